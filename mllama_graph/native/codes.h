// Codes of quantised weights, and how a vector of them is decoded in registers.
//
// Codes are stored in words: one code of 8 bits in a byte, or eight codes of 4 bits in 32 bits, the first in the
// lowest. A panel is the one of linear.h, with words in place of elements: for each word of inputs, those of all its
// outputs.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// The words of a vector of outputs.
inline Integers load_words(const uint32_t* from) {
  Integers x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// A decoder has: Word; kInputs, the inputs of a word; kFactor, by which its values are smaller than those that codes
// stand for; load, which reads the words of a vector of outputs; and decode, which gives the values of one of their
// inputs.

// What decoders of one code a word have in common: loading widens it.
struct OneCode {
  static constexpr int kInputs = 1;
  using Loaded = Vector;

  template <int input>
  static Vector decode(Vector x) { return x; }
};

// Values in fp32 already, as another decoder gave them.
template <class D>
struct Decoded : OneCode {
  using Word = float;
  static constexpr float kFactor = D::kFactor;

  Vector load(const float* from) const { return ::load(from); }
  template <int input>
  float decode_one(float x) const { return x; }
};

struct Int8 : OneCode {
  using Word = int8_t;
  static constexpr float kFactor = 1;

  Vector load(const int8_t* from) const { return ::load(from); }
  template <int input>
  float decode_one(int8_t x) const { return x; }
};

// E4M3 with its exponent and mantissa moved to those of fp16, whose exponents count from 15 instead of 7.
struct Fp8 : OneCode {
  using Word = uint8_t;
  static constexpr float kFactor = 256;

  Vector load(const uint8_t* from) const {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const auto wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const auto half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
    return reinterpret_cast<Vector>(_mm512_cvtph_ps(half));
#elif defined(__AVX2__) && defined(__F16C__)
    const auto wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const auto half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
    return reinterpret_cast<Vector>(_mm256_cvtph_ps(half));
#else
    Vector x;
    for (int lane = 0; lane < kLanes; lane++) x[lane] = decode_one<0>(from[lane]);
    return x;
#endif
  }
  template <int input>
  float decode_one(uint8_t x) const {
    const int16_t wide = static_cast<int8_t>(x);
    return widen(Float16{static_cast<uint16_t>((static_cast<uint16_t>(wide) << 7) & 0xbf80)});
  }
};

// Indices into a table of 16 values.
struct Table {
  using Word = uint32_t;
  static constexpr int kInputs = 8;
  static constexpr float kFactor = 1;

  float values[16];

  template <int input>
  float decode_one(uint32_t x) const { return values[x >> 4 * input & 15]; }

#if defined(__AVX512F__)
  using Loaded = Integers;
  Vector all;

  explicit Table(const float* from) {
    std::memcpy(values, from, sizeof values);
    std::memcpy(&all, from, sizeof all);
  }
  Integers load(const uint32_t* from) const { return load_words(from); }
  template <int input>
  Vector decode(Integers x) const {
    // Only the low four bits of an index count.
    const auto index = _mm512_srli_epi32(reinterpret_cast<__m512i>(x), 4 * input);
    return reinterpret_cast<Vector>(_mm512_permutexvar_ps(index, reinterpret_cast<__m512>(all)));
  }
#elif defined(__AVX2__)
  // A shuffle looks up one byte of the values of 32 indices: four of them, and interleaving what they give, take less
  // time than choosing from two halves of the table for each vector.
  struct Loaded {
    Vector values[kInputs];
  };
  __m256i bytes[4];

  explicit Table(const float* from) {
    std::memcpy(values, from, sizeof values);
    for (int byte = 0; byte < 4; byte++) {
      uint8_t some[16];
      for (int i = 0; i < 16; i++) std::memcpy(some + i, reinterpret_cast<const char*>(values + i) + byte, 1);
      bytes[byte] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(some)));
    }
  }
  // Of the pair 2 * k, 2 * k + 1 of inputs, values[2 * k + odd].
  [[gnu::always_inline]] Loaded load(const uint32_t* from) const {
    // Turned so that a half of the vector has four outputs of the first two inputs, then of the next two, ...
    const auto turn = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const auto pairs = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(load_words(from)), turn);
    Loaded to;
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      const auto index = _mm256_and_si256(odd ? _mm256_srli_epi16(pairs, 4) : pairs, _mm256_set1_epi8(15));
      const auto a = _mm256_shuffle_epi8(bytes[0], index), b = _mm256_shuffle_epi8(bytes[1], index);
      const auto c = _mm256_shuffle_epi8(bytes[2], index), d = _mm256_shuffle_epi8(bytes[3], index);
      const auto low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpacklo_epi8(c, d);
      const auto low_after = _mm256_unpackhi_epi8(a, b), high_after = _mm256_unpackhi_epi8(c, d);
      to.values[odd] = reinterpret_cast<Vector>(_mm256_unpacklo_epi16(low, high));
      to.values[2 + odd] = reinterpret_cast<Vector>(_mm256_unpackhi_epi16(low, high));
      to.values[4 + odd] = reinterpret_cast<Vector>(_mm256_unpacklo_epi16(low_after, high_after));
      to.values[6 + odd] = reinterpret_cast<Vector>(_mm256_unpackhi_epi16(low_after, high_after));
    }
    return to;
  }
  template <int input>
  static Vector decode(const Loaded& x) { return x.values[input]; }
#else
  using Loaded = Integers;

  explicit Table(const float* from) { std::memcpy(values, from, sizeof values); }
  Integers load(const uint32_t* from) const { return load_words(from); }
  template <int input>
  Vector decode(Integers x) const {
    Vector y;
    for (int lane = 0; lane < kLanes; lane++) y[lane] = decode_one<input>(static_cast<uint32_t>(x[lane]));
    return y;
  }
#endif
};

// 4-bit codes that count from -8.
#if defined(__AVX512F__)
struct Int4 : Table {
  static constexpr float kValues[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  Int4() : Table(kValues) {}
};
#else
struct Int4 {
  using Word = uint32_t;
  static constexpr int kInputs = 8;
  static constexpr float kFactor = 1;
  using Loaded = Integers;

  // As two's complement, so that a shift to the right extends the sign.
  Integers load(const uint32_t* from) const { return load_words(from) ^ static_cast<int32_t>(0x88888888); }
  template <int input>
  Vector decode(Integers x) const { return to_floats((x << (28 - 4 * input)) >> 28); }
  template <int input>
  float decode_one(uint32_t x) const { return static_cast<float>(x >> 4 * input & 15) - 8.0f; }
};
#endif

}  // namespace
