// Rows of activations as whole numbers of one or two bytes, in the order in which integers.h multiplies them.

#pragma once

#include <cmath>
#include <vector>

#include "tensors.h"
#include "vectors.h"

namespace {

// Most inputs of a block: sums of products with bytes of a weight then fit 32 bits.
constexpr int64_t kBlock = 128;
// Whole numbers of a row in one byte, and in two.
constexpr float kMostByte = 127, kMostPair = 32512;

// The inputs of a block for weight-only formats: the most that divide a group.
inline int64_t block_of(int64_t group) {
  int64_t block = kBlock;
  while (group % block) block /= 2;
  return block;
}

// Rows as whole numbers. words (rows, stride: words of a weight's row, operands of a word, bytes of an input); scale
// and sum, of each block, and total, of a row, of its inputs.
struct WholeRows {
  int64_t inputs, block;
  int bytes;
  std::vector<int32_t> words;
  std::vector<float> scale, total;
  std::vector<int32_t> sum;

  int64_t blocks() const { return inputs / block; }
  // A line more than a row has, so that rows of a power of two share no set of L1.
  int64_t stride() const { return inputs / 4 * bytes + kLine / 4; }
};

// The largest absolute value of a row; NaN where a value is not finite, which comparisons would miss.
inline float largest_in(const float* x, int64_t count) {
  Vector most{}, unsound{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vector one = load(x + i), size = one < 0.0f ? -one : one;
    most = most > size ? most : size;
    unsound += one * 0.0f;
  }
  float all = largest_of(most), rest = total(unsound);
  for (; i < count; i++) all = std::max(all, std::fabs(x[i])), rest += x[i] * 0.0f;
  return all + rest;
}

// Whole numbers nearest to x / scale, ties going to even numbers; those of a code of 8 bits, which is `zero` for 0.
inline void round_inputs(const float* x, int64_t count, float scale, float zero, bool code, int32_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vector y = load(x + i) / splat(scale) + kMagic - kMagic;
    if (code) {
      y += zero;
      y = (y < -128.0f ? splat(-128.0f) : y > 127.0f ? splat(127.0f) : y) - zero;
    }
    const Integers whole = reinterpret_cast<Integers>(y + kMagic) - 0x4b400000;
    std::memcpy(to + i, &whole, sizeof whole);
  }
  for (; i < count; i++) {
    const float y = std::nearbyintf(x[i] / scale);
    to[i] = static_cast<int32_t>(code ? std::clamp(y + zero, -128.0f, 127.0f) - zero : y);
  }
}

// Whole numbers as bytes: of one byte, or of two, high * 256 + low.
template <int count>
inline void split_bytes(const int32_t* whole, int bytes, int8_t* high, int8_t* low) {
  for (int i = 0; i < count; i++) {
    high[i] = static_cast<int8_t>(bytes == 2 ? (whole[i] + 128) >> 8 : whole[i]);
    low[i] = static_cast<int8_t>(whole[i]);
  }
}

// Sixteen inputs as bytes, those of each operand of a word side by side: words of halves of bytes have the even inputs
// in their first operand, the odd ones in the second.
typedef int8_t Sixteen __attribute__((vector_size(16)));
typedef int32_t Four __attribute__((vector_size(16)));

template <class C>
inline Four operands(const int8_t* bytes) {
  Sixteen x;
  std::memcpy(&x, bytes, sizeof x);
  if constexpr (C::kOperands == 2)
    x = shuffled<0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15>(x, x);
  return reinterpret_cast<Four>(x);
}

// Puts whole numbers into words, in the order in which tiles read them: of each four inputs of an operand, the high
// bytes before the low ones; or inputs of 16 bits as they are.
template <class C>
void pack_inputs(const int32_t* whole, int64_t count, int bytes, int32_t* words) {
  if constexpr (C::kWidth == 2) {
    for (int64_t i = 0; i < count; i += C::kInputs, words += C::kOperands)
      for (int k = 0; k < C::kOperands; k++)
        words[k] = (whole[i + k] & 0xffff) | whole[i + k + C::kOperands] << 16;
    return;
  }
  for (int64_t i = 0; i < count; i += 16, words += 4 * bytes) {
    // The last inputs of a row that is not a multiple of 16 are followed by zeros, which are not stored.
    const int64_t some = std::min<int64_t>(16, count - i);
    alignas(16) int8_t high[16]{}, low[16]{};
    if (some == 16) split_bytes<16>(whole + i, bytes, high, low);
    else for (int64_t at = 0; at < some; at++) split_bytes<1>(whole + i + at, bytes, high + at, low + at);
    const Four first = operands<C>(high), second = operands<C>(low);
    if (bytes == 1) {
      std::memcpy(words, &first, some);
      continue;
    }
    const Four pairs[2] = {shuffled<0, 4, 1, 5>(first, second), shuffled<2, 6, 3, 7>(first, second)};
    std::memcpy(words, pairs, 2 * some);
  }
}

// Rounds rows of x to whole numbers of P elements: codes of 8 bits with the rows' scales, which count from `zero`, or,
// without scales, of 16 bits.
template <class C, int P>
WholeRows whole_rows(const float* x, int64_t rows, int64_t inputs, int64_t block, const float* scales, float zero) {
  constexpr int bytes = P * C::kWidth;
  WholeRows to{inputs, block, bytes};
  const int64_t blocks = to.blocks();
  to.words.resize(rows * to.stride()), to.scale.resize(rows * blocks), to.sum.resize(rows * blocks);
  to.total.resize(rows);
  for_rows(rows, 4 * inputs, [&](int64_t t) {
    std::vector<int32_t> whole(block);
    for (int64_t b = 0; b < blocks; b++) {
      const float* from = x + t * inputs + b * block;
      const float scale = scales ? scales[t] : largest_in(from, block) / kMostPair;
      round_inputs(from, block, scale > 0 ? scale : 1.0f, zero, scales != nullptr, whole.data());
      int32_t sum = 0;
      for (int64_t i = 0; i < block; i++) sum += whole[i];
      pack_inputs<C>(whole.data(), block, bytes, &to.words[t * to.stride() + b * block / 4 * bytes]);
      to.scale[t * blocks + b] = scale, to.sum[t * blocks + b] = sum;
      to.total[t] += scale * static_cast<float>(sum);
    }
  });
  return to;
}

}  // namespace
