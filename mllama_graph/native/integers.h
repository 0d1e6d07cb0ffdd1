// Linear layers with an int8 weight and rows rounded to int8: products of whole numbers, summed exactly in 32 bits.
//
// A word of the weight's panels has four inputs. Rows are held as bytes with 128 added, as the machine's products of
// unsigned and signed bytes take them; the sum of an output's codes, times what was added, is subtracted.

#pragma once

#include <vector>

#include "coded.h"

namespace {

// Inputs of a word, and the most rows of a tile.
constexpr int kBytes = 4;
constexpr int kIntegerRows = kRegisters == 32 ? 6 : 3;

// sum + the products of four bytes in each lane, those of a unsigned.
inline Integers add_bytes(Integers sum, Integers a, Integers b) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // Products of even and of odd bytes, as 16 bits each, whose pairs are summed in 32.
  const auto x = reinterpret_cast<__m256i>(a), w = reinterpret_cast<__m256i>(b);
  const auto low = _mm256_set1_epi16(0xff);
  const auto even = _mm256_madd_epi16(_mm256_and_si256(x, low), _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const auto odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
  return sum + reinterpret_cast<Integers>(_mm256_add_epi32(even, odd));
#else
  for (int byte = 0; byte < kBytes; byte++) sum += (a >> 8 * byte & 255) * ((b << (24 - 8 * byte)) >> 24);
  return sum;
#endif
}

inline Integers load_words(const int32_t* from) {
  Integers x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Integers splat_word(int32_t x) { return Integers{} + x; }

// Sums of the products of R rows of words with V vectors of a panel: y = (sum - added * sum of codes) * row scale *
// scale.
template <int R, int V>
[[gnu::noinline]] void integer_tile(const int32_t* a, int64_t words, const int32_t* b, int64_t width,
                                    const float* row_scale, int32_t added, const float* scale, float* y,
                                    int64_t y_stride, int64_t ahead) {
  Integers sum[R][V] = {}, codes[V] = {};
  const Integers one = splat_word(0x01010101);
  for (int64_t i = 0; i < words; i++, b += width) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < kColumns * 4; byte += kLine)
      __builtin_prefetch(reinterpret_cast<const char*>(b) + ahead + byte, 0, kLocality);
    Integers column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      column[v] = load_words(b + v * kLanes);
      codes[v] = add_bytes(codes[v], one, column[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Integers row = splat_word(a[r * words + i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] = add_bytes(sum[r][v], row, column[v]);
    }
  }
  // Unrolled, so that the sums stay in registers.
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const Vector whole = to_floats(sum[r][v] - codes[v] * added);
      store(y + r * y_stride + v * kLanes, whole * row_scale[r] * load(scale + v * kLanes));
    }
}

template <int R>
void integer_rows(const int32_t* a, int64_t words, const int32_t* b, int64_t width, const float* row_scale,
                  int32_t added, const float* scale, float* y, int64_t y_stride, int64_t rows, int64_t ahead) {
  if (width == kColumns) {
    if (rows == R) return integer_tile<R, kPanel>(a, words, b, width, row_scale, added, scale, y, y_stride, ahead);
    if constexpr (R > 1)
      return integer_rows<R - 1>(a, words, b, width, row_scale, added, scale, y, y_stride, rows, ahead);
  }
  for (int64_t r = 0; r < rows; r++) {
    float* to = y + r * y_stride;
    for (int64_t v = 0; v < width / kLanes; v++)
      integer_tile<1, 1>(a + r * words, words, b + v * kLanes, width, row_scale + r, added, scale + v * kLanes,
                         to + v * kLanes, y_stride, ahead);
    for (int64_t o = width / kLanes * kLanes; o < width; o++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < words * kBytes; i++) {
        const auto* codes = reinterpret_cast<const int8_t*>(b + i / kBytes * width + o);
        sum += (reinterpret_cast<const uint8_t*>(a + r * words)[i] - added) * codes[i % kBytes];
      }
      to[o] = static_cast<float>(sum) * row_scale[r] * scale[o];
    }
  }
}

// The largest absolute value of a row.
inline float largest_in(const float* x, int64_t count) {
  Vector most{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vector one = load(x + i), size = one < 0.0f ? -one : one;
    most = most > size ? most : size;
  }
  float all = largest_of(most);
  for (; i < count; i++) all = std::max(all, std::fabs(x[i]));
  return all;
}

// Whole numbers nearest to x / scale + zero, clamped to int8, plus 128.
inline void round_row(const float* x, int64_t count, float scale, float zero, uint8_t* to) {
  for (int64_t i = 0; i < count; i++)
    to[i] = static_cast<uint8_t>(std::clamp(std::nearbyintf(x[i] / scale) + zero, -128.0f, 127.0f) + 128.0f);
}

// y = x w' + bias: x (..., I) fp32, rounded to int8; w (O, I) int8 in panels of words of four inputs; scale (O, 1) in
// panels. input_scale and input_zero: those of the codes of x; without them a row's scale is its largest absolute value
// / 127, `largest` (parts, rows) giving those of all parts of a row that is split.
Tensor linear_integers(Tensor given, Tensor weight, Tensor scale, std::optional<Tensor> input_scale,
                       std::optional<Tensor> input_zero, std::optional<Tensor> largest, std::optional<Tensor> bias,
                       std::optional<Tensor> real) {
  const Tensor x = packed(given);
  const int64_t inputs = x.size(x.dim() - 1), outputs = weight.size(0), words = inputs / kBytes;
  const int64_t rows = inputs ? x.numel() / inputs : 0, some = real_of(rows, real);
  if (x.scalar_type() != ScalarType::Float || weight.scalar_type() != ScalarType::Char || !weight.is_contiguous() ||
      weight.size(1) != inputs || inputs % kBytes || scale.numel() != outputs)
    fail("linear_integers takes x (..., I) in float32, a contiguous int8 weight (O, I) and scales (O, 1)");
  Tensor y = allocated_rows(x, outputs, some);
  const float *from = floats(x), *most = largest ? floats(*largest) : nullptr;
  const float zero = input_zero ? *floats(*input_zero) : 0.0f;
  std::vector<int32_t> codes(some * words);
  std::vector<float> row_scale(some);
  for_rows(some, 4 * inputs, [&](int64_t t) {
    const float* row = from + t * inputs;
    if (input_scale) {
      row_scale[t] = *floats(*input_scale);
    } else {
      float size = 0;
      if (!most) size = largest_in(row, inputs);
      for (int64_t part = 0; most && part < largest->numel() / rows; part++) size = std::max(size, most[part * rows + t]);
      row_scale[t] = size / 127.0f;
    }
    round_row(row, inputs, row_scale[t] > 0 ? row_scale[t] : 1.0f, zero, reinterpret_cast<uint8_t*>(&codes[t * words]));
  });
  const int32_t added = 128 + static_cast<int32_t>(zero);
  const auto* b = static_cast<const int32_t*>(weight.const_data_ptr());
  const float* scales = floats(scale);
  const int64_t panels = (outputs + kColumns - 1) / kColumns, blocks = (some + kTall - 1) / kTall;
  const int64_t bytes = kColumns * inputs * (1 + some / 64);
  torch::stable::parallel_for(0, blocks * panels, kGrainBytes / bytes + 1, [&](int64_t first, int64_t last) {
    for (; first < last; first++) {
      const int64_t row = first / panels * some / blocks, tall = (first / panels + 1) * some / blocks - row;
      const int64_t at = first % panels * kColumns, width = std::min(kColumns, outputs - at);
      const int64_t tiles = (tall + kIntegerRows - 1) / kIntegerRows;
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t top = row + tile * tall / tiles, high = (tile + 1) * tall / tiles - tile * tall / tiles;
        integer_rows<kIntegerRows>(&codes[top * words], words, b + at * words, width, &row_scale[top], added,
                                   scales + at, results(y) + top * outputs + at, outputs, high,
                                   tiles == 1 ? kAhead : 0);
      }
    }
  });
  add_bias(results(y), bias, some);
  return y;
}

}  // namespace
