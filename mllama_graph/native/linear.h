// Linear layers: products of rows with a weight, which is stored in panels (panels.h).

#pragma once

#include <limits>

#include "blocks.h"
#include "codes.h"
#include "four_rows.h"
#include "panels.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// Loads the vector of one of kPaired interleaved inputs.
template <int part, class W>
inline Vector load_part(const W* inputs) {
  if constexpr (kPaired<W> == 1) return load(inputs);
  Integers pairs;
  std::memcpy(&pairs, inputs, sizeof pairs);
  return reinterpret_cast<Vector>(part == 0 ? pairs << 16 : pairs & static_cast<int32_t>(0xffff0000));
}

// add_products for one of kPaired interleaved inputs.
template <int part, int R, int V, class W>
[[gnu::always_inline]] inline void add_input(Vector (&sum)[R][V], const float* a, int64_t a_stride, const W* b) {
  // If no registers are left to keep the pairs in, they are loaded again: this hides from the compiler that they are
  // the same.
  if constexpr (part && R > 1 && R * V + 2 * V + 2 > kRegisters) asm("" : "+r"(b));
  Vector column[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) column[v] = load_part<part>(b + v * kLanes * kPaired<W>);
  add_products(sum, a + part, a_stride, column);
}

// Up to this many rows, a panel is read once for all of them: their sums fill the registers. With 16 registers and
// pairs, stream_tile has none left for the sums of a fourth row, since the mask of pairs takes one; add_four_rows does
// it.
template <class W>
constexpr int kOnce = kRegisters == 32 ? 8 : kPaired<W> == 2 && !kFourRows ? 3 : 4;

// c += a b for R rows of a and the first V vectors of a panel of `width` columns, which has `depth` rows. Meanwhile
// prefetches from `next` on, which advances by `pace` elements per step.
template <int R, int V, class W>
[[gnu::noinline]] void stream_tile(const float* a, int64_t a_stride, const W* b, int64_t width, int64_t depth, float* c,
                                   int64_t c_stride, const W* next, int64_t pace) {
  Vector sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = load(c + r * c_stride + v * kLanes);
  // Not unrolled: compilers would run out of registers.
  for (; depth >= kPaired<W>; depth -= kPaired<W>, a += kPaired<W>, b += kPaired<W> * width, next += pace) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < kColumns * kPaired<W> * static_cast<int64_t>(sizeof(W)); byte += kLine)
      __builtin_prefetch(next + byte / sizeof(W), 0, kLocality<R>);
    add_input<0, R, V>(sum, a, a_stride, b);
    if constexpr (kPaired<W> == 2) add_input<1, R, V>(sum, a, a_stride, b);
  }
  if (depth) {
    Vector column[V];
    for (int v = 0; v < V; v++) column[v] = load(b + v * kLanes);
    add_products(sum, a, a_stride, column);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

// stream_tile for `rows` rows, at most R.
template <int R, int V, class W>
void stream_rows(const float* a, int64_t a_stride, const W* b, int64_t width, int64_t depth, float* c, int64_t c_stride,
                 int64_t rows, const W* next, int64_t pace) {
  if (rows == R) {
    if constexpr (kFourRows && R == 4 && V == kPanel && kPaired<W> == 2) {
      add_four_rows(a, a_stride, b, depth / 2, c, c_stride, next, pace);
      if (depth % 2 == 0) return;
      a += depth - 1, b += (depth - 1) * width, depth = 1;
    }
    return stream_tile<R, V>(a, a_stride, b, width, depth, c, c_stride, next, pace);
  }
  if constexpr (R > 1) stream_rows<R - 1, V>(a, a_stride, b, width, depth, c, c_stride, rows, next, pace);
}

// stream_tile for any number of rows, in tiles of heights as even as possible. Prefetches what follows b in memory or,
// if b is read once, what is ahead_of bytes ahead.
template <int V, class W>
void stream(const float* a, int64_t a_stride, const W* b, int64_t width, int64_t depth, float* c, int64_t c_stride,
            int64_t rows) {
  const int64_t tiles = (rows + kOnce<W> - 1) / kOnce<W>, pace = kPaired<W> * width / tiles;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t row = tile * rows / tiles, some = (tile + 1) * rows / tiles - row;
    const W* next = b + depth * width + tile * (depth / kPaired<W>) * pace;
    stream_rows<kOnce<W>, V>(a + row * a_stride, a_stride, b, width, depth, c + row * c_stride, c_stride, some,
                             tiles == 1 ? b + ahead_of(rows) / sizeof(W) : next, pace);
  }
}

// Writes rows (R, I) to the panels of a weight (O, I), from its row `at` on. The elements of a row have the dtype of
// the weight and lie side by side; to fp32 weights, which scales are too, rows of 16 bits or any strides are written as
// well.
void lay_rows_(Tensor weight, int64_t at, Tensor rows) {
  const int64_t count = rows.size(0), outputs = weight.size(0), inputs = weight.size(1);
  const int64_t size = weight.scalar_type() == ScalarType::Float ? 4 : 2;
  const bool same_dtype = rows.scalar_type() == weight.scalar_type();
  if (weight.dim() != 2 || !weight.is_contiguous() || rows.dim() != 2 || rows.size(1) != inputs || at < 0 ||
      at + count > outputs || (size == 2 && (!same_dtype || (inputs > 1 && rows.stride(1) != 1))))
    fail("lay_rows_ takes a contiguous weight (O, I), and rows (R, I) of its dtype whose elements are side by side");
  auto* to = static_cast<char*>(weight.mutable_data_ptr());
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  const ByteRows given{from, rows.stride(0) * size};
  const auto same = [](auto x) { return x; };
  switch (weight.scalar_type()) {
    case ScalarType::Half: return lay_rows<uint16_t>(to, outputs, inputs, at, count, given, same);
    case ScalarType::BFloat16:
      return for_panels(to, outputs, inputs * size, at, count,
                        [&](int64_t row, int64_t some, char* panel, int64_t column, int64_t width) {
                          const int64_t pairs = inputs / 2;
                          const char* first = given.row(row);
                          turn_rows(first, given.stride, some, pairs, reinterpret_cast<uint32_t*>(panel) + column,
                                    width, same);
                          auto* odd = reinterpret_cast<uint16_t*>(panel) + pairs * 2 * width + column;
                          turn_rows(first + pairs * 4, given.stride, some, inputs % 2, odd, width, same);
                        });
    case ScalarType::Float: break;
    default: fail("lay_rows_ takes weights of float32, bfloat16 and float16");
  }
  if (same_dtype && rows.stride(1) == 1) return lay_rows<uint32_t>(to, outputs, inputs, at, count, given, same);
  const auto lay = [&]<class W>() {
    const auto* data = reinterpret_cast<const W*>(from);
    const int64_t across = rows.stride(1), down = rows.stride(0);
    for_panels(to, outputs, inputs * size, at, count,
               [=](int64_t row, int64_t some, char* panel, int64_t column, int64_t width) {
                 auto* columns = reinterpret_cast<float*>(panel) + column;
                 // Of transposed scales, those of outputs lie side by side.
                 if (down == 1)
                   for (int64_t i = 0; i < inputs; i++)
                     for (int64_t o = 0; o < some; o++) columns[i * width + o] = widen(data[row + o + i * across]);
                 else
                   for (int64_t o = 0; o < some; o++)
                     for (int64_t i = 0; i < inputs; i++)
                       columns[i * width + o] = widen(data[(row + o) * down + i * across]);
               });
  };
  switch (rows.scalar_type()) {
    case ScalarType::Float: return lay.operator()<float>();
    case ScalarType::BFloat16: return lay.operator()<BFloat16>();
    case ScalarType::Half: return lay.operator()<Float16>();
    default: fail("lay_rows_ takes scales of float32, bfloat16 and float16");
  }
}

// y += x w' for V vectors of a panel of `width` outputs.
template <int V, class W>
void add_vectors(const float* x, const W* w, int64_t inputs, int64_t width, float* y, int64_t stride, int64_t rows) {
  const int64_t deep = rows <= kOnce<W> ? inputs : kDeep;
  for (int64_t i = 0; i < inputs; i += deep)
    stream<V>(x + i, inputs, w + i * width, width, std::min(deep, inputs - i), y, stride, rows);
}

// y += x w' for a panel of `width` outputs, the last of which may not fill a vector.
template <class W>
void add_panel(const float* x, const W* w, int64_t inputs, int64_t width, float* y, int64_t stride, int64_t rows) {
  static_assert(kPanel == 3);
  switch (width / kLanes) {
    case 3: add_vectors<3>(x, w, inputs, width, y, stride, rows); break;
    case 2: add_vectors<2>(x, w, inputs, width, y, stride, rows); break;
    case 1: add_vectors<1>(x, w, inputs, width, y, stride, rows); break;
  }
  for (int64_t t = 0; t < rows; t++)
    for (int64_t o = width / kLanes * kLanes; o < width; o++)
      for (int64_t i = 0; i < inputs; i++)
        y[t * stride + o] = std::fma(x[t * inputs + i], widen(w[place<W>(i, o, inputs, width)]), y[t * stride + o]);
}

// Elements of 16 bits as words of codes: bf16 in pairs (kPaired).
template <class W>
struct Wide : OneCode {
  using Word = W;

  Vector load(const W* from) const { return ::load(from); }
  template <int input>
  float decode_one(W x) const { return widen(x); }
};
template <>
struct Wide<BFloat16> {
  using Word = uint32_t;
  static constexpr int kInputs = 2;

  Integers load(const uint32_t* from) const { return load_words(from); }
  template <int input>
  Vector decode(Integers x) const {
    return reinterpret_cast<Vector>(input ? x & static_cast<int32_t>(0xffff0000) : x << 16);
  }
  template <int input>
  float decode_one(uint32_t x) const { return widen(BFloat16{static_cast<uint16_t>(x >> 16 * input)}); }
};

// From so many rows on, weights of 16 bits are widened in blocks. Else every tile would widen them again: with few
// registers, tiles are many.
constexpr int64_t kWidened = kRegisters == 16 ? 12 : std::numeric_limits<int64_t>::max();
// The fewest rows of a part, if rows are divided into parts.
constexpr int64_t kFewest = 16;

// y = x w' for many rows and a panel of 16-bit weights, each block of which is widened once.
template <class W>
void widened_panel(const float* x, const W* w, int64_t inputs, int64_t width, float* y, int64_t stride, int64_t rows) {
  using D = Wide<W>;
  const int64_t tiles = (rows + kBlockRows - 1) / kBlockRows;
  alignas(kLine) float block[kDeep * kColumns];
  for (int64_t i = 0; i < inputs; i += kDeep) {
    const int64_t some = std::min(kDeep, inputs - i);
    decode_block(D{}, reinterpret_cast<const typename D::Word*>(w + i * width), width, some, block);
    Following next(w + (i + some) * width, width * sizeof(W), tiles);
    for (int64_t tile = 0; tile < tiles; tile++, next.from += some * next.pace) {
      const int64_t row = tile * rows / tiles, tall = (tile + 1) * rows / tiles - row;
      block_rows<kBlockRows>({x + row * inputs + i, 1, inputs}, block, width, some, y + row * stride, stride, i == 0,
                             tall, next);
    }
  }
}

// The number of parts that rows are divided into: each has at most `most` rows, and all threads have several tasks, a
// task being a part of the rows with a panel.
inline int64_t row_parts(int64_t rows, int64_t panels, int64_t most) {
  const int64_t tasks = 4 * torch::stable::get_num_threads();
  return std::max((rows + most - 1) / most, std::min((tasks + panels - 1) / panels, rows / kFewest));
}

// Computes the first `rows` rows of y.
template <class W>
void linear_of(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& y, int64_t rows) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const auto* w = static_cast<const W*>(weight.const_data_ptr());
  const auto* b = bias ? static_cast<const W*>(bias->const_data_ptr()) : nullptr;
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const bool widened = sizeof(W) == 2 && rows >= kWidened && inputs % kPaired<W> == 0;
  const int64_t panels = (outputs + kColumns - 1) / kColumns;
  const int64_t parts = row_parts(rows, panels, widened ? kBlockSharing : kTall);
  // Many rows take longer than reading their weight.
  const int64_t bytes = kColumns * inputs * sizeof(W) * (1 + rows / 16);
  const int64_t grain = kGrainBytes / std::max<int64_t>(1, bytes) + 1;
  parallel_for(parts * panels, grain, [&](int64_t first, int64_t last) {
    for (; first < last; first++) {
      const int64_t row = first / panels * rows / parts, tall = (first / panels + 1) * rows / parts - row;
      const int64_t at = first % panels * kColumns, columns = std::min(kColumns, outputs - at);
      const float* x = from + row * inputs;
      float* y = to + row * outputs + at;
      if (widened) {
        if constexpr (sizeof(W) == 2) widened_panel(x, w + at * inputs, inputs, columns, y, outputs, tall);
      } else {
        for (int64_t t = 0; t < tall; t++) std::fill_n(y + t * outputs, columns, 0.0f);
        add_panel(x, w + at * inputs, inputs, columns, y, outputs, tall);
      }
      for (int64_t t = 0; b && t < tall; t++)
        for (int64_t o = 0; o < columns; o++) y[t * outputs + o] += widen(b[at + o]);
    }
  });
}

// y = x w' + bias: x (..., I) fp32; w (O, I) in panels and bias (O) fp32, bf16 or fp16. Rows from `real` on get zeros.
Tensor linear(Tensor given, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> real) {
  const Tensor x = packed(given);
  if (x.scalar_type() != ScalarType::Float || weight.dim() != 2 || !weight.is_contiguous() || x.dim() == 0 ||
      x.size(x.dim() - 1) != weight.size(1) || (bias && bias->scalar_type() != weight.scalar_type()))
    fail("linear takes x (..., I) in float32, a contiguous weight (O, I) and a bias (O) of the weight's dtype");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  Tensor y = allocated(sizes);
  if (!y.numel()) return y;
  const Tensor* b = bias ? &*bias : nullptr;
  const int64_t outputs = weight.size(0), rows = y.numel() / outputs, some = real_of(rows, real);
  switch (weight.scalar_type()) {
    case ScalarType::Float: linear_of<float>(x, weight, b, y, some); break;
    case ScalarType::BFloat16: linear_of<BFloat16>(x, weight, b, y, some); break;
    case ScalarType::Half: linear_of<Float16>(x, weight, b, y, some); break;
    default: fail("linear takes weights of float32, bfloat16 and float16");
  }
  auto* padding = static_cast<float*>(y.mutable_data_ptr()) + some * outputs;
  parallel_for((rows - some) * outputs, kGrainBytes, [&](int64_t first, int64_t last) {
    std::fill(padding + first, padding + last, 0.0f);
  });
  return y;
}

}  // namespace
