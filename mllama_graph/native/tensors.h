// Inputs of kernels: tensors of torch's stable ABI, their rows, and weights in their storage dtype.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

// A new tensor on the CPU. torch::stable::new_empty and contiguous look up their operators by name in each call, which
// takes a microsecond: as long as the work on one row.
Tensor allocated(torch::headeronly::IntHeaderOnlyArrayRef sizes, int32_t dtype = aoti_torch_dtype_float32()) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * sizes[axis];
  AtenTensorHandle made;
  const auto device = aoti_torch_device_type_cpu();
  const auto dims = static_cast<int64_t>(sizes.size());
  if (aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, device, 0, &made))
    fail("no memory for a result");
  return Tensor(made);
}

const float* floats(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float || !x.is_contiguous()) fail("a kernel takes contiguous float32");
  return static_cast<const float*>(x.const_data_ptr());
}

const int32_t* integers(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Int || !x.is_contiguous()) fail("a kernel takes contiguous int32");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

float* results(const Tensor& y) { return static_cast<float*>(y.mutable_data_ptr()); }

// How many of `rows` rows are not padding.
int64_t real_of(int64_t rows, const std::optional<Tensor>& real) {
  return real ? std::clamp<int64_t>(*static_cast<const int32_t*>(real->const_data_ptr()), 0, rows) : rows;
}

// Memory that is written before it is read.
std::unique_ptr<float[]> scratch(int64_t count) { return std::make_unique_for_overwrite<float[]>(count); }

// Copies `count` elements of a weight from element `first` on, widened to float32.
void widen_elements(const Tensor& weight, int64_t first, int64_t count, float* to) {
  const auto copy = [&](const auto* from) {
    for (int64_t i = 0; i < count; i++) to[i] = widen(from[first + i]);
  };
  const void* data = weight.const_data_ptr();
  if (!weight.is_contiguous() || first < 0 || first + count > weight.numel())
    fail("a kernel takes a contiguous weight that is large enough");
  switch (weight.scalar_type()) {
    case ScalarType::Float: return copy(static_cast<const float*>(data));
    case ScalarType::BFloat16: return copy(static_cast<const BFloat16*>(data));
    case ScalarType::Half: return copy(static_cast<const Float16*>(data));
    case ScalarType::Char: return copy(static_cast<const int8_t*>(data));
    default: fail("a kernel takes weights of float32, bfloat16, float16 and int8");
  }
}

std::vector<float> widened(const Tensor& weight, int64_t first, int64_t count) {
  std::vector<float> elements(count);
  widen_elements(weight, first, count, elements.data());
  return elements;
}

std::vector<float> widened(const Tensor& weight) { return widened(weight, 0, weight.numel()); }

// ---- Rows in parallel ----

// Elements of a part: enough to take longer than its share of beginning and ending a loop.
constexpr int64_t kGrain = 1 << 12;

// Calls f with each of `rows` rows of `width` elements, in parallel if there are enough of them.
template <class F>
void for_rows(int64_t rows, int64_t width, const F& f) {
  parallel_for(rows, kGrain / std::max<int64_t>(1, width) + 1, [&](int64_t first, int64_t last) {
    for (; first < last; first++) f(first);
  });
}

// x in contiguous memory. Rows of float32 that are part of wider rows are copied by the kernels' own threads: torch's
// would wait for some milliseconds after a copy without sleeping, on cores that kernels need.
Tensor packed(const Tensor& x) {
  if (x.is_contiguous()) return x;
  int64_t width = 1;
  bool rows = x.scalar_type() == ScalarType::Float;
  for (int64_t axis = x.dim() - 1; axis > 0; width *= x.size(axis--)) rows &= x.stride(axis) == width;
  if (!rows) return torch::stable::contiguous(x);
  Tensor y = allocated(x.sizes());
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  float* to = results(y);
  const int64_t stride = x.stride(0);
  for_rows(x.size(0), width, [=](int64_t t) { std::copy_n(from + t * stride, width, to + t * width); });
  return y;
}

// The rows of a tensor along its first axis, `width` elements each, `stride` elements apart.
struct Rows {
  Tensor held;
  const float* data;
  int64_t count, width, stride;

  explicit Rows(const Tensor& x) : held(x), count(x.size(0)), width(count ? x.numel() / count : 0), stride(width) {
    int64_t inner = 1;
    bool side_by_side = true;
    for (int64_t axis = x.dim() - 1; axis > 0; axis--) {
      side_by_side &= x.stride(axis) == inner || x.size(axis) == 1;
      inner *= x.size(axis);
    }
    if (x.scalar_type() != ScalarType::Float) fail("a kernel takes rows of float32");
    if (side_by_side) stride = x.stride(0);
    else held = packed(x);
    data = static_cast<const float*>(held.const_data_ptr());
  }

  const float* row(int64_t t) const { return data + t * stride; }
};

// ---- Boxed functions for the dispatcher: arguments on a stack, replaced by the results ----
//
// Like TORCH_BOX, but without the tuples and checks that take a sixth of the time of compiling this library.

template <class R, class... A, size_t... I>
void call(R (*f)(A...), StableIValue* stack, std::index_sequence<I...>) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if constexpr (std::is_void_v<R>) {
    f(to<A>(stack[I])...);
  } else if constexpr (std::is_same_v<R, Tensor>) {
    stack[0] = from(f(to<A>(stack[I])...));
  } else {
    const auto [first, second] = f(to<A>(stack[I])...);
    stack[0] = from(first), stack[1] = from(second);
  }
}

template <class R, class... A>
void call(R (*f)(A...), StableIValue* stack, uint64_t arguments) {
  if (arguments != sizeof...(A)) fail("an operator's schema and its kernel have different numbers of arguments");
  call(f, stack, std::index_sequence_for<A...>{});
}

template <auto f>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t) {
  call(f, stack, arguments);
}

// Calls f with each row that is not padding, and writes zeros to the padding rows of y.
template <class F>
void for_real_rows(const Tensor& y, const std::optional<Tensor>& real, const F& f) {
  const int64_t rows = y.size(0), width = rows ? y.numel() / rows : 0, some = real_of(rows, real);
  float* to = results(y);
  for_rows(rows, width, [&](int64_t t) {
    if (t < some) f(t, to + t * width);
    else std::fill_n(to + t * width, width, 0.0f);
  });
}

}  // namespace
