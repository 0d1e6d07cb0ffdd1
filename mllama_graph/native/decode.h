// Attention of few rows over pages (decode): limited by the speed at which keys and values are read.
//
// They are read once, in the pages' format, and widened in registers. The scale of an int8 key is multiplied into its
// score, that of an int8 value into the token's weight.

#pragma once

#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "pages.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// kSplit: tokens per task of a thread. kTokens and kBlockBytes: the most tokens of a block, and bytes of their keys.
// All keys of a block are read before its values, as memory delivers one stream fastest, and both fit in L2.
constexpr int64_t kSplit = 256, kBlockBytes = 1 << 18;
// A task that reads fewer bytes is not split.
constexpr int64_t kSplitBytes = 1 << 16;
constexpr int kTokens = 64;
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
template <class E>
inline void prefetch(const E* next, int64_t column) {
  if (column * sizeof(E) % kLine == 0) __builtin_prefetch(next, 0, 2);
}

// What is read after a block, and is prefetched meanwhile: rows from `from` on.
template <class E>
struct Next {
  const E* from;
  int64_t stride;
  Next operator+(int64_t elements) const { return {from + elements, stride}; }
};

// Dot products of `tokens` keys, O at a time, with G queries over `width` columns: sums[query][token], whose lanes are
// still to be summed.
template <int O, int G, class E>
inline void score(const E* k, int64_t stride, const float* q, int64_t q_stride, int64_t width, int tokens, Next<E> next,
                  Vector (*sums)[kTokens]) {
  int token = 0;
  const auto some = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    Vector sum[kCount][G] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      Vector key[kCount];
#pragma GCC unroll 8
      for (int o = 0; o < kCount; o++) {
        key[o] = load(k + (token + o) * stride + i);
        prefetch(next.from + (token + o) * next.stride + i, i);
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
template <int G, int V, class E>
inline void add_values(const float (*weights)[kTokens], const E* v, int64_t stride, int tokens, Next<E> next, float* to,
                       int64_t width) {
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
      prefetch(next.from + i * next.stride + c * kLanes, c * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) sum[g][c] = multiply_add(weight[g], value, sum[g][c]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int c = 0; c < V; c++) store(to + g * width + c * kLanes, sum[g][c]);
}

// add_values for columns h to whole - 1, V vectors at a time, then fewer.
template <int G, int V, class E>
inline void add_columns(const float (*weights)[kTokens], const E* v, int64_t stride, int tokens, Next<E> next, float* to,
                        int64_t width, int64_t whole, int64_t& h) {
  for (; h + V * kLanes <= whole; h += V * kLanes)
    add_values<G, V>(weights, v + h, stride, tokens, next + h, to + h, width);
  if constexpr (V > 1) add_columns<G, V - 1>(weights, v, stride, tokens, next, to, width, whole, h);
}

// Softmax weights of G queries for `tokens` tokens, at most kTokens, with keys at k; with scales of keys and values, the
// weights of int8 values. Rescales `out` to the new largest score.
template <int G, class E>
void weigh_tokens(const float* q, const E* k, const float* k_scales, const float* v_scales, int tokens, Next<E> next,
                  const Heads& heads, float scale, Partial out, float (*weights)[kTokens]) {
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
        weight[i] = std::fma(widen(k[i * stride + h]), q[g * heads.width + h], weight[i]);
    for (int i = 0; k_scales && i < held; i += kLanes)
      store(weight + i, load(weight + i) * load(k_scales + i, tokens - i));
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
      store(weight + i, v_scales ? e * load(v_scales + i, tokens - i) : e);
      sum += e;
    }
    out.sum[g] += total(sum);
  }
}

// Adds the weighted values of the same tokens, which are at v, to `to` for G queries.
template <int G, class E>
void add_tokens(const float (*weights)[kTokens], const E* v, int tokens, Next<E> next, const Heads& heads, float* to) {
  const int64_t stride = heads.keys * heads.width, whole = heads.width / kLanes * kLanes;
  int64_t h = 0;
  add_columns<G, std::min(8, kRegisters / 2 / G)>(weights, v, stride, tokens, next, to, heads.width, whole, h);
  for (; h < heads.width; h++)
    for (int g = 0; g < G; g++)
      for (int i = 0; i < tokens; i++)
        to[g * heads.width + h] = std::fma(weights[g][i], widen(v[i * stride + h]), to[g * heads.width + h]);
}

// Calls f(number of query heads, first query head, their kv head) for the query heads of kv heads from .. to - 1, at most
// kHeads at a time.
template <class F>
inline void query_heads(const Heads& heads, int64_t from, int64_t to, const F& f) {
  for (int64_t head = from; head < to; head++) {
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

// Pieces of one row, which one thread processes for some kv heads. Partial results are indexed by task.
struct Task {
  int64_t row;
  std::vector<Piece> pieces;
};

// The tasks in the order in which threads take them: of rows that follow each other and begin with the same page, such as
// a token and the proposals after it, first the first task of each, then the second, so that what one has read from
// memory, the next reads from a cache. `first_task`: of each row, followed by the number of tasks.
inline std::vector<int64_t> in_order(const std::vector<Task>& tasks, const std::vector<int64_t>& first_task) {
  const int64_t rows = static_cast<int64_t>(first_task.size()) - 1;
  const auto page_of = [&](int64_t row) {
    return first_task[row] < first_task[row + 1] ? tasks[first_task[row]].pieces.front().page : -1;
  };
  std::vector<int64_t> order;
  order.reserve(tasks.size());
  for (int64_t first = 0, last; first < rows; first = last) {
    int64_t most = 0;
    for (last = first; last < rows && page_of(last) == page_of(first); last++)
      most = std::max(most, first_task[last + 1] - first_task[last]);
    for (int64_t n = 0; n < most; n++)
      for (int64_t row = first; row < last; row++)
        if (first_task[row] + n < first_task[row + 1]) order.push_back(first_task[row] + n);
  }
  return order;
}

// Attention of the first B * R rows of q (T, Q, H), R for each of the first B sequences: a row sees the first
// seen(row, j) tokens of entry j of its block table, in table (.., J). Writes as many rows of `results`.
template <class E, class Seen>
void attend(const Tensor& q, const Pool<E>& keys, const Pool<E>& values, const Tensor& table, int64_t B, int64_t R,
            double scale, const Seen& seen, float* results) {
  const int64_t rows = B * R, J = table.size(1), page = keys.page;
  const Heads heads{q.size(1), keys.heads, q.size(2)};
  const float* queries = floats(q);
  if (keys.width != heads.width || heads.queries % heads.keys || rows > q.size(0) || B > table.size(0))
    fail("attention takes q (T, Q, H), pages (N, P, K, H) and a table (B, J), Q a multiple of K and T of B");
  const int32_t* tables = integers(table);

  std::vector<Task> tasks;
  std::vector<int64_t> first_task(rows + 1, 0);
  int64_t most = 0;  // tokens of a task
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
      const int64_t at = row / R * J + j;
      tasks.back().pieces.push_back({tables[at], tokens, tables[std::min(at + 1, B * J - 1)]});
      room -= tokens;
      most = std::max(most, std::max(kSplit, page) - room);
    }
  }
  first_task[rows] = static_cast<int64_t>(tasks.size());
  const std::vector<int64_t> order = in_order(tasks, first_task);

  // Layout of a task's partial result: the largest scores, the sums, the values.
  const int64_t width = heads.queries * (heads.width + 2), token = heads.keys * heads.width;
  const int64_t fit = kBlockBytes / (token * sizeof(E));
  const int64_t block = std::clamp<int64_t>(fit / kLanes * kLanes, kLanes, kTokens);
  std::vector<float> partials(tasks.size() * width, 0.0f);
  const auto partial = [&](int64_t task) {
    float* at = partials.data() + task * width;
    return Partial{at, at + heads.queries, at + 2 * heads.queries};
  };
  // Few tasks are split by heads, which changes no sum, where reading them takes longer than waking threads.
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t threads = torch::stable::get_num_threads(), bytes = tasks.empty() ? 0 : 2 * token * sizeof(E) * most;
  const int64_t wanted = bytes < kSplitBytes ? 1 : (2 * threads + count - 1) / std::max<int64_t>(1, count);
  const int64_t parts = count < threads ? std::min(heads.keys, wanted) : 1;
  parallel_for(count * parts, 1, [&](int64_t from, int64_t to) {
    const std::unique_ptr<float[][kTokens]> weights(new float[heads.queries][kTokens]);
    for (; from < to; from++) {
      const int64_t task = order[from / parts], first = from % parts * heads.keys / parts;
      const int64_t last = (from % parts + 1) * heads.keys / parts;
      const Partial out = partial(task);
      std::fill(out.largest + first * heads.group(), out.largest + last * heads.group(),
                -std::numeric_limits<float>::infinity());
      const float* row = queries + tasks[task].row * heads.queries * heads.width;
      for (const Piece& piece : tasks[task].pieces) {
        for (int64_t i = 0; i < piece.tokens; i += block) {
          const int some = static_cast<int>(std::min<int64_t>(block, piece.tokens - i));
          const int64_t slot = piece.page * page + i;
          const int64_t next = i + some < piece.tokens ? slot + some : piece.next * page;
          const E *k = keys.data + slot * token, *v = values.data + slot * token, *after = keys.data + next * token;
          // Keys of all heads, then their values. Meanwhile each head prefetches as many elements as it reads of what
          // is read next (the values, or the next block's keys): in the order of memory, if all heads are this thread's.
          const auto prefetched = [&](const E* from, int64_t h) {
            return parts == 1 ? Next<E>{from + h * some, heads.width} : Next<E>{from + h, token};
          };
          query_heads(heads, first, last, [&](auto queries, int64_t query, int64_t head) {
            const int64_t h = head * heads.width, at_query = query * heads.width;
            weigh_tokens<queries>(row + at_query, k + h, keys.scales_of(slot, head), values.scales_of(slot, head), some,
                                  prefetched(v, h), heads, static_cast<float>(scale),
                                  {out.largest + query, out.sum + query, out.values + at_query}, weights.get() + query);
          });
          query_heads(heads, first, last, [&](auto queries, int64_t query, int64_t head) {
            const int64_t h = head * heads.width;
            add_tokens<queries>(weights.get() + query, v + h, some, prefetched(after, h), heads,
                                out.values + query * heads.width);
          });
        }
      }
    }
  });

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
}

// The same for all rows, T / B of each sequence.
template <class E, class Seen>
Tensor attend(const Tensor& q, const Pool<E>& keys, const Pool<E>& values, const Tensor& table, double scale,
              const Seen& seen) {
  const int64_t rows = q.size(0), B = table.size(0);
  if (rows % B) fail("attention takes as many rows of each sequence");
  Tensor y = allocated(q.sizes());
  attend(q, keys, values, table, B, rows / B, scale, seen, results(y));
  return y;
}

}  // namespace
