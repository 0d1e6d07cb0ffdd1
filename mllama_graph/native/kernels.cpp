// Kernels of a CPU's steps: products of rows with a weight, and attention over pages, prompts and tiles.
//
// Decode steps are bound by memory: a weight or a key is read once from memory, whatever number of rows use it, and widened on
// the way where it is stored in 16 bits. Vectors are the compiler's own (GCC and Clang), as wide as the machine's.
//
// Sums are formed in one order, whatever the number of rows, of threads and of the padding around them: a row's product
// has the same bits alone, in a batch and in a prompt's chunk.
//
// Built on torch's stable ABI; threads are those of torch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Registers for vectors.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

// ---- Loads that widen ----

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float widen(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  return static_cast<float>(half);
}

inline Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vector load(const BFloat16* from) {
  // Named where they exist: compilers widen by halves.
#if defined(__AVX512F__)
  const auto wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return reinterpret_cast<Vector>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const auto wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return reinterpret_cast<Vector>(_mm256_slli_epi32(wide, 16));
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Integers) << 16);
#endif
}

inline Vector load(const Float16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vector x;
  for (int lane = 0; lane < kLanes; lane++) x[lane] = widen(from[lane]);
  return x;
#endif
}

// x in every lane.
inline Vector splat(float x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_set1_ps(x));
#elif defined(__AVX__)
  return reinterpret_cast<Vector>(_mm256_set1_ps(x));
#else
  return Vector{x, x, x, x};
#endif
}

// Keeps x in a register: compilers would load it again for each of its uses.
inline void keep(Vector& x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// a * b + c, rounded once where the machine can. Named, since compilers fuse or not as they see fit.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_fmadd_ps(a, b, c));
#elif defined(__FMA__)
  return reinterpret_cast<Vector>(_mm256_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
  return reinterpret_cast<Vector>(vfmaq_f32(c, a, b));
#else
  return a * b + c;
#endif
}

inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }

// The sum of a vector's lanes.
inline float total(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX__)
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// Sums of neighbouring lanes: a's, then b's.
inline Vector pair_sums(Vector a, Vector b) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return reinterpret_cast<Vector>(_mm512_permutex2var_ps(a, even, b)) + reinterpret_cast<Vector>(_mm512_permutex2var_ps(a, odd, b));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(a, b)), 0xd8));
#elif defined(__aarch64__)
  return reinterpret_cast<Vector>(vpaddq_f32(a, b));
#else
  Vector sums;
  for (int lane = 0; lane < kLanes; lane++) {
    const Vector& x = lane < kLanes / 2 ? a : b;
    sums[lane] = x[2 * lane % kLanes] + x[2 * lane % kLanes + 1];
  }
  return sums;
#endif
}

// Lane i is the sum of the lanes of x[i].
template <int N = kLanes>
inline Vector totals(const Vector* x) {
  if constexpr (N == 1) return *x;
  else return pair_sums(totals<N / 2>(x), totals<N / 2>(x + N / 2));
}

// The largest of a vector's lanes.
inline float largest_of(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#elif defined(__AVX__)
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_shuffle_ps(most, most, 1)));
#else
  return std::max(std::max(x[0], x[2]), std::max(x[1], x[3]));
#endif
}

// ---- Products with a weight ----
//
// Few rows wait for the weight (O, I), which is read once, from its begin to its end, as memory is read fastest. It lies in panels
// of kPanel vectors of outputs: what they have of the first input, then of the next, then the next panel. The last one holds what
// is left.

constexpr int kPanel = 3;
constexpr int64_t kColumns = kPanel * kLanes;

// bf16 lies by pairs of inputs, an element of each in 32 bits, so that one load and one instruction for each part widen both;
// an odd last input lies alone.
template <class W>
constexpr int kPaired = std::is_same_v<W, BFloat16> ? 2 : 1;

// A vector of one of kPaired inputs that lie together.
template <int part, class W>
inline Vector load_part(const W* inputs) {
  if constexpr (kPaired<W> == 1) return load(inputs);
  Integers pairs;
  std::memcpy(&pairs, inputs, sizeof pairs);
  return reinterpret_cast<Vector>(part == 0 ? pairs << 16 : pairs & static_cast<int32_t>(0xffff0000));
}

// Adds to R by V sums the products of R elements of a with V vectors.
template <int R, int V>
[[gnu::always_inline]] inline void add_products(Vector (&sum)[R][V], const float* a, int64_t a_stride, Vector (&column)[V]) {
#pragma GCC unroll 8
  for (int v = 0; R > 1 && v < V; v++) keep(column[v]);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const Vector one = splat(a[r * a_stride]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[r][v] = multiply_add(one, column[v], sum[r][v]);
  }
}

// The same with one of kPaired inputs that lie together.
template <int part, int R, int V, class W>
[[gnu::always_inline]] inline void add_input(Vector (&sum)[R][V], const float* a, int64_t a_stride, const W* b) {
  // Where no registers are left to keep pairs in they are loaded again: the compiler is not to know that they are the same.
  if constexpr (part && R > 1 && R * V + 2 * V + 2 > kRegisters) asm("" : "+r"(b));
  Vector column[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) column[v] = load_part<part>(b + v * kLanes * kPaired<W>);
  add_products(sum, a + part, a_stride, column);
}

// Up to so many rows, a panel is read once for all of them: their sums fill the registers. The mask of pairs takes one, too.
template <class W>
constexpr int kOnce = kRegisters == 32 ? 8 : kPaired<W> == 2 ? 3 : 4;

// Bytes that memory gives at a time.
constexpr int64_t kLine = 64;
// As measured: where what is wanted next waits (__builtin_prefetch's locality), the first-level cache or the second-level one; and how many
// bytes on it is where a panel is read once.
constexpr int kWaits = kRegisters == 32 ? 3 : 2;
constexpr int64_t kAhead = 4096;

// c += a b for R rows of a and the first V vectors of a panel of `width` columns, which has `depth` rows. What is wanted next is called
// for on the way, `pace` elements at a time.
template <int R, int V, class W>
[[gnu::noinline]] void stream_tile(const float* a, int64_t a_stride, const W* b, int64_t width, int64_t depth, float* c,
                                   int64_t c_stride, const W* next, int64_t pace) {
  Vector sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = load(c + r * c_stride + v * kLanes);
  // Not unrolled: compilers would run out of registers.
  for (; depth >= kPaired<W>; depth -= kPaired<W>, a += kPaired<W>, b += kPaired<W> * width, next += pace) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < kColumns * kPaired<W> * static_cast<int64_t>(sizeof(W)); byte += kLine)
      __builtin_prefetch(next + byte / sizeof(W), 0, kWaits);
    add_input<0, R, V>(sum, a, a_stride, b);
    if constexpr (kPaired<W> == 2) add_input<1, R, V>(sum, a, a_stride, b);
  }
  if (depth) {
    Vector column[V];
    for (int v = 0; v < V; v++) column[v] = load(b + v * kLanes);
    add_products(sum, a, a_stride, column);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

// The same for `rows` rows, at most R, and a panel.
template <int R, int V, class W>
void stream_rows(const float* a, int64_t a_stride, const W* b, int64_t width, int64_t depth, float* c, int64_t c_stride,
                 int64_t rows, const W* next, int64_t pace) {
  if (rows == R) return stream_tile<R, V>(a, a_stride, b, width, depth, c, c_stride, next, pace);
  if constexpr (R > 1) stream_rows<R - 1, V>(a, a_stride, b, width, depth, c, c_stride, rows, next, pace);
}

// The same for any number of rows, in tiles that are as even as they can be. What is next in memory is called for meanwhile: what follows
// b or, where b is read once, what is kAhead bytes on.
template <int V, class W>
void stream(const float* a, int64_t a_stride, const W* b, int64_t width, int64_t depth, float* c, int64_t c_stride, int64_t rows) {
  const int64_t tiles = (rows + kOnce<W> - 1) / kOnce<W>, pace = kPaired<W> * width / tiles;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t row = tile * rows / tiles, some = (tile + 1) * rows / tiles - row;
    const W* next = b + depth * width + tile * (depth / kPaired<W>) * pace;
    stream_rows<kOnce<W>, V>(a + row * a_stride, a_stride, b, width, depth, c + row * c_stride, c_stride, some,
                             tiles == 1 ? b + kAhead / sizeof(W) : next, pace);
  }
}

// Inputs of a panel that are worked through at a time by more rows than it is read once for: they stay in the first-level cache.
// Rows that are worked through at a time: theirs stay in the second-level one.
constexpr int64_t kDeep = 256, kTall = 48;
// Bytes of a weight that are worth a thread.
constexpr int64_t kGrainBytes = 1 << 16;

// Where a panel of `width` outputs has that of input i.
template <class W>
inline int64_t place(int64_t i, int64_t output, int64_t inputs, int64_t width) {
  const bool paired = kPaired<W> == 2 && i < inputs / 2 * 2;
  return paired ? (i / 2 * width + output) * 2 + i % 2 : i * width + output;
}

// The rows of a weight (O, I) become panels, in place; the last one holds what is left.
template <class W>
void lay_out(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  auto* w = static_cast<W*>(weight.mutable_data_ptr());
  torch::stable::parallel_for(0, (outputs + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
    std::vector<W> rows(kColumns * inputs);
    for (int64_t panel = first; panel < last; panel++) {
      W* to = w + panel * kColumns * inputs;
      const int64_t some = std::min(kColumns, outputs - panel * kColumns);
      std::memcpy(rows.data(), to, some * inputs * sizeof(W));
      for (int64_t o = 0; o < some; o++)
        for (int64_t i = 0; i < inputs; i++) to[place<W>(i, o, inputs, some)] = rows[o * inputs + i];
    }
  });
}

void lay_out_(Tensor weight) {
  if (weight.dim() != 2 || !weight.is_contiguous()) fail("lay_out_ takes a contiguous weight (O, I)");
  switch (weight.scalar_type()) {
    case ScalarType::Float: return lay_out<float>(weight);
    case ScalarType::BFloat16: return lay_out<BFloat16>(weight);
    case ScalarType::Half: return lay_out<Float16>(weight);
    default: fail("lay_out_ takes weights of float32, bfloat16 and float16");
  }
}

// y += x w' for V vectors of a panel of `width` outputs.
template <int V, class W>
void add_vectors(const float* x, const W* w, int64_t inputs, int64_t width, float* y, int64_t stride, int64_t rows) {
  const int64_t deep = rows <= kOnce<W> ? inputs : kDeep;
  for (int64_t i = 0; i < inputs; i += deep)
    stream<V>(x + i, inputs, w + i * width, width, std::min(deep, inputs - i), y, stride, rows);
}

// y += x w' for a panel of `width` outputs, of which the last ones may fill no vector.
template <class W>
void add_panel(const float* x, const W* w, int64_t inputs, int64_t width, float* y, int64_t stride, int64_t rows) {
  static_assert(kPanel == 3);
  switch (width / kLanes) {
    case 3: add_vectors<3>(x, w, inputs, width, y, stride, rows); break;
    case 2: add_vectors<2>(x, w, inputs, width, y, stride, rows); break;
    case 1: add_vectors<1>(x, w, inputs, width, y, stride, rows); break;
  }
  for (int64_t t = 0; t < rows; t++)
    for (int64_t o = width / kLanes * kLanes; o < width; o++)
      for (int64_t i = 0; i < inputs; i++)
        y[t * stride + o] = std::fma(x[t * inputs + i], widen(w[place<W>(i, o, inputs, width)]), y[t * stride + o]);
}

// The first `rows` rows of y.
template <class W>
void linear_of(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& y, int64_t rows) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const auto* w = static_cast<const W*>(weight.const_data_ptr());
  const auto* b = bias ? static_cast<const W*>(bias->const_data_ptr()) : nullptr;
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t panels = (outputs + kColumns - 1) / kColumns, blocks = (rows + kTall - 1) / kTall;
  // Many rows take longer than what they read.
  const int64_t bytes = kColumns * inputs * sizeof(W) * (1 + rows / 16), grain = kGrainBytes / std::max<int64_t>(1, bytes) + 1;
  torch::stable::parallel_for(0, blocks * panels, grain, [&](int64_t first, int64_t last) {
    for (; first < last; first++) {
      const int64_t row = first / panels * rows / blocks, tall = (first / panels + 1) * rows / blocks - row;
      const int64_t at = first % panels * kColumns, columns = std::min(kColumns, outputs - at);
      float* y = to + row * outputs + at;
      for (int64_t t = 0; t < tall; t++) std::fill_n(y + t * outputs, columns, 0.0f);
      add_panel(from + row * inputs, w + at * inputs, inputs, columns, y, outputs, tall);
      for (int64_t t = 0; b && t < tall; t++)
        for (int64_t o = 0; o < columns; o++) y[t * outputs + o] += widen(b[at + o]);
    }
  });
}

// How many of `rows` rows are no padding.
int64_t real_of(int64_t rows, const std::optional<Tensor>& real) {
  return real ? std::clamp<int64_t>(*static_cast<const int32_t*>(real->const_data_ptr()), 0, rows) : rows;
}

// y = x w' + bias: x (..., I) fp32; w (O, I) in panels and bias (O) fp32, bf16 or fp16. Rows from `real` on get zeros.
Tensor linear(Tensor given, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> real) {
  const Tensor x = torch::stable::contiguous(given);
  if (x.scalar_type() != ScalarType::Float || weight.dim() != 2 || !weight.is_contiguous() || x.dim() == 0 ||
      x.size(x.dim() - 1) != weight.size(1) || (bias && bias->scalar_type() != weight.scalar_type()))
    fail("linear takes x (..., I) in float32, a contiguous weight (O, I) and a bias (O) of the weight's dtype");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, sizes);
  if (!y.numel()) return y;
  const Tensor* b = bias ? &*bias : nullptr;
  const int64_t outputs = weight.size(0), rows = y.numel() / outputs, some = real_of(rows, real);
  switch (weight.scalar_type()) {
    case ScalarType::Float: linear_of<float>(x, weight, b, y, some); break;
    case ScalarType::BFloat16: linear_of<BFloat16>(x, weight, b, y, some); break;
    case ScalarType::Half: linear_of<Float16>(x, weight, b, y, some); break;
    default: fail("linear takes weights of float32, bfloat16 and float16");
  }
  auto* padding = static_cast<float*>(y.mutable_data_ptr()) + some * outputs;
  torch::stable::parallel_for(0, (rows - some) * outputs, kGrainBytes, [&](int64_t first, int64_t last) {
    std::fill(padding + first, padding + last, 0.0f);
  });
  return y;
}

// ---- Attention over pages ----

// Tokens that a thread takes at a time. Those whose keys are worked through before their values, at most, and the bytes of their
// keys: both lie in the second-level cache. Each is one stream so, as memory is read fastest.
constexpr int64_t kSplit = 256, kBlockBytes = 1 << 18;
constexpr int kTokens = 64;
// Up to so many rows of a sequence read its pages each for itself.
constexpr int64_t kFewRows = 4;
// Query heads that are scored together at most, and tokens that are with so many: their sums fill the registers.
constexpr int kHeads = 4;
constexpr int kScored[kHeads + 1] = {0, 8, kRegisters / 4, kRegisters / 8, kRegisters / 8};

// e to each lane, to 2 units in the last place; what is below 1e-37 is 0.
inline Vector exponential(Vector x) {
  constexpr float kMagic = 12582912.0f;  // adding it rounds to a whole number
  const Integers tiny = x < -87.0f;
  const Vector whole = x * 1.44269504f + kMagic - kMagic;
  Vector rest = multiply_add(whole, splat(-0.693359375f), x);
  rest = multiply_add(whole, splat(2.12194440e-4f), rest);
  Vector power = splat(1.9875691500e-4f);
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    power = multiply_add(power, rest, splat(factor));
  power = multiply_add(power, rest * rest, rest + 1.0f);
  const Integers bits = reinterpret_cast<Integers>(power) + (__builtin_convertvector(whole, Integers) << 23);
  return reinterpret_cast<Vector>(bits & ~tiny);
}

// 2 to each lane, none of which is positive, to 2 units in the last place; what is below 2^-126 is 0.
inline Vector power_of_two(Vector x) {
  constexpr float kMagic = 12582912.0f;  // adding it rounds to a whole number, which the low bits then hold
  const Integers tiny = x < -126.0f;
  const Vector shifted = x + kMagic, rest = x - (shifted - kMagic);
  Vector power = splat(1.5403530e-4f);
  for (const float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    power = multiply_add(power, rest, splat(factor));
  const Integers bits = reinterpret_cast<Integers>(power) + (reinterpret_cast<Integers>(shifted) << 23);
  return reinterpret_cast<Vector>(bits & ~tiny);
}

struct Heads {
  int64_t queries, keys, width;
  int64_t group() const { return queries / keys; }
};

// What one query row makes of some tokens: for each of its heads the largest score, the sum of the weights and the
// weighted sum of the values.
struct Partial {
  float* largest;
  float* sum;
  float* values;
};

// Calls for a vector at `next`, a line a time.
inline void call_for(const float* next, int64_t column) {
  if (column * sizeof(float) % kLine == 0) __builtin_prefetch(next, 0, 2);
}

// The products of `tokens` keys, O at a time, with G queries over `width` columns, lane by lane: sums[query][token].
template <int O, int G>
inline void score(const float* k, int64_t stride, const float* q, int64_t q_stride, int64_t width, int tokens,
                  const float* next, Vector (*sums)[kTokens]) {
  int token = 0;
  const auto some = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    Vector sum[kCount][G] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      Vector key[kCount];
#pragma GCC unroll 8
      for (int o = 0; o < kCount; o++) {
        key[o] = load(k + (token + o) * stride + i);
        call_for(next + (token + o) * width + i, i);
      }
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const Vector query = load(q + g * q_stride + i);
#pragma GCC unroll 8
        for (int o = 0; o < kCount; o++) sum[o][g] = multiply_add(key[o], query, sum[o][g]);
      }
    }
    for (int o = 0; o < kCount; o++)
      for (int g = 0; g < G; g++) sums[g][token + o] = sum[o][g];
    token += kCount;
  };
  while (token + O <= tokens) some(std::integral_constant<int, O>{});
  while (token < tokens) some(std::integral_constant<int, 1>{});
}

// Adds to V vectors of columns of G rows the weighted values of `tokens` tokens.
template <int G, int V>
inline void add_values(const float (*weights)[kTokens], const float* v, int64_t stride, int tokens, const float* next,
                       float* to, int64_t width) {
  Vector sum[G][V];
  for (int g = 0; g < G; g++)
    for (int c = 0; c < V; c++) sum[g][c] = load(to + g * width + c * kLanes);
  for (int i = 0; i < tokens; i++) {
    Vector weight[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) weight[g] = splat(weights[g][i]);
#pragma GCC unroll 8
    for (int c = 0; c < V; c++) {
      const Vector value = load(v + i * stride + c * kLanes);
      call_for(next + i * width + c * kLanes, c * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) sum[g][c] = multiply_add(weight[g], value, sum[g][c]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int c = 0; c < V; c++) store(to + g * width + c * kLanes, sum[g][c]);
}

// The same for the columns from h on to `whole`, V vectors at a time, then fewer.
template <int G, int V>
inline void add_columns(const float (*weights)[kTokens], const float* v, int64_t stride, int tokens, const float* next, float* to,
                        int64_t width, int64_t whole, int64_t& h) {
  for (; h + V * kLanes <= whole; h += V * kLanes) add_values<G, V>(weights, v + h, stride, tokens, next + h, to + h, width);
  if constexpr (V > 1) add_columns<G, V - 1>(weights, v, stride, tokens, next, to, width, whole, h);
}

// The weights that G queries give to `tokens` tokens, at most kTokens, whose keys lie at k; what `out` holds shrinks to the largest score.
template <int G>
void weigh_tokens(const float* q, const float* k, int tokens, const float* next, const Heads& heads, float scale, Partial out,
                  float (*weights)[kTokens]) {
  const int64_t stride = heads.keys * heads.width, whole = heads.width / kLanes * kLanes;
  Vector sums[G][kTokens];
  // Whole vectors of tokens; what is beyond `tokens` weighs nothing.
  const int held = (tokens + kLanes - 1) / kLanes * kLanes;
  for (int g = 0; g < G; g++) std::fill(sums[g] + tokens, sums[g] + held, Vector{});
  score<kScored[G], G>(k, stride, q, heads.width, whole, tokens, next, sums);
  for (int g = 0; g < G; g++) {
    float* weight = weights[g];
    for (int i = 0; i < held; i += kLanes) store(weight + i, totals(sums[g] + i));
    for (int i = 0; whole < heads.width && i < tokens; i++)
      for (int64_t h = whole; h < heads.width; h++) weight[i] = std::fma(k[i * stride + h], q[g * heads.width + h], weight[i]);
    std::fill(weight + tokens, weight + held, -std::numeric_limits<float>::infinity());
    Vector most = load(weight);
    for (int i = kLanes; i < held; i += kLanes) most = most > load(weight + i) ? most : load(weight + i);
    // Scales are positive.
    const float before = out.largest[g], largest = std::max(before, largest_of(most) * scale);
    if (largest > before) {
      const float shrink = exponential(splat(before - largest))[0];
      out.sum[g] *= shrink;
      for (int64_t h = 0; h < heads.width; h++) out.values[g * heads.width + h] *= shrink;
      out.largest[g] = largest;
    }
    Vector sum{};
    for (int i = 0; i < held; i += kLanes) {
      const Vector e = exponential(load(weight + i) * scale - largest);
      store(weight + i, e);
      sum += e;
    }
    out.sum[g] += total(sum);
  }
}

// Adds to `to`, of G queries, the weighted values of the same tokens, which lie at v.
template <int G>
void add_tokens(const float (*weights)[kTokens], const float* v, int tokens, const float* next, const Heads& heads, float* to) {
  const int64_t stride = heads.keys * heads.width, whole = heads.width / kLanes * kLanes;
  int64_t h = 0;
  add_columns<G, std::min(8, kRegisters / 2 / G)>(weights, v, stride, tokens, next, to, heads.width, whole, h);
  for (; h < heads.width; h++)
    for (int g = 0; g < G; g++)
      for (int i = 0; i < tokens; i++)
        to[g * heads.width + h] = std::fma(weights[g][i], v[i * stride + h], to[g * heads.width + h]);
}

// Calls f(how many, the first, their key head) for all query heads, at most kHeads at a time.
template <class F>
inline void query_heads(const Heads& heads, const F& f) {
  for (int64_t head = 0; head < heads.keys; head++) {
    for (int64_t g = 0; g < heads.group(); g += kHeads) {
      const int64_t first = head * heads.group() + g;
      switch (std::min<int64_t>(kHeads, heads.group() - g)) {
        case 1: f(std::integral_constant<int, 1>{}, first, head); break;
        case 2: f(std::integral_constant<int, 2>{}, first, head); break;
        case 3: f(std::integral_constant<int, 3>{}, first, head); break;
        default: f(std::integral_constant<int, 4>{}, first, head);
      }
    }
  }
}

const float* floats(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float || !x.is_contiguous()) fail("attention takes contiguous float32");
  return static_cast<const float*>(x.const_data_ptr());
}

// Tokens of one query row, within a page; `next` is the page that is read after it.
struct Piece {
  int64_t page, tokens, next;
};

// Some pieces of one row, a thread's work; its partial result has the number of the task.
struct Task {
  int64_t row;
  std::vector<Piece> pieces;
};

// q (T, Q, H) against the tokens that `seen(row, entry)` counts in entry `entry` of the row's table (B, J).
template <class Seen>
Tensor attend(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& table, double scale,
              const Seen& seen) {
  const int64_t rows = q.size(0), B = table.size(0), J = table.size(1), page = k_pages.size(1);
  const Heads heads{q.size(1), k_pages.size(2), q.size(2)};
  const float *queries = floats(q), *keys = floats(k_pages), *values = floats(v_pages);
  if (k_pages.size(3) != heads.width || heads.queries % heads.keys || rows % B)
    fail("attention takes q (T, Q, H), pages (N, P, K, H) and a table (B, J), Q a multiple of K and T of B");
  const auto* tables = static_cast<const int32_t*>(table.const_data_ptr());

  std::vector<Task> tasks;
  std::vector<int64_t> first_task(rows + 1, 0);
  for (int64_t row = 0; row < rows; row++) {
    first_task[row] = static_cast<int64_t>(tasks.size());
    int64_t room = 0;
    for (int64_t j = 0; j < J; j++) {
      const int64_t tokens = seen(row, j);
      if (tokens <= 0) continue;
      if (room < tokens) {
        tasks.push_back({row, {}});
        room = std::max(kSplit, page);
      }
      const int64_t at = row / (rows / B) * J + j;
      tasks.back().pieces.push_back({tables[at], tokens, tables[std::min(at + 1, B * J - 1)]});
      room -= tokens;
    }
  }
  first_task[rows] = static_cast<int64_t>(tasks.size());

  // A task's partial result: the largest scores, the sums, the values.
  const int64_t width = heads.queries * (heads.width + 2), token = heads.keys * heads.width;
  const int64_t fit = kBlockBytes / (token * sizeof(float)), block = std::clamp<int64_t>(fit / kLanes * kLanes, kLanes, kTokens);
  std::vector<float> partials(tasks.size() * width, 0.0f);
  const auto partial = [&](int64_t task) {
    float* at = partials.data() + task * width;
    return Partial{at, at + heads.queries, at + 2 * heads.queries};
  };
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t from, int64_t to) {
    const std::unique_ptr<float[][kTokens]> weights(new float[heads.queries][kTokens]);
    for (int64_t task = from; task < to; task++) {
      const Partial out = partial(task);
      std::fill_n(out.largest, heads.queries, -std::numeric_limits<float>::infinity());
      const float* row = queries + tasks[task].row * heads.queries * heads.width;
      for (const Piece& piece : tasks[task].pieces) {
        for (int64_t i = 0; i < piece.tokens; i += block) {
          const int some = static_cast<int>(std::min<int64_t>(block, piece.tokens - i));
          const int64_t at = (piece.page * page + i) * token;
          const int64_t next = i + some < piece.tokens ? at + some * token : piece.next * page * token;
          // Keys of all heads, then their values. Meanwhile each head calls for as many floats of what comes next, the values or the
          // next tokens' keys, as it reads itself, in the order of memory.
          query_heads(heads, [&](auto queries, int64_t query, int64_t head) {
            const int64_t h = head * heads.width, at_query = query * heads.width;
            weigh_tokens<queries>(row + at_query, keys + at + h, some, values + at + h * some, heads, static_cast<float>(scale),
                                  {out.largest + query, out.sum + query, out.values + at_query}, weights.get() + query);
          });
          query_heads(heads, [&](auto queries, int64_t query, int64_t head) {
            const int64_t h = head * heads.width;
            add_tokens<queries>(weights.get() + query, values + at + h, some, keys + next + h * some, heads, out.values + query * heads.width);
          });
        }
      }
    }
  });

  Tensor y = torch::stable::new_empty(q, q.sizes());
  auto* results = static_cast<float*>(y.mutable_data_ptr());
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t head = 0; head < heads.queries; head++) {
      float* result = results + (row * heads.queries + head) * heads.width;
      std::fill_n(result, heads.width, 0.0f);
      float largest = -std::numeric_limits<float>::infinity(), sum = 0;
      for (int64_t task = first_task[row]; task < first_task[row + 1]; task++)
        largest = std::max(largest, partial(task).largest[head]);
      for (int64_t task = first_task[row]; task < first_task[row + 1]; task++) {
        const Partial part = partial(task);
        const float factor = std::exp(part.largest[head] - largest);
        sum += part.sum[head] * factor;
        for (int64_t h = 0; h < heads.width; h++) result[h] += part.values[head * heads.width + h] * factor;
      }
      // A row that sees nothing keeps zeros.
      for (int64_t h = 0; h < heads.width && sum > 0; h++) result[h] /= sum;
    }
  }
  return y;
}

// ---- Products of matrices ----
//
// The second factor stays in a cache, in panels of up to 3 vectors.

// Rows whose sums with 1, 2 and 3 vectors fill the registers.
constexpr int kRows[] = {0, kRegisters / 2, kRegisters * 3 / 8, kRegisters / 4};

// Calls f(rows, vectors, first vector) for each panel, `rows` being as many as leave the registers enough for the sums.
template <class F>
inline void panels(int64_t columns, const F& f) {
  for (int64_t left = columns / kLanes, v = 0; left > 0;) {
    const auto panel = [&](auto rows, auto vectors) {
      f(rows, vectors, v);
      v += vectors, left -= vectors;
    };
    if (left == 1) panel(std::integral_constant<int, kRows[1]>{}, std::integral_constant<int, 1>{});
    else if (left == 2 || left == 4) panel(std::integral_constant<int, kRows[2]>{}, std::integral_constant<int, 2>{});
    else panel(std::integral_constant<int, kRows[3]>{}, std::integral_constant<int, 3>{});
  }
}

// c = a b, added to what c holds unless `fresh`, for R rows and a panel of V vectors, whose rows follow each other in b.
template <int R, int V, bool fresh>
inline void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride) {
  Vector sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = fresh ? Vector{} : load(c + r * c_stride + v * kLanes);
#pragma GCC unroll 4
  for (int64_t i = 0; i < depth; i++) {
    Vector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) column[v] = load(b + (i * V + v) * kLanes);
    add_products(sum, a + i, a_stride, column);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

// The same for c (rows, columns), a (rows, depth) and b (depth, columns) in panels; columns are a multiple of kLanes.
template <bool fresh>
void multiply_matrix(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride, int64_t rows, int64_t columns,
                     int64_t depth) {
  panels(columns, [&](auto some, auto vectors, int64_t v) {
    constexpr int R = some, V = vectors;
    const float* from = b + v * kLanes * depth;
    float* to = c + v * kLanes;
    int64_t r = 0;
    for (; r + R <= rows; r += R) multiply_tile<R, V, fresh>(a + r * a_stride, a_stride, from, depth, to + r * c_stride, c_stride);
    for (; r < rows; r++) multiply_tile<1, V, fresh>(a + r * a_stride, a_stride, from, depth, to + r * c_stride, c_stride);
  });
}

// ---- Attention of many rows ----

// Query rows (of all heads that share a key head) and tokens that are worked through at a time: whole tiles.
constexpr int64_t kQueries = 72, kKeys = 96;

// The tokens that a set of rows attends to, in order: where the first head's key and value of each lie.
struct Tokens {
  std::vector<const float*> keys, values;
  void add(const float* k, const float* v) {
    keys.push_back(k);
    values.push_back(v);
  }
};

// A query row sees the tokens from `first` to before `last`.
struct Seen {
  int64_t first, last;
};

// Keys and values in blocks of kKeys tokens, in panels as products take them. The last block repeats its last token.
struct Blocks {
  int64_t count, width, wide;
  std::unique_ptr<float[]> keys, values;  // (heads, count, width by kKeys), (heads, count, kKeys by wide)

  Blocks(const Tokens& tokens, const Heads& heads)
      : count((static_cast<int64_t>(tokens.keys.size()) + kKeys - 1) / kKeys),
        width(heads.width),
        wide((width + kLanes - 1) / kLanes * kLanes),
        keys(new float[heads.keys * count * kKeys * width]),
        values(new float[heads.keys * count * kKeys * wide]) {
    const int64_t last = static_cast<int64_t>(tokens.keys.size()) - 1;
    torch::stable::parallel_for(0, heads.keys * count, 1, [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; task++) {
        const int64_t head = task / count, start = task % count * kKeys;
        float *key = keys.get() + task * kKeys * width, *value = values.get() + task * kKeys * wide;
        const auto from_token = [&](const std::vector<const float*>& tokens, int64_t i) {
          return tokens[std::min(start + i, last)] + head * width;
        };
        panels(kKeys, [&](auto, auto vectors, int64_t v) {
          constexpr int64_t kSome = decltype(vectors)::value * kLanes;
          float* to = key + v * kLanes * width;
          for (int64_t i = 0; i < kSome; i++) {
            const float* k = from_token(tokens.keys, v * kLanes + i);
            for (int64_t h = 0; h < width; h++) to[h * kSome + i] = k[h];
          }
        });
        panels(wide, [&](auto, auto vectors, int64_t v) {
          constexpr int64_t kSome = decltype(vectors)::value * kLanes;
          float* to = value + v * kLanes * kKeys;
          const int64_t some = std::min(kSome, width - v * kLanes);
          for (int64_t i = 0; i < kKeys; i++, to += kSome) {
            std::memcpy(to, from_token(tokens.values, i) + v * kLanes, some * sizeof(float));
            std::fill(to + some, to + kSome, 0.0f);
          }
        });
      }
    });
  }
};

// Makes weights of `held` scores of a row, of which the first `begin` and those from `end` on are not seen; the sum of the
// weights. `top` is the largest score so far, and after it.
inline float weigh(float* w, int64_t begin, int64_t end, float& top) {
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  std::fill(w, w + begin, kUnseen);
  std::fill(w + end, w + kKeys, kUnseen);
  Vector most = load(w);
  for (int64_t i = kLanes; i < kKeys; i += kLanes) {
    const Vector next = load(w + i);
    most = most > next ? most : next;
  }
  top = std::max(top, largest_of(most));
  Vector part{};
  for (int64_t i = 0; i < kKeys; i += kLanes) {
    const Vector e = power_of_two(load(w + i) - top);
    store(w + i, e);
    part += e;
  }
  return total(part);
}

// q (T, Q, H) against `tokens`, of which row t sees seen[t]. A row that sees none gets zeros. Scores are powers of two.
void attend_rows(const float* q, float* out, int64_t rows, const Heads& heads, const Tokens& tokens,
                 const std::vector<Seen>& seen, float scale) {
  const int64_t G = heads.group(), H = heads.width, tasks = (rows * G + kQueries - 1) / kQueries;
  const int64_t count = static_cast<int64_t>(tokens.keys.size());
  const Blocks blocks(tokens, heads);
  const int64_t wide = blocks.wide;
  constexpr float kPowers = 1.44269504f;  // log2(e)
  torch::stable::parallel_for(0, heads.keys * tasks, 1, [&](int64_t from, int64_t to) {
    std::vector<float> query(kQueries * H), weight(kQueries * kKeys), sum_of_values(kQueries * wide);
    std::vector<float> top(kQueries), sum(kQueries);
    for (int64_t task = from; task < to; task++) {
      const int64_t head = task / tasks, row = task % tasks * kQueries;
      const int64_t some = std::min(kQueries, rows * G - row);
      int64_t first = count, last = 0;
      for (int64_t r = 0; r < some; r++) {
        const int64_t t = (row + r) / G, g = (row + r) % G;
        const float* from_row = q + (t * heads.queries + head * G + g) * H;
        for (int64_t h = 0; h < H; h++) query[r * H + h] = from_row[h] * scale * kPowers;
        first = std::min(first, seen[t].first);
        last = std::max(last, seen[t].last);
      }
      std::fill(top.begin(), top.end(), -std::numeric_limits<float>::infinity());
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(sum_of_values.begin(), sum_of_values.end(), 0.0f);
      // Blocks begin at multiples of kKeys, whatever rows there are.
      for (int64_t block = first / kKeys; block * kKeys < std::min(last, count); block++) {
        const int64_t start = block * kKeys, held = std::min(kKeys, count - start);
        const int64_t at = (head * blocks.count + block) * kKeys;
        multiply_matrix<true>(query.data(), H, blocks.keys.get() + at * H, weight.data(), kKeys, some, kKeys, H);
        for (int64_t r = 0; r < some; r++) {
          const Seen& sees = seen[(row + r) / G];
          const int64_t begin = std::max<int64_t>(0, sees.first - start), end = std::min(held, sees.last - start);
          if (begin >= end) {
            std::fill_n(weight.data() + r * kKeys, kKeys, 0.0f);
            continue;
          }
          const float before = top[r];
          const float part = weigh(weight.data() + r * kKeys, begin, end, top[r]);
          if (top[r] > before) {
            const float shrink = power_of_two(splat(before - top[r]))[0];
            for (int64_t h = 0; h < wide; h += kLanes)
              store(sum_of_values.data() + r * wide + h, load(sum_of_values.data() + r * wide + h) * shrink);
            sum[r] *= shrink;
          }
          sum[r] += part;
        }
        multiply_matrix<false>(weight.data(), kKeys, blocks.values.get() + at * wide, sum_of_values.data(), wide, some, wide,
                               kKeys);
      }
      for (int64_t r = 0; r < some; r++) {
        float* result = out + ((row + r) / G * heads.queries + head * G + (row + r) % G) * H;
        const float factor = sum[r] > 0 ? 1 / sum[r] : 0.0f;
        for (int64_t h = 0; h < H; h++) result[h] = sum_of_values[r * wide + h] * factor;
      }
    }
  });
}

Tensor attend_rows(const Tensor& q, int64_t key_heads, const Tokens& tokens, const std::vector<Seen>& seen,
                   double scale) {
  Tensor y = torch::stable::new_empty(q, q.sizes());
  attend_rows(floats(q), static_cast<float*>(y.mutable_data_ptr()), q.size(0), {q.size(1), key_heads, q.size(2)}, tokens,
              seen, static_cast<float>(scale));
  return y;
}

// Row t sees `past` tokens of the table's pages and the first t + 1 rows of k and v. Rows from `real` on get zeros.
Tensor attend_prompt(Tensor q, Tensor given_k, Tensor given_v, Tensor k_pages, Tensor v_pages, Tensor table, Tensor past,
                     std::optional<Tensor> real, double scale) {
  const Tensor k = torch::stable::contiguous(given_k), v = torch::stable::contiguous(given_v);
  const auto* entries = static_cast<const int32_t*>(table.const_data_ptr());
  const int64_t page = k_pages.size(1), rows = real_of(q.size(0), real), token = k.size(1) * k.size(2);
  const int64_t earlier = std::min<int64_t>(*static_cast<const int32_t*>(past.const_data_ptr()), table.size(0) * page);
  const float *earlier_keys = floats(k_pages), *earlier_values = floats(v_pages), *keys = floats(k), *values = floats(v);
  Tokens tokens;
  for (int64_t i = 0; i < earlier; i++) {
    const int64_t at = (entries[i / page] * page + i % page) * token;
    tokens.add(earlier_keys + at, earlier_values + at);
  }
  std::vector<Seen> seen;
  for (int64_t t = 0; t < rows; t++) {
    tokens.add(keys + t * token, values + t * token);
    seen.push_back({0, earlier + t + 1});
  }
  seen.resize(q.size(0), {0, 0});
  return attend_rows(torch::stable::contiguous(q), k.size(1), tokens, seen, scale);
}

// All rows see all rows, but padding does not see padding.
Tensor attend_tiles(Tensor q, Tensor given_k, Tensor given_v, Tensor pad, double scale) {
  const Tensor k = torch::stable::contiguous(given_k), v = torch::stable::contiguous(given_v);
  const auto* padding = static_cast<const bool*>(pad.const_data_ptr());
  const int64_t rows = q.size(0), token = k.size(1) * k.size(2);
  const float *keys = floats(k), *values = floats(v);
  Tokens tokens;
  for (const bool wanted : {false, true})
    for (int64_t s = 0; s < rows; s++)
      if (padding[s] == wanted) tokens.add(keys + s * token, values + s * token);
  const int64_t real = std::count(padding, padding + rows, false);
  std::vector<Seen> seen;
  for (int64_t s = 0; s < rows; s++) seen.push_back({0, padding[s] ? real : rows});
  return attend_rows(torch::stable::contiguous(q), k.size(1), tokens, seen, scale);
}

// attend_image for one sequence of many rows.
Tensor attend_image_rows(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
                         const int32_t* fills, const int32_t* sees, double scale) {
  const auto* entries = static_cast<const int32_t*>(table.const_data_ptr());
  const int64_t page = k_pages.size(1), token = k_pages.size(2) * k_pages.size(3), J = table.size(1);
  const float *keys = floats(k_pages), *values = floats(v_pages);
  Tokens tokens;
  std::vector<int64_t> start;
  for (int64_t j = 0; j <= J; j++) {
    start.push_back(static_cast<int64_t>(tokens.keys.size()));
    for (int64_t i = 0; j < J && i < fills[j]; i++) {
      const int64_t at = (entries[j] * page + i) * token;
      tokens.add(keys + at, values + at);
    }
  }
  std::vector<Seen> seen;
  for (int64_t t = 0; t < q.size(0); t++) seen.push_back({start[sees[2 * t]], start[sees[2 * t + 1]]});
  return attend_rows(q, k_pages.size(2), tokens, seen, scale);
}

// Row i of R = T / B rows of a sequence sees its first length - R + 1 + i tokens.
Tensor attend_pages(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor length, double scale) {
  const auto* lengths = static_cast<const int32_t*>(length.const_data_ptr());
  const int64_t R = q.size(0) / table.size(0), page = k_pages.size(1);
  return attend(torch::stable::contiguous(q), k_pages, v_pages, table, scale, [=](int64_t row, int64_t j) {
    return std::min(page, lengths[row / R] - R + 1 + row % R - j * page);
  });
}

// Row t sees the first `fill` tokens of the table's entries see[0] .. see[1] - 1.
Tensor attend_image(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor fill, Tensor see, double scale) {
  const auto* fills = static_cast<const int32_t*>(fill.const_data_ptr());
  const auto* sees = static_cast<const int32_t*>(see.const_data_ptr());
  const int64_t R = q.size(0) / table.size(0), J = table.size(1);
  if (table.size(0) == 1 && R > kFewRows)
    return attend_image_rows(torch::stable::contiguous(q), k_pages, v_pages, table, fills, sees, scale);
  return attend(torch::stable::contiguous(q), k_pages, v_pages, table, scale, [=](int64_t row, int64_t j) -> int64_t {
    return sees[2 * row] <= j && j < sees[2 * row + 1] ? fills[row / R * J + j] : 0;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_graph, library) {
  const std::vector<at::Tag> traceable{at::Tag::pt2_compliant_tag};
  library.def("lay_out_(Tensor(a!) weight) -> ()");
  library.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? real) -> Tensor", traceable);
  library.def("attend_pages(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor length, float scale) -> Tensor",
              traceable);
  library.def("attend_prompt(Tensor q, Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, Tensor table, Tensor past, "
              "Tensor? real, float scale) -> Tensor", traceable);
  library.def("attend_tiles(Tensor q, Tensor k, Tensor v, Tensor pad, float scale) -> Tensor", traceable);
  library.def("attend_image(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor fill, Tensor see, "
              "float scale) -> Tensor", traceable);
}

STABLE_TORCH_LIBRARY_IMPL(mllama_graph, CPU, library) {
  library.impl("lay_out_", TORCH_BOX(&lay_out_));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("attend_pages", TORCH_BOX(&attend_pages));
  library.impl("attend_prompt", TORCH_BOX(&attend_prompt));
  library.impl("attend_tiles", TORCH_BOX(&attend_tiles));
  library.impl("attend_image", TORCH_BOX(&attend_image));
}
