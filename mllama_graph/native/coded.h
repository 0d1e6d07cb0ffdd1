// Linear layers with a quantised weight and rows in fp32, for codes and machines that integers.h does not serve.
//
// A group's products with codes are summed first; the sum is then multiplied by the group's scale, and the shift by the
// sum of the row's inputs. With AVX-512 or few rows, codes are decoded in registers; else into a block in cache.
// Either way a row's products are summed in the same order, so that its result has the same bits.

#pragma once

#include <utility>
#include <vector>

#include "codes.h"
#include "panels.h"
#include "outputs.h"
#include "tensors.h"

namespace {

// Rows of a tile whose codes are decoded in registers.
template <class D>
constexpr int kCodedRows = kRegisters == 32 ? 8 : D::kInputs == 1 ? 4 : 3;
// Whether that is faster than a decoded block for any number of rows: few instructions decode a wide vector.
#if defined(__AVX512F__)
constexpr bool kDecodesEach = true;
#else
constexpr bool kDecodesEach = false;
#endif

// Inputs of a block, unless a group is longer: a decoded one stays in L1, one of codes in L2. Rows of a task, which share
// its blocks.
constexpr int64_t kDecoded = 128, kCoded = 2048, kSharing = 192;

// A weight in panels, its scales and shifts in panels of their own, and how its inputs are grouped.
template <class Word>
struct Coded {
  const Word* words;
  const float *scale, *shift;
  int64_t inputs, outputs, group;

  int64_t groups() const { return inputs / group; }
};

// Adds to c (R, V vectors) the products of R rows with `groups` groups of `group` inputs. words, scale and shift are
// those of the first group and output; `sums` (R, groups of a row) are the sums of a group's inputs. If not `scaled`,
// c has sums without a scale.
template <int R, int V, class D>
[[gnu::noinline]] void coded_tile(const D& decoder, const float* a, int64_t a_stride, const typename D::Word* words,
                                  int64_t width, int64_t group, int64_t groups, const float* scale, const float* shift,
                                  const float* sums, int64_t sums_stride, bool scaled, float* c, int64_t c_stride,
                                  int64_t ahead) {
  const D table = decoder;
  for (int64_t g = 0; g < groups; g++, scale += width, shift += shift ? width : 0) {
    Vector sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] = scaled ? Vector{} : load(c + r * c_stride + v * kLanes);
    for (int64_t i = 0; i < group; i += D::kInputs, a += D::kInputs, words += width) {
      const char* next = reinterpret_cast<const char*>(words) + ahead;
#pragma GCC unroll 4
      for (int64_t byte = 0; ahead && byte < kColumns * static_cast<int64_t>(sizeof(*words)); byte += kLine)
        __builtin_prefetch(next + byte, 0, kLocality<R>);
      typename D::Loaded loaded[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) loaded[v] = table.load(words + v * kLanes);
      [&]<size_t... input>(std::index_sequence<input...>) {
        const auto add = [&]<int at>() {
          Vector column[V];
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) column[v] = table.template decode<at>(loaded[v]);
          add_products(sum, a + at, a_stride, column);
        };
        (add.template operator()<input>(), ...);
      }(std::make_index_sequence<D::kInputs>{});
    }
    // Unrolled, so that the sums stay in registers.
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        float* to = c + r * c_stride + v * kLanes;
        Vector y = sum[r][v];
        if (scaled) {
          y = multiply_add(y, load(scale + v * kLanes) * D::kFactor, load(to));
          if (shift) y = multiply_add(splat(sums[r * sums_stride + g]), load(shift + v * kLanes), y);
        }
        store(to, y);
      }
  }
}

// coded_tile for the outputs of a panel that fill no vector, one row at a time and in the same order.
template <class D>
void coded_rest(const D& decoder, const float* a, const typename D::Word* words, int64_t width, int64_t group,
                int64_t groups, const float* scale, const float* shift, const float* sums, bool scaled, float* c,
                int64_t from) {
  for (int64_t o = from; o < width; o++)
    for (int64_t g = 0; g < groups; g++) {
      float sum = scaled ? 0.0f : c[o];
      for (int64_t i = 0; i < group; i += D::kInputs) {
        const auto word = words[(g * group + i) / D::kInputs * width + o];
        const float* at = a + g * group + i;
        [&]<size_t... input>(std::index_sequence<input...>) {
          ((sum = std::fma(at[input], decoder.template decode_one<input>(word), sum)), ...);
        }(std::make_index_sequence<D::kInputs>{});
      }
      if (scaled) {
        sum = std::fma(sum, scale[g * width + o] * D::kFactor, c[o]);
        if (shift) sum = std::fma(sums[g], shift[g * width + o], sum);
      }
      c[o] = sum;
    }
}

// coded_tile for `rows` rows, at most R. Tiles narrower than a panel, of which a weight has one, take a row at a time.
template <int R, class D>
void coded_rows(const D& decoder, const float* a, int64_t a_stride, const typename D::Word* words, int64_t width,
                int64_t group, int64_t groups, const float* scale, const float* shift, const float* sums,
                int64_t sums_stride, bool scaled, float* c, int64_t c_stride, int64_t rows, int64_t ahead) {
  if (width == kColumns) {
    if (rows == R)
      return coded_tile<R, kPanel>(decoder, a, a_stride, words, width, group, groups, scale, shift, sums, sums_stride,
                                   scaled, c, c_stride, ahead);
    if constexpr (R > 1)
      return coded_rows<R - 1>(decoder, a, a_stride, words, width, group, groups, scale, shift, sums, sums_stride,
                               scaled, c, c_stride, rows, ahead);
  }
  for (int64_t r = 0; r < rows; r++) {
    const float *row = a + r * a_stride, *row_sums = sums + r * sums_stride;
    float* to = c + r * c_stride;
    for (int64_t v = 0; v < width / kLanes; v++)
      coded_tile<1, 1>(decoder, row, a_stride, words + v * kLanes, width, group, groups, scale + v * kLanes,
                       shift ? shift + v * kLanes : nullptr, row_sums, sums_stride, scaled, to + v * kLanes, c_stride,
                       ahead);
    coded_rest(decoder, row, words, width, group, groups, scale, shift, row_sums, scaled, to,
               width / kLanes * kLanes);
  }
}

// The words of some inputs of a panel as values in fp32, without their scales and factor.
template <class D>
void decode_block(const D& decoder, const typename D::Word* words, int64_t width, int64_t inputs, float* to) {
  for (int64_t i = 0; i < inputs; i += D::kInputs, words += width, to += D::kInputs * width)
    [&]<size_t... input>(std::index_sequence<input...>) {
      int64_t o = 0;
      for (; o + kLanes <= width; o += kLanes) {
        const auto loaded = decoder.load(words + o);
        (store(to + input * width + o, decoder.template decode<input>(loaded)), ...);
      }
      for (; o < width; o++)
        ((to[input * width + o] = decoder.template decode_one<input>(words[o])), ...);
    }(std::make_index_sequence<D::kInputs>{});
}

// y = x w' for one panel and up to kSharing rows, in blocks of inputs.
template <class D>
void coded_panel(const D& decoder, const float* x, const Coded<typename D::Word>& w, int64_t at, const float* sums,
                 float* y, int64_t rows, std::vector<float>& block) {
  const int64_t width = std::min(kColumns, w.outputs - at), group = w.group, groups = w.groups();
  const auto* words = w.words + at * (w.inputs / D::kInputs);
  const float *scale = w.scale + at * groups, *shift = w.shift ? w.shift + at * groups : nullptr;
  // A single group is cut into blocks, and its scale is applied at the end.
  const bool scaled = groups > 1;
  for (int64_t t = 0; t < rows; t++) std::fill_n(y + t * w.outputs, width, 0.0f);
  const auto each_tile = [&]<class Decoder>(const Decoder& of, const typename Decoder::Word* from, int64_t i,
                                            int64_t some, int64_t ahead) {
    const int64_t part = scaled ? group : some, g = i / group;
    const int64_t tiles = (rows + kCodedRows<Decoder> - 1) / kCodedRows<Decoder>;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = tile * rows / tiles, tall = (tile + 1) * rows / tiles - row;
      coded_rows<kCodedRows<Decoder>>(of, x + row * w.inputs + i, w.inputs, from, width, part, some / part,
                                      scale + g * width, shift ? shift + g * width : nullptr, sums + row * groups + g,
                                      groups, scaled, y + row * w.outputs, w.outputs, tall, ahead);
    }
  };
  const bool once = rows <= kCodedRows<D>, decodes_each = once || kDecodesEach;
  const int64_t block_inputs = once ? w.inputs : kDecodesEach ? kCoded : kDecoded;
  const int64_t deep = scaled ? group * std::max<int64_t>(1, block_inputs / group) : block_inputs;
  for (int64_t i = 0; i < w.inputs; i += deep) {
    const int64_t some = std::min(deep, w.inputs - i);
    const auto* from = words + i / D::kInputs * width;
    if (decodes_each) {
      each_tile(decoder, from, i, some, once ? kAhead : 0);
    } else {
      // Its vectors lie in one cache line each.
      block.resize(deep * width + kLine / sizeof(float));
      float* decoded = block.data();
      while (reinterpret_cast<uintptr_t>(decoded) % kLine) decoded++;
      decode_block(decoder, from, width, some, decoded);
      each_tile(Decoded<D>{}, decoded, i, some, 0);
    }
  }
  if (scaled) return;
  for (int64_t t = 0; t < rows; t++)
    for (int64_t o = 0; o < width; o++) {
      float& to = y[t * w.outputs + o];
      to *= scale[o] * D::kFactor;
      if (shift) to = std::fma(sums[t * groups], shift[o], to);
    }
}

// The sum of each group's inputs: (rows, groups).
std::vector<float> group_sums(const float* x, int64_t rows, int64_t inputs, int64_t group) {
  const int64_t groups = inputs / group;
  std::vector<float> sums(rows * groups);
  for_rows(rows, inputs, [&](int64_t t) {
    for (int64_t g = 0; g < groups; g++) {
      Vector sum{};
      float rest = 0;
      int64_t i = g * group;
      for (; i + kLanes <= (g + 1) * group; i += kLanes) sum += load(x + t * inputs + i);
      for (; i < (g + 1) * group; i++) rest += x[t * inputs + i];
      sums[t * groups + g] = total(sum) + rest;
    }
  });
  return sums;
}

template <class D>
void coded_of(const D& decoder, const float* x, const Coded<typename D::Word>& w, const float* sums, float* y,
              int64_t rows) {
  const int64_t panels = (w.outputs + kColumns - 1) / kColumns, blocks = (rows + kSharing - 1) / kSharing;
  const int64_t bytes = kColumns * w.inputs / D::kInputs * sizeof(typename D::Word) * (1 + rows / 16);
  const int64_t grain = kGrainBytes / std::max<int64_t>(1, bytes) + 1;
  parallel_for(blocks * panels, grain, [&](int64_t first, int64_t last) {
    std::vector<float> block;
    for (; first < last; first++) {
      const int64_t row = first / panels * rows / blocks, tall = (first / panels + 1) * rows / blocks - row;
      const int64_t at = first % panels * kColumns;
      coded_panel(decoder, x + row * w.inputs, w, at, sums + (w.shift ? row * w.groups() : 0),
                  y + row * w.outputs + at, tall, block);
    }
  });
}

}  // namespace
