// Linear layers with a quantised weight and rows in fp32, for codes and machines that integers.h does not serve.
//
// A group's products with codes are summed first; the sum is then multiplied by the group's scale, and the shift by the
// sum of the row's inputs. With AVX-512 or few rows, codes are decoded in registers; else into a block (blocks.h).
// Either way a row's products are summed in the same order, so that its result has the same bits.

#pragma once

#include <utility>
#include <vector>

#include "blocks.h"
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

// Inputs of a block of codes, which stays in L2, unless a group is longer.
constexpr int64_t kCoded = 2048;

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
// c has sums without a scale. blocked: a is a tile of BlockedRows, and
// `ahead` what is added per input to the address `next` that is prefetched.
template <int R, int V, bool blocked = false, class D>
[[gnu::noinline]] void coded_tile(const D& decoder, const float* a, int64_t a_stride, const typename D::Word* words,
                                  int64_t width, int64_t group, int64_t groups, const float* scale, const float* shift,
                                  const float* sums, int64_t sums_stride, bool scaled, float* c, int64_t c_stride,
                                  int64_t ahead, const char* next = nullptr) {
  constexpr int64_t step = blocked ? R : 1;
  const D table = decoder;
  for (int64_t g = 0; g < groups; g++, scale += width, shift += shift ? width : 0) {
    Vector sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] = scaled ? Vector{} : load(c + r * c_stride + v * kLanes);
    for (int64_t i = 0; i < group; i += D::kInputs, a += D::kInputs * step, words += width) {
      if constexpr (blocked) __builtin_prefetch(next, 0, kLocality<R>), next += ahead;
#pragma GCC unroll 4
      for (int64_t byte = 0; !blocked && ahead && byte < kColumns * static_cast<int64_t>(sizeof(*words)); byte += kLine)
        __builtin_prefetch(reinterpret_cast<const char*>(words) + ahead + byte, 0, kLocality<R>);
      typename D::Loaded loaded[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) loaded[v] = table.load(words + v * kLanes);
      [&]<size_t... input>(std::index_sequence<input...>) {
        const auto add = [&]<int at>() {
          Vector column[V];
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) column[v] = table.template decode<at>(loaded[v]);
          add_products(sum, a + at * step, blocked ? 1 : a_stride, column);
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

// Inputs that are taken at a time: `most`, or the whole groups that fit, at least one.
template <class Word>
int64_t depth_of(const Coded<Word>& w, int64_t most) {
  return w.groups() > 1 ? w.group * std::max<int64_t>(1, most / w.group) : most;
}

// Multiplies `rows` rows of a weight with a single group, whose scale is applied at the end, by it.
template <class D>
void scale_panel(const Coded<typename D::Word>& w, int64_t at, int64_t width, const float* sums, float* y,
                 int64_t rows) {
  for (int64_t t = 0; t < rows; t++)
    for (int64_t o = 0; o < width; o++) {
      float& to = y[t * w.outputs + o];
      to *= w.scale[at + o] * D::kFactor;
      if (w.shift) to = std::fma(sums[t], w.shift[at + o], to);
    }
}

// y = x w' for one panel and rows whose codes are decoded in registers.
template <class D>
void coded_panel(const D& decoder, const float* x, const Coded<typename D::Word>& w, int64_t at, const float* sums,
                 float* y, int64_t rows) {
  const int64_t width = std::min(kColumns, w.outputs - at), groups = w.groups();
  const float *scale = w.scale + at * groups, *shift = w.shift ? w.shift + at * groups : nullptr;
  const bool scaled = groups > 1;
  for (int64_t t = 0; t < rows; t++) std::fill_n(y + t * w.outputs, width, 0.0f);
  const int64_t tiles = (rows + kCodedRows<D> - 1) / kCodedRows<D>;
  const int64_t deep = tiles == 1 ? w.inputs : depth_of(w, kCoded);
  for (int64_t i = 0; i < w.inputs; i += deep) {
    const int64_t some = std::min(deep, w.inputs - i), part = scaled ? w.group : some, g = i / w.group;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = tile * rows / tiles, tall = (tile + 1) * rows / tiles - row;
      coded_rows<kCodedRows<D>>(decoder, x + row * w.inputs + i, w.inputs,
                                w.words + (at * w.inputs + i * width) / D::kInputs, width, part, some / part,
                                scale + g * width, shift ? shift + g * width : nullptr, sums + row * groups + g, groups,
                                scaled, y + row * w.outputs, w.outputs, tall, tiles == 1 ? ahead_of(rows) : 0);
    }
  }
  if (!scaled) scale_panel<D>(w, at, width, sums, y, rows);
}

// coded_tile for a tile of `rows` blocked rows, at most R, and a block of a whole panel.
template <int R, class D>
void blocked_tile(const Decoded<D>& decoder, const float* a, const float* block, int64_t group, int64_t groups,
                  const float* scale, const float* shift, const float* sums, int64_t sums_stride, bool scaled, float* c,
                  int64_t c_stride, int64_t rows, const Following& next) {
  if (rows == R)
    return coded_tile<R, kPanel, true>(decoder, a, 1, block, kColumns, group, groups, scale, shift, sums, sums_stride,
                                       scaled, c, c_stride, next.pace, next.from);
  if constexpr (R > 1)
    blocked_tile<R - 1>(decoder, a, block, group, groups, scale, shift, sums, sums_stride, scaled, c, c_stride, rows,
                        next);
}

// y = x w' for one whole panel and the tiles `first` to `last` - 1 of x, whose first row has its sums and results at
// `sums` and y. Each block is decoded once.
template <class D>
void decoded_panel(const D& decoder, const BlockedRows& x, int64_t first, int64_t last,
                   const Coded<typename D::Word>& w, int64_t at, const float* sums, float* y,
                   std::vector<float>& memory) {
  const int64_t groups = w.groups(), top = x.row(first), rows = x.row(last) - top;
  const float *scale = w.scale + at * groups, *shift = w.shift ? w.shift + at * groups : nullptr;
  const bool scaled = groups > 1;
  for (int64_t t = 0; t < rows; t++) std::fill_n(y + t * w.outputs, kColumns, 0.0f);
  float* block = aligned_block(memory, x.deep * kColumns);
  for (int64_t i = 0; i < w.inputs; i += x.deep) {
    const int64_t some = std::min(x.deep, w.inputs - i), part = scaled ? w.group : some, g = i / w.group;
    const auto* words = w.words + (at * w.inputs + i * kColumns) / D::kInputs;
    decode_block(decoder, words, kColumns, some, block);
    Following next(words + some * kColumns / D::kInputs, kColumns * sizeof(*words), D::kInputs * (last - first));
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t row = x.row(tile) - top;
      blocked_tile<kBlockRows>(Decoded<D>{}, x.at(tile, i), block, part, some / part, scale + g * kColumns,
                               shift ? shift + g * kColumns : nullptr, sums + row * groups + g, groups, scaled,
                               y + row * w.outputs, w.outputs, x.row(tile + 1) - x.row(tile), next);
      next.from += some * next.pace;
    }
  }
  if (!scaled) scale_panel<D>(w, at, kColumns, sums, y, rows);
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
  const int64_t panels = (w.outputs + kColumns - 1) / kColumns, parts = (rows + kBlockSharing - 1) / kBlockSharing;
  const int64_t bytes = kColumns * w.inputs / D::kInputs * sizeof(typename D::Word) * (1 + rows / 16);
  const int64_t grain = kGrainBytes / std::max<int64_t>(1, bytes) + 1;
  BlockedRows blocked{};
  if (!kDecodesEach && rows > kCodedRows<D>)
    blocked = blocked_rows(rows, w.inputs, depth_of(w, kBlockInputs),
                           [=](int64_t t, float*) { return x + t * w.inputs; });
  parallel_for(parts * panels, grain, [&](int64_t first, int64_t last) {
    std::vector<float> memory;
    for (; first < last; first++) {
      const int64_t part = first / panels, at = first % panels * kColumns, groups = w.shift ? w.groups() : 0;
      if (blocked.rows && w.outputs - at >= kColumns) {
        const int64_t tile = part * blocked.tiles() / parts, row = blocked.row(tile);
        decoded_panel(decoder, blocked, tile, (part + 1) * blocked.tiles() / parts, w, at, sums + row * groups,
                      y + row * w.outputs + at, memory);
        continue;
      }
      const int64_t row = part * rows / parts, tall = (part + 1) * rows / parts - row;
      coded_panel(decoder, x + row * w.inputs, w, at, sums + row * groups, y + row * w.outputs + at, tall);
    }
  });
}

}  // namespace
