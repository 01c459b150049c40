// Copies between pages of all layers, the session pool and staging memory, on a CPU: one call for all of them. Layers are
// given by the addresses of their pages. Everything is checked before anything changes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>

#include "cpu_checks.h"

namespace {

using namespace deltamem_bindings;

constexpr int32_t kEmpty = -1, kNoSlot = -1;  // as in ops/pooled.py

int64_t check_pool(const deltamem::Shape& shape, const Tensor& addresses, const Tensor& states,
                   const std::optional<Tensor>& staging, std::initializer_list<const Tensor*> orders) {
  check("addresses", addresses, ScalarType::Long, {-1});
  const int64_t layers = addresses.size(0), n = (*orders.begin())->size(0);
  for (const Tensor* order : orders) {
    check("orders", *order, ScalarType::Int, {n});
    require(order->is_contiguous(), "orders must be contiguous");
  }
  check("states", states, ScalarType::Float, {-1, layers, shape.heads, shape.rank, shape.rank});
  if (staging) check("staging", *staging, ScalarType::Float, {-1, layers, shape.heads, shape.rank, shape.rank});
  require(states.is_contiguous() && addresses.is_contiguous() && (!staging || staging->is_contiguous()),
          "states, staging and addresses must be contiguous");
  return layers;
}

void check_block(const char* what, int64_t order, int32_t block, int64_t num_blocks) {
  require(block >= 0 && block < num_blocks, what, ": order ", order, " names block ", block, " of ", num_blocks);
}

void take(const Tensor& addresses, int64_t page_stride, int64_t num_blocks, const Tensor& block_ids, const Tensor& counts,
          const Tensor& slots, const Tensor& states, std::optional<Tensor> staging, int64_t block_size,
          int64_t packed_shape) {
  const deltamem::Shape shape = make_shape(packed_shape);
  const int64_t layers = check_pool(shape, addresses, states, staging, {&block_ids, &counts, &slots});
  const int64_t n = block_ids.size(0), floats = shape.state_floats();
  require(block_size >= 1, "block_size must be at least 1, got ", block_size);
  require(!staging || staging->size(0) >= n, "staging has ", staging ? staging->size(0) : 0, " rows for ", n, " orders");
  const int32_t *blocks = data<int32_t>(block_ids), *count = data<int32_t>(counts), *slot = data<int32_t>(slots);
  for (int64_t i = 0; i < n; i++) {
    check_block("take", i, blocks[i], num_blocks);
    require(count[i] >= 0 && count[i] <= block_size, "take: order ", i, " asks for ", count[i], " of ", block_size, " tokens");
    require(slot[i] == kNoSlot || (slot[i] >= 0 && slot[i] < states.size(0)), "take: order ", i, " names slot ", slot[i],
            " of ", states.size(0));
  }

  float* taken = workspace(n * floats + deltamem::thread_floats(shape));
  float *pool = static_cast<float*>(states.data_ptr()), *rows = staging ? static_cast<float*>(staging->data_ptr()) : nullptr;
  for (int64_t layer = 0; layer < layers; layer++) {
    const deltamem::Pages pages = {reinterpret_cast<float*>(data<int64_t>(addresses)[layer]), page_stride, block_size};
    deltamem::kernels().page_state(shape, {pages, blocks, count, n, taken, taken + n * floats});
    for (int64_t i = 0; i < n; i++) {
      const float* state = taken + i * floats;
      if (slot[i] != kNoSlot) memcpy(pool + (slot[i] * layers + layer) * floats, state, floats * sizeof(float));
      if (rows) memcpy(rows + (i * layers + layer) * floats, state, floats * sizeof(float));
    }
  }
}

void seed(const Tensor& addresses, int64_t page_stride, int64_t num_blocks, const Tensor& block_ids, const Tensor& sources,
          const Tensor& states, std::optional<Tensor> staging, int64_t packed_shape) {
  const deltamem::Shape shape = make_shape(packed_shape);
  const int64_t layers = check_pool(shape, addresses, states, staging, {&block_ids, &sources});
  const int64_t n = block_ids.size(0), floats = shape.state_floats(), staged = staging ? staging->size(0) : 0;
  const int32_t *blocks = data<int32_t>(block_ids), *source = data<int32_t>(sources);
  for (int64_t i = 0; i < n; i++) {
    check_block("seed", i, blocks[i], num_blocks);
    require(source[i] < states.size(0), "seed: order ", i, " names slot ", source[i], " of ", states.size(0));
    require(source[i] >= kEmpty || -2 - int64_t{source[i]} < staged, "seed: order ", i, " names staged row ",
            -2 - int64_t{source[i]}, " of ", staged);
  }

  for (int64_t layer = 0; layer < layers; layer++) {
    float* pages = reinterpret_cast<float*>(data<int64_t>(addresses)[layer]);
    for (int64_t i = 0; i < n; i++) {
      float* base = pages + blocks[i] * page_stride;
      if (source[i] == kEmpty) {
        memset(base, 0, floats * sizeof(float));
        continue;
      }
      const float* from = source[i] >= 0 ? data<float>(states) : data<float>(*staging);
      const int64_t row = source[i] >= 0 ? source[i] : -2 - int64_t{source[i]};
      memcpy(base, from + (row * layers + layer) * floats, floats * sizeof(float));
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deltamem_native, m) {
  m.def(
      "take(Tensor addresses, int page_stride, int num_blocks, Tensor block_ids, Tensor counts, Tensor slots, "
      "Tensor(a!) states, Tensor(b!)? staging, int block_size, int shape) -> ()");
  m.def(
      "seed(Tensor addresses, int page_stride, int num_blocks, Tensor block_ids, Tensor sources, Tensor states, "
      "Tensor? staging, int shape) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deltamem_native, CPU, m) {
  m.impl("take", TORCH_BOX(&take));
  m.impl("seed", TORCH_BOX(&seed));
}
