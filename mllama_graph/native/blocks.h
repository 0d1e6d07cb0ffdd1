// Products of many rows, for CPUs with few vector registers. A block of a panel is decoded to fp32 once, into L1, and
// used for all rows of a task.
//
// Rows are first copied in the order in which tiles read them, so that the rows of a tile don't compete for the same
// cache sets.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "panels.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// Inputs of a block, unless a group (of inputs with one scale) is longer. The most rows of a task, which share blocks.
constexpr int64_t kBlockInputs = 128, kBlockSharing = 192;
// Rows of a tile. Their sums for the outputs of a panel fill most of the registers.
constexpr int kBlockRows = kRegisters == 32 ? 8 : 4;

// Rows (T, inputs) in blocks of `deep` inputs; the last block may have fewer. A block stores tile after tile. A tile
// stores the first input of each of its rows, then the second input of each, and so on.
struct BlockedRows {
  int64_t rows, inputs, deep;
  std::vector<float> values;

  int64_t tiles() const { return (rows + kBlockRows - 1) / kBlockRows; }
  // The first row of a tile. The numbers of rows of tiles are as even as possible.
  int64_t row(int64_t tile) const { return tile * rows / tiles(); }
  // A tile's inputs in the block that begins at input i.
  const float* at(int64_t tile, int64_t i) const {
    return values.data() + i * rows + row(tile) * std::min(deep, inputs - i);
  }
};

// row_of(t, free) returns row t. If it computes the row, it may store it in `free`, which has room for one row.
template <class F>
BlockedRows blocked_rows(int64_t rows, int64_t inputs, int64_t deep, const F& row_of) {
  BlockedRows to{rows, inputs, deep};
  to.values.resize(rows * inputs);
  for_rows(to.tiles(), kBlockRows * inputs, [&](int64_t tile) {
    const int64_t first = to.row(tile), tall = to.row(tile + 1) - first;
    std::vector<float> free(inputs);
    for (int64_t r = 0; r < tall; r++) {
      const float* from = row_of(first + r, free.data());
      for (int64_t i = 0; i < inputs; i += deep) {
        const int64_t some = std::min(deep, inputs - i);
        float* values = to.values.data() + i * rows + first * some + r;
        for (int64_t j = 0; j < some; j++) values[j * tall] = from[i + j];
      }
    }
  });
  return to;
}

// Decodes the words of some inputs of a panel to fp32. Scales and the decoder's factor are not applied.
template <class D>
void decode_block(const D& decoder, const typename D::Word* words, int64_t width, int64_t inputs, float* to) {
  const D table = decoder;
  for (int64_t i = 0; i < inputs; i += D::kInputs, words += width, to += D::kInputs * width) {
    [&]<size_t... input>(std::index_sequence<input...>) {
      int64_t o = 0;
      for (; o + kLanes <= width; o += kLanes) {
        const auto loaded = table.load(words + o);
        (store(to + input * width + o, table.template decode<input>(loaded)), ...);
      }
      for (; o < width; o++)
        ((to[input * width + o] = table.template decode_one<input>(words[o])), ...);
    }(std::make_index_sequence<D::kInputs>{});
  }
}

// Memory for a block of that many values. It is aligned, so that each of its vectors lies in one cache line.
inline float* aligned_block(std::vector<float>& memory, int64_t values) {
  memory.resize(values + kLine / sizeof(float));
  float* block = memory.data();
  while (reinterpret_cast<uintptr_t>(block) % kLine) block++;
  return block;
}

// What tiles prefetch: the words after their block. A tile prefetches `pace` bytes per input that it multiplies.
struct Following {
  const char* from;
  int64_t pace;

  // `bytes` are prefetched while tiles multiply `inputs` inputs; an input counts once for each tile.
  Following(const void* words, int64_t bytes, int64_t inputs)
      : from(static_cast<const char*>(words)), pace((bytes + inputs - 1) / inputs) {}
};

// The rows of a tile: input i of row r is from[i * step + r * stride].
struct TileRows {
  const float* from;
  int64_t step, stride;
};

// Adds to `sums`, whose rows are `stride` apart, the products of a tile's R rows with the first V vectors of a block.
// If S is float, the products are added to `sums`, or to 0 if `fresh`, input by input. If S is int32_t, the products of
// the block are first summed in fp32, which holds these integers exactly, and their sum is added to `sums`.
template <int R, int V, class S>
[[gnu::noinline]] void block_tile(TileRows a, const float* block, int64_t width, int64_t inputs, S* sums,
                                  int64_t stride, bool fresh, Following next) {
  constexpr bool whole = std::is_same_v<S, int32_t>;
  Vector sum[R][V] = {};
  if constexpr (!whole)
    if (!fresh)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = load(sums + r * stride + v * kLanes);
  for (; inputs; inputs--, a.from += a.step, block += width, next.from += next.pace) {
    __builtin_prefetch(next.from, 0, kLocality<R>);
    Vector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) column[v] = load(block + v * kLanes);
    add_products(sum, a.from, a.stride, column);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      S* to = sums + r * stride + v * kLanes;
      if constexpr (whole) {
        Integers y;
        std::memcpy(&y, to, sizeof y);
        y += __builtin_convertvector(sum[r][v], Integers);
        std::memcpy(to, &y, sizeof y);
      } else {
        store(to, sum[r][v]);
      }
    }
}

// block_tile for a tile of `rows` rows, at most R, and all outputs of the panel.
template <int R, class S>
void block_rows(const TileRows& a, const float* block, int64_t width, int64_t inputs, S* sums, int64_t stride,
                bool fresh, int64_t rows, const Following& next) {
  if (rows < R) {
    if constexpr (R > 1) block_rows<R - 1>(a, block, width, inputs, sums, stride, fresh, rows, next);
    return;
  }
  static_assert(kPanel == 3);
  switch (width / kLanes) {
    case 3: block_tile<R, 3>(a, block, width, inputs, sums, stride, fresh, next); break;
    case 2: block_tile<R, 2>(a, block, width, inputs, sums, stride, fresh, next); break;
    case 1: block_tile<R, 1>(a, block, width, inputs, sums, stride, fresh, next); break;
  }
  for (int64_t r = 0; r < R; r++)
    for (int64_t o = width / kLanes * kLanes; o < width; o++) {
      S& to = sums[r * stride + o];
      float sum = std::is_same_v<S, int32_t> || fresh ? 0.0f : static_cast<float>(to);
      for (int64_t i = 0; i < inputs; i++) sum = std::fma(a.from[i * a.step + r * a.stride], block[i * width + o], sum);
      if constexpr (std::is_same_v<S, int32_t>) to += static_cast<int32_t>(sum);
      else to = sum;
    }
}

// The products of rows with a weight in panels of words. Each block is decoded once for up to kBlockSharing rows. Calls
// finish(first output, width of its panel, first row, number of rows, their sums (rows, kColumns)).
template <class D, class F>
void multiply_blocks(const BlockedRows& x, const D& decoder, const typename D::Word* words, int64_t outputs,
                     const F& finish) {
  const int64_t panels = (outputs + kColumns - 1) / kColumns, parts = (x.rows + kBlockSharing - 1) / kBlockSharing;
  const int64_t bytes = kColumns * x.inputs / D::kInputs * sizeof(typename D::Word) * (1 + x.rows / 16);
  parallel_for(parts * panels, kGrainBytes / std::max<int64_t>(1, bytes) + 1, [&](int64_t from, int64_t to) {
    std::vector<float> memory;
    std::vector<int32_t> sums;
    float* block = aligned_block(memory, x.deep * kColumns);
    for (; from < to; from++) {
      const int64_t first = from / panels * x.tiles() / parts, last = (from / panels + 1) * x.tiles() / parts;
      const int64_t at = from % panels * kColumns, width = std::min(kColumns, outputs - at), top = x.row(first);
      const int64_t rows = x.row(last) - top;
      sums.assign(rows * kColumns, 0);
      for (int64_t i = 0; i < x.inputs; i += x.deep) {
        const int64_t some = std::min(x.deep, x.inputs - i);
        const auto* part = words + (at * x.inputs + i * width) / D::kInputs;
        decode_block(decoder, part, width, some, block);
        Following next(part + some * width / D::kInputs, width * sizeof(*part), D::kInputs * (last - first));
        for (int64_t tile = first; tile < last; tile++, next.from += some * next.pace)
          block_rows<kBlockRows>({x.at(tile, i), x.row(tile + 1) - x.row(tile), 1}, block, width, some,
                                 &sums[(x.row(tile) - top) * kColumns], kColumns, false,
                                 x.row(tile + 1) - x.row(tile), next);
      }
      finish(at, width, top, rows, sums.data());
    }
  });
}

}  // namespace
