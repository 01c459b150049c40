// What the bindings call: plain pointers and sizes. Nothing here waits for the device or reads from it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deltamem_cuda {

// Ranks beyond this have no kernel: the state of a head must fit shared memory.
constexpr int kMaxRank = 64;

struct Shape {
  int rank, heads, mode;  // mode: standard, lambda_outside, no_lambda
  bool rankwise, has_lambda, normalize;
  int width, gates, log_columns, projected_columns, state_floats;
};

inline Shape make_shape(int rank, int heads, bool rankwise, bool couple, int mode, bool normalize) {
  Shape shape = {rank, heads, mode, rankwise, !couple && mode != 2, normalize, rank * heads, 0, 0, 0, 0};
  shape.gates = rankwise ? shape.width : heads;
  const int gate_columns = shape.gates * (shape.has_lambda ? 2 : 1);
  shape.log_columns = 2 * shape.width + gate_columns;
  shape.projected_columns = 3 * shape.width + gate_columns;
  shape.state_floats = shape.width * rank;
  return shape;
}

// Tensors of PagedOps.page_scan, all on the device.
struct Scan {
  const void* projected;     // [tokens, projected_columns], rows `projected_stride` elements apart
  int64_t projected_stride;
  int dtype;                 // of projected: 0 fp32, 1 bf16, 2 fp16
  const float* bias;
  float* pages;
  int64_t page_stride;  // floats
  int64_t num_blocks;
  const int32_t* block_table;
  int64_t table_stride;
  int table_width;
  const int32_t *query_start_loc, *seq_lens, *write_limit;
  const uint32_t* unwritten;
  float* reads;  // [rows, width]
  int64_t tokens, rows;
  int num_reqs, block_size;
};

// Scratch of the chunked prefill. A chunk is `tokens` positions (a multiple of the block size) of one request; request
// i's first one has number query_start_loc[i] / tokens + 2 i, so numbers need no look at the requests on the host.
struct Chunks {
  int tokens;        // 0: the scan runs in one launch
  int64_t count;     // numbers that may be in use
  float* summaries;  // [count, heads, r + 1, r, r]: what a chunk makes of the state before it
  float* starts;     // [count, heads, r, r]
};

// How a step is best cut, whose longest request has `longest` rows (0: not known); `tokens` 0 for short ones and for ranks
// without such a kernel.
Chunks plan_chunks(const Shape& shape, int64_t tokens, int64_t num_reqs, int64_t longest, int block_size);
inline int64_t summary_floats(const Shape& shape, const Chunks& chunks) {
  return chunks.count * shape.heads * (shape.rank + 1) * shape.rank * shape.rank;
}
inline int64_t start_floats(const Shape& shape, const Chunks& chunks) { return chunks.count * shape.state_floats; }

cudaError_t page_scan(const Shape& shape, const Scan& scan, const Chunks& chunks, cudaStream_t stream);

// States of entries × layers: from pages by replay; to the pool and to staging where those are given.
struct Take {
  const int64_t* addresses;  // [layers] of pages; null: `pages` is the only layer
  const float* pages;
  int layers;
  int64_t page_stride, num_blocks;
  const int32_t *block_ids, *counts, *slots;  // slots null: no pool
  int64_t n, num_slots;
  float *states, *staging;  // staging [n, layers, H, r, r] or null
  int block_size;
};
cudaError_t take(const Shape& shape, const Take& take, cudaStream_t stream);

struct Seed {
  const int64_t* addresses;
  int layers;
  int64_t page_stride, num_blocks;
  const int32_t *block_ids, *sources;
  int64_t n, num_slots, num_staged;
  const float *states, *staging;
};
cudaError_t seed(const Shape& shape, const Seed& seed, cudaStream_t stream);

}  // namespace deltamem_cuda
