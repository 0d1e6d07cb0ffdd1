// The layout of the weight of a linear layer.
//
// With few rows, the time of a product is that of reading the weight (O, I), which is read once and in sequence, as
// memory is read fastest. It is stored in panels of kPanel vectors of outputs: a panel has these outputs' weights for
// the first input, then for the next input, and so on. The last panel has the remaining outputs.

#pragma once

#include <type_traits>
#include <utility>

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
// The locality of __builtin_prefetch for a tile of R rows that was fastest. 3: into L1; 2: into L2; 0: into L1, and
// from there to no other cache. On Zen 4, 2 reads a weight 12 % faster than 3 for one row, and 5 % slower for eight. On
// Zen 1, 0 takes 15 to 20 % less time than 2 for one row of fp32 and bf16, probably since L2 then has nothing to move
// to L3.
template <int R>
constexpr int kLocality = kRegisters == 16 ? (kAmd && R == 1 ? 0 : 2) : kAmd && R <= 2 ? 2 : 3;
// Bytes to prefetch ahead if a panel is read once: `most`, but fewer where L1 alone holds them. There, 512 was fastest
// of 256 to 4096 for fp32 and 1024 for bf16; 768 lies between.
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

// ---- Writing panels ----

// Vectors of 16 bytes of a row.
template <class T>
struct SixteenBytes {
  static constexpr int kElements = 16 / sizeof(T);
  typedef T Elements __attribute__((vector_size(16)));
};

// The elements of the lower or the upper halves of a and b, interleaved.
template <bool upper, class T>
inline typename SixteenBytes<T>::Elements interleaved(typename SixteenBytes<T>::Elements a, typename SixteenBytes<T>::Elements b) {
  constexpr int n = SixteenBytes<T>::kElements;
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return shuffled<(i / 2 + i % 2 * n + upper * n / 2)...>(a, b);
  }(std::make_integer_sequence<int, n>{});
}

// Turns pieces of R rows into their columns, one after the other.
template <class T, int R>
inline void turn(typename SixteenBytes<T>::Elements (&x)[R]) {
  for (int done = 1; done < R; done *= 2) {
    typename SixteenBytes<T>::Elements y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R / 2; r++) {
      y[2 * r] = interleaved<false, T>(x[r], x[r + R / 2]);
      y[2 * r + 1] = interleaved<true, T>(x[r], x[r + R / 2]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) x[r] = y[r];
  }
}

// Writes the elements of rows that are `stride` bytes apart, each changed by f, to columns that are `width` elements
// apart. Reads a cache line of each row at a time, since lines of many rows compete for the same cache sets.
template <class T, class F>
void turn_rows(const char* from, int64_t stride, int64_t rows, int64_t columns, T* to, int64_t width, const F& f) {
  constexpr int R = sizeof(T) == 4 ? 4 : 8, C = SixteenBytes<T>::kElements, kColumn = R * sizeof(T);
  typedef typename SixteenBytes<T>::Elements Elements;
  const auto one_by_one = [&](int64_t row, int64_t last, int64_t column, int64_t end) {
    for (; row < last; row++)
      for (int64_t c = column; c < end; c++) {
        T x;
        std::memcpy(&x, from + row * stride + c * sizeof(T), sizeof x);
        to[c * width + row] = static_cast<T>(f(x));
      }
  };
  constexpr int64_t kBlock = kLine / sizeof(T);
  const int64_t blocked = columns / kBlock * kBlock, whole = rows / R * R;
  for (int64_t c = 0; c < blocked; c += kBlock) {
    for (int64_t row = 0; row < whole; row += R)
      for (int64_t k = c; k < c + kBlock; k += C) {
        Elements x[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          std::memcpy(&x[r], from + (row + r) * stride + k * sizeof(T), sizeof x[r]);
          x[r] = f(x[r]);
        }
        turn<T, R>(x);
        T* column = to + k * width + row;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          if constexpr (kColumn == 16) {
            std::memcpy(column + r * width, &x[r], 16);
          } else {
            const auto halves = reinterpret_cast<SixteenBytes<uint64_t>::Elements>(x[r]);
            const uint64_t first = halves[0], second = halves[1];
            std::memcpy(column + 2 * r * width, &first, 8);
            std::memcpy(column + (2 * r + 1) * width, &second, 8);
          }
        }
      }
    one_by_one(whole, rows, c, c + kBlock);
  }
  one_by_one(0, rows, blocked, columns);
}

// Calls f(row, number of rows, panel, column of the first of them in the panel, width of the panel), in parallel, for
// each panel of a weight (`outputs` rows of `bytes` bytes) that has some of its rows at .. at + count - 1. The argument
// `row` counts from `at`. `given` is f, or a function that makes an f for each range of panels, with memory of its own.
template <class F>
void for_panels(void* weight, int64_t outputs, int64_t bytes, int64_t at, int64_t count, const F& given) {
  const int64_t begin = at / kColumns, end = (at + count + kColumns - 1) / kColumns;
  parallel_for(end - begin, kGrainBytes / std::max<int64_t>(1, kColumns * bytes) + 1, [&](int64_t one, int64_t last) {
    auto f = [&] {
      if constexpr (std::is_invocable_v<F>) return given();
      else return given;
    }();
    for (; one < last; one++) {
      const int64_t panel = (begin + one) * kColumns, width = std::min(kColumns, outputs - panel);
      const int64_t first = std::max(at, panel), stop = std::min(at + count, panel + width);
      f(first - at, stop - first, static_cast<char*>(weight) + panel * bytes, first - panel, width);
    }
  });
}

// Rows of a matrix, `stride` bytes apart.
struct ByteRows {
  const char* from;
  int64_t stride;
  const char* row(int64_t r) const { return from + r * stride; }
};

// Writes rows of `columns` elements, each changed by f, to panels of a weight with `outputs` rows, from row `at` on.
template <class T, class F>
void lay_rows(void* weight, int64_t outputs, int64_t columns, int64_t at, int64_t count, ByteRows rows, const F& f) {
  for_panels(weight, outputs, columns * sizeof(T), at, count,
             [&](int64_t row, int64_t some, char* panel, int64_t column, int64_t width) {
               turn_rows(rows.row(row), rows.stride, some, columns, reinterpret_cast<T*>(panel) + column, width, f);
             });
}

}  // namespace
