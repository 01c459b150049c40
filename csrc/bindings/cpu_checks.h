// What the CPU's bindings share.
#pragma once

#include <vector>

#include "../cpu/delta_rule.h"
#include "checks.h"

namespace deltamem_bindings {

// -1 stands for any size.
inline void check(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  require(tensor.is_cpu(), name, ": expected a CPU tensor");
  check_shape(name, tensor, dtype, sizes);
}

// The six settings in one number, which costs a call less than six arguments; `MemoryShape.packed` writes it.
inline deltamem::Shape make_shape(int64_t packed) {
  const int64_t rank = packed & 0xffff, heads = packed >> 16 & 0xffff, mode = packed >> 32 & 3;
  require(packed >= 0 && packed >> 37 == 0 && rank >= 1 && heads >= 1 && mode <= 2,
          "shape: not a packed MemoryShape: ", packed);
  const auto flag = [&](int bit) { return (packed >> bit & 1) != 0; };
  return {rank, heads, flag(34), flag(35), flag(36), static_cast<deltamem::Mode>(mode)};
}

// Scratch of this thread, at the start of a cache line.
inline float* workspace(int64_t floats) {
  static thread_local std::vector<float> room;
  if (static_cast<int64_t>(room.size()) < floats + 16) room.resize(floats + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
}

}  // namespace deltamem_bindings
