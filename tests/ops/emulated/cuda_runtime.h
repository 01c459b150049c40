// Test only: as much of CUDA as csrc/cuda uses, on a CPU, so that the kernels' own source can be compared with the
// reference where there is no GPU. It proves their logic, indices and barriers, not their speed and not the compiler.
//
// Every thread of a block is a fiber that runs to the next barrier; between barriers the threads take turns in either
// order, so that a missing one shows. Blocks run one after another in an order that differs from launch to launch, with
// shared memory full of NaN. A barrier that not all threads reach, or that they reach at different lines, ends the
// process.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define DELTAMEM_SHARED(name) float* name = emulated::shared_memory()
#define DELTAMEM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulated::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })
#define __syncthreads() emulated::barrier(false, __LINE__)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum class State { ready, at_block, at_warp, done };
struct Fiber {
  ucontext_t context;
  State state;
  int line;
};
inline constexpr size_t kStack = 128 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<Fiber> fibers;
inline std::vector<float> memory;
inline ucontext_t scheduler;
inline unsigned current;
inline uint32_t random_state = 1;
inline uint32_t values[1024];
inline void (*body)(void*);
inline void* body_of;

inline uint32_t random_bits() { return random_state = random_state * 1664525u + 1013904223u; }

inline float* shared_memory() { return memory.data(); }

inline void barrier(bool warp, int line) {
  fibers[current].state = warp ? State::at_warp : State::at_block;
  fibers[current].line = line;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_fiber() {
  body(body_of);
  fibers[current].state = State::done;
  swapcontext(&fibers[current].context, &scheduler);
}

// Lets waiting threads go on where all living ones of their block or warp have come to the same barrier.
inline bool release(unsigned first, unsigned last, State waiting) {
  int line = -1;
  for (unsigned t = first; t < last; t++) {
    if (fibers[t].state == State::done) continue;
    if (fibers[t].state != waiting) return false;
    if (line >= 0 && fibers[t].line != line) return false;
    line = fibers[t].line;
  }
  if (line < 0) return false;
  for (unsigned t = first; t < last; t++)
    if (fibers[t].state == waiting) fibers[t].state = State::ready;
  return true;
}

inline void run_block(unsigned threads) {
  while (stacks.size() < threads) stacks.emplace_back(new char[kStack]);
  fibers.resize(threads);
  for (unsigned t = 0; t < threads; t++) {
    getcontext(&fibers[t].context);
    fibers[t].context.uc_stack.ss_sp = stacks[t].get();
    fibers[t].context.uc_stack.ss_size = kStack;
    fibers[t].context.uc_link = &scheduler;
    fibers[t].state = State::ready;
    makecontext(&fibers[t].context, run_fiber, 0);
  }
  for (;;) {
    bool ran = false, alive = false;
    const bool backwards = random_bits() & 0x10000u;
    for (unsigned i = 0; i < threads; i++) {
      const unsigned t = backwards ? threads - 1 - i : i;
      if (fibers[t].state == State::ready) {
        current = t;
        threadIdx = dim3(t, 0, 0);
        swapcontext(&scheduler, &fibers[t].context);
        ran = true;
      }
      alive = alive || fibers[t].state != State::done;
    }
    if (!alive) return;
    if (ran) continue;
    bool released = release(0, threads, State::at_block);
    for (unsigned t = 0; t < threads; t += 32)
      released = release(t, t + 32 < threads ? t + 32 : threads, State::at_warp) || released;
    if (!released) {
      fprintf(stderr, "emulated CUDA: threads wait at different barriers\n");
      abort();
    }
  }
}

template <typename Body>
void launch(dim3 grid, dim3 block, size_t shared_floats, Body call) {
  body = [](void* f) { (*static_cast<Body*>(f))(); };
  body_of = &call;
  gridDim = grid;
  blockDim = block;
  const unsigned blocks = grid.x * grid.y * grid.z;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i = blocks; i > 1; i--) {
    std::swap(order[i - 1], order[random_bits() % i]);
  }
  for (unsigned b : order) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    memory.assign(shared_floats + 1, std::numeric_limits<float>::quiet_NaN());
    run_block(block.x);
  }
}

}  // namespace emulated

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) == 4);
  memcpy(&emulated::values[emulated::current], &value, 4);
  emulated::barrier(true, __LINE__);
  memcpy(&value, &emulated::values[emulated::current ^ mask], 4);
  emulated::barrier(true, __LINE__);
  return value;
}

inline int atomicAdd(int* to, int value) {
  const int old = *to;
  *to += value;
  return old;
}
