// The rows of a matrix, as its tensor tells of them.
#pragma once

#include <string>

#include "../cpu/delta_rule.h"
#include "checks.h"

namespace deltamem_bindings {

struct Rows {
  int64_t count, columns;
  int64_t stride;  // elements from one row to the next
  deltamem::Dtype dtype;
  char* data;
};

inline deltamem::Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return deltamem::Dtype::f32;
    case ScalarType::BFloat16: return deltamem::Dtype::bf16;
    case ScalarType::Half: return deltamem::Dtype::f16;
    default: throw std::runtime_error(std::string(name) + ": expected float32, bfloat16 or float16");
  }
}

// Throws unless a kernel can walk them. On which device they are is not asked: torch's dispatcher calls what is registered
// for CPUs with tensors of a CPU only. Every question is a call into torch, and in a decode step its code comes from
// memory again in each layer, as everything does: so as few different ones as will do.
inline Rows rows_of(const char* name, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  require(sizes.size() == 2, name, ": expected rows of columns, got ", sizes.size(), " dimensions");
  const auto strides = tensor.strides();
  const Rows rows = {sizes[0], sizes[1], strides[0], dtype_of(name, tensor), static_cast<char*>(tensor.data_ptr())};
  const bool overlap = rows.count > 1 && rows.stride < rows.columns;
  require(rows.count == 0 || (strides[1] == 1 && !overlap), name,
          ": the columns of a row must be contiguous and rows must not overlap, got strides ", rows.stride, ", ", strides[1]);
  return rows;
}

}  // namespace deltamem_bindings
