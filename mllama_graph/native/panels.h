// The layout of the weight of a linear layer.
//
// With few rows, the time of a product is that of reading the weight (O, I), which is read once and in sequence, as
// memory is read fastest. It is stored in panels of kPanel vectors of outputs: a panel has these outputs' weights for
// the first input, then for the next input, and so on. The last panel has the remaining outputs.

#pragma once

#include <type_traits>
#include <vector>

#include "tensors.h"
#include "vectors.h"

namespace {

constexpr int kPanel = 3;
constexpr int64_t kColumns = kPanel * kLanes;

// bf16 weights are interleaved by pairs of inputs, one element of each in 32 bits, so that one load and one instruction
// per input widen both; an odd last input is stored alone.
template <class W>
constexpr int kPaired = std::is_same_v<W, BFloat16> ? 2 : 1;

#if defined(__CLZERO__)  // an instruction that only AMD's processors have
constexpr bool kAmd = true;
#else
constexpr bool kAmd = false;
#endif
// Fastest as measured: the locality of __builtin_prefetch (3: into L1, 2: into L2, 0: into L1 and from there to no other
// cache) for a tile of R rows. On Zen 4, L2 instead of L1 reads a weight 12 % faster for one row, and 5 % slower for eight.
// On Zen 1, 0 reads a weight of fp32 and bf16 15 to 20 % faster for one row: L2 then has nothing to drop to L3.
template <int R>
constexpr int kLocality = kRegisters == 16 ? (kAmd && R == 1 ? 0 : 2) : kAmd && R <= 2 ? 2 : 3;
// How many bytes ahead to prefetch if a panel is read once: `most`, or where L1 alone holds them, what was fastest of 256 to
// 4096.
constexpr int64_t kAhead = 4096;
inline int64_t ahead_of(int64_t rows, int64_t most = kAhead) { return rows == 1 && kLocality<1> == 0 ? 768 : most; }

// kDeep: inputs of a panel per pass of more than kOnce rows, so that they stay in L1. kTall: rows per task, so that
// theirs stay in L2.
constexpr int64_t kDeep = 256, kTall = 48;
// Minimum bytes of a weight per thread.
constexpr int64_t kGrainBytes = 1 << 16;

// Index of the weight of `output` for input i in a panel of `width` outputs.
template <class W>
inline int64_t place(int64_t i, int64_t output, int64_t inputs, int64_t width) {
  const bool paired = kPaired<W> == 2 && i < inputs / 2 * 2;
  return paired ? (i / 2 * width + output) * 2 + i % 2 : i * width + output;
}

// Rows of bytes to the columns of a panel: `count` outputs from `rows`, a multiple of 4 inputs. 16 outputs are taken at
// once, in words of four inputs whose bytes are then separated.
inline void turn_bytes(const uint8_t* rows, int64_t inputs, int64_t count, uint8_t* to) {
  constexpr int kOutputs = 16;
  typedef uint32_t Words __attribute__((vector_size(4 * kOutputs)));
  typedef uint8_t Bytes __attribute__((vector_size(kOutputs)));
  int64_t o = 0;
  for (; o + kOutputs <= count; o += kOutputs)
    for (int64_t i = 0; i < inputs; i += 4) {
      Words words;
      for (int row = 0; row < kOutputs; row++) {
        uint32_t word;
        std::memcpy(&word, rows + (o + row) * inputs + i, sizeof word);
        words[row] = word;
      }
      for (int input = 0; input < 4; input++) {
        const auto bytes = __builtin_convertvector(words >> 8 * input, Bytes);
        std::memcpy(to + (i + input) * count + o, &bytes, sizeof bytes);
      }
    }
  for (; o < count; o++)
    for (int64_t i = 0; i < inputs; i++) to[i * count + o] = rows[o * inputs + i];
}

// Converts rows of `inputs` elements or words to panels, in place.
template <class W>
void lay_out_rows(void* data, int64_t outputs, int64_t inputs) {
  auto* w = static_cast<W*>(data);
  parallel_for((outputs + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
    std::vector<W> rows(kColumns * inputs);
    for (int64_t panel = first; panel < last; panel++) {
      W* to = w + panel * kColumns * inputs;
      const int64_t some = std::min(kColumns, outputs - panel * kColumns);
      std::memcpy(rows.data(), to, some * inputs * sizeof(W));
      if constexpr (sizeof(W) == 1)
        if (inputs % 4 == 0) {
          turn_bytes(rows.data(), inputs, some, to);
          continue;
        }
      for (int64_t o = 0; o < some; o++)
        for (int64_t i = 0; i < inputs; i++) to[place<W>(i, o, inputs, some)] = rows[o * inputs + i];
    }
  });
}

}  // namespace
