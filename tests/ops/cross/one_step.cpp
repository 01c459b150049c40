// One step of the kernels without torch, for instruction sets that this machine runs in an emulator or not at all:
// one_step INPUT OUTPUT. Written and read by tests/ops/test_cross.py; little-endian, all numbers of 4 bytes.
//
// INPUT: rank, heads, rankwise, couple, normalize, mode, dtype, T, N, blocks, page floats, then projected [T, columns]
// (padded to 4 bytes), bias, pages, block ids; then rows [T, kCorrected] and the matrix of their correction (padded, too).
// OUTPUT: reads [T, width], pages after the step, rows corrected.
#include <cstdio>
#include <vector>

#include "delta_rule.h"

namespace deltamem::isa_cross {
extern const Kernels table;
}

constexpr int64_t kCorrected = 50;  // a tile and a part of one

int main(int, char** arguments) {
  using namespace deltamem;
  FILE* in = fopen(arguments[1], "rb");
  FILE* out = fopen(arguments[2], "wb");
  int32_t head[11];
  if (!in || !out || fread(head, 4, 11, in) != 11) return 2;
  const Shape shape = {head[0], head[1], head[2] != 0, head[3] != 0, head[4] != 0, static_cast<Mode>(head[5])};
  const Dtype dtype = static_cast<Dtype>(head[6]);
  const int32_t tokens = head[7], size = head[8], blocks = head[9], floats = head[10];
  const int64_t columns = shape.projected_columns(), bytes = bytes_of(dtype);
  std::vector<float> projected((tokens * columns * bytes + 3) / 4), bias(shape.gate_columns()), pages(blocks * floats);
  std::vector<int32_t> table(blocks);
  size_t got = fread(projected.data(), 4, projected.size(), in) + fread(bias.data(), 4, bias.size(), in);
  got += fread(pages.data(), 4, pages.size(), in) + fread(table.data(), 4, table.size(), in);
  std::vector<float> rows((tokens * kCorrected * bytes + 3) / 4), matrix(2 * kMatrixTile * shape.width() * bytes / 4);
  got += fread(rows.data(), 4, rows.size(), in) + fread(matrix.data(), 4, matrix.size(), in);
  if (got != projected.size() + bias.size() + pages.size() + table.size() + rows.size() + matrix.size()) return 3;

  const std::vector<uint32_t> unwritten(blocks * mask_words(size));
  std::vector<float> reads(tokens * shape.width());
  const ScanArgs args = {projected.data(), columns, dtype, bias.data(), {pages.data(), floats, size}, unwritten.data(),
                         reads.data(), tokens};
  const Request request = {table.data(), 0, tokens, 0, INT32_MAX, table[0], 0, table[0], true};
  const Plan plan = {Cut::none, 1, true, &request, 1, nullptr, 0};
  std::vector<float> workspace(workspace_floats(shape, plan, tokens));
  isa_cross::table.page_scan(shape, args, plan, nullptr, workspace.data());
  isa_cross::table.correct({rows.data(), kCorrected, dtype, matrix.data(), kCorrected, reads.data(), shape.width()}, 0, tokens);
  for (const auto* made : {&reads, &pages, &rows}) fwrite(made->data(), 4, made->size(), out);
  return fclose(out);
}
