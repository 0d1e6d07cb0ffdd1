// Vectors of floats (vector extension of GCC and Clang) in the machine's width, loads that widen, and the exponentials
// e^x and 2^x.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Number of vector registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t ByteLanes __attribute__((vector_size(kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The elements of a and b, counted through, that have these indices; vectors of integers.
template <int... index, class V>
inline V shuffled(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, V{index...});
#endif
}

// Bytes of a cache line.
constexpr int64_t kLine = 64;
// Added to a number of at most 2^22, it rounds the number to a whole one, which the low bits of the sum then hold.
constexpr float kMagic = 12582912.0f;

// ---- Loads that widen ----

inline float widen(float x) { return x; }

inline float widen(int8_t x) { return x; }

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
  // Explicit instructions where they exist: compilers widen in two halves.
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

inline Vector to_floats(Integers x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x)));
#else
  return __builtin_convertvector(x, Vector);
#endif
}

inline Vector load(const int8_t* from) {
#if defined(__AVX512F__)
  const auto wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return to_floats(reinterpret_cast<Integers>(wide));
#elif defined(__AVX2__)
  const auto wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return reinterpret_cast<Vector>(_mm256_cvtepi32_ps(wide));
#else
  ByteLanes codes;
  std::memcpy(&codes, from, sizeof codes);
  return __builtin_convertvector(codes, Vector);
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

// Keeps x, a vector, in a register: compilers would load or compute it again for each use.
template <class V>
inline void keep(V& x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// a * b + c, rounded once if the machine has FMA. Explicit, since compilers may or may not fuse.
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

// Loads the first `some` elements, followed by zeros.
inline Vector load(const float* from, int64_t some) {
  if (some >= kLanes) return load(from);
  float part[kLanes] = {};
  std::memcpy(part, from, some * sizeof(float));
  return load(part);
}

inline void store(float* to, Vector x, int64_t some) {
  if (some >= kLanes) return store(to, x);
  std::memcpy(to, &x, some * sizeof(float));
}

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
  return reinterpret_cast<Vector>(_mm512_permutex2var_ps(a, even, b)) +
         reinterpret_cast<Vector>(_mm512_permutex2var_ps(a, odd, b));
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

template <int... i>
inline Vector interleaved(Vector a, Vector b, int half, std::integer_sequence<int, i...>) {
  const auto x = reinterpret_cast<Integers>(a), y = reinterpret_cast<Integers>(b);
  return reinterpret_cast<Vector>(half ? shuffled<(i / 2 + kLanes / 2 + i % 2 * kLanes)...>(x, y)
                                       : shuffled<(i / 2 + i % 2 * kLanes)...>(x, y));
}

// Transposes kLanes vectors: each pass interleaves the first half of them with the second.
inline void transpose(Vector (&x)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 4
  for (int pass = 1; pass < kLanes; pass *= 2) {
    Vector y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) y[i] = interleaved(x[i / 2], x[i / 2 + kLanes / 2], i % 2, lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) x[i] = y[i];
  }
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

// ---- Products ----

// Adds the products of R elements of a with V vectors to R by V sums.
template <int R, int V>
[[gnu::always_inline]] inline void add_products(Vector (&sum)[R][V], const float* a, int64_t a_stride,
                                                Vector (&column)[V]) {
#pragma GCC unroll 8
  for (int v = 0; R > 1 && v < V; v++) keep(column[v]);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const Vector one = splat(a[r * a_stride]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[r][v] = multiply_add(one, column[v], sum[r][v]);
  }
}

// ---- Functions of vectors ----

// e^x, accurate to 2 units in the last place; results below 1e-37 are 0.
inline Vector exponential(Vector x) {
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

// 2^x for x <= 0, accurate to 2 units in the last place; results below 2^-126 are 0.
inline Vector power_of_two(Vector x) {
  const Integers tiny = x < -126.0f;
  const Vector shifted = x + kMagic, rest = x - (shifted - kMagic);
  Vector power = splat(1.5403530e-4f);
  for (const float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    power = multiply_add(power, rest, splat(factor));
  const Integers bits = reinterpret_cast<Integers>(power) + (reinterpret_cast<Integers>(shifted) << 23);
  return reinterpret_cast<Vector>(bits & ~tiny);
}

}  // namespace
