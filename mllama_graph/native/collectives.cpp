// Collectives among the tensor-parallel ranks of one host, through POSIX shared memory.
//
// Every rank is a process. One segment holds, for each rank, a state (what it has published) and two slots (the data):
//
//     Header | State of rank 0, 1, ... | slots of rank 0: even, odd | slots of rank 1: even, odd | ...
//
// A message is split into pieces of at most one slot. Pieces are numbered 1, 2, 3, ... over the lifetime of a group,
// and every rank processes the same ones. A rank copies piece s into its slot of parity s % 2, publishes the number s,
// waits until every rank has published s, and reads the slots of all.
//
// No slot is overwritten while a peer still reads it: a rank writes the slot of piece s again for piece s + 2, which it
// begins after every rank has published s + 1, and a rank publishes s + 1 only after it has read all that it needs of
// piece s. The same holds for the calls in the states, which alternate in the same way. A rank is therefore at most one
// piece ahead of any other.
//
// Sums are computed element by element in fp32, in the order rank 0, 1, 2, ..., and rounded once, whichever rank
// computes them. They are therefore bitwise identical on all ranks, in every run, and however a message is split.
//
// Built on torch's stable ABI: no libtorch_python, no ATen headers, compiled in about 3 s.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMostRanks = 64;
constexpr uint64_t kLayout = 0x6d6c6c616d610001;  // changes with the layout of the segment
constexpr size_t kLine = 128;                     // no two ranks write to the same pair of cache lines
constexpr size_t kPage = 4096;

// Up to this many bytes every rank sums everything (one wait); above it each rank sums its part and the parts are
// copied (two waits, but 1/world of the additions). Measured with 2, 4 and 8 ranks on two busy cores, in fp32: up to
// 256 KB one phase is mostly 10 to 100 us faster, at 512 KB they are equal, at 16 MB two phases take 0.6 of the time.
constexpr size_t kOnePhaseBytes = 256 << 10;

// Stages of a wait: spin kPauses times, then yield for kYieldSeconds, then sleep between checks.
constexpr int kPauses = 200;
constexpr double kYieldSeconds = 0.003;
constexpr int kSleepMicroseconds = 50;
constexpr double kAttachPollSeconds = 0.005;

static_assert(std::atomic<uint64_t>::is_always_lock_free, "atomics between processes must not need a lock");

enum class Kind : uint32_t { all_reduce = 1, all_gather = 2 };

// Description of a collective call, which must be the same on every rank.
struct Call {
  uint64_t bytes;
  Kind kind;
  int32_t dtype;

  bool operator==(const Call& other) const {
    return bytes == other.bytes && kind == other.kind && dtype == other.dtype;
  }
};

struct alignas(kLine) State {
  std::atomic<uint64_t> published;  // the last piece whose data are in this rank's slot
  Call calls[2];                    // the call that a piece belongs to, by parity of the piece
  alignas(kLine) std::atomic<uint64_t> summed;  // the last piece of which this rank has summed its part
};

enum Failure : uint32_t { kNone, kBeingWritten, kWritten };

struct alignas(kLine) Header {
  std::atomic<uint64_t> layout;  // written last: the segment is ready
  uint64_t world, slot_bytes;
  int64_t creator;  // process id
  std::atomic<uint32_t> joined[kMostRanks];
  std::atomic<uint32_t> joined_count;
  // The first failure of the group, for ranks that are still waiting or arrive later.
  std::atomic<uint32_t> failure;
  int32_t failed_rank;
  char reason[1024];
};

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", seconds);
  return text;
}

// The text of the last error of this process: a package's C interface does not pass it on.
std::mutex error_lock;
std::string error_text;

[[noreturn]] void fail(const std::string& text) {
  {
    std::lock_guard<std::mutex> guard(error_lock);
    error_text = text;
  }
  throw std::runtime_error(text);
}

std::string last_error() {
  std::lock_guard<std::mutex> guard(error_lock);
  return error_text;
}

// out = sum over ranks, in rank order. A block of sums stays in L1.
template <class T>
void sum_in_rank_order(const std::vector<const char*>& sources, size_t first, size_t count, T* __restrict out) {
  constexpr size_t kBlock = 1024;
  alignas(64) float sums[kBlock];
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t n = std::min(kBlock, count - start);
    for (size_t r = 0; r < sources.size(); r++) {
      const T* __restrict source = reinterpret_cast<const T*>(sources[r]) + first + start;
      if (r == 0) {
        for (size_t i = 0; i < n; i++) sums[i] = static_cast<float>(source[i]);
      } else {
        for (size_t i = 0; i < n; i++) sums[i] += static_cast<float>(source[i]);
      }
    }
    for (size_t i = 0; i < n; i++) out[start + i] = static_cast<T>(sums[i]);
  }
}

// This process's membership in a group of ranks.
class Group {
 public:
  int world() const { return world_; }

  void attach(const std::string& name, int64_t rank, int64_t world, double timeout, int64_t slot_bytes) {
    if (base_) fail("this process is attached to " + name_ + " already; detach first");
    if (world < 1 || world > kMostRanks)
      fail("world=" + std::to_string(world) + ": ranks on one host are 1 to " + std::to_string(kMostRanks));
    if (rank < 0 || rank >= world)
      fail("rank=" + std::to_string(rank) + " is not one of 0 to " + std::to_string(world - 1));
    if (!(timeout > 0)) fail("timeout=" + seconds_text(timeout) + " must be positive");
    if (slot_bytes < 1) fail("slot_bytes=" + std::to_string(slot_bytes) + " must be positive");
    name_ = name, rank_ = static_cast<int>(rank), world_ = static_cast<int>(world), timeout_ = timeout;
    slot_bytes_ = round_up(static_cast<size_t>(slot_bytes), kLine);
    bytes_ = round_up(sizeof(Header) + sizeof(State) * world_, kPage) + 2 * slot_bytes_ * world_;
    piece_ = calls_ = 0;
    if (rank_ == 0) {
      create();
    } else {
      join();
    }
    header().joined[rank_].store(1);
    // The last rank to join removes the name, so that nothing is left behind, however the ranks end.
    if (header().joined_count.fetch_add(1) + 1 == static_cast<uint32_t>(world_)) shm_unlink(("/" + name_).c_str());
  }

  void detach() {
    if (base_) munmap(base_, bytes_);
    base_ = nullptr;
    world_ = 0;
  }

  template <class T>
  void all_reduce(const T* x, T* out, size_t count) {
    const char* input = reinterpret_cast<const char*>(x);
    const size_t most = slot_bytes_ / sizeof(T);
    size_t done = 0;
    do {  // also without elements, so that a call that differs between ranks is detected
      const size_t n = std::min(most, count - done);
      const char* piece = input + done * sizeof(T);
      if (n * sizeof(T) <= kOnePhaseBytes || world_ == 1) {
        exchange(piece, n * sizeof(T), 0, 0);
        sum_in_rank_order<T>(sources(piece), 0, n, out + done);
      } else {
        sum_in_parts<T>(piece, n, out + done);
      }
      done += n;
    } while (done < count);
  }

  // `out` holds `world` times `bytes` bytes.
  void all_gather(const char* x, char* out, size_t bytes) {
    size_t done = 0;
    do {
      const size_t n = std::min(slot_bytes_, bytes - done);
      exchange(x + done, n, 0, 0);
      const std::vector<const char*> from = sources(x + done);
      for (int r = 0; r < world_; r++) std::memcpy(out + r * bytes + done, from[r], n);
      done += n;
    } while (done < bytes);
  }

  // Starts a call, once before the pieces of its message.
  void begin(Call call) {
    if (!base_) fail("no group of ranks: attach first");
    calls_++;
    call_ = call;
    if (header().failure.load(std::memory_order_relaxed)) give_up_with_the_group();
  }

  std::mutex lock;

 private:
  Header& header() { return *reinterpret_cast<Header*>(base_); }
  State& state(int rank) { return reinterpret_cast<State*>(base_ + sizeof(Header))[rank]; }
  char* slot(int rank) { return base_ + bytes_ - 2 * slot_bytes_ * world_ + (2 * rank + piece_ % 2) * slot_bytes_; }

  // Publishes a piece without the bytes [skip_first, skip_last), and waits for the other ranks' pieces.
  void exchange(const char* piece, size_t bytes, size_t skip_first, size_t skip_last) {
    piece_++;
    if (world_ > 1) {
      std::memcpy(slot(rank_), piece, skip_first);
      std::memcpy(slot(rank_) + skip_last, piece + skip_last, bytes - skip_last);
    }
    state(rank_).calls[piece_ % 2] = call_;
    state(rank_).published.store(piece_, std::memory_order_release);
    wait_for_all(&State::published);
    for (int r = 0; r < world_; r++)
      if (!(state(r).calls[piece_ % 2] == state(0).calls[piece_ % 2])) fail_group(difference(r));
  }

  // Pointers to each rank's piece; for this rank, to its input.
  std::vector<const char*> sources(const char* own) {
    std::vector<const char*> found(world_);
    for (int r = 0; r < world_; r++) found[r] = r == rank_ ? own : slot(r);
    return found;
  }

  // Rank r sums part r and writes the sum to its own slot, where no other rank reads part r before that.
  template <class T>
  void sum_in_parts(const char* piece, size_t count, T* out) {
    const size_t part = round_up((count + world_ - 1) / world_, kLine / sizeof(T));
    const auto first = [&](int r) { return std::min(count, part * r); };
    exchange(piece, count * sizeof(T), first(rank_) * sizeof(T), first(rank_ + 1) * sizeof(T));
    T* sum = reinterpret_cast<T*>(slot(rank_)) + first(rank_);
    sum_in_rank_order<T>(sources(piece), first(rank_), first(rank_ + 1) - first(rank_), sum);
    state(rank_).summed.store(piece_, std::memory_order_release);
    wait_for_all(&State::summed);
    for (int r = 0; r < world_; r++) {
      const T* part_of_r = reinterpret_cast<const T*>(slot(r)) + first(r);
      std::memcpy(out + first(r), part_of_r, (first(r + 1) - first(r)) * sizeof(T));
    }
  }

  // Waits until every rank's counter has reached this piece.
  void wait_for_all(std::atomic<uint64_t> State::*counter) {
    int pauses = 0;
    double start = 0;
    for (int r = 0; r < world_; r++) {
      while ((state(r).*counter).load(std::memory_order_acquire) < piece_) {
        if (pauses < kPauses) {
          pauses++;
          pause();
          continue;
        }
        const double waited = start ? now() - start : (start = now(), 0.0);
        if (header().failure.load(std::memory_order_relaxed)) give_up_with_the_group();
        if (waited > timeout_) fail_group(absence(counter));
        if (waited > kYieldSeconds) {
          usleep(kSleepMicroseconds);
        } else {
          sched_yield();
        }
      }
    }
  }

  // "rank 3 did not arrive at an all-reduce within 60 s"
  std::string absence(std::atomic<uint64_t> State::*counter) {
    std::string ranks;
    int absent = 0;
    for (int r = 0; r < world_; r++) {
      if ((state(r).*counter).load(std::memory_order_acquire) >= piece_) continue;
      ranks += (absent++ ? ", " : "") + std::to_string(r);
    }
    return std::string(absent > 1 ? "ranks " : "rank ") + ranks + " did not " +
           (counter == &State::published ? "arrive at" : "finish") + " an " + name_of(call_.kind) + " within " +
           seconds_text(timeout_) + " (call " + std::to_string(calls_) + ")";
  }

  std::string difference(int rank) {
    return "ranks disagree at call " + std::to_string(calls_) + ": rank 0 makes " +
           described(state(0).calls[piece_ % 2]) + ", rank " + std::to_string(rank) + " " +
           described(state(rank).calls[piece_ % 2]);
  }

  static std::string name_of(Kind kind) { return kind == Kind::all_reduce ? "all-reduce" : "all-gather"; }

  static std::string described(const Call& call) {
    return "an " + name_of(call.kind) + " of " + std::to_string(call.bytes) + " bytes (dtype number " +
           std::to_string(call.dtype) + ")";
  }

  // After one failure the ranks of a group can't synchronise again: record the reason for the others.
  [[noreturn]] void fail_group(const std::string& text) {
    uint32_t none = kNone;
    if (header().failure.compare_exchange_strong(none, kBeingWritten)) {
      header().failed_rank = rank_;
      std::snprintf(header().reason, sizeof header().reason, "%s", text.c_str());
      header().failure.store(kWritten, std::memory_order_release);
    }
    fail(text);
  }

  [[noreturn]] void give_up_with_the_group() {
    const double start = now();
    while (header().failure.load(std::memory_order_acquire) != kWritten && now() - start < 1) sched_yield();
    const std::string reason(header().reason, strnlen(header().reason, sizeof header().reason));
    const int rank = header().failed_rank;
    fail(rank == rank_ ? reason : "rank " + std::to_string(rank) + " gave up: " + reason);
  }

  void create() {
    const std::string path = "/" + name_;
    shm_unlink(path.c_str());
    const int file = shm_open(path.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
    if (file < 0) fail("can't create shared memory " + name_ + ": " + std::strerror(errno));
    // Reserved now: with a full /dev/shm, the first write would otherwise kill the process.
    const int error = posix_fallocate(file, 0, static_cast<off_t>(bytes_));
    if (error) {
      close(file);
      shm_unlink(path.c_str());
      fail("can't reserve " + std::to_string(bytes_) + " bytes in /dev/shm: " + std::strerror(error) +
           ". Enlarge it (in a container: --shm-size)");
    }
    map(file);
    new (base_) Header{};
    for (int r = 0; r < world_; r++) new (&state(r)) State{};
    header().world = world_;
    header().slot_bytes = slot_bytes_;
    header().creator = getpid();
    header().layout.store(kLayout, std::memory_order_release);
  }

  // Opens the segment that rank 0 creates, possibly later than this rank starts.
  void join() {
    const double start = now();
    std::string obstacle = "rank 0 did not create it";
    while (!joined_now(obstacle)) {
      if (now() - start > timeout_)
        fail("rank " + std::to_string(rank_) + " could not join shared memory " + name_ + " within " +
             seconds_text(timeout_) + ": " + obstacle);
      usleep(static_cast<useconds_t>(1e6 * kAttachPollSeconds));
    }
  }

  // Maps the segment if it is complete and its creator is alive; rank 0 will replace an incomplete or abandoned one.
  bool joined_now(std::string& obstacle) {
    const int file = shm_open(("/" + name_).c_str(), O_RDWR, 0);
    if (file < 0) {
      if (errno != ENOENT) obstacle = std::strerror(errno);
      return false;
    }
    // Only the header at first: it tells the size of the rest.
    struct stat status;
    Header* found = nullptr;
    if (fstat(file, &status) == 0 && static_cast<size_t>(status.st_size) >= sizeof(Header)) {
      void* mapped = mmap(nullptr, sizeof(Header), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
      if (mapped != MAP_FAILED) found = static_cast<Header*>(mapped);
    }
    bool usable = false;
    std::string refusal;
    if (found && found->layout.load(std::memory_order_acquire) == kLayout) {
      if (kill(static_cast<pid_t>(found->creator), 0) != 0 && errno == ESRCH) {
        obstacle = "the process that created it, " + std::to_string(found->creator) + ", is gone";
      } else if (found->joined[rank_].load()) {
        obstacle = "a rank " + std::to_string(rank_) + " is in it already";
      } else if (found->world != static_cast<uint64_t>(world_)) {
        refusal = "was created for " + std::to_string(found->world) + " ranks, not " + std::to_string(world_);
      } else if (found->slot_bytes != slot_bytes_) {
        refusal = "has slots of " + std::to_string(found->slot_bytes) + " bytes, not " + std::to_string(slot_bytes_);
      } else {
        usable = true;
      }
    }
    if (found) munmap(found, sizeof(Header));
    if (usable) {
      map(file);
    } else {
      close(file);
    }
    if (!refusal.empty()) fail("shared memory " + name_ + " " + refusal);
    return usable;
  }

  void map(int file) {
    void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    const int error = errno;
    close(file);
    if (mapped == MAP_FAILED) fail("can't map shared memory " + name_ + ": " + std::strerror(error));
    base_ = static_cast<char*>(mapped);
  }

  char* base_ = nullptr;
  size_t bytes_ = 0, slot_bytes_ = 0;
  std::string name_;
  int rank_ = 0, world_ = 0;
  double timeout_ = 0;
  uint64_t piece_ = 0;  // pieces begun
  uint64_t calls_ = 0;
  Call call_{};
};

Group group;

void attach(std::string name, int64_t rank, int64_t world, double timeout, int64_t slot_bytes) {
  std::lock_guard<std::mutex> guard(group.lock);
  group.attach(name, rank, world, timeout, slot_bytes);
}

void detach() {
  std::lock_guard<std::mutex> guard(group.lock);
  group.detach();
}

Tensor all_reduce(Tensor given) {
  std::lock_guard<std::mutex> guard(group.lock);
  const Tensor x = torch::stable::contiguous(given);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const ScalarType dtype = x.scalar_type();
  const size_t count = static_cast<size_t>(x.numel());
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    fail("all_reduce sums float32, bfloat16 and float16, not dtype number " + std::to_string(static_cast<int>(dtype)));
  group.begin({count * x.element_size(), Kind::all_reduce, static_cast<int32_t>(dtype)});
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  if (dtype == ScalarType::Float) {
    group.all_reduce(static_cast<const float*>(from), static_cast<float*>(to), count);
  } else if (dtype == ScalarType::BFloat16) {
    group.all_reduce(static_cast<const c10::BFloat16*>(from), static_cast<c10::BFloat16*>(to), count);
  } else {
    group.all_reduce(static_cast<const c10::Half*>(from), static_cast<c10::Half*>(to), count);
  }
  return out;
}

Tensor all_gather(Tensor given) {
  std::lock_guard<std::mutex> guard(group.lock);
  const Tensor x = torch::stable::contiguous(given);
  const size_t bytes = static_cast<size_t>(x.numel()) * x.element_size();
  group.begin({bytes, Kind::all_gather, static_cast<int32_t>(x.scalar_type())});
  std::vector<int64_t> sizes{group.world()};
  for (int64_t d = 0; d < x.dim(); d++) sizes.push_back(x.size(d));
  Tensor out = torch::stable::new_empty(x, sizes);
  group.all_gather(static_cast<const char*>(x.const_data_ptr()), static_cast<char*>(out.mutable_data_ptr()), bytes);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_graph, library) {
  const std::vector<at::Tag> traceable{at::Tag::pt2_compliant_tag};
  library.def("all_reduce(Tensor x) -> Tensor", traceable);
  library.def("all_gather(Tensor x) -> Tensor", traceable);
  library.def("attach(str name, int rank, int world, float timeout, int slot_bytes) -> ()");
  library.def("detach() -> ()");
  library.def("last_error() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mllama_graph, CPU, library) {
  library.impl("all_reduce", TORCH_BOX(&all_reduce));
  library.impl("all_gather", TORCH_BOX(&all_gather));
}

STABLE_TORCH_LIBRARY_IMPL(mllama_graph, CompositeExplicitAutograd, library) {
  library.impl("attach", TORCH_BOX(&attach));
  library.impl("detach", TORCH_BOX(&detach));
  library.impl("last_error", TORCH_BOX(&last_error));
}
