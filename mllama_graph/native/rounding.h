// Rounds rows of weights to codes of 8 and of 4 bits while they are loaded: what `quantise` of model/codes.py does, with
// the same codes and scales.

#pragma once

#include <tuple>

#include "integers.h"

namespace {

inline Vector clamped(Vector x, float least, float most) {
  return x < least ? splat(least) : x > most ? splat(most) : x;
}

// The nearest whole numbers to x / scale within least .. most, and the squared error of what they stand for.
struct Rounded {
  const float* x;
  int64_t count;
  float least, most;

  float number(int64_t i, float scale) const { return std::clamp(std::nearbyintf(x[i] / scale), least, most); }
  Vector numbers(int64_t i, Vector scale) const {
    constexpr float kMagic = 12582912.0f;  // adding it rounds to a whole number
    return clamped(load(x + i) / scale + kMagic - kMagic, least, most);
  }

  float error(float scale) const {
    Vector sum{};
    float rest = 0;
    const Vector wide = splat(scale);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Vector off = numbers(i, wide) * wide - load(x + i);
      sum = multiply_add(off, off, sum);
    }
    for (; i < count; i++) {
      const float off = number(i, scale) * scale - x[i];
      rest += off * off;
    }
    return total(sum) + rest;
  }

  template <class Code>
  void write(float scale, float added, Code* to) const {
    const Vector wide = splat(scale);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Integers whole = __builtin_convertvector(numbers(i, wide) + added, Integers);
      for (int lane = 0; lane < kLanes; lane++) to[i + lane] = static_cast<Code>(whole[lane]);
    }
    for (; i < count; i++) to[i] = static_cast<Code>(number(i, scale) + added);
  }
};

// Codes (O, I) and scales (O, G) of rows (O, I) in G groups: codes of 4 bits if `steps` (S) has several numbers, of which
// a group's largest value is divided by the one with the least squared error; else int8, with the one of `steps`.
std::tuple<Tensor, Tensor> round_rows(Tensor rows, int64_t groups, Tensor steps) {
  const int64_t outputs = rows.size(0), inputs = rows.size(1), group = inputs / groups, choices = steps.numel();
  const float *from = floats(rows), *numbers = floats(steps);
  const bool halves = choices > 1;
  Tensor codes = allocated({outputs, inputs}, halves ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8());
  Tensor scales = allocated({outputs, groups});
  auto* to = codes.mutable_data_ptr();
  float* sizes = results(scales);
  for_rows(outputs, inputs * choices, [&](int64_t o) {
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = o * inputs + g * group;
      const Rounded rounded{from + at, group, halves ? -8.0f : -127.0f, halves ? 7.0f : 127.0f};
      const float most = largest_in(from + at, group);
      float best = most / numbers[0], least = INFINITY;
      for (int64_t choice = 0; halves && most > 0 && choice < choices; choice++) {
        const float scale = most / numbers[choice], error = rounded.error(scale);
        if (error < least) best = scale, least = error;
      }
      const float scale = best > 0 ? best : 1.0f;
      halves ? rounded.write(scale, 8, static_cast<uint8_t*>(to) + at)
             : rounded.write(scale, 0, static_cast<int8_t*>(to) + at);
      sizes[o * groups + g] = best;
    }
  });
  return {codes, scales};
}

}  // namespace
