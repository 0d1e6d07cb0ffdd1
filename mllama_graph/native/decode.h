// Attention of few rows over pages (decode): limited by the speed at which keys and values are read.
//
// They are read once for all rows that follow each other and see the same pages, such as a token and the proposals
// after it, in the pages' format, and widened in registers. The scale of an int8 key is multiplied into its score, that
// of an int8 value into the token's weight.

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
// The most rows that read keys and values together: few enough that their queries and sums fit in L1 or L2.
constexpr int64_t kRowsTogether = 8;
constexpr int kTokens = 64;
// The most query heads scored together, and tokens scored together by number of heads: their sums fill the registers.
constexpr int kHeads = 4;
constexpr int kScored[kHeads + 1] = {0, 8, kRegisters / 4, kRegisters / 8, kRegisters / 8};

struct Heads {
  int64_t queries, keys, width;
  int64_t group() const { return queries / keys; }
};

// Partial softmax of queries over some tokens: for each the largest score, the sum of the weights and the weighted sum
// of the values.
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

// Softmax weights of G queries for `tokens` tokens, at most kTokens, with keys at k; with scales of keys and values,
// the weights of int8 values. Rescales `out` to the new largest score.
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

// Calls f(number of queries, first of them, their kv head) for the queries of kv heads from .. to - 1, at most kHeads
// at a time: of the `each` queries of every head, those from `first` to `last` - 1.
template <class F>
inline void query_heads(int64_t from, int64_t to, int64_t each, int64_t first, int64_t last, const F& f) {
  for (int64_t head = from; head < to; head++) {
    for (int64_t g = first; g < last; g += kHeads) {
      const int64_t query = head * each + g;
      switch (std::min<int64_t>(kHeads, last - g)) {
        case 1: f(std::integral_constant<int, 1>{}, query, head); break;
        case 2: f(std::integral_constant<int, 2>{}, query, head); break;
        case 3: f(std::integral_constant<int, 3>{}, query, head); break;
        default: f(std::integral_constant<int, 4>{}, query, head);
      }
    }
  }
}

// Tokens that a query row sees in one page; `next` is the page that is read after it.
struct Piece {
  int64_t page, tokens, next;
};

// Pieces of one row, over which a partial result is summed up.
struct Task {
  int64_t row;
  std::vector<Piece> pieces;
};

// Whether two tasks read the same pages, of which their rows may see different numbers of tokens.
inline bool share_pages(const Task& a, const Task& b) {
  return std::equal(a.pieces.begin(), a.pieces.end(), b.pieces.begin(), b.pieces.end(),
                    [](const Piece& one, const Piece& other) { return one.page == other.page; });
}

// Tasks of rows that share pages, which a thread computes together for some kv heads. space: the number of tasks before
// theirs, which is where their partial results begin.
struct Together {
  std::vector<int64_t> tasks;
  int64_t space;
};

// The tasks of rows that follow each other and share pages, at most kRowsTogether of them. `first_task`: of each row,
// followed by the number of tasks. What one set of rows has read from memory, the next one reads from a cache: first
// the first tasks of all rows that begin with the same page, then the second ones.
inline std::vector<Together> together(const std::vector<Task>& tasks, const std::vector<int64_t>& first_task) {
  const int64_t rows = static_cast<int64_t>(first_task.size()) - 1;
  const auto page_of = [&](int64_t row) {
    return first_task[row] < first_task[row + 1] ? tasks[first_task[row]].pieces.front().page : -1;
  };
  std::vector<Together> sets;
  int64_t space = 0;
  for (int64_t first = 0, last; first < rows; first = last) {
    int64_t most = 0;
    for (last = first; last < rows && page_of(last) == page_of(first); last++)
      most = std::max(most, first_task[last + 1] - first_task[last]);
    for (int64_t n = 0; n < most; n++) {
      bool begun = false;
      for (int64_t row = first; row < last; row++) {
        const int64_t task = first_task[row] + n;
        if (task >= first_task[row + 1]) continue;
        if (!begun || static_cast<int64_t>(sets.back().tasks.size()) == kRowsTogether ||
            !share_pages(tasks[sets.back().tasks.front()], tasks[task]))
          sets.push_back({{}, space});
        begun = true;
        sets.back().tasks.push_back(task);
        space++;
      }
    }
  }
  return sets;
}

// Attention of the first B * R rows of q (T, Q, H), R for each of the first B sequences: a row sees the first
// seen(row, j) tokens of entry j of its block table, in table (.., J). Writes as many rows of `results`.
template <class E, class Seen>
void attend(const Tensor& q, const Pool<E>& keys, const Pool<E>& values, const Tensor& table, int64_t B, int64_t R,
            double scale, const Seen& seen, float* results) {
  const int64_t rows = B * R, J = table.size(1), page = keys.page;
  const Heads heads{q.size(1), keys.heads, q.size(2)};
  const int64_t G = heads.group(), H = heads.width;
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
  const std::vector<Together> sets = together(tasks, first_task);

  // Largest scores, sums and values of the partial results, those of a set by head, row and query of the head.
  const int64_t partials = static_cast<int64_t>(tasks.size()) * heads.queries, token = heads.keys * H;
  const int64_t fit = kBlockBytes / (token * sizeof(E));
  const int64_t block = std::clamp<int64_t>(fit / kLanes * kLanes, kLanes, kTokens);
  std::vector<float> largest(partials, -std::numeric_limits<float>::infinity()), sum(partials), value(partials * H);
  const auto query_of = [&](int64_t set, int64_t n, int64_t head) {
    const int64_t count = static_cast<int64_t>(sets[set].tasks.size());
    return sets[set].space * heads.queries + (head / G * count + n) * G + head % G;
  };
  // Few sets are split by heads, which changes no sum, where reading them takes longer than waking threads.
  const auto count = static_cast<int64_t>(sets.size());
  const int64_t threads = torch::stable::get_num_threads(), bytes = sets.empty() ? 0 : 2 * token * sizeof(E) * most;
  const int64_t wanted = bytes < kSplitBytes ? 1 : (2 * threads + count - 1) / std::max<int64_t>(1, count);
  const int64_t parts = count < threads ? std::min(heads.keys, wanted) : 1;
  parallel_for(count * parts, 1, [&](int64_t from, int64_t to) {
    std::vector<float> query;
    std::unique_ptr<float[][kTokens]> weights;
    int64_t held = 0;
    for (; from < to; from++) {
      const Together& set = sets[from / parts];
      const int64_t rows = static_cast<int64_t>(set.tasks.size()), each = rows * G, at = set.space * heads.queries;
      const int64_t first = from % parts * heads.keys / parts, last = (from % parts + 1) * heads.keys / parts;
      if (held < rows) {
        held = rows;
        query.resize(rows * heads.queries * H);
        weights.reset(new float[rows * heads.queries][kTokens]);
      }
      for (int64_t n = 0; n < rows; n++)
        for (int64_t head = first; head < last; head++)
          std::copy_n(queries + (tasks[set.tasks[n]].row * heads.queries + head * G) * H, G * H,
                      query.data() + (head * rows + n) * G * H);
      const auto pieces_of = [&](int64_t n) -> const std::vector<Piece>& { return tasks[set.tasks[n]].pieces; };
      for (size_t p = 0; p < pieces_of(0).size(); p++) {
        const Piece& piece = pieces_of(rows - 1)[p];
        const auto tokens_of = [&](int64_t n, int64_t i) { return std::min(block, pieces_of(n)[p].tokens - i); };
        int64_t longest = 0;
        for (int64_t n = 0; n < rows; n++) longest = std::max(longest, pieces_of(n)[p].tokens);
        for (int64_t i = 0; i < longest; i += block) {
          // Rows that see as many tokens of a block, which are nearly always all, read it together.
          for (int64_t n = 0, end; n < rows; n = end) {
            const int some = static_cast<int>(tokens_of(n, i));
            for (end = n + 1; end < rows && tokens_of(end, i) == some; end++);
            if (some <= 0) continue;
            const int64_t slot = piece.page * page + i;
            const int64_t next = i + some < piece.tokens ? slot + some : piece.next * page;
            const E *k = keys.data + slot * token, *v = values.data + slot * token, *after = keys.data + next * token;
            // Keys of all heads, then their values. Meanwhile each head prefetches as many elements as it reads of what
            // is read next (the values, or the next block's keys): in the order of memory, if all heads are this
            // thread's.
            const auto prefetched = [&](const E* from, int64_t h) {
              return parts == 1 ? Next<E>{from + h * some, H} : Next<E>{from + h, token};
            };
            query_heads(first, last, each, n * G, end * G, [&](auto some_queries, int64_t one, int64_t head) {
              weigh_tokens<some_queries>(query.data() + one * H, k + head * H, keys.scales_of(slot, head),
                                         values.scales_of(slot, head), some, prefetched(v, head * H), heads,
                                         static_cast<float>(scale),
                                         {largest.data() + at + one, sum.data() + at + one, value.data() + (at + one) * H},
                                         weights.get() + one);
            });
            query_heads(first, last, each, n * G, end * G, [&](auto some_queries, int64_t one, int64_t head) {
              add_tokens<some_queries>(weights.get() + one, v + head * H, some, prefetched(after, head * H), heads,
                                       value.data() + (at + one) * H);
            });
          }
        }
      }
    }
  });

  // The partial results of each row, in the order of its tasks.
  std::vector<std::pair<int64_t, int64_t>> place_of(tasks.size());
  for (int64_t set = 0; set < count; set++)
    for (size_t n = 0; n < sets[set].tasks.size(); n++) place_of[sets[set].tasks[n]] = {set, n};
  const int64_t longest = tasks.empty() ? 1 : static_cast<int64_t>(tasks.size()) / rows + 1;
  parallel_for(rows * heads.queries, kGrain / (longest * H) + 1, [&](int64_t from, int64_t to) {
    for (; from < to; from++) {
      const int64_t row = from / heads.queries, head = from % heads.queries;
      float* result = results + from * H;
      std::fill_n(result, H, 0.0f);
      const auto each = [&](const auto& f) {
        for (int64_t task = first_task[row]; task < first_task[row + 1]; task++)
          f(query_of(place_of[task].first, place_of[task].second, head));
      };
      float top = -std::numeric_limits<float>::infinity(), all = 0;
      each([&](int64_t query) { top = std::max(top, largest[query]); });
      each([&](int64_t query) {
        const float factor = std::exp(largest[query] - top);
        all += sum[query] * factor;
        for (int64_t h = 0; h < H; h++) result[h] += value[query * H + h] * factor;
      });
      // A row that sees no token keeps zeros.
      for (int64_t h = 0; h < H && all > 0; h++) result[h] /= all;
    }
  });
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
