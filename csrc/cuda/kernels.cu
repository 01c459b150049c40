// Launches. All of one call go to one stream, which orders the phases of a prefill.
#include "chunked.cuh"
#include "pool.cuh"
#include "step.cuh"

namespace deltamem_cuda {
namespace {

// Tokens per chunk: short ones make phases 1 and 3 short, long ones phase 2. About as long as phase 2 has steps.
constexpr int kShortestChunk = 64, kLongestChunk = 256;
// Below this many tokens in one request, three launches cost more than they save.
constexpr int64_t kWorthChunks = 192;

template <int R>
size_t step_floats(const Shape& shape) {
  return tile_tokens<R>() * (shape_pitch(shape) + 1) + shape.rank * shape.rank;
}

template <int R>
void chunked(const Shape& shape, const Scan& scan, const Chunks& chunks, cudaStream_t stream) {
  const size_t tile = kTile * (shape_pitch(shape) + 1);
  const dim3 by_chunk(static_cast<unsigned>(chunks.count), shape.heads), by_request(scan.num_reqs, shape.heads);
  const int lanes = (R * (R + 1) + kWarp - 1) / kWarp * kWarp, elements = R * R < kWarp ? kWarp : R * R;
  DELTAMEM_LAUNCH(activate_kernel<R>, by_chunk, dim3(lanes), tile, stream, shape, scan, chunks);
  DELTAMEM_LAUNCH(combine_kernel<R>, by_request, dim3(elements), tile + 2 * R * R, stream, shape, scan, chunks);
  DELTAMEM_LAUNCH(rescan_kernel<R>, by_chunk, dim3(kWarp), tile + R * R, stream, shape, scan, chunks);
}

template <int R>
void scan_with(const Shape& shape, const Scan& scan, const Chunks& chunks, cudaStream_t stream) {
  if constexpr (R > 0)
    if (chunks.tokens) return chunked<R>(shape, scan, chunks, stream);
  const dim3 grid(scan.num_reqs, shape.heads);
  DELTAMEM_LAUNCH(step_kernel<R>, grid, dim3(kWarp), step_floats<R>(shape), stream, shape, scan);
}

template <int R>
void take_with(const Shape& shape, const Take& take, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(take.n * take.layers), shape.heads);
  DELTAMEM_LAUNCH(take_kernel<R>, grid, dim3(kWarp), step_floats<R>(shape), stream, shape, take);
}

}  // namespace

Chunks plan_chunks(const Shape& shape, int64_t tokens, int64_t num_reqs, int64_t longest, int block_size) {
  Chunks chunks = {};
  if (longest <= 0) longest = tokens - num_reqs + 1;
  const bool tuned = shape.rank == 4 || shape.rank == 8 || shape.rank == 16;
  if (!tuned || num_reqs < 1 || longest < kWorthChunks) return chunks;
  int length = kShortestChunk;
  while (length < kLongestChunk && static_cast<int64_t>(length) * length * 2 < longest) length *= 2;
  chunks.tokens = (length + block_size - 1) / block_size * block_size;
  chunks.count = tokens / chunks.tokens + 2 * num_reqs;
  return chunks;
}

cudaError_t page_scan(const Shape& shape, const Scan& scan, const Chunks& chunks, cudaStream_t stream) {
  switch (shape.rank) {
    case 4: scan_with<4>(shape, scan, chunks, stream); break;
    case 8: scan_with<8>(shape, scan, chunks, stream); break;
    case 16: scan_with<16>(shape, scan, chunks, stream); break;
    default: scan_with<0>(shape, scan, chunks, stream);
  }
  return cudaGetLastError();
}

cudaError_t take(const Shape& shape, const Take& take, cudaStream_t stream) {
  switch (shape.rank) {
    case 4: take_with<4>(shape, take, stream); break;
    case 8: take_with<8>(shape, take, stream); break;
    case 16: take_with<16>(shape, take, stream); break;
    default: take_with<0>(shape, take, stream);
  }
  return cudaGetLastError();
}

cudaError_t seed(const Shape& shape, const Seed& seed, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(seed.n * seed.layers));
  DELTAMEM_LAUNCH(seed_kernel, grid, dim3(64), 0, stream, shape, seed);
  return cudaGetLastError();
}

}  // namespace deltamem_cuda
