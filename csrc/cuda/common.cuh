// The paged delta rule on a GPU: arguments, and what the kernels share. Torch stops at the bindings.
//
// Words and layouts are those of deltamem_vllm/ops/layout.py; see ../cpu/delta_rule.h for the same on a CPU. Every
// kernel takes one head; state rows are independent, so a lane owns a row (values) and walks over the tokens.
// Indices are never fetched by the host: one that does not fit is not followed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "launch.h"

// The tests compile the kernels for a CPU (tests/ops/emulated), where these two are something else.
#ifndef DELTAMEM_SHARED
#define DELTAMEM_SHARED(name) extern __shared__ float name[]
#define DELTAMEM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, (shared) * sizeof(float), stream>>>(__VA_ARGS__)
#endif

namespace deltamem_cuda {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kTile = 32;      // tokens activated at a time, tuned ranks
constexpr int kTileAny = 8;    // ... any other rank
template <int R> __host__ __device__ constexpr int tile_tokens() { return R ? kTile : kTileAny; }

__device__ inline float widen(const void* data, int dtype, int64_t i) {
  if (dtype == 0) return static_cast<const float*>(data)[i];
  const uint32_t half = static_cast<const uint16_t*>(data)[i];
  float x;
  if (dtype == 1) {
    const uint32_t bits = half << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  memcpy(&x, &magnitude, sizeof x);
  x *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias from 15 to 127, subnormals included
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;  // infinity and NaN
  bits |= (half & 0x8000u) << 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Tokens side by side in shared memory: q[r] | k[r] | v[r] | beta[g] | lambda[g] of one head, g = r or 1; behind them
// each token's k · (the next token's k).
struct Tile {
  float* rows;
  float* ahead;
  int pitch;

  __device__ float* row(int t) const { return rows + t * pitch; }
};

__device__ inline int gates_of_head(const Shape& shape) { return shape.rankwise ? shape.rank : 1; }
__device__ inline int tile_columns(const Shape& shape) {
  return 3 * shape.rank + gates_of_head(shape) * (shape.has_lambda ? 2 : 1);
}

// A request's part of this step, or nothing (`fits` false): off, empty, or with indices that do not fit.
struct Request {
  int start, stop, length, context, limit;
  bool fits;
};

__device__ inline Request request_of(const Scan& scan, int i) {
  Request r;
  r.start = scan.query_start_loc[i];
  r.stop = scan.query_start_loc[i + 1];
  r.length = scan.seq_lens[i];
  r.context = r.length - (r.stop - r.start);
  r.limit = -1;
  r.fits = r.stop > r.start && r.start >= 0 && r.stop <= scan.tokens && r.context >= 0 &&
           r.length <= static_cast<int64_t>(scan.table_width) * scan.block_size;
  if (r.fits) {
    const int first = scan.block_table[i * scan.table_stride];
    if (first >= 0 && first < scan.num_blocks) r.limit = scan.write_limit[first];
    r.fits = r.limit >= 0;
  }
  return r;
}

// The request that writes, in this launch, the token before `context`: see step.cuh. One warp; every lane gets it.
__device__ inline int source_of(const Scan& scan, int request, int context) {
  if (context <= 0 || context % scan.block_size) return -1;
  const int page = context / scan.block_size - 1, lane = threadIdx.x % kWarp;
  const int mine = scan.block_table[request * scan.table_stride + page];
  int found = -1;
  for (int j = lane; j < scan.num_reqs; j += kWarp) {
    const int start = scan.query_start_loc[j], stop = scan.query_start_loc[j + 1], length = scan.seq_lens[j];
    const int before = length - (stop - start);
    if (before < 0 || before >= context || length < context) continue;
    if (scan.block_table[j * scan.table_stride + page] == mine && request_of(scan, j).fits) found = j;
  }
  for (int step = kWarp / 2; step; step /= 2) {
    const int other = __shfl_xor_sync(kAll, found, step);
    found = other > found ? other : found;
  }
  return found;
}

// `level` sources up from a request: who, where its rows start, and where the next one's context is.
struct Link {
  int request, context, end;
};

__device__ inline Link ancestor(const Scan& scan, int request, const Request& own, int level) {
  Link link = {request, own.context, own.length};
  for (; level > 0; level--) {
    link.end = link.context;
    link.request = source_of(scan, link.request, link.context);
    link.context = scan.seq_lens[link.request] -
                   (scan.query_start_loc[link.request + 1] - scan.query_start_loc[link.request]);
  }
  return link;
}

// How many sources lie between a request and the root, whose first page nobody else writes in this launch.
__device__ inline int depth_of(const Scan& scan, int request, int context) {
  int depth = 0;
  for (int source = source_of(scan, request, context); source >= 0; depth++) {
    context = scan.seq_lens[source] - (scan.query_start_loc[source + 1] - scan.query_start_loc[source]);
    source = source_of(scan, source, context);
  }
  return depth;
}

// The page of a position, or null. No position is beyond the table: request_of has seen to that.
__device__ inline float* page_at(const Scan& scan, int request, int position) {
  const int block = scan.block_table[request * scan.table_stride + position / scan.block_size];
  return block >= 0 && block < scan.num_blocks ? scan.pages + block * scan.page_stride : nullptr;
}

__device__ inline bool is_written(const Scan& scan, int request, int position, int limit) {
  const int block = scan.block_table[request * scan.table_stride + position / scan.block_size];
  if (position >= limit || block < 0 || block >= scan.num_blocks) return false;
  const int slot = position % scan.block_size, words = (scan.block_size + 31) / 32;
  return !(scan.unwritten[static_cast<int64_t>(block) * words + slot / 32] >> (slot % 32) & 1u);
}

// Where tile column c of a log row lies in a page (c >= rank: no q there).
__device__ inline int log_column(const Shape& shape, int head, int c) {
  const int r = shape.rank, gates = gates_of_head(shape);
  if (c < 3 * r) return (c / r - 1) * shape.width + head * r + c % r;
  c -= 3 * r;
  return 2 * shape.width + c / gates * shape.gates + head * gates + c % gates;
}

// All threads of the block: k · next k, after the tile is complete. Ends with the tile visible to all.
__device__ inline void finish_tile(const Shape& shape, const Tile& tile, int n, int thread, int threads) {
  __syncthreads();
  for (int t = thread; t + 1 < n; t += threads) {
    const float *a = tile.row(t) + shape.rank, *b = tile.row(t + 1) + shape.rank;
    float sum = 0.0f;
    for (int j = 0; j < shape.rank; j++) sum = fmaf(a[j], b[j], sum);
    tile.ahead[t] = sum;
  }
  __syncthreads();
}

// Project, squash and normalise n tokens of a request into a tile. Tokens that are not written become idle rows (k, v
// and beta 0, lambda 1): they keep the state as it is.
__device__ inline void activate_tile(const Scan& scan, const Shape& shape, const Tile& tile, int request, int head,
                                     int token, int position, int n, int limit, int thread, int threads) {
  const int r = shape.rank, columns = tile_columns(shape), gates = gates_of_head(shape);
  __syncthreads();  // the tile may still be read
  for (int e = thread; e < n * columns; e += threads) {
    const int t = e / columns, c = e % columns;
    const int column = c < r ? head * r + c : shape.width + log_column(shape, head, c);
    float x = widen(scan.projected, scan.dtype, (token + t) * scan.projected_stride + column);
    if (c < 2 * r) {
      if (shape.normalize) x = tanhf(x);
    } else if (c >= 3 * r) {
      x = 1.0f / (1.0f + expf(-(x + scan.bias[column - 3 * shape.width])));
    }
    tile.row(t)[c] = x;
  }
  __syncthreads();
  if (shape.normalize)
    for (int e = thread; e < 2 * n; e += threads) {
      float* x = tile.row(e / 2) + e % 2 * r;
      float sum = 0.0f;
      for (int j = 0; j < r; j++) sum = fmaf(x[j], x[j], sum);
      const float norm = sqrtf(sum);
      const float scale = norm < 1e-6f ? 1e6f : 1.0f / norm;  // NaN passes through
      for (int j = 0; j < r; j++) x[j] *= scale;
    }
  __syncthreads();
  for (int e = thread; e < n * (columns - r); e += threads) {
    const int t = e / (columns - r), c = r + e % (columns - r);
    if (!is_written(scan, request, position + t, limit)) tile.row(t)[c] = c < 3 * r + gates ? 0.0f : 1.0f;
  }
  finish_tile(shape, tile, n, thread, threads);
}

// n log rows of a request from a position on; with q from `reads`, where the first phase of a prefill has left it.
__device__ inline void load_tile(const Scan& scan, const Shape& shape, const Tile& tile, int request, int head,
                                 int position, int n, const float* q, int thread, int threads) {
  const int r = shape.rank, columns = tile_columns(shape);
  __syncthreads();
  for (int e = thread; e < n * columns; e += threads) {
    const int t = e / columns, c = e % columns;
    float x = 0.0f;
    if (c < r) {
      if (q) x = q[t * static_cast<int64_t>(shape.width) + head * r + c];
    } else if (const float* page = page_at(scan, request, position + t)) {
      const int slot = (position + t) % scan.block_size;
      x = page[shape.state_floats + static_cast<int64_t>(slot) * shape.log_columns + log_column(shape, head, c)];
    }
    tile.row(t)[c] = x;
  }
  finish_tile(shape, tile, n, thread, threads);
}

__device__ inline void store_log(const Scan& scan, const Shape& shape, const Tile& tile, int request, int head,
                                 int position, int n, int thread, int threads) {
  const int r = shape.rank, columns = tile_columns(shape) - r;
  for (int e = thread; e < n * columns; e += threads) {
    const int t = e / columns, c = r + e % columns;
    float* page = page_at(scan, request, position + t);
    if (!page) continue;
    const int slot = (position + t) % scan.block_size;
    page[shape.state_floats + static_cast<int64_t>(slot) * shape.log_columns + log_column(shape, head, c)] =
        tile.row(t)[c];
  }
}

// One state row: registers for the tuned ranks, shared memory for the others.
template <int R>
struct Row {
  float s[R];
  __device__ explicit Row(float* from) {
#pragma unroll
    for (int j = 0; j < R; j++) s[j] = from[j];
  }
  __device__ void store(float* to) const {
#pragma unroll
    for (int j = 0; j < R; j++) to[j] = s[j];
  }
  __device__ float dot(const float* x, int) const {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < R; j++) sums[j & 3] = fmaf(s[j], x[j], sums[j & 3]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  __device__ void update(float keep, float delta, const float* k, int) {
#pragma unroll
    for (int j = 0; j < R; j++) s[j] = fmaf(delta, k[j], keep * s[j]);
  }
};

template <>
struct Row<0> {
  float* s;
  __device__ explicit Row(float* from) : s(from) {}
  __device__ void store(float*) const {}
  __device__ float dot(const float* x, int r) const {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int j = 0; j < r; j++) sums[j & 3] = fmaf(s[j], x[j], sums[j & 3]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  __device__ void update(float keep, float delta, const float* k, int r) {
    for (int j = 0; j < r; j++) s[j] = fmaf(delta, k[j], keep * s[j]);
  }
};

struct Coefficients {
  float keep, erase, take;
};
__device__ inline Coefficients coefficients(const Shape& shape, const float* row, int i) {
  const float* gate = row + 3 * shape.rank + (shape.rankwise ? i : 0);
  const float beta = *gate;
  if (shape.mode == 2) return {1.0f, beta, beta};
  const float lambda = shape.has_lambda ? gate[gates_of_head(shape)] : 1.0f - beta;
  return {lambda, shape.mode == 1 ? lambda * beta : beta, beta};
}

// Tokens first … last − 1 of a tile over the state [r][r] in shared memory. Lane = row. S k of the next token is had
// from the old state while this token's write is still under way: S' k' = keep S k' + delta (k · k').
// reads: where token `first`'s row of reads begins (this head's columns), or null.
template <int R>
__device__ inline void scan_tile(const Shape& shape, const Tile& tile, int first, int last, float* state, float* reads) {
  const int r = R ? R : shape.rank;
  if (first >= last) return;
  for (int i = threadIdx.x; i < r; i += kWarp) {
    Row<R> s(state + i * r);
    float predicted = s.dot(tile.row(first) + r, r);
    for (int t = first; t < last; t++) {
      const float* row = tile.row(t);
      if (reads) reads[(t - first) * static_cast<int64_t>(shape.width) + i] = s.dot(row, r);
      const Coefficients c = coefficients(shape, row, i);
      const float delta = c.take * row[2 * r + i] - c.erase * predicted;
      const float next = t + 1 < last ? s.dot(tile.row(t + 1) + r, r) : 0.0f;
      s.update(c.keep, delta, row + r, r);
      if (t + 1 < last) predicted = fmaf(delta, tile.ahead[t], c.keep * next);
    }
    s.store(state + i * r);
  }
}

__device__ inline void load_base(const Shape& shape, const float* page, int head, float* state, int thread, int threads) {
  const int n = shape.rank * shape.rank;
  for (int e = thread; e < n; e += threads) state[e] = page ? page[head * n + e] : 0.0f;
}

__device__ inline void store_base(const Shape& shape, float* page, int head, const float* state, int thread, int threads) {
  const int n = shape.rank * shape.rank;
  if (page)
    for (int e = thread; e < n; e += threads) page[head * n + e] = state[e];
}

// Floats from one token of a tile to the next: a multiple of four, for wide loads.
__host__ __device__ inline int shape_pitch(const Shape& shape) {
  const int gates = (shape.rankwise ? shape.rank : 1) * (shape.has_lambda ? 2 : 1);
  return (3 * shape.rank + gates + 3) / 4 * 4;
}

// Log rows of positions first ... last - 1 of a request, onto the state. The whole block loads, its first warp scans.
template <int R>
__device__ inline void replay(const Scan& scan, const Shape& shape, const Tile& tile, int request, int head, int first,
                              int last, float* state) {
  for (; first < last; first += tile_tokens<R>()) {
    const int n = last - first < tile_tokens<R>() ? last - first : tile_tokens<R>();
    load_tile(scan, shape, tile, request, head, first, n, nullptr, threadIdx.x, blockDim.x);
    if (threadIdx.x < kWarp) scan_tile<R>(shape, tile, 0, n, state, nullptr);
  }
  __syncthreads();
}

// Zeros for a head's columns of rows first ... last - 1 of `reads`, as far as they exist.
__device__ inline void clear_rows(const Scan& scan, const Shape& shape, int head, int64_t first, int64_t last, int thread,
                                  int threads) {
  if (first < 0) first = 0;
  if (last > scan.rows) last = scan.rows;
  for (int64_t e = first * shape.rank + thread; e < last * shape.rank; e += threads)
    scan.reads[e / shape.rank * shape.width + head * shape.rank + e % shape.rank] = 0.0f;
}

// Rows of no request read zero; blocks share them, each takes every `shares`-th.
__device__ inline void clear_rest(const Scan& scan, const Shape& shape, int head, int share, int shares, int thread,
                                  int threads) {
  int64_t row = scan.query_start_loc[scan.num_reqs];
  if (row < 0) row = 0;
  for (row += share; row < scan.rows; row += shares) clear_rows(scan, shape, head, row, row + 1, thread, threads);
}

}  // namespace deltamem_cuda
