// Attention of many rows over prompts, pages and tiles, and the operators of all kinds of attention.

#pragma once

#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "decode.h"
#include "pages.h"
#include "products.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// ---- Attention of many rows ----

// Query rows (of all heads that share a kv head) and tokens per block: whole tiles.
constexpr int64_t kQueries = 72, kKeys = 96;

// The tokens that a set of rows attends to, in order. All are stored as in the pools.
template <class E>
struct Tokens {
  Pool<E> keys_pool, values_pool;
  std::vector<Token<E>> keys, values;

  // Adds a token of pools that are laid out as these.
  void add(const Pool<E>& k, const Pool<E>& v, int64_t slot) {
    keys.push_back(k.at(slot));
    values.push_back(v.at(slot));
  }
};

// A query row sees the tokens [first, last).
struct Seen {
  int64_t first, last;
};

// Keys and values in blocks of kKeys tokens, in panels for multiply_matrix. The last block repeats its last token.
struct Blocks {
  int64_t count, width, wide;
  std::unique_ptr<float[]> keys, values;  // (heads, count, width by kKeys), (heads, count, kKeys by wide)

  template <class E>
  Blocks(const Tokens<E>& tokens, const Heads& heads)
      : count((static_cast<int64_t>(tokens.keys.size()) + kKeys - 1) / kKeys),
        width(heads.width),
        wide((width + kLanes - 1) / kLanes * kLanes),
        keys(new float[heads.keys * count * kKeys * width]),
        values(new float[heads.keys * count * kKeys * wide]) {
    const int64_t last = static_cast<int64_t>(tokens.keys.size()) - 1;
    parallel_for(heads.keys * count, 1, [&](int64_t from, int64_t to) {
      std::vector<float> space(width);
      for (int64_t task = from; task < to; task++) {
        const int64_t head = task / count, start = task % count * kKeys;
        float *key = keys.get() + task * kKeys * width, *value = values.get() + task * kKeys * wide;
        const auto of_token = [&](const Pool<E>& pool, const std::vector<Token<E>>& all, int64_t i) {
          return pool.values(all[std::min(start + i, last)], head, space.data());
        };
        panels(kKeys, [&](auto, auto vectors, int64_t v) {
          constexpr int64_t kSome = decltype(vectors)::value * kLanes;
          float* to = key + v * kLanes * width;
          for (int64_t i = 0; i < kSome; i++) {
            const float* k = of_token(tokens.keys_pool, tokens.keys, v * kLanes + i);
            for (int64_t h = 0; h < width; h++) to[h * kSome + i] = k[h];
          }
        });
        for (int64_t i = 0; i < kKeys; i++) {
          const float* from = of_token(tokens.values_pool, tokens.values, i);
          panels(wide, [&](auto, auto vectors, int64_t v) {
            constexpr int64_t kSome = decltype(vectors)::value * kLanes;
            float* to = value + v * kLanes * kKeys + i * kSome;
            const int64_t some = std::min(kSome, width - v * kLanes);
            std::memcpy(to, from + v * kLanes, some * sizeof(float));
            std::fill(to + some, to + kSome, 0.0f);
          });
        }
      }
    });
  }
};

// Turns kKeys scores of a row into weights, 0 outside [begin, end), and returns the sum of the weights. Updates `top`,
// the largest score so far.
inline float weigh(float* w, int64_t begin, int64_t end, float& top) {
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  std::fill(w, w + begin, kUnseen);
  std::fill(w + end, w + kKeys, kUnseen);
  Vector most = load(w);
  for (int64_t i = kLanes; i < kKeys; i += kLanes) {
    const Vector next = load(w + i);
    most = most > next ? most : next;
  }
  top = std::max(top, largest_of(most));
  Vector part{};
  for (int64_t i = 0; i < kKeys; i += kLanes) {
    const Vector e = power_of_two(load(w + i) - top);
    store(w + i, e);
    part += e;
  }
  return total(part);
}

// Attention of q (T, Q, H) over `tokens`, of which row t sees seen[t]; zeros for a row that sees none. Weights are
// computed as powers of two.
template <class E>
void attend_rows(const float* q, float* out, int64_t rows, const Heads& heads, const Tokens<E>& tokens,
                 const std::vector<Seen>& seen, float scale) {
  const int64_t G = heads.group(), H = heads.width, tasks = (rows * G + kQueries - 1) / kQueries;
  const int64_t count = static_cast<int64_t>(tokens.keys.size());
  const Blocks blocks(tokens, heads);
  const int64_t wide = blocks.wide;
  constexpr float kPowers = 1.44269504f;  // log2(e)
  parallel_for(heads.keys * tasks, 1, [&](int64_t from, int64_t to) {
    std::vector<float> query(kQueries * H), weight(kQueries * kKeys), sum_of_values(kQueries * wide);
    std::vector<float> top(kQueries), sum(kQueries);
    for (int64_t task = from; task < to; task++) {
      const int64_t head = task / tasks, row = task % tasks * kQueries;
      const int64_t some = std::min(kQueries, rows * G - row);
      int64_t first = count, last = 0;
      for (int64_t r = 0; r < some; r++) {
        const int64_t t = (row + r) / G, g = (row + r) % G;
        const float* from_row = q + (t * heads.queries + head * G + g) * H;
        for (int64_t h = 0; h < H; h++) query[r * H + h] = from_row[h] * scale * kPowers;
        first = std::min(first, seen[t].first);
        last = std::max(last, seen[t].last);
      }
      std::fill(top.begin(), top.end(), -std::numeric_limits<float>::infinity());
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(sum_of_values.begin(), sum_of_values.end(), 0.0f);
      // Blocks begin at multiples of kKeys whatever the rows, so that sums have the same order in each batch.
      for (int64_t block = first / kKeys; block * kKeys < std::min(last, count); block++) {
        const int64_t start = block * kKeys, held = std::min(kKeys, count - start);
        const int64_t at = (head * blocks.count + block) * kKeys;
        multiply_matrix<true>(query.data(), H, blocks.keys.get() + at * H, weight.data(), kKeys, some, kKeys, H);
        for (int64_t r = 0; r < some; r++) {
          const Seen& sees = seen[(row + r) / G];
          const int64_t begin = std::max<int64_t>(0, sees.first - start), end = std::min(held, sees.last - start);
          if (begin >= end) {
            std::fill_n(weight.data() + r * kKeys, kKeys, 0.0f);
            continue;
          }
          const float before = top[r];
          const float part = weigh(weight.data() + r * kKeys, begin, end, top[r]);
          if (top[r] > before) {
            const float shrink = power_of_two(splat(before - top[r]))[0];
            for (int64_t h = 0; h < wide; h += kLanes)
              store(sum_of_values.data() + r * wide + h, load(sum_of_values.data() + r * wide + h) * shrink);
            sum[r] *= shrink;
          }
          sum[r] += part;
        }
        multiply_matrix<false>(weight.data(), kKeys, blocks.values.get() + at * wide, sum_of_values.data(), wide, some,
                               wide, kKeys);
      }
      for (int64_t r = 0; r < some; r++) {
        float* result = out + ((row + r) / G * heads.queries + head * G + (row + r) % G) * H;
        const float factor = sum[r] > 0 ? 1 / sum[r] : 0.0f;
        for (int64_t h = 0; h < H; h++) result[h] = sum_of_values[r * wide + h] * factor;
      }
    }
  });
}

template <class E>
Tensor attend_rows(const Tensor& q, const Tokens<E>& tokens, const std::vector<Seen>& seen, double scale) {
  Tensor y = allocated(q.sizes());
  attend_rows(floats(q), results(y), q.size(0), {q.size(1), tokens.keys_pool.heads, q.size(2)}, tokens, seen,
              static_cast<float>(scale));
  return y;
}

// Row t sees `past` tokens in the table's pages (none without a table) and the first t + 1 rows of k and v, rounded to
// the format of the pages: a prompt in one chunk has the bits of the same prompt in several. Rows from `real` on get
// zeros.
Tensor attend_prompt(Tensor q, Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, std::optional<Tensor> k_scales,
                     std::optional<Tensor> v_scales, std::optional<Tensor> table, Tensor past,
                     std::optional<Tensor> real, double scale) {
  const int32_t* entries = table ? integers(*table) : nullptr;
  const int64_t page = k_pages.size(1), rows = real_of(q.size(0), real);
  const int64_t earlier = table ? std::min<int64_t>(*integers(past), table->size(0) * page) : 0;
  std::vector<Seen> seen;
  for (int64_t t = 0; t < rows; t++) seen.push_back({0, earlier + t + 1});
  seen.resize(q.size(0), {0, 0});
  return with_pools(k_pages, v_pages, k_scales, v_scales, [&]<class E>(const Pool<E>& keys, const Pool<E>& values) {
    const NewRows<E> new_keys(k, rows, keys), new_values(v, rows, values);
    Tokens<E> tokens{keys, values};
    for (int64_t i = 0; i < earlier; i++) tokens.add(keys, values, entries[i / page] * page + i % page);
    for (int64_t t = 0; t < rows; t++) tokens.add(new_keys.pool, new_values.pool, t);
    return attend_rows(packed(q), tokens, seen, scale);
  });
}

// All rows see all rows, but padding does not see padding.
Tensor attend_tiles(Tensor q, Tensor given_k, Tensor given_v, Tensor pad, double scale) {
  const Tensor k = packed(given_k), v = packed(given_v);
  const auto* padding = static_cast<const bool*>(pad.const_data_ptr());
  const int64_t rows = q.size(0);
  const auto as_pages = [&](const Tensor& x) {
    return Pool<float>{const_cast<float*>(floats(x)), nullptr, rows, k.size(1), k.size(2)};
  };
  const Pool<float> keys = as_pages(k), values = as_pages(v);
  Tokens<float> tokens{keys, values};
  for (const bool wanted : {false, true})
    for (int64_t s = 0; s < rows; s++)
      if (padding[s] == wanted) tokens.add(keys, values, s);
  const int64_t real = std::count(padding, padding + rows, false);
  std::vector<Seen> seen;
  for (int64_t s = 0; s < rows; s++) seen.push_back({0, padding[s] ? real : rows});
  return attend_rows(packed(q), tokens, seen, scale);
}

// attend_image for one sequence of many rows.
template <class E>
Tensor attend_image_rows(const Tensor& q, const Pool<E>& keys, const Pool<E>& values, const Tensor& table,
                         const int32_t* fills, const int32_t* sees, double scale) {
  const int32_t* entries = integers(table);
  const int64_t J = table.size(1);
  Tokens<E> tokens{keys, values};
  std::vector<int64_t> start;
  for (int64_t j = 0; j <= J; j++) {
    start.push_back(static_cast<int64_t>(tokens.keys.size()));
    for (int64_t i = 0; j < J && i < fills[j]; i++) tokens.add(keys, values, entries[j] * keys.page + i);
  }
  std::vector<Seen> seen;
  for (int64_t t = 0; t < q.size(0); t++) seen.push_back({start[sees[2 * t]], start[sees[2 * t + 1]]});
  return attend_rows(q, tokens, seen, scale);
}

// Row i of R = T / B rows of a sequence sees its first length - R + 1 + i tokens.
Tensor attend_pages(Tensor q, Tensor k_pages, Tensor v_pages, std::optional<Tensor> k_scales,
                    std::optional<Tensor> v_scales, Tensor table, Tensor length, double scale) {
  const auto* lengths = static_cast<const int32_t*>(length.const_data_ptr());
  const int64_t R = q.size(0) / table.size(0), page = k_pages.size(1);
  return with_pools(k_pages, v_pages, k_scales, v_scales, [&](const auto& keys, const auto& values) {
    return attend(packed(q), keys, values, table, scale, [=](int64_t row, int64_t j) {
      return std::min(page, lengths[row / R] - R + 1 + row % R - j * page);
    });
  });
}

// Row t sees the first `fill` tokens of the table's entries see[0] .. see[1] - 1.
Tensor attend_image(Tensor q, Tensor k_pages, Tensor v_pages, std::optional<Tensor> k_scales,
                    std::optional<Tensor> v_scales, Tensor table, Tensor fill, Tensor see, double scale) {
  const auto* fills = static_cast<const int32_t*>(fill.const_data_ptr());
  const auto* sees = static_cast<const int32_t*>(see.const_data_ptr());
  const int64_t R = q.size(0) / table.size(0), J = table.size(1);
  return with_pools(k_pages, v_pages, k_scales, v_scales, [&](const auto& keys, const auto& values) {
    if (table.size(0) == 1 && R > kFewRows)
      return attend_image_rows(packed(q), keys, values, table, fills, sees, scale);
    return attend(packed(q), keys, values, table, scale, [=](int64_t row, int64_t j) -> int64_t {
      return sees[2 * row] <= j && j < sees[2 * row + 1] ? fills[row / R * J + j] : 0;
    });
  });
}

}  // namespace
