// Adds what the memory reads to what a linear put out, in place: rows[t, c] += sum over j of reads[t, j] * matrix[j, c],
// summed in fp32 and rounded once. A row's bits do not depend on the rows beside it, nor on how many there are.
//
// A row of q is 8 KB for a small model and comes from the second cache or from behind it: what takes the time is that a
// row goes through the core once. The matrix stays in the second cache meanwhile, and each part of it that is loaded
// serves kTogether rows. In a decode step both come from memory, in too many pieces for the CPU to see what is next.
#pragma once

#include "delta_rule.h"
#include "fetch.h"
#include "half.h"

namespace deltamem {
namespace {

constexpr int kParts = 2;       // registers of a row's columns that are summed at a time
constexpr int kTogether = 4;    // rows at a time: their sums and the matrix's parts fit the registers
constexpr int64_t kChunk = 16;  // rows that go through all tiles together
constexpr int64_t kAhead = 2;   // tiles whose lines are asked for before they are needed
static_assert(kChunk % kTogether == 0 && kMatrixTile % (kParts * kLanes) == 0, "whole groups and whole registers");

// Some of a tile's columns of ROWS rows. R: the reads of a token where the compiler knows them, else 0.
template <Dtype D, int R, int ROWS>
inline void correct_columns(int64_t width, const float* reads, const Element<D>* matrix, Element<D>* rows, int64_t stride) {
  const int64_t r = R ? R : width;
  Vec<kLanes> sums[ROWS][kParts];
#pragma GCC unroll 4
  for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 2
    for (int p = 0; p < kParts; p++) sums[t][p] = widened<D>(rows + t * stride + p * kLanes);
  for (int64_t j = 0; j < r; j++) {
    Vec<kLanes> parts[kParts];
#pragma GCC unroll 2
    for (int p = 0; p < kParts; p++) parts[p] = widened<D>(matrix + j * kMatrixTile + p * kLanes);
#pragma GCC unroll 4
    for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; p++) sums[t][p] = fused<kLanes>(spread<kLanes>(reads[t * r + j]), parts[p], sums[t][p]);
  }
#pragma GCC unroll 4
  for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 2
    for (int p = 0; p < kParts; p++) narrow<D>(sums[t][p], rows + t * stride + p * kLanes);
}

// One tile's columns.
template <Dtype D, int R, int ROWS>
inline void correct_tile(int64_t width, const float* reads, const Element<D>* matrix, Element<D>* rows, int64_t stride) {
  for (int c = 0; c < kMatrixTile; c += kParts * kLanes) correct_columns<D, R, ROWS>(width, reads, matrix + c, rows + c, stride);
}

// The columns of a last tile that is not full; the same operations, lane by lane.
template <Dtype D>
inline void correct_rest(int64_t r, int64_t columns, const float* reads, const Element<D>* matrix, Element<D>* row) {
  Element<D> whole[kMatrixTile] = {};
  for (int64_t c = 0; c < columns; c++) whole[c] = row[c];
  correct_tile<D, 0, 1>(r, reads, matrix, whole, 0);
  for (int64_t c = 0; c < columns; c++) row[c] = whole[c];
}

inline bool all_zero(int64_t n, const float* x) {
  for (int64_t i = 0; i < n; i++)
    if (x[i] != 0.0f) return false;
  return true;
}

// At most kChunk rows.
template <Dtype D, int R>
void correct_chunk(const CorrectionArgs& args, int64_t token, int64_t n) {
  const int64_t r = R ? R : args.width, full = args.columns / kMatrixTile, rest = args.columns % kMatrixTile;
  const float* reads = args.reads + token * r;
  Element<D>* rows = static_cast<Element<D>*>(args.rows) + token * args.stride;
  const Element<D>* matrix = static_cast<const Element<D>*>(args.matrix);
  bool idle[kChunk];  // rows of requests without memory, or whose memory is empty
  for (int64_t t = 0; t < n; t++) idle[t] = all_zero(r, reads + t * r);
  for (int64_t tile = 0; tile < full; tile++, matrix += r * kMatrixTile, rows += kMatrixTile) {
    if (tile + kAhead < full) {
      fetch(matrix + kAhead * r * kMatrixTile, r * kMatrixTile * sizeof *matrix);
      for (int64_t t = 0; t < n; t++) fetch(rows + t * args.stride + kAhead * kMatrixTile, kMatrixTile * sizeof *rows);
    }
    for (int64_t t = 0; t < n;) {
      bool together = t + kTogether <= n;
      for (int64_t i = t; together && i < t + kTogether; i++) together = !idle[i];
      if (together) {
        correct_tile<D, R, kTogether>(r, reads + t * r, matrix, rows + t * args.stride, args.stride);
        t += kTogether;
      } else {
        if (!idle[t]) correct_tile<D, R, 1>(r, reads + t * r, matrix, rows + t * args.stride, args.stride);
        t++;
      }
    }
  }
  for (int64_t t = 0; rest && t < n; t++)
    if (!idle[t]) correct_rest<D>(r, rest, reads + t * r, matrix, rows + t * args.stride);
}

template <Dtype D>
void correct_rows(const CorrectionArgs& args, int64_t token, int64_t stop) {
  const auto chunk = args.width == 8 ? correct_chunk<D, 8> : args.width == 16 ? correct_chunk<D, 16> : correct_chunk<D, 0>;
  for (; token < stop; token += kChunk) chunk(args, token, stop - token < kChunk ? stop - token : kChunk);
}

}  // namespace
}  // namespace deltamem
