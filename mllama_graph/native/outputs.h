// Inputs and results of linear layers with quantised weights.

#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "tensors.h"
#include "vectors.h"

namespace {

// Rows with their inputs in the order of a weight's columns.
std::vector<float> sorted_rows(const float* x, int64_t rows, int64_t inputs, const int32_t* order) {
  std::vector<float> sorted(rows * inputs);
  for_rows(rows, inputs, [&](int64_t t) {
    for (int64_t i = 0; i < inputs; i++) sorted[t * inputs + i] = x[t * inputs + order[i]];
  });
  return sorted;
}

// The result of a linear layer for rows of x: (..., O), zeros from row `some` on.
Tensor allocated_rows(const Tensor& x, int64_t outputs, int64_t some) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = outputs;
  Tensor y = allocated(sizes);
  std::fill(results(y) + some * outputs, results(y) + y.numel(), 0.0f);
  return y;
}

// Adds a bias in the storage dtype of weights to rows of y.
template <class B>
void add_bias(float* y, const Tensor& bias, int64_t rows) {
  const auto* b = static_cast<const B*>(bias.const_data_ptr());
  const int64_t outputs = bias.numel();
  for_rows(rows, outputs, [&](int64_t t) {
    for (int64_t o = 0; o < outputs; o++) y[t * outputs + o] += widen(b[o]);
  });
}

void add_bias(float* y, const std::optional<Tensor>& bias, int64_t rows) {
  if (!bias) return;
  switch (bias->scalar_type()) {
    case ScalarType::Float: return add_bias<float>(y, *bias, rows);
    case ScalarType::BFloat16: return add_bias<BFloat16>(y, *bias, rows);
    case ScalarType::Half: return add_bias<Float16>(y, *bias, rows);
    default: fail("a bias is of float32, bfloat16 or float16");
  }
}

}  // namespace
