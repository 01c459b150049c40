// One step in one launch: decode, drafts, and prefills too short to be cut into chunks. Block (request, head), one warp.
//
// Pages filled and hit in the same launch. vLLM lets a request hit the prefix cache on a full page that another one
// fills in this very step, and blocks of a launch run in any order. So no block reads what its launch writes; it computes
// that part again, from what nobody changes:
//
// * Only full pages are shared, so only a request whose context is a multiple of N (and above 0) asks whether some
//   request has the page before its context in its own block table and writes that page's last slot, context - 1, in
//   this launch (source_of). There is at most one: no slot is written twice. That *source* has a smaller context, so
//   following sources ends, at a *root*. Nobody writes the root's first page below the root's context in this launch
//   (else it would have a source), and the root itself writes there only rows that it does not read and, where its
//   context is a multiple of N, not even that page: base and rows that are read are older than the launch.
// * From there the block goes through the projected rows of root, ..., source up to its own context, without reading out
//   and without storing: the same arithmetic by which those requests come to that state. Their masks are its own:
//   requests that share a page share the page's mask and, by the prefix-cache salt, the write limit.
// * It stores only its own rows of `reads`, log rows at its own positions, and bases of pages that start there.
//
// So the result does not depend on the order of blocks, nothing spins, and nothing has to be reset between launches. The
// chained part costs what waiting for the source would.
#pragma once

#include "common.cuh"

namespace deltamem_cuda {

template <int R>
__global__ void step_kernel(const Shape shape, const Scan scan) {
  DELTAMEM_SHARED(shared);
  const int request = blockIdx.x, head = blockIdx.y, lane = threadIdx.x, r = shape.rank;
  const Tile tile = {shared, shared + tile_tokens<R>() * shape_pitch(shape), shape_pitch(shape)};
  float* state = tile.ahead + tile_tokens<R>();
  clear_rest(scan, shape, head, request, scan.num_reqs, lane, kWarp);

  const Request own = request_of(scan, request);
  if (!own.fits) {
    clear_rows(scan, shape, head, own.start, own.stop, lane, kWarp);
    return;
  }
  const int depth = depth_of(scan, request, own.context);
  for (int level = depth; level >= 0; level--) {
    const Link link = ancestor(scan, request, own, level);
    const int first = scan.query_start_loc[link.request];
    if (level == depth) {
      const int last = link.context > 0 ? link.context - 1 : 0;
      load_base(shape, page_at(scan, link.request, last), head, state, lane, kWarp);
      __syncthreads();
      replay<R>(scan, shape, tile, link.request, head, last / scan.block_size * scan.block_size, link.context, state);
    }
    for (int position = link.context; position < link.end;) {
      const int slot = position % scan.block_size, token = first + position - link.context;
      int n = link.end - position < tile_tokens<R>() ? link.end - position : tile_tokens<R>();
      if (n > scan.block_size - slot) n = scan.block_size - slot;
      activate_tile(scan, shape, tile, link.request, head, token, position, n, own.limit, lane, kWarp);
      float* reads = nullptr;
      if (level == 0) {
        float* page = page_at(scan, request, position);
        if (slot == 0 && position > 0) store_base(shape, page, head, state, lane, kWarp);
        store_log(scan, shape, tile, request, head, position, n, lane, kWarp);
        reads = scan.reads + token * static_cast<int64_t>(shape.width) + head * r;
        if (!page) {  // the rest of this request cannot be served
          clear_rows(scan, shape, head, token, own.stop, lane, kWarp);
          return;
        }
      }
      __syncthreads();
      scan_tile<R>(shape, tile, 0, n, state, reads);
      __syncthreads();
      position += n;
    }
  }
}

}  // namespace deltamem_cuda
