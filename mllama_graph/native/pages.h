// Pages of keys and values, and the formats that they are stored in: float32, bfloat16, or int8 with one float32 scale
// per token and head.
//
//     N pages   P tokens per page   K kv heads   H head width
//
// Attention reads all keys from pages, those of new rows too: what a row sees is the same in one chunk and in several.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "tensors.h"
#include "vectors.h"

namespace {

// The largest int8 code; codes are symmetric.
constexpr float kMostCode = 127.0f;

// Rounds `width` floats to bfloat16, ties to even. A NaN stays one.
inline void narrow(const float* from, int64_t width, BFloat16* to) {
  for (int64_t h = 0; h < width; h++) {
    uint32_t bits;
    std::memcpy(&bits, from + h, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[h].bits = static_cast<uint16_t>(from[h] == from[h] ? rounded : 0x7fc0);
  }
}

// Rounds `width` floats to int8 codes, ties to even, and returns their scale: the largest absolute value over 127. The
// scale of a row with a NaN is NaN, that of a row with an infinity infinite.
inline float quantise(const float* from, int64_t width, int8_t* to) {
  Vector most{}, unsound{};
  for (int64_t h = 0; h < width; h += kLanes) {
    const Vector some = load(from + h, width - h), size = some < 0.0f ? -some : some;
    most = most > size ? most : size;
    unsound += some * 0.0f;
  }
  // A NaN fails each comparison, so that `most` may lack it.
  const float scale = largest_of(most) / kMostCode + total(unsound), divisor = scale > 0.0f ? scale : 1.0f;
  for (int64_t h = 0; h < width; h++) {
    const float code = from[h] / divisor + kMagic - kMagic;
    // Written so that a NaN becomes -127. Only the scales that are denormal numbers can need the other bound.
    to[h] = static_cast<int8_t>(std::min(code > -kMostCode ? code : -kMostCode, kMostCode));
  }
  return scale;
}

// The keys or the values of one token: those of its first head, and the scale of each head.
template <class E>
struct Token {
  const E* data;
  const float* scales;
};

// One layer's keys or values (N, P, K, H). int8 pages have scales (N, K, P), so that those of a head are contiguous;
// others have none.
template <class E>
struct Pool {
  static constexpr bool kScaled = std::is_same_v<E, int8_t>;

  E* data;
  float* scales;
  int64_t page, heads, width;

  int64_t row() const { return heads * width; }

  // The scales of a head for the tokens from `slot` on, an index of tokens over all pages; null without scales.
  float* scales_of(int64_t slot, int64_t head) const {
    return kScaled ? scales + (slot / page * heads + head) * page + slot % page : nullptr;
  }

  Token<E> at(int64_t slot) const { return {data + slot * row(), scales_of(slot, 0)}; }

  // Rounds a token's row (K, H) to the format of the pages, and writes it.
  void put(int64_t slot, const float* from) const {
    E* to = data + slot * row();
    if constexpr (kScaled)
      for (int64_t head = 0; head < heads; head++)
        *scales_of(slot, head) = quantise(from + head * width, width, to + head * width);
    else if constexpr (std::is_same_v<E, float>) std::memcpy(to, from, row() * sizeof(float));
    else narrow(from, row(), to);
  }

  // `width` values of a token's head: where they are, if pages hold floats, or else as written to `space`.
  const float* values(const Token<E>& token, int64_t head, float* space) const {
    const E* from = token.data + head * width;
    if constexpr (std::is_same_v<E, float>) return from;
    const float scale = kScaled ? token.scales[head * page] : 1.0f;
    int64_t h = 0;
    for (; h + kLanes <= width; h += kLanes) store(space + h, load(from + h) * scale);
    for (; h < width; h++) space[h] = widen(from[h]) * scale;
    return space;
  }
};

template <class E>
Pool<E> pool_of(const Tensor& pages, const std::optional<Tensor>& scales) {
  const Pool<E> pool{static_cast<E*>(pages.mutable_data_ptr()),
                     scales ? static_cast<float*>(scales->mutable_data_ptr()) : nullptr, pages.size(1), pages.size(2),
                     pages.size(3)};
  if (!pages.is_contiguous()) fail("a kernel takes contiguous pages");
  if (Pool<E>::kScaled != scales.has_value()) fail("int8 pages, and no others, have scales");
  if (scales && (scales->scalar_type() != ScalarType::Float || !scales->is_contiguous() || scales->dim() != 3 ||
                 scales->size(0) != pages.size(0) || scales->size(1) != pool.heads || scales->size(2) != pool.page))
    fail("int8 pages (N, P, K, H) have contiguous float32 scales (N, K, P)");
  return pool;
}

// Calls f(keys, values) with pools of the format in which the pages are stored.
template <class F>
auto with_pools(const Tensor& k_pages, const Tensor& v_pages, const std::optional<Tensor>& k_scales,
                const std::optional<Tensor>& v_scales, const F& f) {
  if (k_pages.scalar_type() != v_pages.scalar_type() || k_pages.dim() != 4 || v_pages.dim() != 4)
    fail("pages of keys and values are (N, P, K, H), in one dtype");
  for (int axis = 0; axis < 4; axis++)
    if (k_pages.size(axis) != v_pages.size(axis)) fail("pages of keys and values have one shape");
  switch (k_pages.scalar_type()) {
    case ScalarType::Float: return f(pool_of<float>(k_pages, k_scales), pool_of<float>(v_pages, v_scales));
    case ScalarType::BFloat16: return f(pool_of<BFloat16>(k_pages, k_scales), pool_of<BFloat16>(v_pages, v_scales));
    case ScalarType::Char: return f(pool_of<int8_t>(k_pages, k_scales), pool_of<int8_t>(v_pages, v_scales));
    default: fail("a kernel takes pages of float32, bfloat16 and int8");
  }
}

// Writes row t of k and v to slot[t] of their pages, an index over all pages; padding is not written.
void write_pages_(Tensor given_k, Tensor given_v, Tensor k_pages, Tensor v_pages, std::optional<Tensor> k_scales,
                  std::optional<Tensor> v_scales, Tensor slot, std::optional<Tensor> real) {
  const Rows k(given_k), v(given_v);
  const int32_t* slots = integers(slot);
  const int64_t count = k_pages.size(0) * k_pages.size(1), some = real_of(k.count, real);
  if (k.width * count != k_pages.numel() || v.width != k.width || v.count != k.count)
    fail("write_pages_ takes k and v (T, K, H) and pages (N, P, K, H)");
  for (int64_t t = 0; t < some; t++)
    if (slots[t] < 0 || slots[t] >= count) fail("a slot is not in the pages");
  with_pools(k_pages, v_pages, k_scales, v_scales, [&](const auto& keys, const auto& values) {
    for_rows(some, 2 * k.width, [&](int64_t t) {
      keys.put(slots[t], k.row(t));
      values.put(slots[t], v.row(t));
    });
  });
}

}  // namespace
