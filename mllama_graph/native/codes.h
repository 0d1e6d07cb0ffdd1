// Codes of quantised weights, and how a vector of them is decoded in registers.
//
// Codes are stored in words: one code of 8 bits in a byte, or eight codes of 4 bits in 32 bits, the first in the lowest.
// A panel is the one of linear.h, with words in place of elements: for each word of inputs, those of all its outputs.

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

// Values in fp32 already.
struct Floats : OneCode {
  using Word = float;
  static constexpr float kFactor = 1;

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
  using Loaded = Integers;

  float values[16];
#if defined(__AVX512F__)
  Vector all;
#elif defined(__AVX2__)
  Vector low, high;
#endif

  explicit Table(const float* from) {
    std::memcpy(values, from, sizeof values);
#if defined(__AVX512F__)
    std::memcpy(&all, from, sizeof all);
#elif defined(__AVX2__)
    std::memcpy(&low, from, sizeof low);
    std::memcpy(&high, from + 8, sizeof high);
#endif
  }

  Integers load(const uint32_t* from) const { return load_words(from); }
  template <int input>
  Vector decode(Integers x) const {
#if defined(__AVX512F__)
    // Only the low four bits of an index count.
    const auto index = _mm512_srli_epi32(reinterpret_cast<__m512i>(x), 4 * input);
    return reinterpret_cast<Vector>(_mm512_permutexvar_ps(index, reinterpret_cast<__m512>(all)));
#elif defined(__AVX2__)
    // Only the low three bits of an index count; the fourth chooses the half of the table.
    const auto word = reinterpret_cast<__m256i>(x);
    const auto index = _mm256_srli_epi32(word, 4 * input);
    const auto half = reinterpret_cast<__m256>(_mm256_slli_epi32(word, 28 - 4 * input));
    return reinterpret_cast<Vector>(_mm256_blendv_ps(_mm256_permutevar8x32_ps(reinterpret_cast<__m256>(low), index),
                                                     _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(high), index),
                                                     half));
#else
    Vector y;
    for (int lane = 0; lane < kLanes; lane++) y[lane] = decode_one<input>(static_cast<uint32_t>(x[lane]));
    return y;
#endif
  }
  template <int input>
  float decode_one(uint32_t x) const { return values[x >> 4 * input & 15]; }
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
