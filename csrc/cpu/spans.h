// The inner loops: n tokens of one head, one after the other.
//
// The state is kept transposed while a request runs, [key][value]: lane = state row (value), so that S q and S k are
// sums of columns, a gate is a lane-wise factor and no sum crosses lanes. Replay (without q) and scan are one loop,
// hence the same bits.
#pragma once

#include "delta_rule.h"
#include "vec.h"

namespace deltamem {
namespace {

// Read (if q), then write. log and q: the head's first token's whole row; state: this head's, in and out.
using Span = void (*)(const Shape&, int64_t head, int64_t n, const float* q, const float* log, float* reads, float* state);

// What a state row keeps, erases and takes, and from them S' = keep S + (take v - erase p) k^T.
template <int N>
struct Gates {
  Vec<N> keep, erase, take;
};
template <int N>
inline Gates<N> gates_of(const Shape& shape, const Vec<N>& beta, const Vec<N>& lambda) {
  if (shape.mode == Mode::no_lambda) return {spread<N>(1.0f), beta, beta};
  return {lambda, shape.mode == Mode::standard ? beta : lambda * beta, beta};
}

// How N state rows from `at` on (head and row, counted in floats of a row of reads) move in one token. log: its log row.
template <int N>
inline Gates<N> gates_at(const Shape& shape, int64_t head, int64_t at, const float* log) {
  const int64_t gate_count = shape.gates();
  const float* gate = log + 2 * shape.width() + (shape.rankwise ? at : head);
  const Vec<N> beta = shape.rankwise ? load<N>(gate) : spread<N>(*gate);
  Vec<N> lambda = 1.0f - beta;
  if (shape.has_lambda()) lambda = shape.rankwise ? load<N>(gate + gate_count) : spread<N>(gate[gate_count]);
  return gates_of<N>(shape, beta, lambda);
}

// take v - erase p
template <int N>
inline Vec<N> change(const Shape& shape, const Gates<N>& gates, const Vec<N>& predicted, int64_t at, const float* log) {
  return fused<N>(-gates.erase, predicted, gates.take * load<N>(log + shape.width() + at));
}

// S x for N state rows, a column at a time: four sums, so that additions need not wait for each other.
template <int N>
struct Product {
  Vec<N> sums[4];
  inline void add(int j, const Vec<N>& column, float x) {
    sums[j & 3] = j < 4 ? column * spread<N>(x) : fused<N>(column, spread<N>(x), sums[j & 3]);
  }
  inline Vec<N> value() const { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }
};
template <int R, int N>
inline Vec<N> product(const Vec<N>* s, const float* x) {
  Product<N> sum;
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) sum.add(j, s[j], x[j]);
  return sum.value();
}

// N state rows from `row` on of a head of rank R, in registers. Rows do not depend on each other.
template <int R, int N>
inline void span_in_registers(const Shape& given, int64_t head, int64_t row, int64_t n, const float* q, const float* log,
                              float* reads, float* state) {
  using V = Vec<N>;
  const Shape shape = given;  // a copy, so that the compiler knows that no store below changes it
  const int64_t width = shape.width(), log_row = shape.log_columns(), at = head * R + row;
  V s[R];
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) s[j] = load<N>(state + j * R + row);
  for (int64_t t = 0; t < n; t++, log += log_row) {
    const float* k = log + head * R;
    if (q) store<N>(reads + t * width + at, product<R, N>(s, q + t * width + head * R));
    const V predicted = product<R, N>(s, k);
    const Gates<N> gates = gates_at<N>(shape, head, at, log);
    const V delta = change<N>(shape, gates, predicted, at, log);
#pragma GCC unroll 16
    for (int j = 0; j < R; j++) s[j] = fused<N>(delta, spread<N>(k[j]), s[j] * gates.keep);
  }
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) store<N>(state + j * R + row, s[j]);
}

// A head whose rows do not fit the registers: each column is loaded and stored once per token, and while it is at hand
// the next token's products take it up. The same operations as in registers, in the same order: the same bits.
template <int R, int N>
inline void span_in_cache(const Shape& given, int64_t head, int64_t n, const float* q, const float* log, float* reads,
                          float* state) {
  using V = Vec<N>;
  constexpr int kGroups = R / N;
  const Shape shape = given;
  const int64_t width = shape.width(), log_row = shape.log_columns();
  V predicted[kGroups], read[kGroups];
  for (int group = 0; group < kGroups; group++) {
    V s[R];
    for (int j = 0; j < R; j++) s[j] = load<N>(state + j * R + group * N);
    predicted[group] = product<R, N>(s, log + head * R);
    read[group] = q ? product<R, N>(s, q + head * R) : V{};
  }
  for (int64_t t = 0; t < n; t++, log += log_row) {
    const float* k = log + head * R;
    const int64_t more = t + 1 < n;  // behind the last token its own k and q are read again, for nothing
    const float *next_k = k + more * log_row, *next_q = q ? q + (t + more) * width + head * R : next_k;
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; group++) {
      const int64_t at = head * R + group * N;
      if (q) store<N>(reads + t * width + at, read[group]);
      const Gates<N> gates = gates_at<N>(shape, head, at, log);
      const V delta = change<N>(shape, gates, predicted[group], at, log);
      Product<N> prediction, reading;
#pragma GCC unroll 16
      for (int j = 0; j < R; j++) {
        float* column = state + j * R + group * N;
        const V s = fused<N>(delta, spread<N>(k[j]), load<N>(column) * gates.keep);
        store<N>(column, s);
        prediction.add(j, s, next_k[j]);
        reading.add(j, s, next_q[j]);
      }
      predicted[group] = prediction.value();
      read[group] = reading.value();
    }
  }
}

template <int R>
void span_fixed(const Shape& shape, int64_t head, int64_t n, const float* q, const float* log, float* reads, float* state) {
  constexpr int N = R < kLanes ? R : kLanes;
  if constexpr (2 * R > kRegisters) {
    if (n) span_in_cache<R, N>(shape, head, n, q, log, reads, state);
  } else {
    for (int64_t row = 0; row < R; row += N) span_in_registers<R, N>(shape, head, row, n, q, log, reads, state);
  }
}

// Any rank: the state stays in memory, and rows are taken N at a time, then one at a time.
template <int N>
inline void step_rows(const Shape& shape, int64_t head, int64_t row, const float* query, const float* log, float* read, float* state) {
  using V = Vec<N>;
  const int64_t r = shape.rank, at = head * r + row;
  const float* k = log + head * r;
  V sum = {}, predicted = {};
  for (int64_t j = 0; j < r; j++) {
    const V s = load<N>(state + j * r + row);
    if (query) sum = fused<N>(s, spread<N>(query[j]), sum);
    predicted = fused<N>(s, spread<N>(k[j]), predicted);
  }
  if (query) store<N>(read + row, sum);
  const Gates<N> gates = gates_at<N>(shape, head, at, log);
  const V delta = change<N>(shape, gates, predicted, at, log);
  for (int64_t j = 0; j < r; j++) {
    float* column = state + j * r + row;
    store<N>(column, fused<N>(delta, spread<N>(k[j]), load<N>(column) * gates.keep));
  }
}

void span_any(const Shape& shape, int64_t head, int64_t n, const float* q, const float* log, float* reads, float* state) {
  const int64_t r = shape.rank, width = shape.width();
  for (int64_t t = 0; t < n; t++, log += shape.log_columns()) {
    const float* query = q ? q + t * width + head * r : nullptr;
    float* read = q ? reads + t * width + head * r : nullptr;
    int64_t row = 0;
    for (; row + kLanes <= r; row += kLanes) step_rows<kLanes>(shape, head, row, query, log, read, state);
    for (; row + 4 <= r; row += 4) step_rows<4>(shape, head, row, query, log, read, state);
    for (; row < r; row++) step_rows<1>(shape, head, row, query, log, read, state);
  }
}

Span span_for(const Shape& shape) {
  switch (shape.rank) {
    case 4: return span_fixed<4>;
    case 8: return span_fixed<8>;
    case 16: return span_fixed<16>;
    default: return span_any;
  }
}

}  // namespace
}  // namespace deltamem
