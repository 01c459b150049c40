// torch.ops.deltamem_native, on torch's stable ABI: no Python API, so one library serves every Python.
//
// Everything is checked before a kernel changes anything: shapes, dtypes, and every index the step will use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "scan_args.h"

namespace {

using namespace deltamem_bindings;

void page_scan(const Tensor& projected, const Tensor& bias, const Tensor& pages, const Tensor& block_table,
               const Tensor& query_start_loc, const Tensor& seq_lens, const Tensor& write_limit,
               const Tensor& unwritten, const Tensor& reads,
               int64_t block_size, int64_t num_reqs, int64_t packed_shape) {
  const deltamem::Shape shape = make_shape(packed_shape);
  const LayerConstants own = layer_constants(shape, bias, std::nullopt, 0, std::nullopt);
  static thread_local Step step;
  plan_step(shape, make_pages(shape, pages, block_size), pages.size(0),
            {block_table, query_start_loc, seq_lens, write_limit, unwritten, num_reqs}, projected.size(0), step);
  const Rows rows = rows_of("projected", projected);
  run_layer(step, own, {rows, rows, rows_of("reads", reads), std::nullopt});
}

void activate(const Tensor& projected, const Tensor& bias, const Tensor& q, const Tensor& log, int64_t packed_shape) {
  const deltamem::Shape shape = make_shape(packed_shape);
  const Rows rows = rows_of("projected", projected);
  require(rows.columns == shape.projected_columns(), "projected: expected ", shape.projected_columns(), " columns, got ",
          rows.columns);
  check("bias", bias, ScalarType::Float, {shape.gate_columns()});
  check("q", q, ScalarType::Float, {rows.count, shape.width()});
  check("log", log, ScalarType::Float, {rows.count, shape.log_columns()});
  require(bias.is_contiguous() && q.is_contiguous() && log.is_contiguous(), "activate: bias, q and log must be contiguous");
  const deltamem::ActivateArgs args = {rows.data, rows.stride, rows.dtype, data<float>(bias), rows.count,
                                       static_cast<float*>(q.data_ptr()), static_cast<float*>(log.data_ptr()),
                                       workspace(deltamem::thread_floats(shape))};
  deltamem::kernels().activate(shape, args);
}

void page_state(const Tensor& pages, const Tensor& block_ids, const Tensor& counts, const Tensor& out,
                int64_t block_size, int64_t packed_shape) {
  const deltamem::Shape shape = make_shape(packed_shape);
  check("block_ids", block_ids, ScalarType::Int, {-1});
  const int64_t n = block_ids.size(0);
  check("counts", counts, ScalarType::Int, {n});
  check("out", out, ScalarType::Float, {n, shape.heads, shape.rank, shape.rank});
  require(block_ids.is_contiguous() && counts.is_contiguous() && out.is_contiguous(),
          "page_state: block_ids, counts and out must be contiguous");
  const deltamem::StateArgs args = {make_pages(shape, pages, block_size), data<int32_t>(block_ids),
                                    data<int32_t>(counts), n, static_cast<float*>(out.data_ptr()),
                                    workspace(deltamem::thread_floats(shape))};
  for (int64_t i = 0; i < n; i++)
    require(args.block_ids[i] >= 0 && args.block_ids[i] < pages.size(0) && args.counts[i] >= 0 &&
                args.counts[i] <= block_size,
            "page_state: entry ", i, " asks for ", args.counts[i], " of ", block_size, " tokens of block ",
            args.block_ids[i], " of ", pages.size(0));
  deltamem::kernels().page_state(shape, args);
}

std::string isa() { return deltamem::kernels().isa; }

bool force_isa(std::string isa) { return deltamem::force_isa(isa.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY(deltamem_native, m) {
  m.def(
      "page_scan(Tensor projected, Tensor bias, Tensor(a!) pages, Tensor block_table, Tensor query_start_loc, "
      "Tensor seq_lens, Tensor write_limit, Tensor unwritten, Tensor(b!) reads, int block_size, int num_reqs, "
      "int shape) -> ()");
  m.def(
      "page_state(Tensor pages, Tensor block_ids, Tensor counts, Tensor(a!) out, int block_size, int shape) -> ()");
  // For measurements and tests of the activation alone.
  m.def("activate(Tensor projected, Tensor bias, Tensor(a!) q, Tensor(b!) log, int shape) -> ()");
  m.def("isa() -> str");
  m.def("force_isa(str isa) -> bool");  // for tests: every build must pass on a machine that can run it
}

STABLE_TORCH_LIBRARY_IMPL(deltamem_native, CPU, m) {
  m.impl("page_scan", TORCH_BOX(&page_scan));
  m.impl("page_state", TORCH_BOX(&page_state));
  m.impl("activate", TORCH_BOX(&activate));
}

STABLE_TORCH_LIBRARY_IMPL(deltamem_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("force_isa", TORCH_BOX(&force_isa));
}
