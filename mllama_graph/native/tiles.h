// Operations of the vision tower: from an image's tiles to rows, and from layers to features.
//
//     C tiles   N patches per tile   L tokens per tile   R rows per tile   W = C * R   E width

#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "products.h"
#include "rows.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// (x * scale - mean) / deviation of uint8 tiles (C, 3, h, w); zeros from tile `real` on.
Tensor normalise(Tensor tiles, Tensor real, Tensor scale, Tensor mean, Tensor deviation) {
  const int64_t colours = tiles.size(1), planes = tiles.size(0) * colours, pixels = tiles.size(2) * tiles.size(3);
  if (tiles.scalar_type() != ScalarType::Byte || !tiles.is_contiguous() || mean.numel() != colours ||
      deviation.numel() != colours)
    fail("normalise takes tiles (C, 3, h, w) in uint8, a mean and a deviation of each colour");
  Tensor x = allocated(tiles.sizes());
  const auto* from = static_cast<const uint8_t*>(tiles.const_data_ptr());
  const float factor = *floats(scale), *means = floats(mean), *deviations = floats(deviation);
  const int64_t some = *integers(real);
  float* to = results(x);
  for_rows(planes, pixels, [&](int64_t plane) {
    const float m = means[plane % colours], d = deviations[plane % colours];
    for (int64_t i = plane * pixels; i < (plane + 1) * pixels; i++)
      to[i] = plane / colours < some ? (static_cast<float>(from[i]) * factor - m) / d : 0.0f;
  });
  return x;
}

// A weight (E, depth) as the second factor of multiply_matrix: its columns in panels, padded with zeros to whole
// vectors.
std::vector<float> patch_panels(const Tensor& weight) {
  const int64_t E = weight.size(0), depth = weight.numel() / E, wide = (E + kLanes - 1) / kLanes * kLanes;
  const std::vector<float> w = widened(weight);
  std::vector<float> b(wide * depth);
  panels(wide, [&](auto, auto vectors, int64_t v) {
    constexpr int64_t kSome = decltype(vectors)::value * kLanes;
    float* to = b.data() + v * kLanes * depth;
    for (int64_t e = 0; e < std::min(kSome, E - v * kLanes); e++)
      for (int64_t i = 0; i < depth; i++) to[i * kSome + e] = w[(v * kLanes + e) * depth + i];
  });
  return b;
}

// Cuts tiles (C, 3, h, w) into patches and projects them by a weight (E, 3, p, p): (C, N, E). A task of a thread is one
// line of patches.
Tensor patch_embed(Tensor x, Tensor weight) {
  const int64_t C = x.size(0), colours = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t E = weight.size(0), p = weight.size(3);
  const int64_t lines = h / p, across = w / p, depth = colours * p * p, wide = (E + kLanes - 1) / kLanes * kLanes;
  if (weight.size(1) != colours || weight.size(2) != p)
    fail("patch_embed takes x (C, 3, h, w) and a weight (E, 3, p, p)");
  const float* from = floats(x);
  const std::vector<float> b = patch_panels(weight);
  Tensor y = allocated({C, lines * across, E});
  float* to = results(y);
  for_rows(C * lines, across * depth * E, [&](int64_t line) {
    std::vector<float> patches(across * depth), products(across * wide);
    for (int64_t n = 0; n < across; n++)
      for (int64_t row = 0; row < colours * p; row++) {
        const int64_t plane = line / lines * colours + row / p, pixel = (line % lines * p + row % p) * w + n * p;
        std::memcpy(patches.data() + n * depth + row * p, from + plane * h * w + pixel, p * sizeof(float));
      }
    multiply_matrix<true>(patches.data(), depth, b.data(), products.data(), wide, across, wide, depth);
    for (int64_t n = 0; n < across; n++)
      std::memcpy(to + (line * across + n) * E, products.data() + n * wide, E * sizeof(float));
  });
  return y;
}

// The embeddings of an image's tiles: the row of its aspect ratio in a table (A, C * rows * E).
std::vector<float> of_aspect(const Tensor& table, const Tensor& aspect) {
  return widened(table, *integers(aspect) * table.size(1), table.size(1));
}

// x (C, R, E) + tanh(gate) * each tile's embedding.
Tensor add_tile_embedding(Tensor given, Tensor table, Tensor aspect, Tensor gate) {
  const float *x = floats(given), factor = tanh_of(gate);
  const int64_t C = given.size(0), R = given.size(1), E = given.size(2);
  if (table.size(1) != C * E) fail("add_tile_embedding takes x (C, R, E) and a table (A, C * E)");
  const std::vector<float> tiles = of_aspect(table, aspect);
  Tensor y = allocated(given.sizes());
  float* to = results(y);
  for_rows(C * R, E, [&](int64_t row) {
    for_vectors(E, [&](int64_t i, int64_t left) {
      store(to + row * E + i, load(x + row * E + i, left) + load(tiles.data() + row / R * E + i, left) * factor, left);
    });
  });
  return y;
}

// Puts `first` before the patches x (C, N, E) of each tile, and adds (1 - tanh(gate)) * position (L, E) + tanh(gate) *
// the tile's own positions, from a table (A, C * L * E).
Tensor add_positions(Tensor given, Tensor first, Tensor position, Tensor table, Tensor aspect, Tensor gate) {
  const float *x = floats(given), factor = tanh_of(gate);
  const int64_t C = given.size(0), L = given.size(1) + 1, E = given.size(2);
  if (first.numel() != E || position.numel() != L * E || table.size(1) != C * L * E)
    fail("add_positions takes x (C, N, E), a first row (E), positions (N + 1, E) and a table (A, C * (N + 1) * E)");
  const std::vector<float> begin = widened(first), shared = widened(position), own = of_aspect(table, aspect);
  Tensor y = allocated({C, L, E});
  float* to = results(y);
  for_rows(C * L, E, [&](int64_t row) {
    const int64_t l = row % L;
    const float* token = l ? x + (row / L * (L - 1) + l - 1) * E : begin.data();
    for_vectors(E, [&](int64_t i, int64_t left) {
      const Vector placed = load(token + i, left) + (1.0f - factor) * load(shared.data() + l * E + i, left);
      store(to + row * E + i, placed + factor * load(own.data() + row * E + i, left), left);
    });
  });
  return y;
}

// Pads the L rows of each tile of x (C, L, E) with zeros to a multiple. Also returns which rows are padding, including
// all rows from tile `real` on.
std::tuple<Tensor, Tensor> pad_rows(Tensor given, Tensor real, int64_t multiple) {
  const float* x = floats(given);
  const int64_t C = given.size(0), L = given.size(1), E = given.size(2), R = (L + multiple - 1) / multiple * multiple;
  const int64_t some = *integers(real);
  Tensor y = allocated({C * R, E});
  Tensor pad = allocated({C * R}, aoti_torch_dtype_bool());
  float* to = results(y);
  auto* padding = static_cast<bool*>(pad.mutable_data_ptr());
  for_rows(C * R, E, [&](int64_t row) {
    const int64_t tile = row / R, l = row % R;
    padding[row] = tile >= some || l >= L;
    if (l < L) std::memcpy(to + row * E, x + (tile * L + l) * E, E * sizeof(float));
    else std::fill_n(to + row * E, E, 0.0f);
  });
  return {y, pad};
}

// The first `tokens` rows of each tile of x (W, E), each followed by element 0 of that row of every kept tensor, then
// element 1, ...
Tensor join_features(Tensor given, std::vector<Tensor> kept, int64_t tiles, int64_t tokens) {
  const float* x = floats(given);
  const int64_t R = given.size(0) / tiles, E = given.size(1), count = static_cast<int64_t>(kept.size());
  std::vector<const float*> layers;
  for (const Tensor& layer : kept) {
    if (layer.numel() != given.numel()) fail("join_features takes kept tensors of the shape of x");
    layers.push_back(floats(layer));
  }
  Tensor y = allocated({tiles * tokens, E * (1 + count)});
  float* to = results(y);
  for_rows(tiles * tokens, E * (1 + count), [&](int64_t s) {
    const int64_t row = s / tokens * R + s % tokens;
    float* joined = to + s * E * (1 + count);
    std::memcpy(joined, x + row * E, E * sizeof(float));
    for (int64_t n = 0; n < count; n++)
      for (int64_t e = 0; e < E; e++) joined[E + e * count + n] = layers[n][row * E + e];
  });
  return y;
}

}  // namespace
