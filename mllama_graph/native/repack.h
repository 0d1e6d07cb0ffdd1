// Codes of published checkpoints, rewritten as a leaf holds them: what `_packed` of model/published_codes.py does.
//
// A leaf has a row of codes for each output, in words of 32 bits with 8 or 4 codes, the first in the lowest bits. Files
// have the same words, or have them transposed (GPTQ), or words of outputs (AWQ), or bytes with the first code in the
// high half (bitsandbytes). Codes of 8 bits lose their sign there: they count from 0 instead of -128.

#pragma once

#include <vector>

#include "tensors.h"

namespace {

// 16 words, whatever the machine's vectors hold.
constexpr int64_t kWords = 16;
typedef uint32_t Words __attribute__((vector_size(4 * kWords)));

inline Words words_at(const uint32_t* from) {
  Words x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// The layouts of model/stored.py, in the order of REPACKED of ops/cpu.py.
enum class Stored : int64_t { kPacked, kGptq, kAwq, kBlocks };

// A tile: the words of inputs that are transposed at once, unless columns are sorted, and the words side by side in a row
// of the file, whose cache lines are read one after the other.
constexpr int64_t kTileWords = 32, kTileOutputs = 64;
// Outputs in a word of AWQ, and the code of the word that each has.
constexpr int kAwqOutputs = 8, kAwqPlaces[kAwqOutputs] = {0, 4, 1, 5, 2, 6, 3, 7};

// Words to write (O, W), and the words of a file with the distances of its rows.
struct Repacked {
  uint32_t* to;
  const uint32_t* from;
  int64_t outputs, words, stride;
  const int32_t* order;  // the input of each column, or null
  int bits;

  uint32_t sign() const { return bits == 8 ? 0x80808080 : 0; }
};

// Words in tiles (words, kTileOutputs) to rows of outputs, from word `first` on.
void write_tile(const Repacked& p, const uint32_t* tile, int64_t first, int64_t count, int64_t at, int64_t outputs) {
  for (int64_t o = 0; o < outputs; o++) {
    uint32_t* row = p.to + (at + o) * p.words + first;
    for (int64_t w = 0; w < count; w++) row[w] = tile[w * kTileOutputs + o] ^ p.sign();
  }
}

// The words of sorted columns: input order[c] of `tile` (words, kTileOutputs) becomes column c.
template <int kBits>
void sort_tile(const uint32_t* tile, const int32_t* order, int64_t words, uint32_t* to) {
  constexpr int kCodes = 32 / kBits;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  for (int64_t w = 0; w < words; w++, to += kTileOutputs) {
    Words sum[kTileOutputs / kWords] = {};
#pragma GCC unroll 8
    for (int code = 0; code < kCodes; code++) {
      const auto input = static_cast<uint32_t>(order[w * kCodes + code]);
      const uint32_t* from = tile + input / kCodes * kTileOutputs;
#pragma GCC unroll 4
      for (int64_t v = 0; v < kTileOutputs / kWords; v++)
        sum[v] |= (words_at(from + v * kWords) >> input % kCodes * kBits & kMask) << code * kBits;
    }
    std::memcpy(to, sum, sizeof sum);
  }
}

// Words along the inputs, in rows of outputs or (`transposed`) in columns.
void repack_words(const Repacked& p, bool transposed) {
  const int64_t deep = p.order ? p.words : std::min(kTileWords, p.words), size = deep * kTileOutputs;
  for_rows((p.outputs + kTileOutputs - 1) / kTileOutputs, p.words * kTileOutputs, [&](int64_t t) {
    std::vector<uint32_t> memory(p.order ? 2 * size : size);
    uint32_t *tile = memory.data(), *sorted = tile + size;
    const int64_t at = t * kTileOutputs, some = std::min(kTileOutputs, p.outputs - at);
    for (int64_t first = 0; first < p.words; first += deep) {
      const int64_t count = std::min(deep, p.words - first);
      if (transposed)
        for (int64_t w = 0; w < count; w++)
          std::memcpy(tile + w * kTileOutputs, p.from + (first + w) * p.stride + at, some * sizeof(uint32_t));
      else
        for (int64_t o = 0; o < some; o++)
          for (int64_t w = 0; w < count; w++) tile[w * kTileOutputs + o] = p.from[(at + o) * p.stride + first + w];
      if (p.order) p.bits == 4 ? sort_tile<4>(tile, p.order, count, sorted) : sort_tile<8>(tile, p.order, count, sorted);
      write_tile(p, p.order ? sorted : tile, first, count, at, some);
    }
  });
}

// Words of 8 outputs in columns: 8 of them, of the inputs of a word, have the words of 8 outputs.
void repack_awq(const Repacked& p) {
  const int64_t across = p.outputs / kAwqOutputs;
  for_rows((across + kTileOutputs - 1) / kTileOutputs, p.words * kTileOutputs * kAwqOutputs, [&](int64_t t) {
    std::vector<uint32_t> memory(kAwqOutputs * kTileWords * kTileOutputs);
    const int64_t at = t * kTileOutputs, some = std::min(kTileOutputs, across - at);
    for (int64_t first = 0; first < p.words; first += kTileWords) {
      const int64_t count = std::min(kTileWords, p.words - first);
      for (int64_t w = 0; w < count; w++) {
        uint32_t given[8][kTileOutputs];
        for (int input = 0; input < 8; input++)
          std::memcpy(given[input], p.from + ((first + w) * 8 + input) * p.stride + at, some * sizeof(uint32_t));
        for (int64_t o = 0; o < some; o += kWords) {
          Words words[8];
#pragma GCC unroll 8
          for (int input = 0; input < 8; input++) words[input] = words_at(given[input] + o);
#pragma GCC unroll 8
          for (int output = 0; output < kAwqOutputs; output++) {
            Words sum{};
#pragma GCC unroll 8
            for (int input = 0; input < 8; input++)
              sum |= (words[input] >> 4 * kAwqPlaces[output] & 15) << 4 * input;
            std::memcpy(memory.data() + (output * kTileWords + w) * kTileOutputs + o, &sum, sizeof sum);
          }
        }
      }
      for (int64_t o = 0; o < some * kAwqOutputs; o++) {
        const uint32_t* from = memory.data() + o % kAwqOutputs * kTileWords * kTileOutputs + o / kAwqOutputs;
        uint32_t* row = p.to + (at * kAwqOutputs + o) * p.words + first;
        for (int64_t w = 0; w < count; w++) row[w] = from[w * kTileOutputs];
      }
    }
  });
}

// Words in the order of the leaf's, each changed by f.
template <class F>
void repack_rows(const Repacked& p, const F& f) {
  for_rows(p.outputs, p.words, [&](int64_t o) {
    const uint32_t* from = p.from + o * p.stride;
    uint32_t* to = p.to + o * p.words;
    for (int64_t w = 0; w < p.words; w++) to[w] = f(from[w]);
  });
}

// Writes the codes (O, ...) of a leaf, uint8 with two codes of 4 bits or int8, from what a file has of them: int32 words
// (O, W) or transposed; of blocks, bytes. order: the input of each column.
void repack_(Tensor codes, Tensor stored, int64_t layout, std::optional<Tensor> order) {
  const auto kind = static_cast<Stored>(layout);
  const int bits = codes.scalar_type() == ScalarType::Byte ? 4 : 8;
  const int64_t outputs = codes.size(0), words = codes.size(1) / 4, inputs = words * 32 / bits;
  const bool of_bytes = kind == Stored::kBlocks, awq = kind == Stored::kAwq, gptq = kind == Stored::kGptq;
  if (!codes.is_contiguous() || codes.size(1) % 4 || stored.stride(1) != 1 || (order && order->numel() != inputs) ||
      stored.scalar_type() != (of_bytes ? ScalarType::Byte : ScalarType::Int) ||
      stored.size(0) != (awq ? inputs : gptq ? words : outputs) ||
      stored.size(1) != (awq ? outputs / kAwqOutputs : gptq ? outputs : of_bytes ? words * 4 : words) ||
      (of_bytes && stored.stride(0) % 4) || (awq && (bits != 4 || outputs % kAwqOutputs)))
    fail("repack_ takes contiguous codes of whole words, and as many rows of words in the file as they need");
  const Repacked p{static_cast<uint32_t*>(codes.mutable_data_ptr()),
                   static_cast<const uint32_t*>(stored.const_data_ptr()), outputs, words,
                   stored.stride(0) / (of_bytes ? 4 : 1), order ? integers(*order) : nullptr, bits};
  if (of_bytes) return repack_rows(p, [](uint32_t x) { return (x >> 4 & 0x0f0f0f0f) | (x << 4 & 0xf0f0f0f0); });
  if (awq) return repack_awq(p);
  if (gptq || order) return repack_words(p, gptq);
  repack_rows(p, [sign = p.sign()](uint32_t x) { return x ^ sign; });
}

}  // namespace
