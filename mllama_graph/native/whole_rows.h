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

// Rows as whole numbers. words (rows, words of a weight's row, operands of a word, bytes of an input); scale and sum, of
// each block, and total, of a row, of its inputs.
struct WholeRows {
  int64_t inputs, block;
  int bytes;
  std::vector<int32_t> words;
  std::vector<float> scale, total;
  std::vector<int32_t> sum;

  int64_t blocks() const { return inputs / block; }
  int64_t stride() const { return inputs / 4 * bytes; }
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
  constexpr float kMagic = 12582912.0f;  // adding it rounds to a whole number, which the low bits then hold
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

// Puts up to kBlock whole numbers into words, in the order in which tiles read them. Written as plain loops over arrays,
// which compilers turn into vectors.
template <class C>
void pack_inputs(const int32_t* whole, int64_t count, int bytes, int32_t* words) {
  constexpr int K = C::kOperands;
  alignas(64) int8_t parts[2][kBlock], split[K][kBlock / K];
  for (int64_t i = 0; i < count; i++) {
    const int32_t high = bytes == 2 ? (whole[i] + 128) >> 8 : whole[i];
    parts[0][i] = static_cast<int8_t>(high);
    parts[1][i] = static_cast<int8_t>(whole[i] - high * 256);
  }
  for (int part = 0; part < bytes; part++) {
    // The first operand of a word of halves of bytes has the even inputs, the second the odd ones.
    for (int64_t i = 0; i < count / K; i++)
      for (int k = 0; k < K; k++) split[k][i] = parts[part][i * K + k];
    for (int k = 0; k < K; k++)
      for (int64_t word = 0; word < count / K / 4; word++)
        std::memcpy(words + (word * K + k) * bytes + part, split[k] + 4 * word, 4);
  }
}

// Rounds rows of x to whole numbers of `bytes` bytes: codes of 8 bits with the rows' scales, which count from `zero`, or,
// without scales, of 16 bits.
template <class C>
WholeRows whole_rows(const float* x, int64_t rows, int64_t inputs, int64_t block, int bytes, const float* scales,
                     float zero) {
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
      for (int64_t i = 0; i < block; i += kBlock)
        pack_inputs<C>(&whole[i], std::min(kBlock, block - i), bytes,
                       &to.words[t * to.stride() + (b * block + i) / 4 * bytes]);
      to.scale[t * blocks + b] = scale, to.sum[t * blocks + b] = sum;
      to.total[t] += scale * static_cast<float>(sum);
    }
  });
  return to;
}

}  // namespace
