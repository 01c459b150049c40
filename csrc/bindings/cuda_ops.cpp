// torch.ops.deltamem_cuda, on torch's stable ABI.
//
// Shapes, dtypes and devices are checked here. Indices are on the device and are not fetched: a call waits for
// nothing and can be captured in a CUDA graph; the kernels follow no index that does not fit.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../cuda/launch.h"
#include "checks.h"

namespace {

using namespace deltamem_bindings;
using deltamem_cuda::Shape;

// The tests compile this for a CPU, where the tensors are on the CPU and there are no streams.
#ifdef DELTAMEM_EMULATED
struct Where {
  explicit Where(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
bool staging_fits(const Tensor& tensor) { return tensor.is_cpu(); }
#define DELTAMEM_KEY CPU
#else
struct Where {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  explicit Where(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    require(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current) == 0, "no current CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }
};
bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }
// Pinned host memory is addressed from the device as it is.
bool staging_fits(const Tensor& tensor) {
  if (tensor.is_cuda()) return true;
  cudaPointerAttributes attributes;
  return cudaPointerGetAttributes(&attributes, tensor.data_ptr()) == cudaSuccess &&
         attributes.type == cudaMemoryTypeHost && attributes.devicePointer == tensor.data_ptr();
}
#define DELTAMEM_KEY CUDA
#endif

void check(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  require(on_device(tensor), name, ": expected a tensor on the GPU");
  check_shape(name, tensor, dtype, sizes);
}

void launched(cudaError_t error) {
  require(error == cudaSuccess, "deltamem_cuda: a kernel did not start: ", cudaGetErrorString(error));
}

Shape make_shape(int64_t rank, int64_t heads, bool rankwise, bool couple, int64_t mode, bool normalize) {
  require(rank >= 1 && rank <= deltamem_cuda::kMaxRank && heads >= 1 && heads <= 65535,
          "the CUDA kernels serve ranks from 1 to ", deltamem_cuda::kMaxRank, ", got rank ", rank, " and ", heads,
          " heads: use --deltamem-kernel triton");
  require(mode >= 0 && mode <= 2, "unknown update mode ", mode);
  return deltamem_cuda::make_shape(static_cast<int>(rank), static_cast<int>(heads), rankwise, couple,
                                   static_cast<int>(mode), normalize);
}

void check_pages(const Shape& shape, const Tensor& pages, int64_t block_size) {
  check("pages", pages, ScalarType::Float, {-1, -1});
  require(block_size >= 1, "block_size must be at least 1, got ", block_size);
  const int64_t need = shape.state_floats + block_size * shape.log_columns;
  require(pages.stride(1) == 1 && pages.size(1) >= need && (pages.size(0) < 2 || pages.stride(0) >= need),
          "pages: ", block_size, " tokens need ", need, " consecutive floats, got ", pages.size(1), " with strides ",
          pages.stride(0), ", ", pages.stride(1));
}

int dtype_of(const Tensor& projected) {
  switch (projected.scalar_type()) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: throw std::runtime_error("projected: expected float32, bfloat16 or float16");
  }
}

// longest: rows of the longest request, 0 where that is not known. chunk: tokens per chunk of a long prefill; -1: as the step's size asks for; 0: never.
void page_scan(const Tensor& projected, const Tensor& bias, const Tensor& pages, const Tensor& block_table,
               const Tensor& query_start_loc, const Tensor& seq_lens, const Tensor& write_limit,
               const Tensor& unwritten, const Tensor& reads, int64_t block_size, int64_t num_reqs, int64_t rank,
               int64_t heads, bool rankwise, bool couple, int64_t mode, bool normalize, int64_t longest,
               int64_t chunk) {
  const Shape shape = make_shape(rank, heads, rankwise, couple, mode, normalize);
  const int dtype = dtype_of(projected);
  check("projected", projected, projected.scalar_type(), {-1, shape.projected_columns});
  check("bias", bias, ScalarType::Float, {shape.projected_columns - 3 * shape.width});
  check("block_table", block_table, ScalarType::Int, {-1, -1});
  check("query_start_loc", query_start_loc, ScalarType::Int, {-1});
  check("seq_lens", seq_lens, ScalarType::Int, {-1});
  check_pages(shape, pages, block_size);
  check("write_limit", write_limit, ScalarType::Int, {pages.size(0)});
  check("unwritten", unwritten, ScalarType::Int, {pages.size(0), (block_size + 31) / 32});
  check("reads", reads, ScalarType::Float, {-1, shape.width});
  for (const Tensor* tensor : {&bias, &reads, &query_start_loc, &seq_lens, &write_limit, &unwritten})
    require(tensor->is_contiguous(), "page_scan: only projected, pages and block_table may be strided");
  require(projected.stride(1) == 1 && (projected.size(0) < 2 || projected.stride(0) >= shape.projected_columns),
          "projected: the columns of a row must be contiguous and rows must not overlap, got strides ",
          projected.stride(0), ", ", projected.stride(1));
  require(block_table.stride(1) == 1 || block_table.size(1) < 2, "block_table: the entries of a row must be contiguous");
  const int64_t tokens = projected.size(0);
  require(reads.size(0) >= tokens, "page_scan: reads has ", reads.size(0), " rows for ", tokens, " tokens");
  require(num_reqs >= 0 && query_start_loc.size(0) > num_reqs && seq_lens.size(0) >= num_reqs &&
              block_table.size(0) >= num_reqs,
          "page_scan: ", num_reqs, " requests, but query_start_loc has ", query_start_loc.size(0), " entries, seq_lens ",
          seq_lens.size(0), " and block_table ", block_table.size(0), " rows");
  if (num_reqs == 0) {
    Tensor all = reads;
    torch::stable::zero_(all);
    return;
  }

  deltamem_cuda::Scan scan = {};
  scan.projected = projected.data_ptr();
  scan.projected_stride = projected.stride(0);
  scan.dtype = dtype;
  scan.bias = data<float>(bias);
  scan.pages = static_cast<float*>(pages.data_ptr());
  scan.page_stride = pages.stride(0);
  scan.num_blocks = pages.size(0);
  scan.block_table = data<int32_t>(block_table);
  scan.table_stride = block_table.stride(0);
  scan.table_width = static_cast<int>(block_table.size(1));
  scan.query_start_loc = data<int32_t>(query_start_loc);
  scan.seq_lens = data<int32_t>(seq_lens);
  scan.write_limit = data<int32_t>(write_limit);
  scan.unwritten = data<uint32_t>(unwritten);
  scan.reads = static_cast<float*>(reads.data_ptr());
  scan.tokens = tokens;
  scan.rows = reads.size(0);
  scan.num_reqs = static_cast<int>(num_reqs);
  scan.block_size = static_cast<int>(block_size);

  const Where where(projected);
  deltamem_cuda::Chunks chunks = {};
  if (chunk < 0) {
    chunks = deltamem_cuda::plan_chunks(shape, tokens, num_reqs, longest, scan.block_size);
  } else if (chunk > 0) {
    require((rank == 4 || rank == 8 || rank == 16) && chunk % block_size == 0, "a chunk of ", chunk,
            " tokens: expected a multiple of ", block_size, " and a rank of 4, 8 or 16");
    chunks.tokens = static_cast<int>(chunk);
    chunks.count = tokens / chunk + 2 * num_reqs;
  }
  std::optional<Tensor> scratch;  // the caching allocator keeps it from others until the stream has passed
  if (chunks.tokens) {
    const int64_t summaries = deltamem_cuda::summary_floats(shape, chunks);
    scratch = torch::stable::new_empty(reads, {summaries + deltamem_cuda::start_floats(shape, chunks)});
    chunks.summaries = static_cast<float*>(scratch->data_ptr());
    chunks.starts = chunks.summaries + summaries;
  }
  launched(deltamem_cuda::page_scan(shape, scan, chunks, where.stream));
}

void page_state(const Tensor& pages, const Tensor& block_ids, const Tensor& counts, const Tensor& out,
                int64_t block_size, int64_t rank, int64_t heads, bool rankwise, bool couple, int64_t mode,
                bool normalize) {
  const Shape shape = make_shape(rank, heads, rankwise, couple, mode, normalize);
  check("block_ids", block_ids, ScalarType::Int, {-1});
  const int64_t n = block_ids.size(0);
  check("counts", counts, ScalarType::Int, {n});
  check("out", out, ScalarType::Float, {n, heads, rank, rank});
  check_pages(shape, pages, block_size);
  require(block_ids.is_contiguous() && counts.is_contiguous() && out.is_contiguous(),
          "page_state: block_ids, counts and out must be contiguous");
  if (n == 0) return;
  const Where where(pages);
  deltamem_cuda::Take take = {};
  take.pages = data<float>(pages);
  take.layers = 1;
  take.page_stride = pages.stride(0);
  take.num_blocks = pages.size(0);
  take.block_ids = data<int32_t>(block_ids);
  take.counts = data<int32_t>(counts);
  take.n = n;
  take.staging = static_cast<float*>(out.data_ptr());
  take.block_size = static_cast<int>(block_size);
  launched(deltamem_cuda::take(shape, take, where.stream));
}

// Orders, pool and staging of take and seed; returns how many layers there are.
int64_t check_pool(const Shape& shape, const Tensor& addresses, const Tensor& states,
                   const std::optional<Tensor>& staging, std::initializer_list<const Tensor*> orders) {
  check("addresses", addresses, ScalarType::Long, {-1});
  const int64_t layers = addresses.size(0), n = (*orders.begin())->size(0);
  for (const Tensor* order : orders) {
    check("orders", *order, ScalarType::Int, {n});
    require(order->is_contiguous(), "orders must be contiguous");
  }
  check("states", states, ScalarType::Float, {-1, layers, shape.heads, shape.rank, shape.rank});
  require(states.is_contiguous() && addresses.is_contiguous(), "states and addresses must be contiguous");
  if (staging) {
    check_shape("staging", *staging, ScalarType::Float, {-1, layers, shape.heads, shape.rank, shape.rank});
    require(staging->is_contiguous() && staging_fits(*staging), "staging must be contiguous, on the GPU or pinned");
  }
  return layers;
}

void take(const Tensor& addresses, int64_t page_stride, int64_t num_blocks, const Tensor& block_ids,
          const Tensor& counts, const Tensor& slots, const Tensor& states, std::optional<Tensor> staging,
          int64_t block_size, int64_t rank, int64_t heads, bool rankwise, bool couple, int64_t mode, bool normalize) {
  const Shape shape = make_shape(rank, heads, rankwise, couple, mode, normalize);
  const int64_t layers = check_pool(shape, addresses, states, staging, {&block_ids, &counts, &slots});
  const int64_t n = block_ids.size(0);
  require(!staging || staging->size(0) >= n, "staging has too few rows for ", n, " orders");
  if (n == 0 || layers == 0) return;
  const Where where(states);
  launched(deltamem_cuda::take(
      shape,
      {data<int64_t>(addresses), nullptr, static_cast<int>(layers), page_stride, num_blocks, data<int32_t>(block_ids),
       data<int32_t>(counts), data<int32_t>(slots), n, states.size(0), static_cast<float*>(states.data_ptr()),
       staging ? static_cast<float*>(staging->data_ptr()) : nullptr, static_cast<int>(block_size)},
      where.stream));
}

void seed(const Tensor& addresses, int64_t page_stride, int64_t num_blocks, const Tensor& block_ids,
          const Tensor& sources, const Tensor& states, std::optional<Tensor> staging, int64_t rank, int64_t heads,
          bool rankwise, bool couple, int64_t mode, bool normalize) {
  const Shape shape = make_shape(rank, heads, rankwise, couple, mode, normalize);
  const int64_t layers = check_pool(shape, addresses, states, staging, {&block_ids, &sources});
  const int64_t n = block_ids.size(0);
  if (n == 0 || layers == 0) return;
  const Where where(states);
  launched(deltamem_cuda::seed(
      shape,
      {data<int64_t>(addresses), static_cast<int>(layers), page_stride, num_blocks, data<int32_t>(block_ids),
       data<int32_t>(sources), n, states.size(0), staging ? staging->size(0) : 0, data<float>(states),
       staging ? data<float>(*staging) : nullptr},
      where.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY(deltamem_cuda, m) {
  m.def(
      "page_scan(Tensor projected, Tensor bias, Tensor(a!) pages, Tensor block_table, Tensor query_start_loc, "
      "Tensor seq_lens, Tensor write_limit, Tensor unwritten, Tensor(b!) reads, int block_size, int num_reqs, int rank, "
      "int heads, bool rankwise, bool couple, int mode, bool normalize, int longest, int chunk) -> ()");
  m.def(
      "page_state(Tensor pages, Tensor block_ids, Tensor counts, Tensor(a!) out, int block_size, int rank, int heads, "
      "bool rankwise, bool couple, int mode, bool normalize) -> ()");
  m.def(
      "take(Tensor addresses, int page_stride, int num_blocks, Tensor block_ids, Tensor counts, Tensor slots, "
      "Tensor(a!) states, Tensor(b!)? staging, int block_size, int rank, int heads, bool rankwise, bool couple, int mode, "
      "bool normalize) -> ()");
  m.def(
      "seed(Tensor addresses, int page_stride, int num_blocks, Tensor block_ids, Tensor sources, Tensor states, "
      "Tensor? staging, int rank, int heads, bool rankwise, bool couple, int mode, bool normalize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deltamem_cuda, DELTAMEM_KEY, m) {
  m.impl("page_scan", TORCH_BOX(&page_scan));
  m.impl("page_state", TORCH_BOX(&page_state));
  m.impl("take", TORCH_BOX(&take));
  m.impl("seed", TORCH_BOX(&seed));
}
