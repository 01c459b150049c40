// From tensors to what a step's kernels take. Everything is checked, before anything changes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "../cpu/plan.h"
#include "cpu_checks.h"

namespace deltamem_bindings {

inline deltamem::Pages make_pages(const deltamem::Shape& shape, const Tensor& pages, int64_t block_size) {
  check("pages", pages, ScalarType::Float, {-1, -1});
  require(block_size >= 1, "block_size must be at least 1, got ", block_size);
  const int64_t need = shape.state_floats() + block_size * shape.log_columns();
  require(pages.stride(1) == 1 && pages.size(1) >= need && (pages.size(0) < 2 || pages.stride(0) >= need),
          "pages: ", block_size, " tokens need ", need, " consecutive floats, got ", pages.size(1), " with strides ",
          pages.stride(0), ", ", pages.stride(1));
  return {static_cast<float*>(pages.data_ptr()), pages.stride(0), block_size, pages.size(1)};
}

inline deltamem::Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return deltamem::Dtype::f32;
    case ScalarType::BFloat16: return deltamem::Dtype::bf16;
    case ScalarType::Half: return deltamem::Dtype::f16;
    default: throw std::runtime_error(std::string(name) + ": expected float32, bfloat16 or float16");
  }
}

// On torch's own threads.
inline void in_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot++) body(context, slot);
  });
}

// Rows that a kernel can walk; -1 stands for any number of columns.
inline void check_rows(const char* name, const Tensor& rows, int64_t columns) {
  check(name, rows, rows.scalar_type(), {-1, columns});
  const bool overlap = rows.size(0) > 1 && rows.stride(0) < rows.size(1);
  require(rows.size(0) == 0 || (rows.stride(1) == 1 && !overlap), name,
          ": the columns of a row must be contiguous and rows must not overlap, got strides ", rows.stride(0), ", ",
          rows.stride(1));
}

// Which tokens of a step belong to which request, and which of them are written.
struct Batch {
  const Tensor &block_table, &query_start_loc, &seq_lens, &write_limit, &unwritten;
  int64_t num_reqs;
};

// Every index that the kernel will follow; throws before anything has changed.
inline void check_requests(const deltamem::BatchArgs& batch, int64_t size, int64_t tokens, int64_t num_blocks, int64_t table_width) {
  for (int64_t i = 0; i < batch.num_reqs; i++) {
    const int64_t start = batch.query_start_loc[i], stop = batch.query_start_loc[i + 1];
    if (stop <= start) continue;
    const int64_t length = batch.seq_lens[i], context = length - (stop - start), last_page = (length - 1) / size;
    require(start >= 0 && stop <= tokens && context >= 0 && last_page < table_width, "page_scan: request ", i,
            " has rows ", start, " to ", stop, " of ", tokens, " and sequence length ", length,
            "; its block table holds ", table_width, " blocks of ", size, " tokens");
    const int32_t* blocks = batch.block_table + i * batch.table_stride;
    const auto known = [&](int64_t block) {
      require(block >= 0 && block < num_blocks, "page_scan: request ", i, " uses block ", block, ", but there are ",
              num_blocks, " pages");
    };
    known(blocks[0]);
    if (batch.write_limit[blocks[0]] < 0) continue;
    for (int64_t page = context > 0 ? (context - 1) / size : 0; page <= last_page; page++) known(blocks[page]);
  }
}

inline deltamem::BatchArgs batch_args(const Batch& batch, int64_t block_size, int64_t tokens, int64_t num_blocks) {
  const auto& [block_table, query_start_loc, seq_lens, write_limit, unwritten, num_reqs] = batch;
  check("block_table", block_table, ScalarType::Int, {-1, -1});
  check("query_start_loc", query_start_loc, ScalarType::Int, {-1});
  check("seq_lens", seq_lens, ScalarType::Int, {-1});
  check("write_limit", write_limit, ScalarType::Int, {num_blocks});
  check("unwritten", unwritten, ScalarType::Int, {num_blocks, deltamem::mask_words(block_size)});
  require(query_start_loc.is_contiguous() && seq_lens.is_contiguous() && write_limit.is_contiguous() &&
              unwritten.is_contiguous() && (block_table.stride(1) == 1 || block_table.size(1) < 2),
          "page_scan: query_start_loc, seq_lens, write_limit, unwritten and the rows of block_table must be contiguous");
  require(num_reqs >= 0 && query_start_loc.size(0) > num_reqs && seq_lens.size(0) >= num_reqs &&
              block_table.size(0) >= num_reqs,
          "page_scan: ", num_reqs, " requests, but query_start_loc has ", query_start_loc.size(0), " entries, seq_lens ",
          seq_lens.size(0), " and block_table ", block_table.size(0), " rows");
  const deltamem::BatchArgs args = {data<int32_t>(block_table), block_table.stride(0), data<int32_t>(query_start_loc),
                                    data<int32_t>(seq_lens), data<int32_t>(write_limit), data<uint32_t>(unwritten), num_reqs};
  check_requests(args, block_size, tokens, num_blocks, block_table.size(1));
  return args;
}

// A step that has been planned, but for its layers' own tensors.
struct Step {
  deltamem::Shape shape;
  deltamem::ScanArgs args;
  deltamem::Planned planned;
  int64_t tokens = 0;
};

// Throws before anything else has changed.
inline void plan_step(const deltamem::Shape& shape, const deltamem::Pages& pages, int64_t num_blocks, const Batch& batch,
                      int64_t tokens, Step& step) {
  const deltamem::BatchArgs args = batch_args(batch, pages.block_size, tokens, num_blocks);
  deltamem::make_plan(shape, pages, args, num_blocks, torch::stable::get_num_threads(), step.planned);
  step.shape = shape;
  step.tokens = tokens;
  step.args = {};
  step.args.pages = pages;
  step.args.unwritten = args.unwritten;
}

// What of a layer is the same in every step. Whoever makes one keeps the tensors that it points into.
struct LayerConstants {
  const float* bias;
  const void* matrix;  // of the correction of rows from column `first` on; null: nothing is corrected
  int64_t tiles, first;
  deltamem::Dtype dtype;  // of matrix
};

inline LayerConstants layer_constants(const deltamem::Shape& shape, const Tensor& bias, const std::optional<Tensor>& matrix,
                                      int64_t first) {
  check("bias", bias, ScalarType::Float, {shape.gate_columns()});
  require(bias.is_contiguous(), "bias must be contiguous");
  if (!matrix) return {data<float>(bias), nullptr, 0, 0, deltamem::Dtype::f32};
  const deltamem::Dtype dtype = dtype_of("matrix", *matrix);
  check("matrix", *matrix, matrix->scalar_type(), {-1, shape.width(), deltamem::kMatrixTile});
  require(matrix->is_contiguous() && first >= 0, "matrix must be contiguous, and its first column 0 or more, not ", first);
  return {data<float>(bias), matrix->data_ptr(), matrix->size(0), first, dtype};
}

// One layer's tensors in a step.
struct LayerRows {
  const Tensor& rows;  // what its linear put out: q | k | v, and behind them `projected` where that is none
  const std::optional<Tensor>& projected;  // [T, projected_columns]
  const Tensor& reads;
};

// Where one layer's activation reads, and where its reads go.
inline void set_rows(const deltamem::Shape& shape, const LayerConstants& own, const LayerRows& layer, int64_t tokens,
                     deltamem::ScanArgs& args) {
  const int64_t columns = shape.projected_columns();
  const char* name = layer.projected ? "projected" : "rows";
  const Tensor& from = layer.projected ? *layer.projected : layer.rows;
  args.dtype = dtype_of(name, from);
  check_rows(name, from, layer.projected ? columns : -1);
  require(from.size(0) == tokens, name, ": ", from.size(0), " rows in a step of ", tokens, " tokens");
  require(from.size(1) >= columns, "rows: expected at least the ", columns, " projected columns, got ", from.size(1));
  check("reads", layer.reads, ScalarType::Float, {-1, shape.width()});
  require(layer.reads.is_contiguous(), "page_scan: reads must be contiguous");
  require(layer.reads.size(0) >= tokens, "page_scan: reads has ", layer.reads.size(0), " rows for ", tokens, " tokens");
  args.projected = data<char>(from) + (from.size(1) - columns) * bytes_of(args.dtype);
  args.projected_stride = from.stride(0);
  args.bias = own.bias;
  args.reads = static_cast<float*>(layer.reads.data_ptr());
  args.num_rows = layer.reads.size(0);
}

// What of one layer's rows is corrected; no columns: nothing is. args: of `set_rows`.
inline deltamem::CorrectionArgs correction_args(const deltamem::Shape& shape, const LayerConstants& own,
                                                const LayerRows& layer, int64_t tokens, const deltamem::ScanArgs& args) {
  if (own.matrix == nullptr) return {};
  const Tensor& rows = layer.rows;
  deltamem::Dtype dtype = args.dtype;
  if (layer.projected) {  // else they are the activation's, and have been checked
    dtype = dtype_of("rows", rows);
    check_rows("rows", rows, -1);
    require(rows.size(0) == tokens, "rows: expected one for each of ", tokens, " tokens, got ", rows.size(0));
  }
  require(dtype == own.dtype, "rows: not of the dtype of the layer's matrix");
  const int64_t room = rows.size(1) - (layer.projected ? 0 : shape.projected_columns()) - own.first;
  const int64_t columns = own.tiles * deltamem::kMatrixTile;
  require(columns - room < deltamem::kMatrixTile, "matrix: expected whole tiles of at most ", room, " columns from column ",
          own.first, " on, got ", columns);
  return {static_cast<char*>(rows.data_ptr()) + own.first * bytes_of(dtype), rows.stride(0), dtype, own.matrix,
          columns < room ? columns : room, args.reads, shape.width()};
}

// Over threads where that pays: tokens of one piece stay on one.
inline void correct(const deltamem::CorrectionArgs& args, int64_t tokens) {
  constexpr int64_t kPiece = 64;
  if (args.columns == 0) return;
  const auto function = deltamem::kernels().correct;
  if (tokens <= kPiece || torch::stable::get_num_threads() == 1) return function(args, 0, tokens);
  torch::stable::parallel_for(0, tokens, kPiece, [=](int64_t begin, int64_t end) { function(args, begin, end); });
}

// One layer of a step; nothing has changed if it throws.
inline void run_layer(Step& step, const LayerConstants& own, const LayerRows& layer) {
  set_rows(step.shape, own, layer, step.tokens, step.args);
  const deltamem::CorrectionArgs correction = correction_args(step.shape, own, layer, step.tokens, step.args);
  const deltamem::Plan& plan = step.planned.plan;
  float* room = workspace(deltamem::workspace_floats(step.shape, plan, step.tokens));
  deltamem::kernels().page_scan(step.shape, step.args, plan, in_parallel, room);
  correct(correction, step.tokens);
}

}  // namespace deltamem_bindings
