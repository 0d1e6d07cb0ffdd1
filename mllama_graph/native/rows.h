// Row-wise operations: norms, rotations, gates, and copies of rows from and to tables.
//
// A row is processed from its first element, a vector at a time, independently of other rows: its result is bitwise
// identical alone, in a batch and in a chunk.

#pragma once

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "tensors.h"
#include "vectors.h"

namespace {

// Calls f(i, number of elements left) for each vector of a row.
template <class F>
inline void for_vectors(int64_t width, const F& f) {
  for (int64_t i = 0; i < width; i += kLanes) f(i, width - i);
}

// ---- Norms ----

// y = x / rms(x) * weight
inline void rms_norm_row(const float* x, const float* weight, float eps, int64_t width, float* y) {
  Vector squares{};
  for_vectors(width, [&](int64_t i, int64_t left) {
    const Vector some = load(x + i, left);
    squares = multiply_add(some, some, squares);
  });
  const float scale = 1 / std::sqrt(total(squares) / static_cast<float>(width) + eps);
  for_vectors(width, [&](int64_t i, int64_t left) {
    store(y + i, load(weight + i, left) * (load(x + i, left) * scale), left);
  });
}

// The norms of x along its last axis.
Tensor rms_norm(Tensor given, Tensor weight, double eps, std::optional<Tensor> real) {
  const Rows x(given);
  const int64_t width = weight.numel();
  if (width == 0 || given.size(given.dim() - 1) != width) fail("rms_norm takes x (..., D) and a weight (D)");
  Tensor y = allocated(given.sizes());
  const std::vector<float> w = widened(weight);
  for_real_rows(y, real, [&](int64_t t, float* to) {
    for (int64_t i = 0; i < x.width; i += width)
      rms_norm_row(x.row(t) + i, w.data(), static_cast<float>(eps), width, to + i);
  });
  return y;
}

// The norm of x + y, and x + y.
std::tuple<Tensor, Tensor> add_rms_norm(Tensor given_x, Tensor given_y, Tensor weight, double eps,
                                        std::optional<Tensor> real) {
  const Rows x(given_x), y(given_y);
  if (x.width != weight.numel() || y.width != x.width || y.count != x.count)
    fail("add_rms_norm takes x and y (T, D) and a weight (D)");
  Tensor normed = allocated(given_x.sizes());
  Tensor sum = allocated(given_x.sizes());
  float* sums = results(sum);
  const std::vector<float> w = widened(weight);
  for_real_rows(normed, real, [&](int64_t t, float* to) {
    float* z = sums + t * x.width;
    for_vectors(x.width, [&](int64_t i, int64_t left) {
      store(z + i, load(x.row(t) + i, left) + load(y.row(t) + i, left), left);
    });
    rms_norm_row(z, w.data(), static_cast<float>(eps), x.width, to);
  });
  const int64_t some = real_of(x.count, real);
  std::fill(sums + some * x.width, sums + x.count * x.width, 0.0f);
  return {normed, sum};
}

// y = (x - mean) / deviation * weight + bias
inline void layer_norm_row(const float* x, const float* weight, const float* bias, float eps, int64_t width, float* y) {
  Vector sum{}, squares{};
  for_vectors(width, [&](int64_t i, int64_t left) { sum += load(x + i, left); });
  const float mean = total(sum) / static_cast<float>(width);
  for_vectors(width, [&](int64_t i, int64_t left) {
    const Vector off = load(x + i, left) - mean;
    // Padding of the last vector must not be counted.
    if (left >= kLanes) squares = multiply_add(off, off, squares);
    else for (int64_t lane = 0; lane < left; lane++) squares[lane] = std::fma(off[lane], off[lane], squares[lane]);
  });
  const float scale = 1 / std::sqrt(total(squares) / static_cast<float>(width) + eps);
  for_vectors(width, [&](int64_t i, int64_t left) {
    store(y + i, (load(x + i, left) - mean) * scale * load(weight + i, left) + load(bias + i, left), left);
  });
}

Tensor layer_norm(Tensor given, Tensor weight, Tensor bias, double eps) {
  const Rows x(given);
  const int64_t width = weight.numel();
  if (width == 0 || given.size(given.dim() - 1) != width || bias.numel() != width)
    fail("layer_norm takes x (..., E), a weight and a bias (E)");
  Tensor y = allocated(given.sizes());
  const std::vector<float> w = widened(weight), b = widened(bias);
  for_real_rows(y, std::nullopt, [&](int64_t t, float* to) {
    for (int64_t i = 0; i < x.width; i += width)
      layer_norm_row(x.row(t) + i, w.data(), b.data(), static_cast<float>(eps), width, to + i);
  });
  return y;
}

// ---- Rotations ----

// Cosines and sines (T, H) of position times frequency, for both halves of H.
std::tuple<Tensor, Tensor> rope_angles(Tensor position, Tensor inv_freq) {
  const int64_t rows = position.size(0), half = inv_freq.size(0);
  const int32_t* positions = integers(position);
  const float* frequencies = floats(inv_freq);
  Tensor cosine = allocated({rows, 2 * half});
  Tensor sine = allocated({rows, 2 * half});
  float *cosines = results(cosine), *sines = results(sine);
  for_rows(rows, half * 16, [&](int64_t t) {
    for (int64_t i = 0; i < half; i++) {
      const float angle = static_cast<float>(positions[t]) * frequencies[i];
      const int64_t at = t * 2 * half + i;
      cosines[at] = cosines[at + half] = std::cos(angle);
      sines[at] = sines[at + half] = std::sin(angle);
    }
  });
  return {cosine, sine};
}

// Rotates each head of a row by the row's angles, its first half paired with the second.
Tensor rope(Tensor given, Tensor cosine, Tensor sine, std::optional<Tensor> real) {
  const Rows x(given);
  const int64_t width = given.size(2), half = width / 2;
  const float *cosines = floats(cosine), *sines = floats(sine);
  if (cosine.size(0) != x.count || cosine.size(1) != width || sine.numel() != cosine.numel() || width % 2)
    fail("rope takes x (T, Q, H), cosines and sines (T, H)");
  Tensor y = allocated(given.sizes());
  for_real_rows(y, real, [&](int64_t t, float* to) {
    for (int64_t head = 0; head < x.width; head += width)
      for_vectors(half, [&](int64_t i, int64_t left) {
        const float *low = x.row(t) + head + i, *high = low + half;
        const Vector c = load(cosines + t * width + i, left), s = load(sines + t * width + i, left);
        const Vector a = load(low, left), b = load(high, left);
        store(to + head + i, a * c - b * s, left);
        store(to + head + half + i, b * c + a * s, left);
      });
  });
  return y;
}

// ---- Elementwise ----

// The error function to 2e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
inline Vector error_function(Vector x) {
  const Vector size = x < 0.0f ? -x : x;
  const Vector t = 1.0f / (1.0f + 0.3275911f * size);
  Vector series = splat(1.061405429f);
  for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    series = multiply_add(series, t, splat(factor));
  const Vector y = 1.0f - series * t * exponential(-size * size);
  return x < 0.0f ? -y : y;
}

// x (1 + erf(x / sqrt(2))) / 2
Tensor gelu(Tensor given) {
  const Rows x(given);
  Tensor y = allocated(given.sizes());
  for_real_rows(y, std::nullopt, [&](int64_t t, float* to) {
    for_vectors(x.width, [&](int64_t i, int64_t left) {
      const Vector some = load(x.row(t) + i, left);
      store(to + i, 0.5f * some * (1.0f + error_function(some * 0.707106781f)), left);
    });
  });
  return y;
}

// gate / (1 + e^-gate) * up; a row has its gates first.
Tensor swiglu(Tensor given, std::optional<Tensor> real) {
  const Rows h(given);
  const int64_t width = h.width / 2;
  if (given.dim() != 2 || h.width % 2) fail("swiglu takes gate and up side by side (T, 2F)");
  Tensor y = allocated({h.count, width});
  for_real_rows(y, real, [&](int64_t t, float* to) {
    for_vectors(width, [&](int64_t i, int64_t left) {
      const Vector gate = load(h.row(t) + i, left);
      // Clamped so that the power is finite, as e^88 is.
      const Vector power = exponential(gate > -88.0f ? -gate : splat(88.0f));
      store(to + i, gate / (1.0f + power) * load(h.row(t) + width + i, left), left);
    });
  });
  return y;
}

float tanh_of(const Tensor& gate) { return std::tanh(widened(gate, 0, 1)[0]); }

// y * tanh(gate); zeros for a row t whose range [from, to) in see[t] is empty.
Tensor gated(Tensor given, Tensor gate, Tensor see) {
  const Rows y(given);
  const int32_t* sees = integers(see);
  const float factor = tanh_of(gate);
  if (see.numel() != 2 * y.count) fail("gated takes y (T, D) and see (T, 2)");
  Tensor z = allocated(given.sizes());
  for_real_rows(z, std::nullopt, [&](int64_t t, float* to) {
    if (sees[2 * t] >= sees[2 * t + 1]) return static_cast<void>(std::fill_n(to, y.width, 0.0f));
    for_vectors(y.width, [&](int64_t i, int64_t left) { store(to + i, load(y.row(t) + i, left) * factor, left); });
  });
  return z;
}

// x + tanh(gate) * (y + bias); gate and bias are optional.
Tensor add_gated(Tensor given_x, Tensor given_y, std::optional<Tensor> bias, std::optional<Tensor> gate) {
  const Rows x(given_x), y(given_y);
  if (y.count != x.count || y.width != x.width || (bias && bias->numel() != x.width))
    fail("add_gated takes x and y (W, E) and a bias (E)");
  const float factor = gate ? tanh_of(*gate) : 1.0f;
  Tensor z = allocated(given_x.sizes());
  const std::vector<float> b = bias ? widened(*bias) : std::vector<float>(x.width);
  for_real_rows(z, std::nullopt, [&](int64_t t, float* to) {
    for_vectors(x.width, [&](int64_t i, int64_t left) {
      const Vector added = load(y.row(t) + i, left) + load(b.data() + i, left);
      store(to + i, load(x.row(t) + i, left) + added * factor, left);
    });
  });
  return z;
}

// ---- Rows from and to tables ----

// Rows of a table (V, D), widened, times their `scale` (V, 1). With `first`, the table is a part that begins at that
// id, and ids outside of it get zeros.
Tensor embed(Tensor id, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> first,
             std::optional<Tensor> real) {
  const int32_t *ids = integers(id), from = first ? *integers(*first) : 0;
  const int64_t rows = id.size(0), held = weight.size(0), width = weight.size(1), some = real_of(rows, real);
  const auto holds = [=](int64_t t) { return ids[t] >= from && ids[t] - from < held; };
  for (int64_t t = 0; t < some && !first; t++)
    if (!holds(t)) fail("an id is no row of the embedding table");
  const float* scales = scale ? floats(*scale) : nullptr;
  if (scale && scale->numel() != held) fail("embed takes a table (V, D) and scales (V, 1)");
  Tensor y = allocated({rows, width});
  for_real_rows(y, real, [&](int64_t t, float* to) {
    if (!holds(t)) return static_cast<void>(std::fill_n(to, width, 0.0f));
    widen_elements(weight, (ids[t] - from) * width, width, to);
    for (int64_t i = 0; scales && i < width; i++) to[i] *= scales[ids[t] - from];
  });
  return y;
}

// The rows of x with the indices `at`.
Tensor take_rows(Tensor given, Tensor at) {
  const Rows x(given);
  const int32_t* wanted = integers(at);
  const int64_t count = at.size(0);
  Tensor y = allocated({count, x.width});
  for (int64_t i = 0; i < count; i++) {
    if (wanted[i] < 0 || wanted[i] >= x.count) fail("take_rows takes the numbers of rows");
    std::memcpy(results(y) + i * x.width, x.row(wanted[i]), x.width * sizeof(float));
  }
  return y;
}

}  // namespace
