// Attention of many rows over prompts, pages and tiles, and the operators of all kinds of attention.

#pragma once

#include <limits>
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
// The most blocks of queries that a thread computes together, with panels that it writes once for all of them and keeps
// in its cache, as it does their queries and sums. Panels of all tokens would take as much memory as the pages.
constexpr int64_t kTogether = 4;
// log2(e): weights are computed as powers of two.
constexpr float kPowers = 1.44269504f;

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

// Prefetches a head of a key or value: those of one head are apart in memory, so that no processor foresees them.
template <class E>
inline void prefetch_head(const Token<E>& token, int64_t head, int64_t width) {
  for (int64_t h = 0; h < width; h += kLine / static_cast<int64_t>(sizeof(E)))
    __builtin_prefetch(token.data + head * width + h, 0, 3);
}

// Writes the panels of a head for `count` tokens from `start` on, as multiply_matrix takes them: keys (width by count)
// and values (count by wide). `space` holds kLanes * width floats. Meanwhile prefetches what is read next: the values,
// then the next tokens' keys.
template <class E>
void write_panels(const Tokens<E>& tokens, int64_t head, int64_t start, int64_t count, int64_t width, int64_t wide,
                  float* key, float* value, float* space) {
  const auto* keys = tokens.keys.data() + start;
  const auto* values = tokens.values.data() + start;
  panels(count, [&](auto, auto vectors, int64_t v) {
    constexpr int64_t kSome = decltype(vectors)::value * kLanes;
    for (int64_t first = 0; first < kSome; first += kLanes) {
      float* to = key + v * kLanes * width + first;
      const float* k[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int64_t token = v * kLanes + first + i;
        prefetch_head(values[token], head, width);
        k[i] = tokens.keys_pool.values(keys[token], head, space + i * width);
      }
      int64_t h = 0;
      for (; h + kLanes <= width; h += kLanes) {
        Vector some[kLanes];
        for (int i = 0; i < kLanes; i++) some[i] = load(k[i] + h);
        transpose(some);
        for (int i = 0; i < kLanes; i++) store(to + (h + i) * kSome, some[i]);
      }
      for (; h < width; h++)
        for (int i = 0; i < kLanes; i++) to[h * kSome + i] = k[i][h];
    }
  });
  for (int64_t i = 0; i < count; i++) {
    if (start + kKeys + i < tokens.count()) prefetch_head(keys[kKeys + i], head, width);
    const float* from = tokens.values_pool.values(values[i], head, space);
    panels(wide, [&](auto, auto vectors, int64_t v) {
      constexpr int64_t kSome = decltype(vectors)::value * kLanes;
      float* to = value + v * kLanes * count + i * kSome;
      for (int64_t h = 0; h < kSome; h += kLanes) store(to + h, load(from + v * kLanes + h, width - v * kLanes - h));
    });
  }
}

// Turns `count` scores of a row into weights, 0 outside [begin, end), and returns their sum. Updates `top`, the largest
// score so far. `count` is a multiple of kLanes.
inline float weigh(float* w, int64_t count, int64_t begin, int64_t end, float& top) {
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  std::fill(w, w + begin, kUnseen);
  std::fill(w + end, w + count, kUnseen);
  Vector most = load(w);
  for (int64_t i = kLanes; i < count; i += kLanes) {
    const Vector next = load(w + i);
    most = most > next ? most : next;
  }
  top = std::max(top, largest_of(most));
  Vector part{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector e = power_of_two(load(w + i) - top);
    store(w + i, e);
    part += e;
  }
  return total(part);
}

// Sums of some queries over the tokens so far: the largest score, the sum of weights, the weighted sum of values.
struct Sums {
  float *top, *weights, *values;
};

// Turns scores of `count` queries for `keys` tokens from `start` on into weights, 0 for tokens outside seen_by(query),
// and scales the queries' sums to their new largest scores. Scores of two queries are kKeys apart. `wide`: floats of a
// weighted sum of values.
template <class F>
void weigh_queries(float* scores, int64_t count, int64_t start, int64_t keys, int64_t wide, const Sums& sums,
                   const F& seen_by) {
  for (int64_t r = 0; r < count; r++) {
    const Seen sees = seen_by(r);
    const int64_t begin = std::max<int64_t>(0, sees.first - start), end = std::min(keys, sees.last - start);
    if (begin >= end) {
      std::fill_n(scores + r * kKeys, keys, 0.0f);
      continue;
    }
    const float before = sums.top[r], part = weigh(scores + r * kKeys, keys, begin, end, sums.top[r]);
    float* values = sums.values + r * wide;
    if (sums.top[r] > before) {
      const float shrink = power_of_two(splat(before - sums.top[r]))[0];
      for (int64_t h = 0; h < wide; h += kLanes) store(values + h, load(values + h) * shrink);
      sums.weights[r] *= shrink;
    }
    sums.weights[r] += part;
  }
}

// Attention of q (T, Q, H) over `tokens`, of which row t sees seen[t]; zeros for a row that sees none. Weights are
// computed as powers of two.
template <class E>
void attend_rows(const float* q, float* out, const std::vector<RowsOfSequence>& sequences, const Heads& heads,
                 const Tokens<E>& tokens, const std::vector<Seen>& seen, float scale) {
  const int64_t G = heads.group(), H = heads.width, count = tokens.count();
  const int64_t wide = (H + kLanes - 1) / kLanes * kLanes;
  // Queries (rows times heads of a group) that a thread computes together: few enough that all threads have some. They
  // are of one sequence: a key of another one that is NaN would spoil them, as 0 * NaN is NaN.
  int64_t blocks = 0;
  for (const auto& rows : sequences) blocks += ((rows.last - rows.first) * G + kQueries - 1) / kQueries;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::clamp<int64_t>(heads.keys * blocks / (4 * threads), 1, kTogether) * kQueries;
  std::vector<RowsOfSequence> queries;
  for (const auto& rows : sequences)
    for (int64_t first = rows.first * G; first < rows.last * G; first += most)
      queries.push_back({first, std::min(first + most, rows.last * G)});
  const int64_t tasks = static_cast<int64_t>(queries.size());
  parallel_for(heads.keys * tasks, 1, [&](int64_t from, int64_t to) {
    const auto query = scratch(most * H), weight = scratch(kQueries * kKeys), sum_of_values = scratch(most * wide);
    const auto key = scratch(kKeys * H), value = scratch(kKeys * wide), space = scratch(kLanes * H);
    std::vector<float> top(most), sum(most);
    for (int64_t task = from; task < to; task++) {
      const int64_t head = task / tasks, row = queries[task % tasks].first;
      const int64_t some = queries[task % tasks].last - row;
      std::vector<Seen> seen_by(kTogether, {count, 0});  // each block of queries
      for (int64_t r = 0; r < some; r++) {
        const int64_t t = (row + r) / G, g = (row + r) % G;
        const float* from_row = q + (t * heads.queries + head * G + g) * H;
        for (int64_t h = 0; h < H; h++) query[r * H + h] = from_row[h] * scale * kPowers;
        Seen& block = seen_by[r / kQueries];
        block = {std::min(block.first, seen[t].first), std::max(block.last, seen[t].last)};
      }
      int64_t first = count, last = 0;
      for (const Seen& block : seen_by) first = std::min(first, block.first), last = std::max(last, block.last);
      last = std::min(last, count);
      std::fill(top.begin(), top.end(), -std::numeric_limits<float>::infinity());
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill_n(sum_of_values.get(), some * wide, 0.0f);
      // Begins at a multiple of kKeys whatever the rows, so that sums have the same order in each batch.
      for (int64_t start = first / kKeys * kKeys; start < last; start += kKeys) {
        // No row sees the tokens after `last`.
        const int64_t keys = std::min(kKeys, (last - start + kLanes - 1) / kLanes * kLanes);
        write_panels(tokens, head, start, keys, H, wide, key.get(), value.get(), space.get());
        for (int64_t at = 0; at < some; at += kQueries) {
          const Seen& block = seen_by[at / kQueries];
          if (block.first >= start + kKeys || block.last <= start) continue;
          const int64_t tall = std::min(kQueries, some - at);
          float* sums = sum_of_values.get() + at * wide;
          multiply_matrix<true>(query.get() + at * H, H, key.get(), weight.get(), kKeys, tall, keys, H);
          weigh_queries(weight.get(), tall, start, keys, wide, {top.data() + at, sum.data() + at, sums},
                        [&](int64_t r) { return seen[(row + at + r) / G]; });
          multiply_matrix<false>(weight.get(), kKeys, value.get(), sums, wide, tall, wide, keys);
        }
      }
      for (int64_t r = 0; r < some; r++) {
        float* result = out + ((row + r) / G * heads.queries + head * G + (row + r) % G) * H;
        const float factor = sum[r] > 0 ? 1 / sum[r] : 0.0f;
        for (int64_t h = 0; h < H; h++) result[h] = sum_of_values[r * wide + h] * factor;
      }
    }
  });
}

// Scores of N keys for V vectors of queries, whose columns are in `turned`, `lanes` apart. Sums have the order in which
// multiply_matrix computes them.
template <int N, int V>
inline void score_keys(const float* const* keys, const float* turned, int64_t lanes, int64_t width, float* scores) {
  Vector sum[N][V] = {};
  for (int64_t h = 0; h < width; h++) {
    Vector query[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) query[v] = load(turned + h * lanes + v * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const Vector key = splat(keys[n][h]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[n][v] = multiply_add(key, query[v], sum[n][v]);
    }
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) store(scores + n * lanes + v * kLanes, sum[n][v]);
}

// The sums of a head's queries in attention of few rows, and the queries: (width, lanes), zeros after the last.
struct FewQueries {
  int64_t count, lanes;
  std::vector<float> turned, top, weights, values;

  FewQueries(const float* q, RowsOfSequence rows, const Heads& heads, int64_t head, int64_t wide, float scale)
      : count((rows.last - rows.first) * heads.group()),
        lanes((count + kLanes - 1) / kLanes * kLanes),
        turned(heads.width * lanes),
        top(count, -std::numeric_limits<float>::infinity()),
        weights(count),
        values(count * wide) {
    for (int64_t r = 0; r < count; r++) {
      const float* from = q + query_of(r, rows, heads, head);
      for (int64_t h = 0; h < heads.width; h++) turned[h * lanes + r] = from[h] * scale * kPowers;
    }
  }

  static int64_t query_of(int64_t r, RowsOfSequence rows, const Heads& heads, int64_t head) {
    const int64_t G = heads.group();
    return ((rows.first + r / G) * heads.queries + head * G + r % G) * heads.width;
  }
};

// The most queries of a head in attention of few rows.
constexpr int64_t kFewQueries = kQueries;
// Keys scored together.
constexpr int kKeysTogether = kRegisters == 32 ? 8 : 6;

// attend_rows for few rows of one sequence, with the same bits. Writing keys to panels would take longer than the
// products: instead the queries are turned, once. A thread has some heads, and reads each block of tokens for all of
// them, since what is apart in memory is slow to find.
template <class E>
void attend_few(const float* q, float* out, RowsOfSequence rows, const Heads& heads, const Tokens<E>& tokens,
                const std::vector<Seen>& seen, float scale) {
  const int64_t G = heads.group(), H = heads.width, wide = (H + kLanes - 1) / kLanes * kLanes;
  int64_t first = tokens.count(), last = 0;
  for (int64_t t = rows.first; t < rows.last; t++)
    first = std::min(first, seen[t].first), last = std::max(last, seen[t].last);
  last = std::min(last, tokens.count());
  const int64_t parts = std::min<int64_t>(heads.keys, torch::stable::get_num_threads());
  parallel_for(parts, 1, [&](int64_t from, int64_t to) {
    const int64_t begin = from * heads.keys / parts, end = to * heads.keys / parts;
    std::vector<FewQueries> queries;
    for (int64_t head = begin; head < end; head++) queries.emplace_back(q, rows, heads, head, wide, scale);
    const int64_t count = queries[0].count, lanes = queries[0].lanes;
    std::vector<float> scores(kKeys * lanes), weight(lanes * kKeys), value(kKeys * 3 * kLanes);
    std::vector<float> space(kKeysTogether * H);
    for (int64_t start = first / kKeys * kKeys; start < last; start += kKeys) {
      const auto *keys = tokens.keys.data() + start, *values = tokens.values.data() + start;
      for (int64_t head = begin; head < end; head++) {
        FewQueries& of = queries[head - begin];
        for (int64_t i = 0; i < kKeys; i += kKeysTogether) {
          const float* k[kKeysTogether];
          for (int n = 0; n < kKeysTogether; n++) {
            k[n] = tokens.keys_pool.values(keys[i + n], head, space.data() + n * H);
            prefetch_head(values[i + n], head, H);
          }
          int64_t v = 0;
          for (; v + 2 * kLanes <= lanes; v += 2 * kLanes)
            score_keys<kKeysTogether, 2>(k, of.turned.data() + v, lanes, H, scores.data() + i * lanes + v);
          if (v < lanes) score_keys<kKeysTogether, 1>(k, of.turned.data() + v, lanes, H, scores.data() + i * lanes + v);
        }
        for (int64_t i = 0; i < kKeys; i += kLanes)
          for (int64_t v = 0; v < lanes; v += kLanes) {
            Vector some[kLanes];
            for (int n = 0; n < kLanes; n++) some[n] = load(scores.data() + (i + n) * lanes + v);
            transpose(some);
            for (int n = 0; n < kLanes; n++) store(weight.data() + (v + n) * kKeys + i, some[n]);
          }
        weigh_queries(weight.data(), count, start, kKeys, wide, {of.top.data(), of.weights.data(), of.values.data()},
                      [&](int64_t r) { return seen[rows.first + r / G]; });
        // What is read next: this block's keys of the next head, or the next block's of the first.
        const int64_t ahead = head + 1 < end ? head + 1 : begin;
        const auto* next = head + 1 < end ? keys : keys + (start + kKeys < last ? kKeys : 0);
        for (int64_t i = 0; i < kKeys; i++) prefetch_head(next[i], ahead, H);
        panels(wide, [&](auto tall, auto vectors, int64_t v) {
          constexpr int R = tall, V = vectors;
          for (int64_t i = 0; i < kKeys; i++) {
            const E* value_of = values[i].data + head * H;
            const float factor = Pool<E>::kScaled ? values[i].scales[head * tokens.values_pool.page] : 1.0f;
            for (int64_t h = v * kLanes; h < (v + V) * kLanes; h += kLanes) {
              float* to = value.data() + i * V * kLanes + h - v * kLanes;
              if (h + kLanes <= H) store(to, Pool<E>::kScaled ? load(value_of + h) * factor : load(value_of + h));
              else
                for (int64_t c = 0; c < kLanes; c++)
                  to[c] = h + c < H ? (Pool<E>::kScaled ? widen(value_of[h + c]) * factor : widen(value_of[h + c])) : 0.0f;
            }
          }
          float* sums = of.values.data() + v * kLanes;
          int64_t r = 0;
          for (; r + R <= count; r += R)
            multiply_tile<R, V, false>(weight.data() + r * kKeys, kKeys, value.data(), kKeys, sums + r * wide, wide);
          for (; r < count; r++)
            multiply_tile<1, V, false>(weight.data() + r * kKeys, kKeys, value.data(), kKeys, sums + r * wide, wide);
        });
      }
    }
    for (int64_t head = begin; head < end; head++) {
      const FewQueries& of = queries[head - begin];
      for (int64_t r = 0; r < count; r++) {
        float* result = out + FewQueries::query_of(r, rows, heads, head);
        const float factor = of.weights[r] > 0 ? 1 / of.weights[r] : 0.0f;
        for (int64_t h = 0; h < H; h++) result[h] = of.values[r * wide + h] * factor;
      }
    }
  });
}

template <class E>
Tensor attend_rows(const Tensor& q, const std::vector<RowsOfSequence>& sequences, const Tokens<E>& tokens,
                   const std::vector<Seen>& seen, double scale) {
  Tensor y = allocated(q.sizes());
  const int64_t real = sequences.empty() ? 0 : sequences.back().last, width = q.size(1) * q.size(2);
  const Heads heads{q.size(1), tokens.keys_pool.heads, q.size(2)};
  const auto factor = static_cast<float>(scale);
  std::vector<RowsOfSequence> many;
  for (const auto& rows : sequences) {
    const bool few = (rows.last - rows.first) * heads.group() <= kFewQueries;
    if (!few) many.push_back(rows);
    else if (rows.first < rows.last) attend_few(floats(q), results(y), rows, heads, tokens, seen, factor);
  }
  attend_rows(floats(q), results(y), many, heads, tokens, seen, factor);
  std::fill(results(y) + real * width, results(y) + q.size(0) * width, 0.0f);
  return y;
}

// How many sequences decode: the first ones, with one row each.
int64_t decoding_of(const std::optional<Tensor>& decoding) { return decoding ? *integers(*decoding) : 0; }

// The rows of each sequence, which follow each other. `rows`: their numbers, 0 for padding. Those of the first
// `decoding` sequences are left out: `attend` computes them, with the same bits as in a decode step.
std::vector<RowsOfSequence> sequences_of(const Tensor& q, const Tensor& rows, const Tensor& table, int64_t decoding) {
  std::vector<RowsOfSequence> sequences;
  int64_t first = 0;
  if (rows.size(0) != table.size(0)) fail("attention takes a block table and a number of rows for each sequence");
  for (int64_t b = 0; b < rows.size(0); b++) {
    const int64_t last = first + integers(rows)[b];
    if (last < first || last > q.size(0)) fail("attention takes numbers of rows whose sum is at most that of all rows");
    if (b < decoding && last != first + 1) fail("attention takes one row of a sequence that decodes");
    sequences.push_back({b < decoding ? last : first, last});
    first = last;
  }
  return sequences;
}

// Row i of a sequence sees the first past + i + 1 tokens of its pages. Rows of no sequence get zeros. The first
// `decoding` sequences have one row each.
Tensor attend_prompt(Tensor q, Tensor k_pages, Tensor v_pages, std::optional<Tensor> k_scales,
                     std::optional<Tensor> v_scales, Tensor table, Tensor rows, Tensor past,
                     std::optional<Tensor> decoding, double scale) {
  const int64_t page = k_pages.size(1), J = table.size(1), tokenwise = decoding_of(decoding);
  const auto sequences = sequences_of(q, rows, table, tokenwise);
  return with_pools(k_pages, v_pages, k_scales, v_scales, [&]<class E>(const Pool<E>& keys, const Pool<E>& values) {
    Tokens<E> tokens{keys, values};
    std::vector<Seen> seen(tokenwise);
    for (size_t b = 0; b < sequences.size(); b++) {
      const int32_t* entries = integers(table) + b * J;
      const int64_t start = tokens.count(), count = sequences[b].last - sequences[b].first;
      const int64_t earlier = count ? integers(past)[b] : 0;
      if (earlier < 0 || earlier + count > J * page) fail("a prompt is longer than the pages of its block table");
      for (int64_t i = 0; i < earlier + count; i++) tokens.add(entries[i / page] * page + i % page);
      for (int64_t i = 0; i < count; i++) seen.push_back({start, start + earlier + i + 1});
      tokens.end_sequence();
    }
    const int32_t* earlier_tokens = integers(past);
    const Tensor queries = packed(q), y = attend_rows(queries, sequences, tokens, seen, scale);
    if (tokenwise)
      attend(queries, keys, values, table, tokenwise, 1, scale,
             [=](int64_t row, int64_t j) { return std::min(page, earlier_tokens[row] + 1 - j * page); }, results(y));
    return y;
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
                         int64_t decoding, double scale) {
  const int64_t J = table.size(1);
  Tokens<E> tokens{keys, values};
  std::vector<Seen> seen(decoding);
  // Where an entry's tokens begin, and where those before it end. What a row sees begins at a multiple of kKeys, so
  // that sums have the same order whatever other rows of a chunk see: unless it is within what another row sees, which
  // models never ask for.
  std::vector<int64_t> start(J + 1), stop(J + 1);
  for (size_t b = 0; b < sequences.size(); b++) {
    const int32_t *entries = integers(table) + b * J, *fill = fills + b * J;
    const bool any = sequences[b].first < sequences[b].last;
    std::vector<bool> begins(J + 1, false);
    for (int64_t t = sequences[b].first; t < sequences[b].last; t++) begins[sees[2 * t]] = true;
    for (int64_t t = sequences[b].first; t < sequences[b].last; t++)
      for (int64_t j = sees[2 * t] + 1; j < sees[2 * t + 1]; j++) begins[j] = false;
    for (int64_t j = 0; j <= J; j++) {
      stop[j] = tokens.count();
      if (begins[j]) tokens.end_sequence();
      start[j] = tokens.count();
      for (int64_t i = 0; any && j < J && i < fill[j]; i++) tokens.add(entries[j] * keys.page + i);
    }
    for (int64_t t = sequences[b].first; t < sequences[b].last; t++)
      seen.push_back({start[sees[2 * t]], stop[sees[2 * t + 1]]});
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

// Row t sees the first `fill` tokens of its sequence's entries see[0] .. see[1] - 1. Sequences have `rows`, or T / B
// each; of the first `decoding` sequences, one row each.
Tensor attend_image(Tensor q, Tensor k_pages, Tensor v_pages, std::optional<Tensor> k_scales,
                    std::optional<Tensor> v_scales, Tensor table, Tensor fill, Tensor see, std::optional<Tensor> rows,
                    std::optional<Tensor> decoding, double scale) {
  const auto* fills = static_cast<const int32_t*>(fill.const_data_ptr());
  const auto* sees = static_cast<const int32_t*>(see.const_data_ptr());
  const int64_t R = q.size(0) / table.size(0), J = table.size(1);
  return with_pools(k_pages, v_pages, k_scales, v_scales, [&](const auto& keys, const auto& values) {
    const auto seen_by = [=](int64_t each) {
      return [=](int64_t row, int64_t j) -> int64_t {
        return sees[2 * row] <= j && j < sees[2 * row + 1] ? fills[row / each * J + j] : 0;
      };
    };
    const Tensor queries = packed(q);
    if (!rows) return attend(queries, keys, values, table, scale, seen_by(R));
    const int64_t first = decoding_of(decoding);
    const auto sequences = sequences_of(q, *rows, table, first);
    const Tensor y = attend_image_rows(queries, sequences, keys, values, table, fills, sees, first, scale);
    if (first) attend(queries, keys, values, table, first, 1, scale, seen_by(1), results(y));
    return y;
  });
}

}  // namespace
