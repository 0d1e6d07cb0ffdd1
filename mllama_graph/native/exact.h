// Linear layers with weights and activations in int8 and many rows, for CPUs that multiply fp32 as fast as integers.
//
// A block's products are integers whose sum fp32 holds exactly. The sums of blocks are added as 32-bit integers. So
// results have the same bits as those of integers.h, while a weight is widened once for all rows of a task.

#pragma once

#include <cmath>
#include <vector>

#include "blocks.h"
#include "codes.h"
#include "whole_rows.h"

namespace {

// Words of four 8-bit codes. Code 0 stands for -128.
struct WholeBytes {
  using Word = uint32_t;
  static constexpr int kInputs = 4;

  Integers load(const uint32_t* from) const { return load_words(from) ^ static_cast<int32_t>(0x80808080); }
  template <int input>
  Vector decode(Integers x) const { return to_floats((x << (24 - 8 * input)) >> 24); }
  template <int input>
  float decode_one(uint32_t x) const { return static_cast<float>(x >> 8 * input & 255) - 128.0f; }
};

// y = x w' for rows x (rows, inputs), which are rounded to 8-bit codes with one scale per row; code `zero` stands for
// 0. words, scale and shift are in panels. The weight has a single group.
void exact_of(const float* x, int64_t rows, int64_t inputs, const float* scales, float zero, const uint32_t* words,
              const float* scale, const float* shift, float* y, int64_t outputs) {
  std::vector<float> total(rows);
  static_assert(kBlockInputs << 15 < 1 << 24);
  const BlockedRows blocked = blocked_rows(rows, inputs, kBlockInputs, [&](int64_t t, float* free) {
    std::vector<int32_t> whole(inputs);
    round_inputs(x + t * inputs, inputs, scales[t] > 0 ? scales[t] : 1.0f, zero, true, whole.data());
    int32_t sum = 0;
    for (int64_t i = 0; i < inputs; i++) free[i] = static_cast<float>(whole[i]), sum += whole[i];
    total[t] = scales[t] * static_cast<float>(sum);
    return free;
  });
  multiply_blocks(
      blocked, WholeBytes{}, words, outputs,
      [&](int64_t at, int64_t width, int64_t top, int64_t count, const int32_t* sums) {
        for (int64_t t = top; t < top + count; t++, sums += kColumns)
          for (int64_t o = 0; o < width; o++) {
            // 0.0f is added as in the tiles of integers.h: it turns -0 into 0.
            const float product = 0.0f + static_cast<float>(sums[o]) * scales[t];
            float& to = y[t * outputs + at + o];
            to = product * scale[at + o];
            if (shift) to = std::fma(total[t], shift[at + o], to);
          }
      });
}

}  // namespace
