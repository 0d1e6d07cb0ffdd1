// Rounds rows of weights to codes of 8 and of 4 bits while they are loaded: what `quantise` of model/codes.py does,
// with the same codes and scales.

#pragma once

#include <vector>

#include "integers.h"

namespace {

inline Vector magnitude(Vector x) { return reinterpret_cast<Vector>(reinterpret_cast<Integers>(x) & 0x7fffffff); }

// Whether a lane is above a number, or is NaN.
inline bool any_above(Vector x, float most) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(most), _CMP_NLE_UQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(x), _mm256_set1_ps(most), _CMP_NLE_UQ));
#else
  bool any = false;
  for (int lane = 0; lane < kLanes; lane++) any |= !(x[lane] <= most);
  return any;
#endif
}

// The whole numbers nearest to x / scale, at most `most`, and their squared error. Scales are such that |x / scale| is
// at most `most`, or 8 for codes of 4 bits (-8 .. 7), so that only the upper end is limited.
struct Rounded {
  const float* x;
  int64_t count;
  float most;

  // Products with 1 / scale replace quotients. Such a product is off by less than 2^-22 of itself. `doubt` is its
  // distance from the whole number; where that is more than sure(), the quotient might round to another number.
  static constexpr float kLeast = 1e-30f;
  float sure() const { return 0.5f - (most + 1) * 0x1p-21f; }
  static Vector whole(Vector x) { return x + kMagic - kMagic; }
  Vector limited(Vector number) const { return splat(most) < number ? splat(most) : number; }
  Vector numbers(Vector x, Vector inverse, Vector& doubt) const {
    const Vector quotient = x * inverse, number = whole(quotient), size = magnitude(quotient - number);
    doubt = doubt > size ? doubt : size;
    return limited(number);
  }
  Vector numbers(Vector x, Vector scale) const { return limited(whole(x / scale)); }
  float number(int64_t i, float scale) const { return std::min(std::nearbyintf(x[i] / scale), most); }

  // The squared errors of N scales.
  template <int N>
  void errors(const float* scales, float* to) const {
    Vector wide[N], inverse[N], sum[N] = {};
    bool small = false;
    for (int k = 0; k < N; k++) {
      wide[k] = splat(scales[k]), inverse[k] = splat(1.0f / scales[k]);
      small |= scales[k] < kLeast;
    }
    const int64_t end = count / kLanes * kLanes;
    for (int64_t i = 0; i < end; i += kLanes) {
      const Vector value = load(x + i);
      Vector number[N], doubt{};
#pragma GCC unroll 8
      for (int k = 0; k < N; k++) number[k] = numbers(value, inverse[k], doubt);
      // Seldom, except for a group's largest value: some scales put it halfway between two numbers.
      if (small || any_above(doubt, sure()))
        for (int k = 0; k < N; k++) number[k] = numbers(value, wide[k]);
#pragma GCC unroll 8
      for (int k = 0; k < N; k++) {
        const Vector off = number[k] * wide[k] - value;
        sum[k] = multiply_add(off, off, sum[k]);
      }
    }
    for (int k = 0; k < N; k++) {
      float rest = 0;
      for (int64_t i = end; i < count; i++) {
        const float off = this->number(i, scales[k]) * scales[k] - x[i];
        rest += off * off;
      }
      to[k] = total(sum[k]) + rest;
    }
  }

  // Writes codes, the number + `added`, each in the low bits of a word.
  void write(float scale, float added, int32_t* to) const {
    const Vector wide = splat(scale), inverse = splat(1.0f / scale), more = splat(added + kMagic);
    const int64_t end = count / kLanes * kLanes;
    for (int64_t i = 0; i < end; i += kLanes) {
      Vector doubt{}, found = numbers(load(x + i), inverse, doubt);
      if (scale < kLeast || any_above(doubt, sure())) found = numbers(load(x + i), wide);
      store(to + i, found + more);
    }
    for (int64_t i = end; i < count; i++) to[i] = static_cast<int32_t>(number(i, scale) + added);
  }

  static void store(int32_t* to, Vector words) { std::memcpy(to, &words, sizeof words); }
};

// E4M3 of x / scale, which is at most 448; ties go to even numbers.
inline void write_fp8(const float* x, int64_t count, float scale, int32_t* to) {
  constexpr float kMost = 448.0f;
  // As bits of fp32: 2^-6, the least normal number of E4M3, and 2^14, where fp32 has the steps of E4M3 below 2^-6.
  constexpr int32_t kNormal = 121 << 23, kSteps = 141 << 23;
  const auto code = [](auto x, auto bits, auto with) {
    const auto size = bits & 0x7fffffff;
    const auto normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
    const auto small = with(x) - kSteps;
    return (size < kNormal ? small : normal) | (bits >> 24 & 0x80);
  };
  const Vector wide = splat(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vector y = load(x + i) / wide;
    y = splat(kMost) < y ? splat(kMost) : y;
    y = splat(-kMost) > y ? splat(-kMost) : y;
    const auto codes = code(y, reinterpret_cast<Integers>(y), [](Vector y) {
      return reinterpret_cast<Integers>(magnitude(y) + 16384.0f);
    });
    std::memcpy(to + i, &codes, sizeof codes);
  }
  for (; i < count; i++) {
    const float y = std::clamp(x[i] / scale, -kMost, kMost);
    int32_t bits;
    std::memcpy(&bits, &y, sizeof bits);
    to[i] = code(y, bits, [](float y) {
      const float sum = std::fabs(y) + 16384.0f;
      int32_t found;
      std::memcpy(&found, &sum, sizeof found);
      return found;
    });
  }
}

// The lower halves of the elements of a and b, which are 32 or 16 bits wide.
template <class T>
inline typename SixteenBytes<T>::Elements lower_halves(typename SixteenBytes<T>::Elements a,
                                                       typename SixteenBytes<T>::Elements b) {
  typedef std::conditional_t<sizeof(T) == 4, uint16_t, uint8_t> Half;
  typedef typename SixteenBytes<Half>::Elements Halves;
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return reinterpret_cast<typename SixteenBytes<T>::Elements>(
        shuffled<(2 * i)...>(reinterpret_cast<Halves>(a), reinterpret_cast<Halves>(b)));
  }(std::make_integer_sequence<int, SixteenBytes<Half>::kElements>{});
}

// Packs codes in the low bits of words into bytes: one per byte, or two of 4 bits, the first in the low half. `count`
// is a multiple of 4.
inline void pack_codes(const int32_t* words, int64_t count, bool halves, uint8_t* to) {
  typedef SixteenBytes<uint32_t>::Elements Words;
  typedef SixteenBytes<uint16_t>::Elements Shorts;
  const auto sixteen = [&](const int32_t* from) {
    Shorts two[2];
    for (int k = 0; k < 2; k++) {
      Words a, b;
      std::memcpy(&a, from + 8 * k, 16), std::memcpy(&b, from + 8 * k + 4, 16);
      two[k] = reinterpret_cast<Shorts>(lower_halves<uint32_t>(a, b));
    }
    return lower_halves<uint16_t>(two[0], two[1]);
  };
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    Shorts first = sixteen(words + i), second = sixteen(words + i + 16);
    if (halves) {
      first = lower_halves<uint16_t>(first | first >> 4, second | second >> 4);
      std::memcpy(to + i / 2, &first, 16);
    } else {
      std::memcpy(to + i, &first, 16), std::memcpy(to + i + 16, &second, 16);
    }
  }
  for (; i < count; i += 2) {
    if (halves) {
      to[i / 2] = static_cast<uint8_t>((words[i] & 15) | words[i + 1] << 4);
    } else {
      to[i] = static_cast<uint8_t>(words[i]), to[i + 1] = static_cast<uint8_t>(words[i + 1]);
    }
  }
}

// The number of INT4_STEPS of model/codes.py.
constexpr int kChoices = 5;

// Rounds the groups of a row to codes, each in the low bits of a word, and calls put(group, scale). A group's scale is
// its largest value divided by steps[0] or, for codes of 4 bits, by the one of kChoices steps with the least squared
// error.
template <class F>
void round_row(const float* row, int64_t count, int64_t group, ScalarType kind, const float* steps, int32_t* to,
               const F& put) {
  const bool halves = kind == ScalarType::Byte;
  for (int64_t at = 0; at < count; at += group) {
    const float* x = row + at;
    const Rounded rounded{x, group, halves ? 7.0f : 127.0f};
    const float most = largest_in(x, group);
    float best = most / steps[0], least = INFINITY;
    if (halves && most > 0) {
      float scales[kChoices], errors[kChoices];
      for (int choice = 0; choice < kChoices; choice++) scales[choice] = most / steps[choice];
      rounded.errors<kChoices>(scales, errors);
      for (int choice = 0; choice < kChoices; choice++)
        if (errors[choice] < least) best = scales[choice], least = errors[choice];
    }
    const float scale = best > 0 ? best : 1.0f;
    if (kind == ScalarType::Float8_e4m3fn) write_fp8(x, group, scale, to + at);
    else rounded.write(scale, halves ? 8.0f : 0.0f, to + at);
    put(at / group, best);
  }
}

// Copies `count` elements of a row, widened to fp32.
void widen_row(const char* from, ScalarType kind, int64_t count, float* to) {
  const auto copy = [&]<class W>() {
    const auto* row = reinterpret_cast<const W*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(row + i));
    for (; i < count; i++) to[i] = widen(row[i]);
  };
  switch (kind) {
    case ScalarType::Float: std::memcpy(to, from, count * sizeof(float)); break;
    case ScalarType::BFloat16: copy.operator()<BFloat16>(); break;
    case ScalarType::Half: copy.operator()<Float16>(); break;
    default: fail("lay_rounded_ takes rows of float32, bfloat16 and float16");
  }
}

// Rounds whole rows (R, K) of a weight in groups. Writes their inputs from `first` on as codes to `weight` (O, ...),
// and the scales of these to `scale` (O, G), from row `at` on: in panels or in rows.
void lay_rounded_(Tensor weight, Tensor scale, int64_t at, Tensor rows, int64_t first, int64_t groups, Tensor steps,
                  bool panels, bool whole) {
  const ScalarType kind = weight.scalar_type(), given = rows.scalar_type();
  const bool halves = kind == ScalarType::Byte, words = in_words(kind, whole);
  const int64_t outputs = weight.size(0), bytes = weight.size(1), inputs = bytes * (halves ? 2 : 1);
  const int64_t count = rows.size(0), all = rows.size(1), group = all / groups, held = scale.size(1);
  const int64_t stride = rows.stride(0) * (given == ScalarType::Float ? 4 : 2);
  const float* numbers = floats(steps);
  if (!weight.is_contiguous() || bytes % 4 || all % groups || (groups > 1 && (first % group || inputs != held * group)) ||
      (groups == 1 && held != 1) || (halves && group % 8) || first + inputs > all || rows.stride(1) != 1 ||
      steps.numel() < (halves ? kChoices : 1) || scale.size(0) != outputs || at < 0 || at + count > outputs)
    fail("lay_rounded_ takes a contiguous weight, rows of at least as many inputs, and a scale for each group");
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  auto* to = static_cast<uint8_t*>(weight.mutable_data_ptr());
  float* scales = results(scale);
  // A row with one scale is rounded as a whole, and some of its codes are taken.
  const int64_t begin = groups == 1 ? 0 : first, taken = groups == 1 ? all : inputs;
  const int64_t skipped = (first - begin) / (halves ? 2 : 1);
  for_panels(to, outputs, bytes, at, count, [&] {
    return [&, wide = std::vector<float>(all), row_codes = std::vector<int32_t>(all),
            codes = std::vector<uint8_t>(kColumns * taken)](
               int64_t row, int64_t some, char* panel, int64_t column, int64_t width) mutable {
      for (int64_t r = 0; r < some; r++) {
        const int64_t o = at + row + r;
        widen_row(from + (row + r) * stride + begin * (given == ScalarType::Float ? 4 : 2), given, taken, wide.data());
        float* sizes = scales + (panels ? (o - column - r) * held + column + r : o * held);
        round_row(wide.data(), taken, group, kind, numbers, row_codes.data(),
                  [&](int64_t g, float size) { sizes[panels ? g * width : g] = size; });
        pack_codes(row_codes.data(), taken, halves, codes.data() + r * taken);
        if (!panels) std::memcpy(to + o * bytes, codes.data() + r * taken + skipped, bytes);
      }
      const char* laid = reinterpret_cast<const char*>(codes.data()) + skipped;
      const uint32_t sign = kind == ScalarType::Char ? 0x80808080 : 0;
      if (panels && words)
        turn_rows(laid, taken, some, bytes / 4, reinterpret_cast<uint32_t*>(panel) + column, width,
                  [=](auto x) { return x ^ sign; });
      else if (panels)
        turn_rows(laid, taken, some, bytes, reinterpret_cast<uint8_t*>(panel) + column, width, [](auto x) { return x; });
    };
  });
}

}  // namespace
