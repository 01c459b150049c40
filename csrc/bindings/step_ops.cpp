// A step of the engine, layer after layer. What all layers share (requests, indices, the cut over threads) is checked and
// planned once, when the first layer runs; each of the others is then one call with its own rows. That is what a decode
// step needs: between two layers a model's weights have gone through the caches, so that every line of a call's way is
// fetched from memory again. Most of that way is torch's dispatcher, which `deltamem_next` goes past: a plain function.
//
// The step belongs to the thread that runs it. It ends with its last layer, and the first layer of the next one replaces
// whatever a step that failed has left; a layer out of its turn is refused.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "scan_args.h"

namespace {

using namespace deltamem_bindings;

// A table's rows: one layer's constants, as 64-bit words.
constexpr int64_t kWords = sizeof(LayerConstants) / sizeof(int64_t);
static_assert(sizeof(LayerConstants) == kWords * sizeof(int64_t));

struct CurrentStep : Step {
  int64_t layers = 0, next = 0;  // next: the layer whose turn it is; 0: no step has begun
  bool idle = false;             // no request, no page: reads are zero
  const int64_t* addresses = nullptr;
  const LayerConstants* constants = nullptr;
  std::vector<Tensor> held;  // what the step points into, however long the caller keeps it

  void done() { next = next + 1 < layers ? next + 1 : 0; }
};
thread_local CurrentStep current;

void layer_entry(const Tensor& bias, const std::optional<Tensor>& in_rows, int64_t first,
                 const std::optional<Tensor>& in_residual, const Tensor& entry, int64_t packed_shape) {
  check("entry", entry, ScalarType::Long, {kWords});
  require(entry.is_contiguous(), "entry must be contiguous");
  const LayerConstants own = layer_constants(make_shape(packed_shape), bias, in_rows, first, in_residual);
  memcpy(entry.data_ptr(), &own, sizeof own);
}

int64_t entry_words() { return kWords; }

void scan_first(const Tensor& rows, const std::optional<Tensor>& projected, const std::optional<Tensor>& reads,
                const std::optional<Tensor>& residual, const Tensor& table, const Tensor& addresses, int64_t page_stride,
                int64_t num_blocks, int64_t page_width, const Tensor& block_table, const Tensor& query_start_loc, const Tensor& seq_lens,
                const Tensor& write_limit, const Tensor& unwritten, int64_t block_size, int64_t num_reqs,
                int64_t packed_shape) {
  CurrentStep& step = current;
  step.next = 0;
  const deltamem::Shape shape = make_shape(packed_shape);
  check("addresses", addresses, ScalarType::Long, {-1});
  require(addresses.is_contiguous() && addresses.size(0) > 0, "addresses must be contiguous, and name a layer");
  check("table", table, ScalarType::Long, {addresses.size(0), kWords});
  require(table.is_contiguous(), "table must be contiguous");
  require(block_size >= 1 && page_stride >= page_width &&
              page_width >= shape.state_floats() + block_size * shape.log_columns(),
          "pages of ", page_width, " floats, ", page_stride, " apart, cannot hold ", block_size, " tokens");
  step.addresses = data<int64_t>(addresses);
  step.constants = reinterpret_cast<const LayerConstants*>(table.data_ptr());
  const deltamem::Pages pages = {reinterpret_cast<float*>(step.addresses[0]), page_stride, block_size, page_width};
  plan_step(shape, pages, num_blocks, {block_table, query_start_loc, seq_lens, write_limit, unwritten, num_reqs},
            rows.size(0), step);
  step.held = {block_table, unwritten, addresses, table};
  step.layers = addresses.size(0);
  step.idle = false;
  run_layer(step, step.constants[0], layer_rows(rows, projected, reads, residual));
  step.done();
}

void scan_nothing(int64_t layers) {
  current.layers = layers;
  current.idle = true;
  current.next = 0;
  current.done();
}

// Throws unless it is this layer's turn.
CurrentStep& step_at(int64_t layer) {
  CurrentStep& step = current;
  require(layer > 0 && layer == step.next, "layer ", layer, ", but it is the turn of layer ", step.next, " of ", step.layers,
          ": a layer was left out, or run twice");
  return step;
}

void run_next(CurrentStep& step, const LayerRows& layer) {
  if (step.idle && layer.reads) {
    const Rows& reads = *layer.reads;
    require(reads.dtype == deltamem::Dtype::f32 && (reads.count < 2 || reads.stride == reads.columns),
            "reads must be contiguous floats");
    memset(reads.data, 0, reads.count * reads.columns * sizeof(float));
  } else if (!step.idle) {
    step.args.pages.data = reinterpret_cast<float*>(step.addresses[step.next]);
    run_layer(step, step.constants[step.next], layer);
  }
  step.done();
}

void scan_next(const Tensor& rows, const std::optional<Tensor>& projected, const std::optional<Tensor>& reads,
               const std::optional<Tensor>& residual, int64_t layer) {
  run_next(step_at(layer), layer_rows(rows, projected, reads, residual));
}

// Under tracing: rows and the residual are corrected in place, reads have their shape already.
void nothing(const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&, int64_t) {}

}  // namespace

// `scan_next` of rows [count, columns], reads [count, width] and a residual [count, hidden] that are contiguous, the
// projection in the rows' last columns; null: no reads, no residual. Returns null, or what is wrong, until this thread
// calls it again; nothing has changed then.
extern "C" __attribute__((visibility("default"))) const char* deltamem_next(void* rows, int64_t count, int64_t columns,
                                                                            int64_t dtype, void* reads, int64_t width,
                                                                            void* residual, int64_t hidden,
                                                                            int64_t layer) noexcept {
  static thread_local std::string error;
  try {
    require(dtype >= 0 && dtype <= static_cast<int64_t>(deltamem::Dtype::f16), "rows: no dtype has number ", dtype);
    const auto known = [=](void* data, int64_t wide, deltamem::Dtype kind) {
      return data ? std::optional(Rows{count, wide, wide, kind, static_cast<char*>(data)}) : std::nullopt;
    };
    const auto kind = static_cast<deltamem::Dtype>(dtype);
    const Rows own = {count, columns, columns, kind, static_cast<char*>(rows)};
    run_next(step_at(layer), {own, {}, known(reads, width, deltamem::Dtype::f32), known(residual, hidden, kind)});
    return nullptr;
  } catch (const std::exception& wrong) {
    error = wrong.what();
    return error.c_str();
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(deltamem_native, m) {
  m.def("entry_words() -> int");
  // One layer's row of a table. The row points into bias and matrices: who keeps it keeps them, and lets them be.
  m.def("layer_entry(Tensor bias, Tensor? in_rows, int first, Tensor? in_residual, Tensor(a!) entry, int shape) -> ()");
  // rows: a layer's q | k | v | projected (or q | k | v, and projected by itself), of which the layer's matrix, if it has
  // one, corrects columns from its first on. residual: what o's correction is added to.
  m.def(
      "scan_first(Tensor(a!) rows, Tensor? projected, Tensor(b!)? reads, Tensor(c!)? residual, Tensor table, "
      "Tensor addresses, int page_stride, int num_blocks, int page_width, Tensor block_table, Tensor query_start_loc, Tensor seq_lens, Tensor write_limit, "
      "Tensor unwritten, int block_size, int num_reqs, int shape) -> ()");
  m.def("scan_nothing(int layers) -> ()");
  m.def("scan_next(Tensor(a!) rows, Tensor? projected, Tensor(b!)? reads, Tensor(c!)? residual, int layer) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deltamem_native, CPU, m) {
  m.impl("layer_entry", TORCH_BOX(&layer_entry));
  m.impl("scan_first", TORCH_BOX(&scan_first));
  m.impl("scan_next", TORCH_BOX(&scan_next));
}

STABLE_TORCH_LIBRARY_IMPL(deltamem_native, Meta, m) {
  m.impl("scan_next", TORCH_BOX(&nothing));
}

STABLE_TORCH_LIBRARY_IMPL(deltamem_native, CompositeExplicitAutograd, m) {
  m.impl("scan_nothing", TORCH_BOX(&scan_nothing));
  m.impl("entry_words", TORCH_BOX(&entry_words));
}
