// Codes of quantised checkpoints, written as the kernels read them, in one pass from a file that is mapped into memory.
//
// A panel has words of 32 bits, or bytes with one code each. A word has 8 or 4 codes of one output, the first in the
// lowest bits. Files have the same words in rows of outputs (compressed-tensors) or transposed (GPTQ), words with the
// codes of 8 outputs (AWQ), or bytes with the first code in the high half (bitsandbytes). Codes of 8 bits in words have
// no sign, in panels as in files: they count from 0 instead of -128.

#pragma once

#include <vector>

#include "panels.h"
#include "tensors.h"

namespace {

// The layouts of model/stored.py, in the order of STORED of ops/cpu.py.
enum class Stored : int64_t { kRows, kPacked, kGptq, kAwq, kBlocks };

// Transposed words are copied in tiles: of so many words of inputs, and of the outputs of at most so many panels, which
// lie side by side in a row of the file.
constexpr int64_t kTileWords = 16, kTilePanels = 16;
// Outputs in a word of AWQ, and the place in the word of each one's code.
constexpr int kAwqOutputs = 8, kAwqPlaces[kAwqOutputs] = {0, 4, 1, 5, 2, 6, 3, 7};

// A weight (outputs, words) in panels. `count` of its rows are written, from row `at` on.
struct CodePanels {
  void* to;
  int64_t outputs, words, at, count;
  int bits;
  bool bytes;            // panels have bytes, not words
  bool flips;            // the highest bit of each byte changes
  const int32_t* order;  // the input of each column, or null

  uint32_t sign() const { return flips ? 0x80808080 : 0; }
};

// Words with sorted columns for V vectors of outputs: input order[c] of `from` becomes column c.
template <int kBits, int V>
void sort_words(const uint32_t* from, int64_t stride, const int32_t* order, int64_t words, uint32_t* to, int64_t width) {
  constexpr int kCodes = 32 / kBits;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  for (int64_t w = 0; w < words; w++) {
    Words sum[V] = {};
#pragma GCC unroll 8
    for (int code = 0; code < kCodes; code++) {
      const auto input = static_cast<uint32_t>(order[w * kCodes + code]);
      const uint32_t* taken = from + input / kCodes * stride;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        Words x;
        std::memcpy(&x, taken + v * kLanes, sizeof x);
        sum[v] |= (x >> input % kCodes * kBits & kMask) << code * kBits;
      }
    }
    std::memcpy(to + w * width, sum, sizeof sum);
  }
}

// Sorts the inputs of `some` outputs of a panel in place, from output `column` on.
void sort_columns(const CodePanels& p, char* panel, int64_t column, int64_t some, int64_t width) {
  if (p.bytes) {
    const int64_t inputs = p.words * 4;
    auto* to = reinterpret_cast<uint8_t*>(panel) + column;
    std::vector<uint8_t> held(inputs * some);
    for (int64_t i = 0; i < inputs; i++) std::memcpy(held.data() + i * some, to + i * width, some);
    for (int64_t i = 0; i < inputs; i++) std::memcpy(to + i * width, held.data() + p.order[i] * some, some);
    return;
  }
  auto* to = reinterpret_cast<uint32_t*>(panel) + column;
  // Rows of whole vectors.
  const int64_t stride = (some + kLanes - 1) / kLanes * kLanes;
  std::vector<uint32_t> held(p.words * stride);
  for (int64_t w = 0; w < p.words; w++) std::memcpy(held.data() + w * stride, to + w * width, some * sizeof(uint32_t));
  const auto sort = [&]<int V>(const uint32_t* from, uint32_t* sorted, int64_t apart) {
    p.bits == 4 ? sort_words<4, V>(from, stride, p.order, p.words, sorted, apart)
                : sort_words<8, V>(from, stride, p.order, p.words, sorted, apart);
  };
  if (some == kColumns) return sort.operator()<kPanel>(held.data(), to, width);
  std::vector<uint32_t> sorted(p.words * kLanes);
  for (int64_t o = 0; o < some; o += kLanes) {
    sort.operator()<1>(held.data() + o, sorted.data(), kLanes);
    for (int64_t w = 0; w < p.words; w++)
      std::memcpy(to + w * width + o, sorted.data() + w * kLanes, std::min<int64_t>(kLanes, some - o) * sizeof(uint32_t));
  }
}

// Writes codes from rows of outputs. f changes each word or byte (T).
template <class T, class F>
void lay_row_codes(const CodePanels& p, ByteRows rows, const F& f) {
  for_panels(p.to, p.outputs, p.words * 4, p.at, p.count,
             [&](int64_t row, int64_t some, char* panel, int64_t column, int64_t width) {
               T* to = reinterpret_cast<T*>(panel) + column;
               turn_rows(rows.row(row), rows.stride, some, p.words * 4 / int64_t{sizeof(T)}, to, width, f);
               if (p.order) sort_columns(p, panel, column, some, width);
             });
}

// Writes words of a tile, whose rows are `stride` apart, to `some` outputs of a panel, from word `first` on.
void write_tile(const CodePanels& p, const uint32_t* tile, int64_t stride, int64_t first, int64_t count, int64_t some,
                char* panel, int64_t column, int64_t width) {
  const uint32_t sign = p.sign();
  if (p.bytes) {
    auto* to = reinterpret_cast<uint8_t*>(panel) + first * 4 * width + column;
    for (int64_t w = 0; w < count; w++, tile += stride)
      for (int byte = 0; byte < 4; byte++, to += width)
        for (int64_t o = 0; o < some; o++) to[o] = static_cast<uint8_t>((tile[o] ^ sign) >> 8 * byte);
    return;
  }
  auto* to = reinterpret_cast<uint32_t*>(panel) + first * width + column;
  if (some == kColumns) {
    for (int64_t w = 0; w < count; w++, tile += stride, to += width)
      for (int64_t o = 0; o < kColumns; o++) to[o] = tile[o] ^ sign;
  } else {
    for (int64_t w = 0; w < count; w++, tile += stride, to += width)
      for (int64_t o = 0; o < some; o++) to[o] = tile[o] ^ sign;
  }
}

// Writes transposed codes. fill(first word, number of words, first output, end, tile) writes the words of the file's
// outputs first .. end - 1 to a tile, whose rows are end - first words apart. first is a multiple of kAwqOutputs.
template <class F>
void lay_columns(const CodePanels& p, const F& fill) {
  const int64_t begin = p.at / kColumns, panels = (p.at + p.count + kColumns - 1) / kColumns - begin;
  const int64_t threads = torch::stable::get_num_threads();
  // Few panels if they are sorted afterwards: they are still in the cache then.
  const int64_t most = p.order ? kTilePanels / 4 : kTilePanels, size = std::clamp<int64_t>(panels / (8 * threads), 1, most);
  parallel_for((panels + size - 1) / size, 1, [&](int64_t one, int64_t last) {
    std::vector<uint32_t> tile(kTileWords * (size * kColumns + 2 * kAwqOutputs));
    for (; one < last; one++) {
      const int64_t from = std::max(p.at, (begin + one * size) * kColumns);
      const int64_t to = std::min(p.at + p.count, (begin + (one + 1) * size) * kColumns);
      const int64_t first = (from - p.at) / kAwqOutputs * kAwqOutputs, stride = to - p.at - first;
      const auto each = [&](const auto& f) {
        for (int64_t o = from, next; o < to; o = next) {
          const int64_t panel = o / kColumns * kColumns;
          next = std::min(to, panel + kColumns);
          f(o, next - o, static_cast<char*>(p.to) + panel * p.words * 4, o - panel, std::min(kColumns, p.outputs - panel));
        }
      };
      for (int64_t w = 0; w < p.words; w += kTileWords) {
        const int64_t count = std::min(kTileWords, p.words - w);
        fill(w, count, first, to - p.at, tile.data());
        each([&](int64_t o, int64_t some, char* panel, int64_t column, int64_t width) {
          write_tile(p, tile.data() + o - p.at - first, stride, w, count, some, panel, column, width);
        });
      }
      if (p.order)
        each([&](int64_t, int64_t some, char* panel, int64_t column, int64_t width) {
          sort_columns(p, panel, column, some, width);
        });
    }
  });
}

// Eight words with eight codes of 4 bits each: code k of word i becomes code i of word k.
template <class Words>
inline void turn_codes(Words (&x)[8]) {
  constexpr uint32_t kMasks[] = {0x0f0f0f0f, 0x00ff00ff, 0x0000ffff};
#pragma GCC unroll 3
  for (int level = 0; level < 3; level++)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
      if (const int apart = 1 << level; !(i & apart)) {
        const Words other = (x[i] >> 4 * apart ^ x[i + apart]) & kMasks[level];
        x[i + apart] ^= other;
        x[i] ^= other << 4 * apart;
      }
}

// Writes codes of AWQ. The 8 words of 8 inputs that follow each other become one word of each of their 8 outputs.
void lay_awq(const CodePanels& p, ByteRows rows) {
  typedef SixteenBytes<uint32_t>::Elements Words;
  lay_columns(p, [=](int64_t first, int64_t count, int64_t begin, int64_t end, uint32_t* tile) {
    const int64_t stride = end - begin, across = (stride + kAwqOutputs - 1) / kAwqOutputs;
    for (int64_t w = 0; w < count; w++, tile += stride)
      for (int64_t a = 0; a < across; a += 4) {
        const int64_t some = std::min<int64_t>(4, across - a);
        Words x[8] = {};
        for (int input = 0; input < 8; input++) {
          const char* from = rows.row((first + w) * 8 + input) + (begin / kAwqOutputs + a) * sizeof(uint32_t);
          if (some == 4) std::memcpy(&x[input], from, sizeof(Words));
          else std::memcpy(&x[input], from, some * sizeof(uint32_t));
        }
        turn_codes(x);
        Words low[4], high[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) low[k] = x[kAwqPlaces[k]], high[k] = x[kAwqPlaces[k + 4]];
        turn<uint32_t, 4>(low);
        turn<uint32_t, 4>(high);
        for (int64_t k = 0; k < some; k++) {
          uint32_t words[kAwqOutputs];
          std::memcpy(words, &low[k], 16), std::memcpy(words + 4, &high[k], 16);
          const int64_t at = (a + k) * kAwqOutputs;
          if (stride - at >= kAwqOutputs) std::memcpy(tile + at, words, sizeof words);
          else std::memcpy(tile + at, words, (stride - at) * sizeof(uint32_t));
        }
      }
  });
}

// Writes codes to a weight (O, ...) in panels, from its row `at` on. stored: rows of codes as the leaf has them
// (kRows), int32 words (R, W) or transposed ones (W, R), or bytes (R, W) of blocks. order: the input of each column.
// in_words: whether panels have codes of 8 bits in words.
void lay_codes(Tensor weight, int64_t at, const Tensor& stored, Stored kind, const std::optional<Tensor>& order,
               bool in_words) {
  const int bits = weight.scalar_type() == ScalarType::Byte ? 4 : 8;
  const int64_t outputs = weight.size(0), bytes = weight.size(1), words = bytes / 4, inputs = bytes * 8 / bits;
  const bool awq = kind == Stored::kAwq, gptq = kind == Stored::kGptq, packed = kind == Stored::kPacked;
  const int64_t wide = awq || gptq || packed ? 4 : 1, count = awq ? stored.size(1) * kAwqOutputs : stored.size(gptq);
  if (!weight.is_contiguous() || stored.dim() != 2 || at < 0 || at + count > outputs ||
      (order && order->numel() != inputs) || (stored.size(1) > 1 && stored.stride(1) != 1) ||
      bytes % 4 || stored.size(!gptq && !awq) != (awq ? inputs : bytes / wide) ||
      (wide == 4 && stored.scalar_type() != ScalarType::Int) || (awq && bits != 4))
    fail("lay_codes_ takes a contiguous weight, and as many rows of whole words in the file as it needs");
  const bool fp8 = weight.scalar_type() == ScalarType::Float8_e4m3fn;
  const CodePanels p{weight.mutable_data_ptr(), outputs, words, at, count, bits, !in_words,
                     bits == 8 && !fp8 && in_words == (kind == Stored::kRows), order ? integers(*order) : nullptr};
  const ByteRows rows{static_cast<const char*>(stored.const_data_ptr()), stored.stride(0) * wide};
  if (awq) return lay_awq(p, rows);
  if (gptq)
    return lay_columns(p, [=](int64_t first, int64_t some, int64_t begin, int64_t end, uint32_t* tile) {
      for (int64_t w = 0; w < some; w++)
        std::memcpy(tile + w * (end - begin), rows.row(first + w) + begin * 4, (end - begin) * 4);
    });
  if (kind == Stored::kBlocks)
    return lay_row_codes<uint32_t>(p, rows, [](auto x) { return (x >> 4 & 0x0f0f0f0f) | (x << 4 & 0xf0f0f0f0); });
  if (p.bytes) return lay_row_codes<uint8_t>(p, rows, [sign = uint8_t(p.sign())](auto x) { return x ^ sign; });
  lay_row_codes<uint32_t>(p, rows, [sign = p.sign()](auto x) { return x ^ sign; });
}

// The sum of each row of int8 (R, K), as int32. Bytes without a sign are summed in 16 bits, as many as fit, and these
// sums in 32 bits.
Tensor sum_codes(Tensor rows) {
  const int64_t count = rows.size(0), inputs = rows.size(1), stride = rows.stride(0);
  if (rows.scalar_type() != ScalarType::Char || (inputs > 1 && rows.stride(1) != 1)) fail("sum_codes takes rows of int8");
  Tensor sums = allocated({count}, aoti_torch_dtype_int32());
  auto* to = static_cast<int32_t*>(sums.mutable_data_ptr());
  const auto* from = static_cast<const int8_t*>(rows.const_data_ptr());
  for_rows(count, inputs, [=](int64_t r) {
    typedef uint16_t Sums __attribute__((vector_size(4 * kLanes)));
    constexpr int64_t kStep = sizeof(Sums), kMost = 128 * kStep;
    const int8_t* row = from + r * stride;
    int32_t all = 0;
    int64_t i = 0;
    while (i + kStep <= inputs) {
      Sums sum{};
      const int64_t begin = i, end = std::min(inputs / kStep * kStep, i + kMost);
      for (; i < end; i += kStep) {
        Sums x;
        std::memcpy(&x, row + i, sizeof x);
        x ^= 0x8080;
        sum += (x & 0xff) + (x >> 8);
      }
      for (int lane = 0; lane < kStep / 2; lane++) all += sum[lane];
      all -= static_cast<int32_t>(128 * (i - begin));
    }
    for (; i < inputs; i++) all += row[i];
    to[r] = all;
  });
  return sums;
}

// Scales that are stored as bytes (S): map[byte] * of_blocks[its block] + added, fp32. map (256); a block has `each`
// bytes; `skipped` bytes of the whole weight come before these.
Tensor unnested(Tensor bytes, Tensor map, Tensor of_blocks, int64_t each, int64_t skipped, double added) {
  const int64_t count = bytes.numel();
  if (bytes.scalar_type() != ScalarType::Byte || !bytes.is_contiguous() || map.numel() != 256 ||
      of_blocks.numel() * each < skipped + count)
    fail("unnested takes contiguous bytes, and a scale for each of their blocks");
  Tensor scales = allocated({count});
  const auto* from = static_cast<const uint8_t*>(bytes.const_data_ptr());
  const float *values = floats(map), *sizes = floats(of_blocks), more = static_cast<float>(added);
  float* to = results(scales);
  parallel_for(count, kGrain, [=](int64_t first, int64_t last) {
    for (; first < last; first++) to[first] = values[from[first]] * sizes[(skipped + first) / each] + more;
  });
  return scales;
}

}  // namespace
