// Matrix products whose second factor stays in cache, in panels of up to 3 vectors.

#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

// Rows per tile for panels of 1, 2 and 3 vectors: their sums fill the registers.
constexpr int kRows[] = {0, kRegisters / 2, kRegisters * 3 / 8, kRegisters / 4};

// Calls f(rows, vectors, first vector) for each panel; `rows` is the number of rows per tile, from kRows.
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

// c = a b if `fresh`, else c += a b, for R rows and a panel of V vectors, whose rows are contiguous in b.
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

// multiply_tile for c (rows, columns), a (rows, depth), b (depth, columns) in panels; columns a multiple of kLanes.
template <bool fresh>
void multiply_matrix(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride, int64_t rows,
                     int64_t columns, int64_t depth) {
  panels(columns, [&](auto some, auto vectors, int64_t v) {
    constexpr int R = some, V = vectors;
    const float* from = b + v * kLanes * depth;
    float* to = c + v * kLanes;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      multiply_tile<R, V, fresh>(a + r * a_stride, a_stride, from, depth, to + r * c_stride, c_stride);
    for (; r < rows; r++)
      multiply_tile<1, V, fresh>(a + r * a_stride, a_stride, from, depth, to + r * c_stride, c_stride);
  });
}

}  // namespace
