// Attention of few rows over pages (decode), and of many rows over pages, prompts and tiles.

#pragma once

#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "tensors.h"
#include "vectors.h"

namespace {

// ---- Attention over pages ----

// kSplit: tokens per task of a thread. kTokens and kBlockBytes: the most tokens of a block, and bytes of their keys.
// All keys of a block are read before its values, as memory delivers one stream fastest, and both fit in L2.
constexpr int64_t kSplit = 256, kBlockBytes = 1 << 18;
constexpr int kTokens = 64;
// Up to this many rows of a sequence, each row reads the pages separately.
constexpr int64_t kFewRows = 4;
// The most query heads scored together, and tokens scored together by number of heads: their sums fill the registers.
constexpr int kHeads = 4;
constexpr int kScored[kHeads + 1] = {0, 8, kRegisters / 4, kRegisters / 8, kRegisters / 8};

struct Heads {
  int64_t queries, keys, width;
  int64_t group() const { return queries / keys; }
};

// Partial softmax of one query row over some tokens: for each head the largest score, the sum of the weights and the
// weighted sum of the values.
struct Partial {
  float* largest;
  float* sum;
  float* values;
};

// Prefetches the vector at `next` into L2, once per cache line.
inline void prefetch(const float* next, int64_t column) {
  if (column * sizeof(float) % kLine == 0) __builtin_prefetch(next, 0, 2);
}

// Dot products of `tokens` keys, O at a time, with G queries over `width` columns: sums[query][token], whose lanes are
// still to be summed.
template <int O, int G>
inline void score(const float* k, int64_t stride, const float* q, int64_t q_stride, int64_t width, int tokens,
                  const float* next, Vector (*sums)[kTokens]) {
  int token = 0;
  const auto some = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    Vector sum[kCount][G] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      Vector key[kCount];
#pragma GCC unroll 8
      for (int o = 0; o < kCount; o++) {
        key[o] = load(k + (token + o) * stride + i);
        prefetch(next + (token + o) * width + i, i);
      }
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const Vector query = load(q + g * q_stride + i);
#pragma GCC unroll 8
        for (int o = 0; o < kCount; o++) sum[o][g] = multiply_add(key[o], query, sum[o][g]);
      }
    }
    for (int o = 0; o < kCount; o++)
      for (int g = 0; g < G; g++) sums[g][token + o] = sum[o][g];
    token += kCount;
  };
  while (token + O <= tokens) some(std::integral_constant<int, O>{});
  while (token < tokens) some(std::integral_constant<int, 1>{});
}

// Adds the weighted values of `tokens` tokens to G rows, in V vectors of columns.
template <int G, int V>
inline void add_values(const float (*weights)[kTokens], const float* v, int64_t stride, int tokens, const float* next,
                       float* to, int64_t width) {
  Vector sum[G][V];
  for (int g = 0; g < G; g++)
    for (int c = 0; c < V; c++) sum[g][c] = load(to + g * width + c * kLanes);
  for (int i = 0; i < tokens; i++) {
    Vector weight[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) weight[g] = splat(weights[g][i]);
#pragma GCC unroll 8
    for (int c = 0; c < V; c++) {
      const Vector value = load(v + i * stride + c * kLanes);
      prefetch(next + i * width + c * kLanes, c * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) sum[g][c] = multiply_add(weight[g], value, sum[g][c]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int c = 0; c < V; c++) store(to + g * width + c * kLanes, sum[g][c]);
}

// add_values for columns h to whole - 1, V vectors at a time, then fewer.
template <int G, int V>
inline void add_columns(const float (*weights)[kTokens], const float* v, int64_t stride, int tokens, const float* next,
                        float* to, int64_t width, int64_t whole, int64_t& h) {
  for (; h + V * kLanes <= whole; h += V * kLanes)
    add_values<G, V>(weights, v + h, stride, tokens, next + h, to + h, width);
  if constexpr (V > 1) add_columns<G, V - 1>(weights, v, stride, tokens, next, to, width, whole, h);
}

// Softmax weights of G queries for `tokens` tokens, at most kTokens, with keys at k. Rescales `out` to the new largest
// score.
template <int G>
void weigh_tokens(const float* q, const float* k, int tokens, const float* next, const Heads& heads, float scale,
                  Partial out, float (*weights)[kTokens]) {
  const int64_t stride = heads.keys * heads.width, whole = heads.width / kLanes * kLanes;
  Vector sums[G][kTokens];
  // Rounded up to whole vectors of tokens; those beyond `tokens` get the weight 0.
  const int held = (tokens + kLanes - 1) / kLanes * kLanes;
  for (int g = 0; g < G; g++) std::fill(sums[g] + tokens, sums[g] + held, Vector{});
  score<kScored[G], G>(k, stride, q, heads.width, whole, tokens, next, sums);
  for (int g = 0; g < G; g++) {
    float* weight = weights[g];
    for (int i = 0; i < held; i += kLanes) store(weight + i, totals(sums[g] + i));
    for (int i = 0; whole < heads.width && i < tokens; i++)
      for (int64_t h = whole; h < heads.width; h++)
        weight[i] = std::fma(k[i * stride + h], q[g * heads.width + h], weight[i]);
    std::fill(weight + tokens, weight + held, -std::numeric_limits<float>::infinity());
    Vector most = load(weight);
    for (int i = kLanes; i < held; i += kLanes) most = most > load(weight + i) ? most : load(weight + i);
    // Scaling the largest score suffices, since scales are positive.
    const float before = out.largest[g], largest = std::max(before, largest_of(most) * scale);
    if (largest > before) {
      const float shrink = exponential(splat(before - largest))[0];
      out.sum[g] *= shrink;
      for (int64_t h = 0; h < heads.width; h++) out.values[g * heads.width + h] *= shrink;
      out.largest[g] = largest;
    }
    Vector sum{};
    for (int i = 0; i < held; i += kLanes) {
      const Vector e = exponential(load(weight + i) * scale - largest);
      store(weight + i, e);
      sum += e;
    }
    out.sum[g] += total(sum);
  }
}

// Adds the weighted values of the same tokens, which are at v, to `to` for G queries.
template <int G>
void add_tokens(const float (*weights)[kTokens], const float* v, int tokens, const float* next, const Heads& heads,
                float* to) {
  const int64_t stride = heads.keys * heads.width, whole = heads.width / kLanes * kLanes;
  int64_t h = 0;
  add_columns<G, std::min(8, kRegisters / 2 / G)>(weights, v, stride, tokens, next, to, heads.width, whole, h);
  for (; h < heads.width; h++)
    for (int g = 0; g < G; g++)
      for (int i = 0; i < tokens; i++)
        to[g * heads.width + h] = std::fma(weights[g][i], v[i * stride + h], to[g * heads.width + h]);
}

// Calls f(number of query heads, first query head, their kv head) for all query heads, at most kHeads at a time.
template <class F>
inline void query_heads(const Heads& heads, const F& f) {
  for (int64_t head = 0; head < heads.keys; head++) {
    for (int64_t g = 0; g < heads.group(); g += kHeads) {
      const int64_t first = head * heads.group() + g;
      switch (std::min<int64_t>(kHeads, heads.group() - g)) {
        case 1: f(std::integral_constant<int, 1>{}, first, head); break;
        case 2: f(std::integral_constant<int, 2>{}, first, head); break;
        case 3: f(std::integral_constant<int, 3>{}, first, head); break;
        default: f(std::integral_constant<int, 4>{}, first, head);
      }
    }
  }
}

// Tokens that a query row sees in one page; `next` is the page that is read after it.
struct Piece {
  int64_t page, tokens, next;
};

// Pieces of one row, which one thread processes. Partial results are indexed by task.
struct Task {
  int64_t row;
  std::vector<Piece> pieces;
};

// Attention of q (T, Q, H): a row sees the first seen(row, j) tokens of entry j of its block table, in table (B, J).
template <class Seen>
Tensor attend(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& table, double scale,
              const Seen& seen) {
  const int64_t rows = q.size(0), B = table.size(0), J = table.size(1), page = k_pages.size(1);
  const Heads heads{q.size(1), k_pages.size(2), q.size(2)};
  const float *queries = floats(q), *keys = floats(k_pages), *values = floats(v_pages);
  if (k_pages.size(3) != heads.width || heads.queries % heads.keys || rows % B)
    fail("attention takes q (T, Q, H), pages (N, P, K, H) and a table (B, J), Q a multiple of K and T of B");
  const auto* tables = static_cast<const int32_t*>(table.const_data_ptr());

  std::vector<Task> tasks;
  std::vector<int64_t> first_task(rows + 1, 0);
  for (int64_t row = 0; row < rows; row++) {
    first_task[row] = static_cast<int64_t>(tasks.size());
    int64_t room = 0;
    for (int64_t j = 0; j < J; j++) {
      const int64_t tokens = seen(row, j);
      if (tokens <= 0) continue;
      if (room < tokens) {
        tasks.push_back({row, {}});
        room = std::max(kSplit, page);
      }
      const int64_t at = row / (rows / B) * J + j;
      tasks.back().pieces.push_back({tables[at], tokens, tables[std::min(at + 1, B * J - 1)]});
      room -= tokens;
    }
  }
  first_task[rows] = static_cast<int64_t>(tasks.size());

  // Layout of a task's partial result: the largest scores, the sums, the values.
  const int64_t width = heads.queries * (heads.width + 2), token = heads.keys * heads.width;
  const int64_t fit = kBlockBytes / (token * sizeof(float));
  const int64_t block = std::clamp<int64_t>(fit / kLanes * kLanes, kLanes, kTokens);
  std::vector<float> partials(tasks.size() * width, 0.0f);
  const auto partial = [&](int64_t task) {
    float* at = partials.data() + task * width;
    return Partial{at, at + heads.queries, at + 2 * heads.queries};
  };
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t from, int64_t to) {
    const std::unique_ptr<float[][kTokens]> weights(new float[heads.queries][kTokens]);
    for (int64_t task = from; task < to; task++) {
      const Partial out = partial(task);
      std::fill_n(out.largest, heads.queries, -std::numeric_limits<float>::infinity());
      const float* row = queries + tasks[task].row * heads.queries * heads.width;
      for (const Piece& piece : tasks[task].pieces) {
        for (int64_t i = 0; i < piece.tokens; i += block) {
          const int some = static_cast<int>(std::min<int64_t>(block, piece.tokens - i));
          const int64_t at = (piece.page * page + i) * token;
          const int64_t next = i + some < piece.tokens ? at + some * token : piece.next * page * token;
          // Keys of all heads, then their values. Meanwhile each head prefetches as many floats as it reads of what is
          // read next (the values, or the next block's keys), in the order of memory.
          query_heads(heads, [&](auto queries, int64_t query, int64_t head) {
            const int64_t h = head * heads.width, at_query = query * heads.width;
            weigh_tokens<queries>(row + at_query, keys + at + h, some, values + at + h * some, heads,
                                  static_cast<float>(scale),
                                  {out.largest + query, out.sum + query, out.values + at_query}, weights.get() + query);
          });
          query_heads(heads, [&](auto queries, int64_t query, int64_t head) {
            const int64_t h = head * heads.width;
            add_tokens<queries>(weights.get() + query, values + at + h, some, keys + next + h * some, heads,
                                out.values + query * heads.width);
          });
        }
      }
    }
  });

  Tensor y = allocated(q.sizes());
  auto* results = static_cast<float*>(y.mutable_data_ptr());
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t head = 0; head < heads.queries; head++) {
      float* result = results + (row * heads.queries + head) * heads.width;
      std::fill_n(result, heads.width, 0.0f);
      float largest = -std::numeric_limits<float>::infinity(), sum = 0;
      for (int64_t task = first_task[row]; task < first_task[row + 1]; task++)
        largest = std::max(largest, partial(task).largest[head]);
      for (int64_t task = first_task[row]; task < first_task[row + 1]; task++) {
        const Partial part = partial(task);
        const float factor = std::exp(part.largest[head] - largest);
        sum += part.sum[head] * factor;
        for (int64_t h = 0; h < heads.width; h++) result[h] += part.values[head * heads.width + h] * factor;
      }
      // A row that sees no token keeps zeros.
      for (int64_t h = 0; h < heads.width && sum > 0; h++) result[h] /= sum;
    }
  }
  return y;
}

// ---- Matrix products ----
//
// The second factor stays in cache, in panels of up to 3 vectors.

// Rows per tile for panels of 1, 2 and 3 vectors: their sums fill the registers.
constexpr int kRows[] = {0, kRegisters / 2, kRegisters * 3 / 8, kRegisters / 4};

// Calls f(rows, vectors, first vector) for each panel; `rows` is the number of rows per tile, from kRows.
template <class F>
inline void panels(int64_t columns, const F& f) {
  for (int64_t left = columns / kLanes, v = 0; left > 0;) {
    const auto panel = [&](auto rows, auto vectors) {
      f(rows, vectors, v);
      v += vectors, left -= vectors;
    };
    if (left == 1) panel(std::integral_constant<int, kRows[1]>{}, std::integral_constant<int, 1>{});
    else if (left == 2 || left == 4) panel(std::integral_constant<int, kRows[2]>{}, std::integral_constant<int, 2>{});
    else panel(std::integral_constant<int, kRows[3]>{}, std::integral_constant<int, 3>{});
  }
}

// c = a b if `fresh`, else c += a b, for R rows and a panel of V vectors, whose rows are contiguous in b.
template <int R, int V, bool fresh>
inline void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride) {
  Vector sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = fresh ? Vector{} : load(c + r * c_stride + v * kLanes);
#pragma GCC unroll 4
  for (int64_t i = 0; i < depth; i++) {
    Vector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) column[v] = load(b + (i * V + v) * kLanes);
    add_products(sum, a + i, a_stride, column);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

// multiply_tile for c (rows, columns), a (rows, depth), b (depth, columns) in panels; columns a multiple of kLanes.
template <bool fresh>
void multiply_matrix(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride, int64_t rows,
                     int64_t columns, int64_t depth) {
  panels(columns, [&](auto some, auto vectors, int64_t v) {
    constexpr int R = some, V = vectors;
    const float* from = b + v * kLanes * depth;
    float* to = c + v * kLanes;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      multiply_tile<R, V, fresh>(a + r * a_stride, a_stride, from, depth, to + r * c_stride, c_stride);
    for (; r < rows; r++)
      multiply_tile<1, V, fresh>(a + r * a_stride, a_stride, from, depth, to + r * c_stride, c_stride);
  });
}

// ---- Attention of many rows ----

// Query rows (of all heads that share a kv head) and tokens per block: whole tiles.
constexpr int64_t kQueries = 72, kKeys = 96;

// The tokens that a set of rows attends to, in order: pointers to the key and the value of each token's first head.
struct Tokens {
  std::vector<const float*> keys, values;
  void add(const float* k, const float* v) {
    keys.push_back(k);
    values.push_back(v);
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

  Blocks(const Tokens& tokens, const Heads& heads)
      : count((static_cast<int64_t>(tokens.keys.size()) + kKeys - 1) / kKeys),
        width(heads.width),
        wide((width + kLanes - 1) / kLanes * kLanes),
        keys(new float[heads.keys * count * kKeys * width]),
        values(new float[heads.keys * count * kKeys * wide]) {
    const int64_t last = static_cast<int64_t>(tokens.keys.size()) - 1;
    torch::stable::parallel_for(0, heads.keys * count, 1, [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; task++) {
        const int64_t head = task / count, start = task % count * kKeys;
        float *key = keys.get() + task * kKeys * width, *value = values.get() + task * kKeys * wide;
        const auto from_token = [&](const std::vector<const float*>& tokens, int64_t i) {
          return tokens[std::min(start + i, last)] + head * width;
        };
        panels(kKeys, [&](auto, auto vectors, int64_t v) {
          constexpr int64_t kSome = decltype(vectors)::value * kLanes;
          float* to = key + v * kLanes * width;
          for (int64_t i = 0; i < kSome; i++) {
            const float* k = from_token(tokens.keys, v * kLanes + i);
            for (int64_t h = 0; h < width; h++) to[h * kSome + i] = k[h];
          }
        });
        panels(wide, [&](auto, auto vectors, int64_t v) {
          constexpr int64_t kSome = decltype(vectors)::value * kLanes;
          float* to = value + v * kLanes * kKeys;
          const int64_t some = std::min(kSome, width - v * kLanes);
          for (int64_t i = 0; i < kKeys; i++, to += kSome) {
            std::memcpy(to, from_token(tokens.values, i) + v * kLanes, some * sizeof(float));
            std::fill(to + some, to + kSome, 0.0f);
          }
        });
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
void attend_rows(const float* q, float* out, int64_t rows, const Heads& heads, const Tokens& tokens,
                 const std::vector<Seen>& seen, float scale) {
  const int64_t G = heads.group(), H = heads.width, tasks = (rows * G + kQueries - 1) / kQueries;
  const int64_t count = static_cast<int64_t>(tokens.keys.size());
  const Blocks blocks(tokens, heads);
  const int64_t wide = blocks.wide;
  constexpr float kPowers = 1.44269504f;  // log2(e)
  torch::stable::parallel_for(0, heads.keys * tasks, 1, [&](int64_t from, int64_t to) {
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

Tensor attend_rows(const Tensor& q, int64_t key_heads, const Tokens& tokens, const std::vector<Seen>& seen,
                   double scale) {
  Tensor y = allocated(q.sizes());
  attend_rows(floats(q), results(y), q.size(0), {q.size(1), key_heads, q.size(2)}, tokens, seen,
              static_cast<float>(scale));
  return y;
}

// Row t sees `past` tokens in the table's pages (none without a table) and the first t + 1 rows of k and v. Rows from
// `real` on get zeros.
Tensor attend_prompt(Tensor q, Tensor given_k, Tensor given_v, Tensor k_pages, Tensor v_pages,
                     std::optional<Tensor> table, Tensor past, std::optional<Tensor> real, double scale) {
  const Tensor k = packed(given_k), v = packed(given_v);
  const int32_t* entries = table ? integers(*table) : nullptr;
  const int64_t page = k_pages.size(1), rows = real_of(q.size(0), real), token = k.size(1) * k.size(2);
  const int64_t earlier = table ? std::min<int64_t>(*integers(past), table->size(0) * page) : 0;
  const float *earlier_keys = floats(k_pages), *earlier_values = floats(v_pages);
  const float *keys = floats(k), *values = floats(v);
  Tokens tokens;
  for (int64_t i = 0; i < earlier; i++) {
    const int64_t at = (entries[i / page] * page + i % page) * token;
    tokens.add(earlier_keys + at, earlier_values + at);
  }
  std::vector<Seen> seen;
  for (int64_t t = 0; t < rows; t++) {
    tokens.add(keys + t * token, values + t * token);
    seen.push_back({0, earlier + t + 1});
  }
  seen.resize(q.size(0), {0, 0});
  return attend_rows(packed(q), k.size(1), tokens, seen, scale);
}

// All rows see all rows, but padding does not see padding.
Tensor attend_tiles(Tensor q, Tensor given_k, Tensor given_v, Tensor pad, double scale) {
  const Tensor k = packed(given_k), v = packed(given_v);
  const auto* padding = static_cast<const bool*>(pad.const_data_ptr());
  const int64_t rows = q.size(0), token = k.size(1) * k.size(2);
  const float *keys = floats(k), *values = floats(v);
  Tokens tokens;
  for (const bool wanted : {false, true})
    for (int64_t s = 0; s < rows; s++)
      if (padding[s] == wanted) tokens.add(keys + s * token, values + s * token);
  const int64_t real = std::count(padding, padding + rows, false);
  std::vector<Seen> seen;
  for (int64_t s = 0; s < rows; s++) seen.push_back({0, padding[s] ? real : rows});
  return attend_rows(packed(q), k.size(1), tokens, seen, scale);
}

// attend_image for one sequence of many rows.
Tensor attend_image_rows(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
                         const int32_t* fills, const int32_t* sees, double scale) {
  const auto* entries = static_cast<const int32_t*>(table.const_data_ptr());
  const int64_t page = k_pages.size(1), token = k_pages.size(2) * k_pages.size(3), J = table.size(1);
  const float *keys = floats(k_pages), *values = floats(v_pages);
  Tokens tokens;
  std::vector<int64_t> start;
  for (int64_t j = 0; j <= J; j++) {
    start.push_back(static_cast<int64_t>(tokens.keys.size()));
    for (int64_t i = 0; j < J && i < fills[j]; i++) {
      const int64_t at = (entries[j] * page + i) * token;
      tokens.add(keys + at, values + at);
    }
  }
  std::vector<Seen> seen;
  for (int64_t t = 0; t < q.size(0); t++) seen.push_back({start[sees[2 * t]], start[sees[2 * t + 1]]});
  return attend_rows(q, k_pages.size(2), tokens, seen, scale);
}

// Row i of R = T / B rows of a sequence sees its first length - R + 1 + i tokens.
Tensor attend_pages(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor length, double scale) {
  const auto* lengths = static_cast<const int32_t*>(length.const_data_ptr());
  const int64_t R = q.size(0) / table.size(0), page = k_pages.size(1);
  return attend(packed(q), k_pages, v_pages, table, scale, [=](int64_t row, int64_t j) {
    return std::min(page, lengths[row / R] - R + 1 + row % R - j * page);
  });
}

// Row t sees the first `fill` tokens of the table's entries see[0] .. see[1] - 1.
Tensor attend_image(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor fill, Tensor see, double scale) {
  const auto* fills = static_cast<const int32_t*>(fill.const_data_ptr());
  const auto* sees = static_cast<const int32_t*>(see.const_data_ptr());
  const int64_t R = q.size(0) / table.size(0), J = table.size(1);
  if (table.size(0) == 1 && R > kFewRows)
    return attend_image_rows(packed(q), k_pages, v_pages, table, fills, sees, scale);
  return attend(packed(q), k_pages, v_pages, table, scale, [=](int64_t row, int64_t j) -> int64_t {
    return sees[2 * row] <= j && j < sees[2 * row + 1] ? fills[row / R * J + j] : 0;
  });
}

}  // namespace
