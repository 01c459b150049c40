// Between pages of all layers, the session pool and staging memory: one launch for all orders of a step.
#pragma once

#include "common.cuh"

namespace deltamem_cuda {

// Grid (orders × layers, heads), one warp: the state after `count` tokens of a block.
template <int R>
__global__ void take_kernel(const Shape shape, const Take take) {
  DELTAMEM_SHARED(shared);
  const int head = blockIdx.y, lane = threadIdx.x, squares = shape.rank * shape.rank;
  const int64_t entry = blockIdx.x / take.layers, layer = blockIdx.x % take.layers;
  const Tile tile = {shared, shared + tile_tokens<R>() * shape_pitch(shape), shape_pitch(shape)};
  float* state = tile.ahead + tile_tokens<R>();
  const float* pages = take.addresses ? reinterpret_cast<const float*>(take.addresses[layer]) : take.pages;
  const int block = take.block_ids[entry], count = take.counts[entry];
  const bool fits = block >= 0 && block < take.num_blocks && count >= 0 && count <= take.block_size;

  // The page as a request of its own: one block, `count` tokens.
  Scan scan = {};
  scan.pages = const_cast<float*>(pages);
  scan.page_stride = take.page_stride;
  scan.num_blocks = take.num_blocks;
  scan.block_table = take.block_ids + entry;
  scan.block_size = take.block_size;
  if (fits) {
    load_base(shape, pages + block * take.page_stride, head, state, lane, kWarp);
    __syncthreads();
    replay<R>(scan, shape, tile, 0, head, 0, count, state);
  } else {
    for (int e = lane; e < squares; e += kWarp) state[e] = nanf("");
  }
  __syncthreads();
  const int64_t at = layer * shape.state_floats + head * squares, session = take.layers * static_cast<int64_t>(shape.state_floats);
  const int slot = take.slots ? take.slots[entry] : -1;
  if (take.states && slot >= 0 && slot < take.num_slots)
    for (int e = lane; e < squares; e += kWarp) take.states[slot * session + at + e] = state[e];
  if (take.staging)
    for (int e = lane; e < squares; e += kWarp) take.staging[entry * session + at + e] = state[e];
}

// Grid (orders × layers). A source: a slot of the pool, -1 the empty memory, -2 - i row i of staging.
__global__ void seed_kernel(const Shape shape, const Seed seed) {
  const int64_t entry = blockIdx.x / seed.layers, layer = blockIdx.x % seed.layers;
  const int64_t session = seed.layers * static_cast<int64_t>(shape.state_floats);
  const int block = seed.block_ids[entry], source = seed.sources[entry];
  if (block < 0 || block >= seed.num_blocks) return;
  const float* from = nullptr;
  if (source >= 0) {
    if (source >= seed.num_slots) return;
    from = seed.states + source * session;
  } else if (source <= -2) {
    if (!seed.staging || -2 - source >= seed.num_staged) return;
    from = seed.staging + (-2 - source) * session;
  }
  float* to = reinterpret_cast<float*>(seed.addresses[layer]) + block * seed.page_stride;
  for (int e = threadIdx.x; e < shape.state_floats; e += blockDim.x)
    to[e] = from ? from[layer * shape.state_floats + e] : 0.0f;
}

}  // namespace deltamem_cuda
