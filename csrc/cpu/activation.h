// From projected rows to what the rule consumes: q, and the log rows of the tokens. A token's bits do not depend on the
// tokens beside it.
//
// Lanes run over the packed values of a whole tile, so no rank wastes any; only the norm knows heads.
#pragma once

#include "delta_rule.h"
#include "elementary.h"

namespace deltamem {
namespace {

// n consecutive tokens of one request in one block.
struct Tile {
  const void* projected;  // [n, projected_columns]
  int64_t stride;         // elements from one row to the next
  Dtype dtype;
  const float* bias;
  uint32_t idle;  // bit t: token t reads and is not written
  int64_t n;      // <= kTile
};

// A few floats: less than what a call of memcpy costs.
inline void copy(int64_t n, const float* from, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store<8>(to + i, load<8>(from + i));
  for (; i < n; i++) to[i] = from[i];
}

inline void widen(const Tile& tile, int64_t token, int64_t column, int64_t n, float* out) {
  const int64_t offset = token * tile.stride + column;
  if (tile.dtype == Dtype::f32) {
    copy(n, static_cast<const float*>(tile.projected) + offset, out);
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(tile.projected) + offset;
  if (tile.dtype == Dtype::bf16)
    for (int64_t i = 0; i < n; i++) out[i] = from_bf16(half[i]);
  else
    for (int64_t i = 0; i < n; i++) out[i] = from_f16(half[i]);
}

// In place, up to the next multiple of kLanes floats; what lies behind n is scratch.
template <typename Function>
inline void apply(int64_t n, float* x, const Function& function) {
  for (int64_t i = n; i % kLanes; i++) x[i] = 0.0f;
  for (int64_t i = 0; i < n; i += kLanes) store<kLanes>(x + i, function(load<kLanes>(x + i)));
}

// Four partial sums of the squares of r values. R: r where it is known to the compiler, else 0.
template <int R>
inline Vec<4> square_sums(int64_t rank, const float* x) {
  const int64_t r = R ? R : rank;
  Vec<4> sums = {};
  int64_t i = 0;
  for (; i + 4 <= r; i += 4) {
    const Vec<4> part = load<4>(x + i);
    sums = fused<4>(part, part, sums);
  }
  if (R == 0)
    for (; i < r; i++) sums[0] = fused(x[i], x[i], sums[0]);
  return sums;
}

// The factors that bring blocks of r values to length 1; floored: a zero vector stays zero. Up to a multiple of 4 factors.
template <int R>
inline void scales(int64_t blocks, int64_t rank, const float* x, float* out) {
  const int64_t r = R ? R : rank;
  for (int64_t b = 0; b < blocks; b += 4) {
    Vec<4> part[4] = {};
    for (int64_t i = 0; i < 4 && b + i < blocks; i++) part[i] = square_sums<R>(r, x + (b + i) * r);
    const Ints<4> low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
    const Vec<4> ac0 = __builtin_shuffle(part[0], part[2], low), ac1 = __builtin_shuffle(part[0], part[2], high);
    const Vec<4> bd0 = __builtin_shuffle(part[1], part[3], low), bd1 = __builtin_shuffle(part[1], part[3], high);
    const Vec<4> lane0 = __builtin_shuffle(ac0, bd0, low), lane1 = __builtin_shuffle(ac0, bd0, high);
    const Vec<4> lane2 = __builtin_shuffle(ac1, bd1, low), lane3 = __builtin_shuffle(ac1, bd1, high);
    store<4>(out + b, (lane0 + lane1) + (lane2 + lane3));
  }
  const Vec<4> floor = spread<4>(1e-6f), one = spread<4>(1.0f);
  for (int64_t b = 0; b < blocks; b += 4) {
    const Vec<4> norm = square_root<4>(load<4>(out + b));
    store<4>(out + b, norm < floor ? spread<4>(1e6f) : one / norm);
  }
}

// heads blocks of r values, each times its factor
template <int R>
inline void scaled(int64_t heads, int64_t rank, const float* x, const float* factors, float* out) {
  const int64_t r = R ? R : rank;
  constexpr int N = R > 0 && R < kLanes ? R : kLanes < 8 ? kLanes : 8;
  for (int64_t h = 0; h < heads; h++, x += r, out += r) {
    int64_t i = 0;
    for (; i + N <= r; i += N) store<N>(out + i, load<N>(x + i) * factors[h]);
    for (; i < r; i++) out[i] = x[i] * factors[h];
  }
}

// A tile: to q [n, width] and the log rows from `log` on. The row of an idle token, replayed, changes nothing: beta 0,
// lambda 1. scratch: Shape::activation_floats.
using Activate = void (*)(const Shape&, const Tile&, float* q, float* log, float* scratch);

template <int R>
void activate(const Shape& shape, const Tile& tile, float* q, float* log, float* scratch) {
  const int64_t r = R ? R : shape.rank, heads = shape.heads, width = heads * r, n = tile.n;
  const int64_t columns = shape.gate_columns(), row = shape.log_columns();
  float *keys = scratch, *gates = keys + kTile * 2 * width + kPad, *factors = gates + kTile * columns + kPad;

  for (int64_t t = 0; t < n; t++) {
    widen(tile, t, 0, 2 * width, keys + t * 2 * width);
    float* gate = gates + t * columns;
    widen(tile, t, 3 * width, columns, gate);
    for (int64_t g = 0; g < columns; g++) gate[g] += tile.bias[g];
  }
  apply(n * columns, gates, sigmoid<kLanes>);
  if (shape.normalize) {
    apply(n * 2 * width, keys, hyperbolic_tangent<kLanes>);
    scales<R>(n * 2 * heads, r, keys, factors);
  }
  for (int64_t t = 0; t < n; t++, q += width, log += row, keys += 2 * width, factors += 2 * heads, gates += columns) {
    const bool write = !(tile.idle >> t & 1);
    if (shape.normalize) {
      scaled<R>(heads, r, keys, factors, q);
      if (write) scaled<R>(heads, r, keys + width, factors + heads, log);
    } else {
      copy(width, keys, q);
      if (write) copy(width, keys + width, log);
    }
    if (write) {
      widen(tile, t, 2 * width, width, log + width);
      copy(columns, gates, log + 2 * width);
    } else {
      memset(log, 0, (2 * width + shape.gates()) * sizeof(float));
      for (int64_t g = shape.gates(); g < columns; g++) log[2 * width + g] = 1.0f;
    }
  }
}

Activate activate_for(const Shape& shape) {
  switch (shape.rank) {
    case 8: return activate<8>;
    case 16: return activate<16>;
    default: return activate<0>;
  }
}

}  // namespace
}  // namespace deltamem
