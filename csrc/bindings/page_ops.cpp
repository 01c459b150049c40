// torch.ops.deltamem_native, on torch's stable ABI: no Python API, so one library serves every Python.
//
// Everything is checked here, before a kernel changes anything: shapes, dtypes, and every index the step will use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "../cpu/plan.h"
#include "cpu_checks.h"

namespace {

using namespace deltamem_bindings;

deltamem::Pages make_pages(const deltamem::Shape& shape, const Tensor& pages, int64_t block_size) {
  check("pages", pages, ScalarType::Float, {-1, -1});
  require(block_size >= 1, "block_size must be at least 1, got ", block_size);
  const int64_t need = shape.state_floats() + block_size * shape.log_columns();
  require(pages.stride(1) == 1 && pages.size(1) >= need && (pages.size(0) < 2 || pages.stride(0) >= need),
          "pages: ", block_size, " tokens need ", need, " consecutive floats, got ", pages.size(1), " with strides ",
          pages.stride(0), ", ", pages.stride(1));
  return {static_cast<float*>(pages.data_ptr()), pages.stride(0), block_size};
}

deltamem::Dtype dtype_of(const Tensor& projected) {
  switch (projected.scalar_type()) {
    case ScalarType::Float: return deltamem::Dtype::f32;
    case ScalarType::BFloat16: return deltamem::Dtype::bf16;
    case ScalarType::Half: return deltamem::Dtype::f16;
    default: throw std::runtime_error("projected: expected float32, bfloat16 or float16");
  }
}

// On torch's own threads.
void in_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot++) body(context, slot);
  });
}

void check_projected(const deltamem::Shape& shape, const Tensor& projected) {
  check("projected", projected, projected.scalar_type(), {-1, shape.projected_columns()});
  const bool overlap = projected.size(0) > 1 && projected.stride(0) < shape.projected_columns();
  require(projected.size(0) == 0 || (projected.stride(1) == 1 && !overlap),
          "projected: the columns of a row must be contiguous and rows must not overlap, got strides ",
          projected.stride(0), ", ", projected.stride(1));
}

// Every index that the kernel will follow; throws before anything has changed.
void check_requests(const deltamem::ScanArgs& args, int64_t tokens, int64_t num_blocks, int64_t table_width) {
  for (int64_t i = 0; i < args.num_reqs; i++) {
    const int64_t start = args.query_start_loc[i], stop = args.query_start_loc[i + 1];
    if (stop <= start) continue;
    const int64_t length = args.seq_lens[i], context = length - (stop - start), size = args.pages.block_size;
    const int64_t last_page = (length - 1) / size;
    require(start >= 0 && stop <= tokens && context >= 0 && last_page < table_width, "page_scan: request ", i,
            " has rows ", start, " to ", stop, " of ", tokens, " and sequence length ", length,
            "; its block table holds ", table_width, " blocks of ", size, " tokens");
    const int32_t* blocks = args.block_table + i * args.table_stride;
    const auto known = [&](int64_t block) {
      require(block >= 0 && block < num_blocks, "page_scan: request ", i, " uses block ", block, ", but there are ",
              num_blocks, " pages");
    };
    known(blocks[0]);
    if (args.write_limit[blocks[0]] < 0) continue;
    for (int64_t page = context > 0 ? (context - 1) / size : 0; page <= last_page; page++) known(blocks[page]);
  }
}

void page_scan(const Tensor& projected, const Tensor& bias, const Tensor& pages, const Tensor& block_table,
               const Tensor& query_start_loc, const Tensor& seq_lens, const Tensor& write_limit,
               const Tensor& unwritten, const Tensor& reads,
               int64_t block_size, int64_t num_reqs, int64_t packed_shape) {
  const deltamem::Shape shape = make_shape(packed_shape);
  const deltamem::Dtype dtype = dtype_of(projected);
  check_projected(shape, projected);
  check("bias", bias, ScalarType::Float, {shape.gate_columns()});
  check("block_table", block_table, ScalarType::Int, {-1, -1});
  check("query_start_loc", query_start_loc, ScalarType::Int, {-1});
  check("seq_lens", seq_lens, ScalarType::Int, {-1});
  check("write_limit", write_limit, ScalarType::Int, {pages.size(0)});
  require(block_size >= 1, "block_size must be at least 1, got ", block_size);
  check("unwritten", unwritten, ScalarType::Int, {pages.size(0), (block_size + 31) / 32});
  check("reads", reads, ScalarType::Float, {-1, shape.width()});
  require(bias.is_contiguous() && reads.is_contiguous(), "page_scan: bias and reads must be contiguous");
  require(query_start_loc.is_contiguous() && seq_lens.is_contiguous() && write_limit.is_contiguous() &&
              unwritten.is_contiguous() && (block_table.stride(1) == 1 || block_table.size(1) < 2),
          "page_scan: query_start_loc, seq_lens, write_limit, unwritten and the rows of block_table must be contiguous");
  const int64_t tokens = projected.size(0);
  require(reads.size(0) >= tokens, "page_scan: reads has ", reads.size(0), " rows for ", tokens, " tokens");
  require(num_reqs >= 0 && query_start_loc.size(0) > num_reqs && seq_lens.size(0) >= num_reqs &&
              block_table.size(0) >= num_reqs,
          "page_scan: ", num_reqs, " requests, but query_start_loc has ", query_start_loc.size(0), " entries, seq_lens ",
          seq_lens.size(0), " and block_table ", block_table.size(0), " rows");

  const deltamem::ScanArgs args = {projected.data_ptr(), projected.stride(0), dtype, data<float>(bias),
                                   make_pages(shape, pages, block_size), data<int32_t>(block_table),
                                   block_table.stride(0), data<int32_t>(query_start_loc), data<int32_t>(seq_lens),
                                   data<int32_t>(write_limit), data<uint32_t>(unwritten),
                                   static_cast<float*>(reads.data_ptr()), reads.size(0), num_reqs};
  check_requests(args, tokens, pages.size(0), block_table.size(1));
  const deltamem::Plan plan = deltamem::make_plan(shape, args, pages.size(0), torch::stable::get_num_threads());
  deltamem::kernels().page_scan(shape, args, plan, in_parallel,
                                workspace(deltamem::workspace_floats(shape, plan, tokens)));
}

void activate(const Tensor& projected, const Tensor& bias, const Tensor& q, const Tensor& log, int64_t packed_shape) {
  const deltamem::Shape shape = make_shape(packed_shape);
  const deltamem::Dtype dtype = dtype_of(projected);
  check_projected(shape, projected);
  check("bias", bias, ScalarType::Float, {shape.gate_columns()});
  check("q", q, ScalarType::Float, {projected.size(0), shape.width()});
  check("log", log, ScalarType::Float, {projected.size(0), shape.log_columns()});
  require(bias.is_contiguous() && q.is_contiguous() && log.is_contiguous(), "activate: bias, q and log must be contiguous");
  const deltamem::ActivateArgs args = {projected.data_ptr(), projected.stride(0), dtype, data<float>(bias),
                                       projected.size(0), static_cast<float*>(q.data_ptr()),
                                       static_cast<float*>(log.data_ptr()), workspace(deltamem::thread_floats(shape))};
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
