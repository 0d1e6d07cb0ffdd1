// Linear layers whose weights are whole numbers of 8 or 4 bits, by the machine's products of whole numbers.
//
// Rows become whole numbers too. For activations in int8 that is what the format says. For weight-only formats a row's
// inputs become 16 bits, in blocks of up to kBlock inputs with a scale of their own: an input is off by at most 2^-16
// of the largest in its block. They are held as two bytes, hi * 256 + lo, where the machine multiplies bytes, else as
// they are. Products are summed exactly, in 32 bits; blocks are summed in fp32, in order, so that a row's result does
// not depend on other rows.
//
// Codes are held without a sign, as these instructions take them, and the row's sum times the offset is subtracted.

#pragma once

#include <utility>
#include <vector>

#include "codes.h"
#include "exact.h"
#include "outputs.h"
#include "panels.h"
#include "tensors.h"
#include "whole_rows.h"

namespace {

// Whether products of bytes are fast enough to be worth two bytes for an input; whether AVX2 multiplies pairs of 16
// bits instead, which needs no more instructions than fp32 and no conversions of codes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kFastBytes = true, kPairs = false;
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kFastBytes = false, kPairs = true;
#else
constexpr bool kFastBytes = false, kPairs = false;
#endif

// Whether a weight-only format's codes are whole numbers, and served as such by this machine.
bool in_whole_numbers(ScalarType kind, bool table) {
  return (kFastBytes || kPairs) && !table && (kind == ScalarType::Char || kind == ScalarType::Byte);
}

// Whether panels have a format's codes in words, not in bytes. whole: products are of whole numbers.
bool in_words(ScalarType kind, bool whole) {
  return kind == ScalarType::Byte || (kind == ScalarType::Char && (whole || in_whole_numbers(kind, false)));
}

// A word of four codes of 8 bits, and of eight codes of 4 bits, without a sign. operand<k>: those of its codes for the
// inputs k, k + kOperands, k + 2 * kOperands ..., in kWidth bytes each.
struct ByteCodes {
  static constexpr int kInputs = 4, kOperands = 1, kWidth = 1, kOffset = 128;
  template <int k>
  static Integers operand(Integers x) { return x; }
  static uint32_t code(uint32_t word, int input) { return word >> 8 * input & 255; }
};
struct HalfbyteCodes {
  static constexpr int kInputs = 8, kOperands = 2, kWidth = 1, kOffset = 8;
  template <int k>
  static Integers operand(Integers x) { return x >> 4 * k & 0x0f0f0f0f; }
  static uint32_t code(uint32_t word, int input) { return word >> 4 * input & 15; }
};
// The two halves of each lane, without a sign, shifted to the right.
template <int bits>
inline Integers shift_halves(Integers x) {
  typedef uint16_t Pairs __attribute__((vector_size(4 * kLanes)));
  return reinterpret_cast<Integers>(reinterpret_cast<Pairs>(x) >> bits);
}

struct BytePairs : ByteCodes {
  static constexpr int kOperands = 2, kWidth = 2;
  template <int k>
  static Integers operand(Integers x) { return k ? shift_halves<8>(x) : x & 0x00ff00ff; }
};
struct HalfbytePairs : HalfbyteCodes {
  static constexpr int kOperands = 4, kWidth = 2;
  template <int k>
  static Integers operand(Integers x) { return k == 3 ? shift_halves<12>(x) : x >> 4 * k & 0x000f000f; }
};

// Whether a tile of R rows takes operand 1 without a shift, which makes it 16 times as large, and sums its products
// apart.
template <class C, int R>
constexpr bool kApart = R == 1 && std::is_same_v<C, HalfbytePairs>;

// Words whose products AVX2 sums in 16 bits before they are widened: 4 words of 8 products of 4-bit codes with bytes.
template <class C>
constexpr int kNarrow = kPairs && std::is_same_v<C, HalfbyteCodes> ? 4 : 0;

// sum + the products of the elements of a and b in each lane, those of a without a sign, those of b with one.
template <class C>
inline Integers add_elements(Integers sum, Integers a, Integers b) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const auto x = reinterpret_cast<__m256i>(a), w = reinterpret_cast<__m256i>(b), to = reinterpret_cast<__m256i>(sum);
  return reinterpret_cast<Integers>(kNarrow<C> ? _mm256_add_epi16(to, _mm256_maddubs_epi16(x, w))
                                               : _mm256_add_epi32(to, _mm256_madd_epi16(x, w)));
#else
  for (int byte = 0; byte < 4; byte++) sum += (a >> 8 * byte & 255) * ((b << (24 - 8 * byte)) >> 24);
  return sum;
#endif
}

// sum + the two sums of 16 bits in each lane.
inline Integers add_narrow(Integers sum, Integers narrow) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return sum + reinterpret_cast<Integers>(
                   _mm256_madd_epi16(reinterpret_cast<__m256i>(narrow), _mm256_set1_epi16(1)));
#else
  return sum + (narrow << 16 >> 16) + (narrow >> 16);
#endif
}

// From so many rows of int8 activations on, AVX2 multiplies them in fp32 (exact.h).
constexpr int64_t kManyRows = 32;

// A weight in panels of words, its scales and shifts in panels of their own, and how its inputs are grouped.
struct WholeWeight {
  const uint32_t* words;
  const float *scale, *shift;
  int64_t inputs, outputs, group;

  int64_t groups() const { return inputs / group; }
};

// Adds the products of `count` blocks from block b on to c (R, V vectors): times the scale of the block and, where
// `groups`, that of its group of the weight. words, scale and shift are those of block 0.
template <class C, int P, int R, int V>
[[gnu::noinline]] void whole_tile(const WholeRows& x, int64_t row, int64_t b, int64_t count, const uint32_t* words,
                                  int64_t width, int64_t group, bool groups, const float* scale, const float* shift,
                                  float* c, int64_t c_stride, int64_t ahead) {
  const int64_t stride = x.stride(), blocks = x.blocks(), steps = x.block / C::kInputs;
  const int32_t* a = &x.words[row * stride + b * x.block / 4 * x.bytes];
  words += b * steps * width;
  for (; count; count--, b++) {
    Integers sum[P][R][V], large[V]{};
#pragma GCC unroll 8
    for (int r = 0; r < P * R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r / R][r % R][v] = Integers{};
    const auto add_words = [&](int64_t count, auto& sum) {
      for (; count; count--, a += C::kOperands * P, words += width) {
#pragma GCC unroll 4
        for (int64_t byte = 0; byte < kColumns * 4; byte += kLine)
          __builtin_prefetch(reinterpret_cast<const char*>(words) + ahead + byte, 0, kLocality<R>);
        Integers loaded[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) loaded[v] = load_words(words + v * kLanes);
        [&]<size_t... k>(std::index_sequence<k...>) {
          const auto add = [&]<int at>() {
            Integers column[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
              column[v] = kApart<C, R> && at == 1 ? loaded[v] & 0x00f000f0 : C::template operand<at>(loaded[v]);
#pragma GCC unroll 16
            for (int r = 0; r < P * R; r++) {
              const Integers input = Integers{} + a[r % R * stride + at * P + r / R];
#pragma GCC unroll 8
              for (int v = 0; v < V; v++) {
                Integers& to = kApart<C, R> && at == 1 ? large[v] : sum[r / R][r % R][v];
                to = add_elements<C>(to, column[v], input);
                // Compilers would add products first, and run out of registers.
                if constexpr (kPairs && R > 1 && kNarrow<C> == 0) keep(to);
              }
            }
          };
          (add.template operator()<k>(), ...);
        }(std::make_index_sequence<C::kOperands>{});
      }
    };
    if constexpr (kNarrow<C> == 0) {
      add_words(steps, sum);
    } else {
      for (int64_t left = steps; left > 0; left -= kNarrow<C>) {
        Integers narrow[P][R][V]{};
        add_words(std::min<int64_t>(left, kNarrow<C>), narrow);
#pragma GCC unroll 8
        for (int r = 0; r < P * R; r++)
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) sum[r / R][r % R][v] = add_narrow(sum[r / R][r % R][v], narrow[r / R][r % R][v]);
      }
    }
    const int64_t of_group = b * x.block / group * width;
    // Unrolled, so that the sums stay in registers.
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const int64_t at = (row + r) * blocks + b;
      const Vector size = splat(x.scale[at]), part = splat(x.scale[at] * static_cast<float>(x.sum[at]));
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        float* to = c + r * c_stride + v * kLanes;
        Integers whole = sum[0][r][v];
        if constexpr (P == 2) whole = (whole << 8) + sum[1][r][v];
        if constexpr (kApart<C, R>) whole += large[v] >> 4;
        const Vector product = to_floats(whole - C::kOffset * x.sum[at]) * size;
        Vector y = load(to);
        y = groups ? multiply_add(product, load(scale + of_group + v * kLanes), y) : y + product;
        if (groups && shift) y = multiply_add(part, load(shift + of_group + v * kLanes), y);
        store(to, y);
      }
    }
  }
}

// whole_tile for one row and the outputs of a panel that fill no vector.
template <class C, int P>
void whole_rest(const WholeRows& x, int64_t row, int64_t b, const uint32_t* words, int64_t width, const float* scale,
                const float* shift, float* c) {
  const int64_t at = row * x.blocks() + b;
  const int32_t* a = &x.words[row * x.stride() + b * x.block / 4 * x.bytes];
  for (int64_t o = width / kLanes * kLanes; o < width; o++) {
    int32_t sum = 0;
    for (int64_t i = 0; i < x.block; i++) {
      const int64_t word = i / C::kInputs, input = i % C::kInputs;
      const int64_t k = input % C::kOperands, element = input / C::kOperands;
      int32_t whole = 0;
      for (int p = 0; p < P; p++) {
        const int32_t elements = a[(word * C::kOperands + k) * P + p] >> 8 * C::kWidth * element;
        whole = whole * 256 + (C::kWidth == 2 ? static_cast<int16_t>(elements) : static_cast<int8_t>(elements));
      }
      sum += whole * static_cast<int32_t>(C::code(words[word * width + o], input));
    }
    const float product = static_cast<float>(sum - C::kOffset * x.sum[at]) * x.scale[at];
    c[o] = scale ? std::fma(product, scale[o], c[o]) : c[o] + product;
    if (scale && shift) c[o] = std::fma(x.scale[at] * static_cast<float>(x.sum[at]), shift[o], c[o]);
  }
}

// whole_tile for `rows` rows, at most R.
template <class C, int P, int R>
void whole_tiles(const WholeRows& x, int64_t row, int64_t b, int64_t count, const uint32_t* words, int64_t width,
                 int64_t group, bool groups, const float* scale, const float* shift, float* c, int64_t c_stride,
                 int64_t rows, int64_t ahead) {
  if (width == kColumns) {
    if (rows == R)
      return whole_tile<C, P, R, kPanel>(x, row, b, count, words, width, group, groups, scale, shift, c, c_stride,
                                         ahead);
    if constexpr (R > 1)
      return whole_tiles<C, P, R - 1>(x, row, b, count, words, width, group, groups, scale, shift, c, c_stride, rows,
                                      ahead);
  }
  // Of a weight's panels, only the last is narrower.
  for (int64_t r = 0; r < rows; r++) {
    float* to = c + r * c_stride;
    for (int64_t v = 0; v < width / kLanes * kLanes; v += kLanes)
      whole_tile<C, P, 1, 1>(x, row + r, b, count, words + v, width, group, groups, scale + v,
                             shift ? shift + v : nullptr, to + v, c_stride, ahead);
    for (int64_t block = b; block < b + count; block++) {
      const int64_t g = block * x.block / group * width;
      whole_rest<C, P>(x, row + r, block, words + block * (x.block / C::kInputs) * width, width,
                       groups ? scale + g : nullptr, groups && shift ? shift + g : nullptr, to);
    }
  }
}

// Bytes to prefetch ahead. On Zen 5, 8192 reads int8 weights with int8 activations 4 % faster than 4096 for one row and
// 6 % for eight; 16384 is no faster than 4096.
constexpr int64_t kWordsAhead = 8192;

// The most rows of a tile: their sums fill most of the registers.
template <class C, int P>
constexpr int kWholeRows = kRegisters == 32 ? 8 / P : kNarrow<C> ? 2 : 3 / P;

// y = x w' for one panel and the rows from `row` on.
template <class C, int P>
void whole_panel(const WholeRows& x, const WholeWeight& w, int64_t at, int64_t row, int64_t rows, float* y) {
  const int64_t width = std::min(kColumns, w.outputs - at), groups = w.groups();
  const uint32_t* words = w.words + at * (w.inputs / C::kInputs);
  const float *scale = w.scale + at * groups, *shift = w.shift ? w.shift + at * groups : nullptr;
  constexpr int R = kWholeRows<C, P>;
  const int64_t tiles = (rows + R - 1) / R;
  for (int64_t t = 0; t < rows; t++) std::fill_n(y + t * w.outputs, width, 0.0f);
  // Blocks of several tiles stay in L1 between them.
  const int64_t some = tiles == 1 ? x.blocks() : 1;
  for (int64_t b = 0; b < x.blocks(); b += some)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t top = tile * rows / tiles, tall = (tile + 1) * rows / tiles - top;
      whole_tiles<C, P, R>(x, row + top, b, some, words, width, w.group, groups > 1, scale, shift,
                           y + top * w.outputs, w.outputs, tall, tile ? 0 : ahead_of(rows, kWordsAhead));
    }
  for (int64_t t = 0; groups == 1 && t < rows; t++)
    for (int64_t o = 0; o < width; o++) {
      float& to = y[t * w.outputs + o];
      to *= scale[o];
      if (shift) to = std::fma(x.total[row + t], shift[o], to);
    }
}

template <class C, int P>
void whole_of(const WholeRows& x, const WholeWeight& w, float* y, int64_t rows) {
  const int64_t panels = (w.outputs + kColumns - 1) / kColumns, blocks = (rows + kTall - 1) / kTall;
  const int64_t bytes = kColumns * w.inputs / C::kInputs * 4 * (1 + rows / 32);
  parallel_for(blocks * panels, kGrainBytes / bytes + 1, [&](int64_t first, int64_t last) {
    for (; first < last; first++) {
      const int64_t row = first / panels * rows / blocks, tall = (first / panels + 1) * rows / blocks - row;
      const int64_t at = first % panels * kColumns;
      whole_panel<C, P>(x, w, at, row, tall, y + row * w.outputs + at);
    }
  });
}

// y = x w' + bias: x (..., I) fp32, rounded to codes of 8 bits; w in panels of words: int8, or two codes of 4 bits in
// each byte, which count from -8; scale and shift (O, G) in panels. order: the input of each column of w. input_scale
// and input_zero: those of the codes of x; without them a row's scale is its largest absolute value / 127, `largest`
// (parts, rows) giving those of all parts of a row that is split.
Tensor linear_integers(Tensor given, Tensor weight, Tensor scale, std::optional<Tensor> shift,
                       std::optional<Tensor> order, std::optional<Tensor> input_scale,
                       std::optional<Tensor> input_zero, std::optional<Tensor> largest, std::optional<Tensor> bias,
                       std::optional<Tensor> real) {
  const Tensor x = packed(given);
  const bool halves = weight.scalar_type() == ScalarType::Byte;
  const int64_t inputs = x.size(x.dim() - 1), outputs = weight.size(0), groups = scale.size(1);
  const int64_t rows = inputs ? x.numel() / inputs : 0, some = real_of(rows, real);
  if (x.scalar_type() != ScalarType::Float || !(halves || weight.scalar_type() == ScalarType::Char) ||
      !weight.is_contiguous() || weight.size(1) * (halves ? 2 : 1) != inputs || scale.size(0) != outputs || !groups ||
      inputs % groups || inputs / groups % (halves ? HalfbyteCodes::kInputs : ByteCodes::kInputs) ||
      (halves && input_zero))
    fail("linear_integers takes x (..., I) in float32, a contiguous weight of codes (O, I) and scales (O, G)");
  Tensor y = allocated_rows(x, outputs, some);
  const float *from = floats(x), *most = largest ? floats(*largest) : nullptr;
  const float zero = input_zero ? *floats(*input_zero) : 0.0f;
  std::vector<float> scales(some), sorted;
  if (order) {
    sorted = sorted_rows(from, some, inputs, integers(*order));
    from = sorted.data();
  }
  for_rows(some, inputs, [&](int64_t t) {
    float size = largest_in(from + t * inputs, inputs);
    for (int64_t part = 0; most && part < largest->numel() / rows; part++) {
      const float other = most[part * rows + t];
      // Written so that a NaN stays one.
      size = other <= size ? size : other + size * 0.0f;
    }
    scales[t] = input_scale ? *floats(*input_scale) + size * 0.0f : size / kMostByte;
  });
  const WholeWeight w{static_cast<const uint32_t*>(weight.const_data_ptr()), floats(scale),
                      shift ? floats(*shift) : nullptr, inputs, outputs, inputs / groups};
  if (kPairs && !halves && groups == 1 && inputs <= 1 << 15 && some >= kManyRows) {
    exact_of(from, some, inputs, scales.data(), zero, w.words, w.scale, w.shift, results(y), outputs);
    add_bias(results(y), bias, some);
    return y;
  }
  // Sums of up to 2^15 products of 9 and 8 bits fit 32 bits.
  const int64_t block = w.group <= 1 << 15 ? w.group : block_of(w.group);
  const auto run = [&]<class C, int P>() {
    whole_of<C, P>(whole_rows<C, P>(from, some, inputs, block, scales.data(), zero), w, results(y), some);
  };
  if (halves) run.operator()<HalfbyteCodes, 1>();
  else if constexpr (kPairs) run.operator()<BytePairs, 1>();
  // A code less its zero takes more than a byte.
  else zero ? run.operator()<ByteCodes, 2>() : run.operator()<ByteCodes, 1>();
  add_bias(results(y), bias, some);
  return y;
}

}  // namespace
