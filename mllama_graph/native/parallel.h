// The threads of the kernels, and how they share the parts of a loop.
//
// A loop is cut into parts of equal size. Each thread begins with a range of its own, so that it reads memory in
// sequence; when that is done, it takes parts from the end of another thread's range. So a thread that is late, because
// it slept or because another process has its core, delays a loop by the one part that it is computing.
//
// A thread that waits spins for kSpin, longer than the gap between the kernels of a step, and then sleeps: it leaves its
// core to others, also to a thread of its own loop that another process has displaced.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>

namespace mllama_graph {

constexpr std::chrono::microseconds kSpin{100};
constexpr int kMostThreads = 256;
constexpr int64_t kFetched = 256 << 10;

inline void pause_thread() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Waits until `value` is no longer `old`.
template <class T>
void wait_for_change(const std::atomic<T>& value, T old) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; i++, pause_thread())
      if (value.load(std::memory_order_acquire) != old) return;
  } while (std::chrono::steady_clock::now() < end);
  value.wait(old, std::memory_order_acquire);
}

// Memory that a loop reads once.
struct Stream {
  const char* from = nullptr;
  int64_t bytes = 0;
};

class Threads {
 public:
  // Calls body(context, part) for each of `parts` parts, on up to `members` threads including this one. `stream`: what the
  // parts read in turn.
  using Body = void (*)(const void* context, int64_t part);

  void run(int64_t parts, int members, Body body, const void* context, Stream stream) {
    std::unique_lock alone(running_, std::defer_lock);
    // A loop within a part, and one beside another loop, stay on their thread.
    if (members == 1 || inside_ || !alone.try_lock()) {
      for (int64_t part = 0; part < parts; part++) body(context, part);
      return;
    }
    while (started_ < members - 1) std::thread([this, me = ++started_] { serve(me); }).detach();
    body_ = body, context_ = context;
    if (stream.from) {
      following_[last_] = stream;
      last_ = stream.from;
      const auto next = following_.find(last_);
      next_from_.store(next == following_.end() ? nullptr : next->second.from, std::memory_order_relaxed);
      next_bytes_.store(next == following_.end() ? 0 : next->second.bytes, std::memory_order_relaxed);
    }
    left_.store(static_cast<int32_t>(parts), std::memory_order_relaxed);
    members_.store(members, std::memory_order_relaxed);
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
  // The parts of a thread that nobody has taken.
  struct Range {
    int32_t begin, end;
  };
  struct alignas(128) Shared : std::atomic<Range> {};

  void serve(int me) {
    inside_ = true;
    const char* fetched = nullptr;
    for (uint32_t seen = 0;;) {
      wait_for_change(loops_, seen);
      seen = loops_.load(std::memory_order_acquire);
      const int members = members_.load(std::memory_order_relaxed);
      if (me < members) work(me, members);
      const char* from = next_from_.load(std::memory_order_relaxed);
      if (from == fetched || !from) continue;
      fetched = from;
      const int64_t bytes = next_bytes_.load(std::memory_order_relaxed);
      from += bytes * me / members;
      const int64_t some = std::min<int64_t>(kFetched, bytes / members);
      for (int64_t at = 0; at < some; at += 1024) {
        if (loops_.load(std::memory_order_relaxed) != seen) break;
        for (int64_t line = 0; line < 1024; line += 64) __builtin_prefetch(from + at + line, 0, 2);
      }
    }
  }

  // Computes parts until none is left to take. A thread that comes late may find the next loop's: what a part belongs to
  // is read after it is taken, and that loop does not end before the part is done.
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

  static_assert(std::atomic<Range>::is_always_lock_free);
  static inline thread_local bool inside_ = false;
  std::mutex running_, failing_;
  int started_ = 0;
  Body body_ = nullptr;
  const void* context_ = nullptr;
  std::unordered_map<const char*, Stream> following_;
  const char* last_ = nullptr;
  std::atomic<const char*> next_from_ = nullptr;
  std::atomic<int64_t> next_bytes_ = 0;
  std::exception_ptr failure_;
  std::atomic<int> members_ = 0;
  alignas(128) std::atomic<uint32_t> loops_ = 0;
  alignas(128) std::atomic<int32_t> left_ = 0;
  Shared ranges_[kMostThreads];
};

// The threads of this process: one set for all libraries, which is never destroyed, since they may still be waiting when
// the process ends.
inline Threads& threads() {
  static Threads* const all = new Threads;
  return *all;
}

}  // namespace mllama_graph

namespace {

// Calls f(first, last) for ranges of 0 .. count - 1, of `grain` elements or fewer, on torch's number of threads.
template <class F>
void parallel_for(int64_t count, int64_t least, const F& f, mllama_graph::Stream stream = {}) {
  if (count <= 0) return;
  const int64_t grain = std::max(least, count / (16 * torch::stable::get_num_threads()));
  const int64_t parts = (count + grain - 1) / grain;
  const auto wanted = parts == 1 ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), mllama_graph::kMostThreads);
  const int members = static_cast<int>(std::min<int64_t>(parts, wanted));
  if (members == 1) return f(0, count);
  const auto part_of = [&](int64_t part) { f(part * grain, std::min(count, (part + 1) * grain)); };
  mllama_graph::threads().run(
      parts, members,
      [](const void* context, int64_t part) { (*static_cast<const decltype(part_of)*>(context))(part); }, &part_of, stream);
}

}  // namespace
