// The threads of the kernels, and how they share the parts of a loop.
//
// Each thread begins with a range of parts of its own, so that it reads memory in sequence; when that is done, it takes
// parts from the end of another's range. A thread that is late, because it slept or another process has its core,
// delays a loop at most by the part that it is computing.
//
// A thread that waits spins for kSpin, which is longer than the gap between two kernels of a step, and then sleeps: its
// core is free for others, among them threads of the same loop that another process displaced.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>

namespace mllama_graph {

constexpr std::chrono::microseconds kSpin{50};
constexpr int kMostThreads = 256;

inline void pause_thread() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Waits until `value` is not `old`.
template <class T>
void wait_for_change(const std::atomic<T>& value, T old) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; i++, pause_thread())
      if (value.load(std::memory_order_acquire) != old) return;
  } while (std::chrono::steady_clock::now() < end);
  value.wait(old, std::memory_order_acquire);
}

class Threads {
 public:
  using Body = void (*)(const void* context, int64_t part);

  // Calls body(context, part) for each of `parts` parts, on this thread and up to `members` - 1 others. Rethrows what a
  // part throws.
  void run(int64_t parts, int members, Body body, const void* context) {
    std::unique_lock alone(running_, std::defer_lock);
    // A loop within a part, or beside another thread's loop, stays on this thread.
    if (inside_ || !alone.try_lock()) {
      for (int64_t part = 0; part < parts; part++) body(context, part);
      return;
    }
    while (started_ < members - 1) std::thread([this, me = ++started_] { serve(me); }).detach();
    body_ = body, context_ = context;
    members_.store(members, std::memory_order_relaxed);
    left_.store(static_cast<int32_t>(parts), std::memory_order_relaxed);
    for (int k = 0; k < members; k++)
      ranges_[k].store({static_cast<int32_t>(k * parts / members), static_cast<int32_t>((k + 1) * parts / members)},
                       std::memory_order_release);
    loops_.fetch_add(1, std::memory_order_release);
    loops_.notify_all();
    inside_ = true;
    work(0, members);
    inside_ = false;
    for (int32_t left; (left = left_.load(std::memory_order_acquire));) wait_for_change(left_, left);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  // The parts of a thread that none has taken yet.
  struct Range {
    int32_t begin, end;
  };
  struct alignas(128) SharedRange : std::atomic<Range> {};
  static_assert(std::atomic<Range>::is_always_lock_free);

  void serve(int me) {
    inside_ = true;
    for (uint32_t seen = 0;;) {
      wait_for_change(loops_, seen);
      seen = loops_.load(std::memory_order_acquire);
      const int members = members_.load(std::memory_order_relaxed);
      if (me < members) work(me, members);
    }
  }

  // Computes parts until none is left. A thread that comes late may take one of the next loop: it reads what to do
  // after it has taken a part, and until that part is done the loop does not end.
  void work(int me, int members) {
    int32_t done = 0;
    for (int k = 0; k < members; k++) {
      auto& range = ranges_[(me + k) % members];
      for (Range had = range.load(std::memory_order_acquire); had.begin < had.end;) {
        const Range rest = k ? Range{had.begin, had.end - 1} : Range{had.begin + 1, had.end};
        if (!range.compare_exchange_weak(had, rest, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        try {
          body_(context_, k ? rest.end : had.begin);
        } catch (...) {
          const std::lock_guard one(failing_);
          failure_ = std::current_exception();
        }
        done++;
        had = range.load(std::memory_order_acquire);
      }
    }
    if (done && left_.fetch_sub(done, std::memory_order_acq_rel) == done) left_.notify_all();
  }

  static inline thread_local bool inside_ = false;
  std::mutex running_, failing_;
  int started_ = 0;
  Body body_ = nullptr;
  const void* context_ = nullptr;
  std::exception_ptr failure_;
  std::atomic<int> members_ = 0;
  alignas(128) std::atomic<uint32_t> loops_ = 0;
  alignas(128) std::atomic<int32_t> left_ = 0;
  SharedRange ranges_[kMostThreads];
};

// The threads of this process, which all libraries share. Never destroyed: threads may wait until the process ends.
inline Threads& threads() {
  static Threads* const all = new Threads;
  return *all;
}

}  // namespace mllama_graph

namespace {

// Parts per thread: few enough that their number costs nothing, and many, since threads of unequal speed wait for half
// of a part on average at the end of a loop.
constexpr int64_t kParts = 64;

// Calls f(first, last) for ranges of 0 .. count - 1, on as many threads as torch has. Ranges are as equal as possible
// and have about `grain` elements or more. Each thread begins with the same number of ranges.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), mllama_graph::kMostThreads);
  const int64_t wanted = std::min((count + grain - 1) / grain, kParts * most);
  const int64_t parts = wanted <= most ? wanted : std::min((wanted + most - 1) / most * most, count);
  const int members = static_cast<int>(std::min(parts, most));
  if (members == 1) return f(0, count);
  const auto part_of = [&](int64_t part) { f(part * count / parts, (part + 1) * count / parts); };
  using Part = std::remove_reference_t<decltype(part_of)>;
  mllama_graph::threads().run(
      parts, members, [](const void* context, int64_t part) { (*static_cast<Part*>(context))(part); }, &part_of);
}

}  // namespace
