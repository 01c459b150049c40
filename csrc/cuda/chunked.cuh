// Long prefills in three launches: chunks of every request side by side.
//
//   1 activate    log rows into the pages, q into `reads`, and for every chunk that has a successor what it makes of
//                 any state: per state row r basis vectors and an offset, each a scan of its own (a lane each)
//   2 combine     per request, chunk after chunk: start state -> next chunk's start state
//   3 rescan      every chunk from its start state: reads out, and bases of the pages that begin in it
//
// A row of the state is s' = s M + c over a chunk, for any gates: M from the basis vectors, c from zero. Products of
// M over chunks are never formed, so the error stays that of the sequential scan.
//
// Pages filled and hit in the same step are no matter for phases 1 and 3, which look at no other request. Phase 2 follows
// sources as step.cuh does, and takes their part from their chunks' summaries and, where a request starts inside a
// source's chunk, from log rows; both were written by phase 1, an earlier launch. The one base it reads is that of
// the root's first page, which phase 3, a later launch, does not write either.
#pragma once

#include "common.cuh"

namespace deltamem_cuda {

struct Chunk {
  int request, first, last;  // positions first ... last - 1; empty where this number is not in use
  bool followed;             // the request goes on behind it
};

__host__ __device__ inline int64_t first_number(const Chunks& chunks, int start, int request) {
  return start / chunks.tokens + 2 * static_cast<int64_t>(request);
}

// The chunk of a number: the last request whose first number is not above it. All threads get the same.
__device__ inline Chunk chunk_of(const Scan& scan, const Chunks& chunks, int64_t number, Request& request) {
  __shared__ int below;
  if (threadIdx.x == 0) below = 0;
  __syncthreads();
  int mine = 0;
  for (int i = threadIdx.x; i < scan.num_reqs; i += blockDim.x)
    mine += first_number(chunks, scan.query_start_loc[i], i) <= number;
  if (mine) atomicAdd(&below, mine);
  __syncthreads();
  Chunk chunk = {below - 1, 0, 0, false};
  if (chunk.request < 0) return chunk;
  request = request_of(scan, chunk.request);
  if (!request.fits) return chunk;
  const int64_t index =
      request.context / chunks.tokens + number - first_number(chunks, request.start, chunk.request);
  const int64_t first = index * chunks.tokens, last = first + chunks.tokens;
  if (first >= request.length) return chunk;
  chunk.first = first > request.context ? static_cast<int>(first) : request.context;
  chunk.last = last < request.length ? static_cast<int>(last) : request.length;
  chunk.followed = last < request.length;
  return chunk;
}

// Grid (numbers, heads); a thread per state row and vector.
template <int R>
__global__ void activate_kernel(const Shape shape, const Scan scan, const Chunks chunks) {
  DELTAMEM_SHARED(shared);
  const int64_t number = blockIdx.x;
  const int head = blockIdx.y, thread = threadIdx.x, threads = blockDim.x;
  const Tile tile = {shared, shared + kTile * shape_pitch(shape), shape_pitch(shape)};
  clear_rest(scan, shape, head, blockIdx.x, gridDim.x, thread, threads);
  Request own;
  const Chunk chunk = chunk_of(scan, chunks, number, own);
  if (chunk.request >= 0 && !own.fits && number == first_number(chunks, own.start, chunk.request))
    clear_rows(scan, shape, head, own.start, own.stop, thread, threads);
  if (chunk.first >= chunk.last) return;

  const int row = thread % R, vector = thread / R;
  float x[R];
#pragma unroll
  for (int j = 0; j < R; j++) x[j] = j == vector ? 1.0f : 0.0f;
  for (int position = chunk.first; position < chunk.last; position += kTile) {
    const int n = chunk.last - position < kTile ? chunk.last - position : kTile;
    const int64_t token = own.start + position - own.context;
    activate_tile(scan, shape, tile, chunk.request, head, static_cast<int>(token), position, n, own.limit, thread,
                  threads);
    store_log(scan, shape, tile, chunk.request, head, position, n, thread, threads);
    for (int e = thread; e < n * R; e += threads)
      scan.reads[(token + e / R) * shape.width + head * R + e % R] = tile.row(e / R)[e % R];
    if (chunk.followed && vector <= R)
      for (int t = 0; t < n; t++) {
        const float *tokens = tile.row(t), *k = tokens + R;
        const Coefficients c = coefficients(shape, tokens, row);
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < R; j++) sums[j & 3] = fmaf(x[j], k[j], sums[j & 3]);
        float delta = -c.erase * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
        if (vector == R) delta = fmaf(c.take, tokens[2 * R + row], delta);
#pragma unroll
        for (int j = 0; j < R; j++) x[j] = fmaf(delta, k[j], c.keep * x[j]);
      }
  }
  if (chunk.followed && vector <= R) {
    float* to = chunks.summaries + (((number * shape.heads + head) * (R + 1) + vector) * R + row) * R;
#pragma unroll
    for (int j = 0; j < R; j++) to[j] = x[j];
  }
}

// Grid (requests, heads); a thread per element of the state, at least a warp.
template <int R>
__global__ void combine_kernel(const Shape shape, const Scan scan, const Chunks chunks) {
  DELTAMEM_SHARED(shared);
  const int request = blockIdx.x, head = blockIdx.y, thread = threadIdx.x;
  const Tile tile = {shared, shared + kTile * shape_pitch(shape), shape_pitch(shape)};
  float *state = tile.ahead + kTile, *next = state + R * R;
  const Request own = request_of(scan, request);
  if (!own.fits) return;
  const int row = thread / R, column = thread % R;
  const int depth = depth_of(scan, request, own.context);  // every warp finds the same
  for (int level = depth; level >= 0; level--) {
    const Link link = ancestor(scan, request, own, level);
    const int length = scan.seq_lens[link.request];
    if (level == depth) {
      const int last = link.context > 0 ? link.context - 1 : 0;
      load_base(shape, page_at(scan, link.request, last), head, state, thread, blockDim.x);
      __syncthreads();
      replay<R>(scan, shape, tile, link.request, head, last / scan.block_size * scan.block_size, link.context,
                         state);
    }
    const int64_t skipped = link.context / chunks.tokens;
    const int64_t base = first_number(chunks, scan.query_start_loc[link.request], link.request);
    for (int64_t index = skipped; index * chunks.tokens < link.end; index++) {
      const int64_t number = base + index - skipped, end = (index + 1) * chunks.tokens;
      const int64_t at = number * shape.heads + head;
      __syncthreads();
      if (level == 0)
        for (int e = thread; e < R * R; e += blockDim.x) chunks.starts[at * R * R + e] = state[e];
      if (end <= link.end && end < length) {
        if (thread < R * R) {
          const float* from = chunks.summaries + at * (R + 1) * R * R + thread;
          float sum = from[R * R * R];
#pragma unroll
          for (int j = 0; j < R; j++) sum = fmaf(state[row * R + j], from[j * R * R], sum);
          next[row * R + column] = sum;
        }
        float* swap = state;
        state = next;
        next = swap;
      } else if (level > 0) {
        int64_t first = index * chunks.tokens;
        if (first < link.context) first = link.context;
        replay<R>(scan, shape, tile, link.request, head, static_cast<int>(first),
                           static_cast<int>(end < link.end ? end : link.end), state);
      }
    }
    __syncthreads();
  }
}

// Grid (numbers, heads); one warp.
template <int R>
__global__ void rescan_kernel(const Shape shape, const Scan scan, const Chunks chunks) {
  DELTAMEM_SHARED(shared);
  const int64_t number = blockIdx.x;
  const int head = blockIdx.y, lane = threadIdx.x;
  const Tile tile = {shared, shared + kTile * shape_pitch(shape), shape_pitch(shape)};
  float* state = tile.ahead + kTile;
  Request own;
  const Chunk chunk = chunk_of(scan, chunks, number, own);
  if (chunk.first >= chunk.last) return;
  load_base(shape, chunks.starts + number * shape.state_floats, head, state, lane, kWarp);
  for (int position = chunk.first; position < chunk.last;) {
    const int n = chunk.last - position < kTile ? chunk.last - position : kTile;
    const int64_t token = own.start + position - own.context;
    float* reads = scan.reads + token * shape.width;
    load_tile(scan, shape, tile, chunk.request, head, position, n, reads, lane, kWarp);
    for (int t = 0; t < n;) {  // to the end of the tile or of the page
      const int slot = (position + t) % scan.block_size;
      const int stop = n - t < scan.block_size - slot ? n : t + scan.block_size - slot;
      float* page = page_at(scan, chunk.request, position + t);
      if (slot == 0 && position + t > 0) store_base(shape, page, head, state, lane, kWarp);
      __syncthreads();
      scan_tile<R>(shape, tile, t, stop, state, reads + t * static_cast<int64_t>(shape.width) + head * R);
      __syncthreads();
      if (!page) {  // what lies beyond a page that does not exist reads zero
        clear_rows(scan, shape, head, token + t, own.stop, lane, kWarp);
        return;
      }
      t = stop;
    }
    position += n;
  }
}

}  // namespace deltamem_cuda
