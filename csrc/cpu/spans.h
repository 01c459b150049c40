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

// S x for N state rows; four sums, so that additions need not wait for each other.
template <int R, int N>
inline Vec<N> product(const Vec<N>* s, const float* x) {
  Vec<N> sums[4];
#pragma GCC unroll 16
  for (int j = 0; j < 4; j++) sums[j] = s[j] * spread<N>(x[j]);
#pragma GCC unroll 16
  for (int j = 4; j < R; j++) sums[j & 3] = fused<N>(s[j], spread<N>(x[j]), sums[j & 3]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// N state rows from `row` on of a head of rank R. Rows do not depend on each other: what does not fit the registers
// together runs one part after the other.
template <int R, int N>
inline void span_rows(const Shape& shape, int64_t head, int64_t row, int64_t n, const float* q, const float* log,
                      float* reads, float* state) {
  using V = Vec<N>;
  const int64_t width = shape.width(), log_row = shape.log_columns(), gate_count = shape.gates();
  const int64_t at = head * R + row;
  const bool has_lambda = shape.has_lambda();
  V s[R];
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) s[j] = load<N>(state + j * R + row);
  for (int64_t t = 0; t < n; t++, log += log_row) {
    const float* k = log + head * R;
    if (q) store<N>(reads + t * width + at, product<R, N>(s, q + t * width + head * R));
    const V predicted = product<R, N>(s, k);

    const float* gate = log + 2 * width + (shape.rankwise ? at : head);
    const V beta = shape.rankwise ? load<N>(gate) : spread<N>(*gate);
    V lambda = 1.0f - beta;
    if (has_lambda) lambda = shape.rankwise ? load<N>(gate + gate_count) : spread<N>(gate[gate_count]);
    const Gates<N> g = gates_of<N>(shape, beta, lambda);
    const V delta = fused<N>(-g.erase, predicted, g.take * load<N>(log + width + at));
#pragma GCC unroll 16
    for (int j = 0; j < R; j++) s[j] = fused<N>(delta, spread<N>(k[j]), s[j] * g.keep);
  }
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) store<N>(state + j * R + row, s[j]);
}

template <int R>
void span_fixed(const Shape& shape, int64_t head, int64_t n, const float* q, const float* log, float* reads, float* state) {
  constexpr int N = R < kLanes ? R : kLanes;
  for (int64_t row = 0; row < R; row += N) span_rows<R, N>(shape, head, row, n, q, log, reads, state);
}

// Any rank: the state stays in memory, and rows are taken N at a time, then one at a time.
template <int N>
inline void step_rows(const Shape& shape, int64_t head, int64_t row, const float* query, const float* log, float* read, float* state) {
  using V = Vec<N>;
  const int64_t r = shape.rank, width = shape.width(), at = head * r + row, gate_count = shape.gates();
  const float* k = log + head * r;
  V sum = {}, predicted = {};
  for (int64_t j = 0; j < r; j++) {
    const V s = load<N>(state + j * r + row);
    if (query) sum = fused<N>(s, spread<N>(query[j]), sum);
    predicted = fused<N>(s, spread<N>(k[j]), predicted);
  }
  if (query) store<N>(read + row, sum);
  const float* gate = log + 2 * width + (shape.rankwise ? at : head);
  const V beta = shape.rankwise ? load<N>(gate) : spread<N>(*gate);
  V lambda = 1.0f - beta;
  if (shape.has_lambda()) lambda = shape.rankwise ? load<N>(gate + gate_count) : spread<N>(gate[gate_count]);
  const Gates<N> g = gates_of<N>(shape, beta, lambda);
  const V delta = fused<N>(-g.erase, predicted, g.take * load<N>(log + width + at));
  for (int64_t j = 0; j < r; j++) {
    float* column = state + j * r + row;
    store<N>(column, fused<N>(delta, spread<N>(k[j]), load<N>(column) * g.keep));
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
