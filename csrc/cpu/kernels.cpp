// The kernels, compiled once per instruction set (DELTAMEM_ISA names the namespace; see csrc/CMakeLists.txt).
//
// No function here may be shared between builds: everything but the table is local, and no standard container is used,
// because the linker would keep one copy of a shared inline function and run AVX-512 code on a CPU without it.
//
// The state is kept transposed while a request runs: lane = state row (value), so that S q and S k are sums of
// columns, a gate is a lane-wise factor and no sum crosses lanes. Replay and scan are one loop, hence the same bits.
#include "delta_rule.h"
#include "vec.h"

namespace deltamem {
namespace DELTAMEM_ISA {
namespace {

// What a state row keeps, erases and takes: S' = keep S + (take v - erase p) k^T. One gate, one row.
struct Coefficients {
  float keep, erase, take;
};
inline Coefficients coefficients(const Shape& shape, float beta, const float* lambda) {
  if (shape.mode == Mode::no_lambda) return {1.0f, beta, beta};
  const float lam = lambda ? *lambda : 1.0f - beta;
  return {lam, shape.mode == Mode::standard ? beta : lam * beta, beta};
}

// n tokens of one head: read (if q), then write. state: [key][value], in and out.
using Span = void (*)(const Shape&, int64_t head, int64_t n, const float* q, const float* log, float* reads, float* state);

template <int R>
void span_fixed(const Shape& shape, int64_t head, int64_t n, const float* q, const float* log, float* reads, float* state) {
  using V = Vec<R>;
  const int64_t width = shape.width(), row = shape.log_columns(), gates = shape.gates();
  const bool has_lambda = shape.has_lambda();
  V s[R];
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) load<R>(s[j], state + j * R);
  const V one = V{} + 1.0f;
  for (int64_t t = 0; t < n; t++, log += row) {
    const float* k = log + head * R;
    V x, sums[4];
    if (q) {
      const float* query = q + t * width + head * R;
#pragma GCC unroll 16
      for (int j = 0; j < 4; j++) { spread<R>(x, query[j]); sums[j] = s[j] * x; }
#pragma GCC unroll 16
      for (int j = 4; j < R; j++) { spread<R>(x, query[j]); accumulate<R>(sums[j & 3], s[j], x); }
      store<R>(reads + t * width + head * R, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
#pragma GCC unroll 16
    for (int j = 0; j < 4; j++) { spread<R>(x, k[j]); sums[j] = s[j] * x; }
#pragma GCC unroll 16
    for (int j = 4; j < R; j++) { spread<R>(x, k[j]); accumulate<R>(sums[j & 3], s[j], x); }
    const V predicted = (sums[0] + sums[1]) + (sums[2] + sums[3]);

    V v, beta, lam, erase;
    load<R>(v, log + width + head * R);
    const float* gate = log + 2 * width + (shape.rankwise ? head * R : head);
    if (shape.rankwise) load<R>(beta, gate); else spread<R>(beta, *gate);
    if (shape.mode == Mode::no_lambda) lam = one;
    else if (!has_lambda) lam = one - beta;
    else if (shape.rankwise) load<R>(lam, gate + gates);
    else spread<R>(lam, gate[gates]);
    erase = shape.mode == Mode::lambda_outside ? lam * beta : beta;
    const V delta = beta * v - erase * predicted;
#pragma GCC unroll 16
    for (int j = 0; j < R; j++) {
      spread<R>(x, k[j]);
      s[j] = s[j] * lam;
      accumulate<R>(s[j], delta, x);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) store<R>(state + j * R, s[j]);
}

void span_any(const Shape& shape, int64_t head, int64_t n, const float* q, const float* log, float* reads, float* state) {
  const int64_t r = shape.rank, width = shape.width(), row = shape.log_columns(), gates = shape.gates();
  for (int64_t t = 0; t < n; t++, log += row) {
    const float *k = log + head * r, *v = log + width + head * r, *gate = log + 2 * width;
    if (q) {
      const float* query = q + t * width + head * r;
      float* read = reads + t * width + head * r;
      for (int64_t i = 0; i < r; i++) read[i] = 0.0f;
      for (int64_t j = 0; j < r; j++)
        for (int64_t i = 0; i < r; i++) read[i] = fused(state[j * r + i], query[j], read[i]);
    }
    for (int64_t i = 0; i < r; i++) {
      const float* beta = gate + (shape.rankwise ? head * r + i : head);
      const Coefficients c = coefficients(shape, *beta, shape.has_lambda() ? beta + gates : nullptr);
      float predicted = 0.0f;
      for (int64_t j = 0; j < r; j++) predicted = fused(state[j * r + i], k[j], predicted);
      const float delta = c.take * v[i] - c.erase * predicted;
      for (int64_t j = 0; j < r; j++) state[j * r + i] = fused(delta, k[j], c.keep * state[j * r + i]);
    }
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

// base [H, value, key] <-> state [H, key, value]
void transpose(const Shape& shape, const float* from, float* to) {
  const int64_t r = shape.rank;
  for (int64_t h = 0; h < shape.heads; h++, from += r * r, to += r * r)
    for (int64_t i = 0; i < r; i++)
      for (int64_t j = 0; j < r; j++) to[i * r + j] = from[j * r + i];
}

void run(const Shape& shape, Span span, int64_t n, const float* q, const float* log, float* reads, float* state) {
  for (int64_t h = 0; h < shape.heads; h++) span(shape, h, n, q, log, reads, state + h * shape.rank * shape.rank);
}

void widen(const void* projected, Dtype dtype, int64_t offset, int64_t n, float* out) {
  if (dtype == Dtype::f32) {
    memcpy(out, static_cast<const float*>(projected) + offset, n * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(projected) + offset;
  if (dtype == Dtype::bf16)
    for (int64_t i = 0; i < n; i++) out[i] = from_bf16(half[i]);
  else
    for (int64_t i = 0; i < n; i++) out[i] = from_f16(half[i]);
}

// tanh, then the L2 norm per head, floored: a zero vector stays zero. In place over `count` blocks of r values.
void normalize(int64_t count, int64_t r, float* x) {
  for (int64_t i = 0; i < count * r; i++) x[i] = tanh_(x[i]);
  for (int64_t h = 0; h < count; h++, x += r) {
    float parts[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int64_t i = 0;
    for (; i + 4 <= r; i += 4)
      for (int64_t lane = 0; lane < 4; lane++) parts[lane] = fused(x[i + lane], x[i + lane], parts[lane]);
    for (; i < r; i++) parts[0] = fused(x[i], x[i], parts[0]);
    const float norm = __builtin_sqrtf((parts[0] + parts[1]) + (parts[2] + parts[3]));
    const float scale = norm < 1e-6f ? 1e6f : 1.0f / norm;
    for (i = 0; i < r; i++) x[i] *= scale;
  }
}

// One token: its projected row (scratch, overwritten) to q and, unless it is idle, to its log row.
void activate(const Shape& shape, const float* bias, float* row, float* q, float* log, bool write) {
  const int64_t width = shape.width(), columns = shape.gate_columns();
  if (shape.normalize) normalize((write ? 2 : 1) * shape.heads, shape.rank, row);
  memcpy(q, row, width * sizeof(float));
  if (write) {
    memcpy(log, row + width, 2 * width * sizeof(float));
    const float* gates = row + 3 * width;
    for (int64_t g = 0; g < columns; g++) log[2 * width + g] = sigmoid(gates[g] + bias[g]);
  } else {  // replaying this row changes nothing: beta 0, lambda 1
    memset(log, 0, (2 * width + shape.gates()) * sizeof(float));
    for (int64_t g = shape.gates(); g < columns; g++) log[2 * width + g] = 1.0f;
  }
}

// Bring `state` (transposed) to where request i's first token of this step finds it.
void resume(const Shape& shape, Span span, const Pages& pages, const int32_t* blocks, int64_t context, float* state) {
  if (context == 0) {
    transpose(shape, pages.base(blocks[0]), state);
    return;
  }
  const int64_t block = blocks[(context - 1) / pages.block_size];
  transpose(shape, pages.base(block), state);
  const int64_t count = (context - 1) % pages.block_size + 1;
  run(shape, span, count, nullptr, pages.log(block, shape, 0), nullptr, state);
}

// Whether a token reads only, wherever the request's limit lies.
inline bool masked(const ScanArgs& args, int64_t block, int64_t slot) {
  const int64_t words = (args.pages.block_size + 31) / 32;
  return args.unwritten[block * words + slot / 32] >> (slot % 32) & 1;
}

void page_scan(const Shape& shape, const ScanArgs& args) {
  const Span span = span_for(shape);
  const int64_t width = shape.width(), columns = shape.projected_columns(), log_columns = shape.log_columns();
  const int64_t block_size = args.pages.block_size;
  float *state = args.workspace, *row = state + shape.state_floats(), *q = row + columns;

  memset(args.reads, 0, args.num_rows * width * sizeof(float));
  for (int64_t next = 0; next < args.num_reqs; next++) {
    const int64_t i = args.order[next];
    const int64_t stop = args.query_start_loc[i + 1];
    int64_t token = args.query_start_loc[i];
    const int32_t* blocks = args.block_table + i * args.table_stride;
    if (stop <= token) continue;
    const int64_t limit = args.write_limit[blocks[0]];
    if (limit < 0) continue;
    int64_t position = args.seq_lens[i] - (stop - token);
    resume(shape, span, args.pages, blocks, position, state);

    while (token < stop) {
      const int64_t block = blocks[position / block_size], slot = position % block_size;
      int64_t n = stop - token < kTile ? stop - token : kTile;
      if (n > block_size - slot) n = block_size - slot;
      if (slot == 0 && position > 0) transpose(shape, state, args.pages.base(block));
      float* log = args.pages.log(block, shape, slot);
      for (int64_t t = 0; t < n; t++) {
        widen(args.projected, args.dtype, (token + t) * columns, columns, row);
        const bool write = position + t < limit && !masked(args, block, slot + t);
        activate(shape, args.bias, row, q + t * width, log + t * log_columns, write);
      }
      run(shape, span, n, q, log, args.reads + token * width, state);
      token += n;
      position += n;
    }
  }
}

void page_state(const Shape& shape, const StateArgs& args) {
  const Span span = span_for(shape);
  float* state = args.workspace;
  for (int64_t i = 0; i < args.n; i++) {
    transpose(shape, args.pages.base(args.block_ids[i]), state);
    run(shape, span, args.counts[i], nullptr, args.pages.log(args.block_ids[i], shape, 0), nullptr, state);
    transpose(shape, state, args.out + i * shape.state_floats());
  }
}

}  // namespace

#define DELTAMEM_STRING_(x) #x
#define DELTAMEM_STRING(x) DELTAMEM_STRING_(x)
extern const Kernels table;
const Kernels table = {DELTAMEM_STRING(DELTAMEM_ISA) + 4 /* drops "isa_" */, page_scan, page_state};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
