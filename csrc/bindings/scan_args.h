// From tensors to what a step's kernels take. Everything is checked, before anything changes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../cpu/plan.h"
#include "cpu_checks.h"
#include "rows.h"

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

// On torch's own threads.
inline void in_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot++) body(context, slot);
  });
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

// A correction's matrix, in tiles; null: nothing is corrected.
struct Matrix {
  const void* data = nullptr;
  int32_t tiles = 0, first = 0;  // first: column of what is corrected
  deltamem::Dtype dtype = deltamem::Dtype::f32;
};

inline Matrix matrix_of(const char* name, const deltamem::Shape& shape, const std::optional<Tensor>& matrix, int64_t first) {
  if (!matrix) return {};
  const deltamem::Dtype dtype = dtype_of(name, *matrix);
  check(name, *matrix, matrix->scalar_type(), {-1, shape.width(), deltamem::kMatrixTile});
  require(matrix->is_contiguous() && first >= 0 && first <= INT32_MAX && matrix->size(0) <= INT32_MAX, name,
          " must be contiguous, and its first column 0 or more, not ", first);
  return {matrix->data_ptr(), static_cast<int32_t>(matrix->size(0)), static_cast<int32_t>(first), dtype};
}

// What of a layer is the same in every step. Whoever makes one keeps the tensors that it points into.
struct LayerConstants {
  const float* bias;
  Matrix in_rows, in_residual;
};

inline LayerConstants layer_constants(const deltamem::Shape& shape, const Tensor& bias, const std::optional<Tensor>& in_rows,
                                      int64_t first, const std::optional<Tensor>& in_residual) {
  check("bias", bias, ScalarType::Float, {shape.gate_columns()});
  require(bias.is_contiguous(), "bias must be contiguous");
  return {data<float>(bias), matrix_of("matrix", shape, in_rows, first), matrix_of("matrix of o", shape, in_residual, 0)};
}

// One layer's tensors in a step.
struct LayerRows {
  Rows rows;  // what its linear put out: q | k | v, and behind them `projected` where that is none
  std::optional<Rows> projected;  // [T, projected_columns]
  std::optional<Rows> reads;      // none: only the corrections here need them
  std::optional<Rows> residual;   // [T, D], to which the correction of o is added; none: that is not done here
};

// As tensors tell of them.
inline LayerRows layer_rows(const Tensor& rows, const std::optional<Tensor>& projected, const std::optional<Tensor>& reads,
                            const std::optional<Tensor>& residual) {
  const auto found = [](const char* name, const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(rows_of(name, *tensor)) : std::nullopt;
  };
  return {rows_of("rows", rows), found("projected", projected), found("reads", reads), found("residual", residual)};
}

// Rows whose last columns an activation can read: as many as tokens.
inline Rows source_rows(const deltamem::Shape& shape, const LayerRows& layer, int64_t tokens) {
  const char* name = layer.projected ? "projected" : "rows";
  const Rows& rows = layer.projected ? *layer.projected : layer.rows;
  const int64_t columns = shape.projected_columns();
  require(rows.count == tokens, name, ": ", rows.count, " rows in a step of ", tokens, " tokens");
  require(layer.projected ? rows.columns == columns : rows.columns >= columns, name, ": expected ",
          layer.projected ? "" : "at least ", "the ", columns, " projected columns, got ", rows.columns);
  return rows;
}

inline void check_reads(const deltamem::Shape& shape, const Rows& reads, int64_t tokens) {
  require(reads.dtype == deltamem::Dtype::f32 && reads.columns == shape.width() && reads.count >= tokens &&
              (reads.count < 2 || reads.stride == reads.columns),
          "reads: expected ", shape.width(), " contiguous floats for each of ", tokens, " tokens, got ", reads.count, " rows of ",
          reads.columns, ", ", reads.stride, " apart", reads.dtype == deltamem::Dtype::f32 ? "" : ", not of float32");
}

// Where one layer's activation reads.
inline void set_rows(const deltamem::Shape& shape, const LayerConstants& own, const Rows& source, deltamem::ScanArgs& args) {
  args.dtype = source.dtype;
  args.projected = source.data + (source.columns - shape.projected_columns()) * bytes_of(args.dtype);
  args.projected_stride = source.stride;
  args.bias = own.bias;
}

// What of `rows` a matrix corrects, but for the reads; no columns: nothing. last: columns behind those that it may.
inline deltamem::CorrectionArgs correction_args(const char* name, const Matrix& matrix, const Rows& rows, int64_t last,
                                                int64_t tokens) {
  if (matrix.data == nullptr) return {};
  require(rows.count == tokens, name, ": expected one for each of ", tokens, " tokens, got ", rows.count);
  require(rows.dtype == matrix.dtype, name, ": not of the dtype of the layer's matrix");
  const int64_t columns = matrix.tiles * deltamem::kMatrixTile, room = rows.columns - last - matrix.first;
  require(columns - room < deltamem::kMatrixTile, name, ": expected a matrix of whole tiles and at most ", room,
          " columns from column ", matrix.first, " on, got ", columns);
  return {rows.data + matrix.first * bytes_of(rows.dtype), rows.stride, rows.dtype, matrix.data,
          columns < room ? columns : room, nullptr, 0};
}

// Over threads where that pays: tokens of one piece stay on one.
inline void correct(deltamem::CorrectionArgs args, const float* reads, int64_t width, int64_t tokens) {
  constexpr int64_t kPiece = 64;
  if (args.columns == 0) return;
  args.reads = reads;
  args.width = width;
  const auto function = deltamem::kernels().correct;
  if (tokens <= kPiece || torch::stable::get_num_threads() == 1) return function(args, 0, tokens);
  torch::stable::parallel_for(0, tokens, kPiece, [=](int64_t begin, int64_t end) { function(args, begin, end); });
}

// One layer of a step; nothing has changed if it throws.
inline void run_layer(Step& step, const LayerConstants& own, const LayerRows& layer) {
  const deltamem::Plan& plan = step.planned.plan;
  const int64_t width = step.shape.width(), apart = layer.projected ? 0 : step.shape.projected_columns();
  deltamem::fetch_pages(step.shape, step.args.pages, plan);
  set_rows(step.shape, own, source_rows(step.shape, layer, step.tokens), step.args);
  if (layer.reads) check_reads(step.shape, *layer.reads, step.tokens);
  const auto in_rows = correction_args("rows", own.in_rows, layer.rows, apart, step.tokens);
  deltamem::CorrectionArgs in_residual = {};
  if (layer.residual) {
    require(own.in_residual.data != nullptr, "residual: the layer has no matrix of o");
    in_residual = correction_args("residual", own.in_residual, *layer.residual, 0, step.tokens);
  }
  const int64_t floats = deltamem::workspace_floats(step.shape, plan, step.tokens);
  float* room = workspace(floats + (layer.reads ? 0 : step.tokens * width));
  step.args.reads = layer.reads ? reinterpret_cast<float*>(layer.reads->data) : room + floats;
  step.args.num_rows = layer.reads ? layer.reads->count : step.tokens;
  deltamem::kernels().page_scan(step.shape, step.args, plan, in_parallel, room);
  correct(in_rows, step.args.reads, width, step.tokens);
  correct(in_residual, step.args.reads, width, step.tokens);
}

}  // namespace deltamem_bindings
