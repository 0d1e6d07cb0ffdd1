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

// The tokens that a set of rows attends to, in order. Those of each sequence begin at a multiple of kKeys, so that sums
// have the same order whatever sequences come before.
template <class E>
struct Tokens {
  Pool<E> keys_pool, values_pool;
  std::vector<Token<E>> keys, values;

  int64_t count() const { return static_cast<int64_t>(keys.size()); }

  void add(int64_t slot) {
    keys.push_back(keys_pool.at(slot));
    values.push_back(values_pool.at(slot));
  }

  // Repeats the last token, which no row sees again, up to a multiple of kKeys.
  void end_sequence() {
    while (count() % kKeys) keys.push_back(keys.back()), values.push_back(values.back());
  }
};

// A query row sees the tokens [first, last).
struct Seen {
  int64_t first, last;
};

// The query rows [first, last) are of one sequence.
struct RowsOfSequence {
  int64_t first, last;
};

// Keys and values in blocks of kKeys tokens, in panels for multiply_matrix.
struct Blocks {
  int64_t count, width, wide;
  std::unique_ptr<float[]> keys, values;  // (heads, count, width by kKeys), (heads, count, kKeys by wide)

  template <class E>
  Blocks(const Tokens<E>& tokens, const Heads& heads)
      : count(tokens.count() / kKeys),
        width(heads.width),
        wide((width + kLanes - 1) / kLanes * kLanes),
        keys(new float[heads.keys * count * kKeys * width]),
        values(new float[heads.keys * count * kKeys * wide]) {
    parallel_for(heads.keys * count, 1, [&](int64_t from, int64_t to) {
      std::vector<float> space(width);
      for (int64_t task = from; task < to; task++) {
        const int64_t head = task / count, start = task % count * kKeys;
        float *key = keys.get() + task * kKeys * width, *value = values.get() + task * kKeys * wide;
        const auto of_token = [&](const Pool<E>& pool, const std::vector<Token<E>>& all, int64_t i) {
          return pool.values(all[start + i], head, space.data());
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
void attend_rows(const float* q, float* out, const std::vector<RowsOfSequence>& sequences, const Heads& heads,
                 const Tokens<E>& tokens, const std::vector<Seen>& seen, float scale) {
  const int64_t G = heads.group(), H = heads.width, count = tokens.count();
  const Blocks blocks(tokens, heads);
  const int64_t wide = blocks.wide;
  // Queries (rows times heads of a group) that are computed together. They are of one sequence: a key of another one
  // that is NaN would spoil them, as 0 * NaN is NaN.
  std::vector<RowsOfSequence> queries;
  for (const auto& rows : sequences)
    for (int64_t first = rows.first * G; first < rows.last * G; first += kQueries)
      queries.push_back({first, std::min(first + kQueries, rows.last * G)});
  const int64_t tasks = static_cast<int64_t>(queries.size());
  constexpr float kPowers = 1.44269504f;  // log2(e)
  parallel_for(heads.keys * tasks, 1, [&](int64_t from, int64_t to) {
    std::vector<float> query(kQueries * H), weight(kQueries * kKeys), sum_of_values(kQueries * wide);
    std::vector<float> top(kQueries), sum(kQueries);
    for (int64_t task = from; task < to; task++) {
      const int64_t head = task / tasks, row = queries[task % tasks].first;
      const int64_t some = queries[task % tasks].last - row;
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
        const int64_t start = block * kKeys;
        const int64_t at = (head * blocks.count + block) * kKeys;
        multiply_matrix<true>(query.data(), H, blocks.keys.get() + at * H, weight.data(), kKeys, some, kKeys, H);
        for (int64_t r = 0; r < some; r++) {
          const Seen& sees = seen[(row + r) / G];
          const int64_t begin = std::max<int64_t>(0, sees.first - start), end = std::min(kKeys, sees.last - start);
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
Tensor attend_rows(const Tensor& q, const std::vector<RowsOfSequence>& sequences, const Tokens<E>& tokens,
                   const std::vector<Seen>& seen, double scale) {
  Tensor y = allocated(q.sizes());
  const int64_t real = sequences.empty() ? 0 : sequences.back().last, width = q.size(1) * q.size(2);
  attend_rows(floats(q), results(y), sequences, {q.size(1), tokens.keys_pool.heads, q.size(2)}, tokens, seen,
              static_cast<float>(scale));
  std::fill(results(y) + real * width, results(y) + q.size(0) * width, 0.0f);
  return y;
}

// The rows of each sequence, which follow each other. `rows`: their numbers, 0 for padding.
std::vector<RowsOfSequence> sequences_of(const Tensor& q, const Tensor& rows, const Tensor& table) {
  std::vector<RowsOfSequence> sequences;
  int64_t first = 0;
  if (rows.size(0) != table.size(0)) fail("attention takes a block table and a number of rows for each sequence");
  for (int64_t b = 0; b < rows.size(0); b++) {
    const int64_t last = first + integers(rows)[b];
    if (last < first || last > q.size(0)) fail("attention takes numbers of rows whose sum is at most that of all rows");
    sequences.push_back({first, last});
    first = last;
  }
  return sequences;
}

// Row i of a sequence sees the first past + i + 1 tokens of its pages. Rows of no sequence get zeros.
Tensor attend_prompt(Tensor q, Tensor k_pages, Tensor v_pages, std::optional<Tensor> k_scales,
                     std::optional<Tensor> v_scales, Tensor table, Tensor rows, Tensor past, double scale) {
  const int64_t page = k_pages.size(1), J = table.size(1);
  const auto sequences = sequences_of(q, rows, table);
  return with_pools(k_pages, v_pages, k_scales, v_scales, [&]<class E>(const Pool<E>& keys, const Pool<E>& values) {
    Tokens<E> tokens{keys, values};
    std::vector<Seen> seen;
    for (size_t b = 0; b < sequences.size(); b++) {
      const int32_t* entries = integers(table) + b * J;
      const int64_t start = tokens.count(), count = sequences[b].last - sequences[b].first;
      const int64_t earlier = count ? integers(past)[b] : 0;
      if (earlier < 0 || earlier + count > J * page) fail("a prompt is longer than the pages of its block table");
      for (int64_t i = 0; i < earlier + count; i++) tokens.add(entries[i / page] * page + i % page);
      for (int64_t i = 0; i < count; i++) seen.push_back({start, start + earlier + i + 1});
      tokens.end_sequence();
    }
    return attend_rows(packed(q), sequences, tokens, seen, scale);
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
      if (padding[s] == wanted) tokens.add(s);
  tokens.end_sequence();
  const int64_t real = std::count(padding, padding + rows, false);
  std::vector<Seen> seen;
  for (int64_t s = 0; s < rows; s++) seen.push_back({0, padding[s] ? real : rows});
  return attend_rows(packed(q), {{0, rows}}, tokens, seen, scale);
}

// attend_image for sequences of different numbers of rows.
template <class E>
Tensor attend_image_rows(const Tensor& q, const std::vector<RowsOfSequence>& sequences, const Pool<E>& keys,
                         const Pool<E>& values, const Tensor& table, const int32_t* fills, const int32_t* sees,
                         double scale) {
  const int64_t J = table.size(1);
  Tokens<E> tokens{keys, values};
  std::vector<Seen> seen;
  std::vector<int64_t> start(J + 1);
  for (size_t b = 0; b < sequences.size(); b++) {
    const int32_t *entries = integers(table) + b * J, *fill = fills + b * J;
    const bool any = sequences[b].first < sequences[b].last;
    for (int64_t j = 0; j <= J; j++) {
      start[j] = tokens.count();
      for (int64_t i = 0; any && j < J && i < fill[j]; i++) tokens.add(entries[j] * keys.page + i);
    }
    for (int64_t t = sequences[b].first; t < sequences[b].last; t++)
      seen.push_back({start[sees[2 * t]], start[sees[2 * t + 1]]});
    tokens.end_sequence();
  }
  return attend_rows(q, sequences, tokens, seen, scale);
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

// Row t sees the first `fill` tokens of its sequence's entries see[0] .. see[1] - 1. Sequences have `rows`, or T / B each.
Tensor attend_image(Tensor q, Tensor k_pages, Tensor v_pages, std::optional<Tensor> k_scales,
                    std::optional<Tensor> v_scales, Tensor table, Tensor fill, Tensor see, std::optional<Tensor> rows,
                    double scale) {
  const auto* fills = static_cast<const int32_t*>(fill.const_data_ptr());
  const auto* sees = static_cast<const int32_t*>(see.const_data_ptr());
  const int64_t R = q.size(0) / table.size(0), J = table.size(1);
  return with_pools(k_pages, v_pages, k_scales, v_scales, [&](const auto& keys, const auto& values) {
    if (rows)
      return attend_image_rows(packed(q), sequences_of(q, *rows, table), keys, values, table, fills, sees, scale);
    return attend(packed(q), keys, values, table, scale, [=](int64_t row, int64_t j) -> int64_t {
      return sees[2 * row] <= j && j < sees[2 * row + 1] ? fills[row / R * J + j] : 0;
    });
  });
}

}  // namespace
