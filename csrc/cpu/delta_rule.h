// The paged delta rule on a CPU. Raw pointers, sizes and 64-bit offsets only: torch stops at the bindings.
//
// Words and layouts are those of deltamem_vllm/ops/layout.py:
//   state  S[H, r, r], S[value, key]      projected row  q | k | v | beta | lambda (before activation)
//   log row  k | v | beta | lambda        page  base[H, r, r] | log[N, log_columns]
#pragma once

#include <cstdint>

namespace deltamem {

enum class Mode : int64_t { standard = 0, lambda_outside = 1, no_lambda = 2 };
enum class Dtype : int64_t { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

struct Shape {
  int64_t rank, heads;
  bool rankwise, couple, normalize;
  Mode mode;

  int64_t width() const { return rank * heads; }
  int64_t gates() const { return rankwise ? width() : heads; }
  bool has_lambda() const { return !couple && mode != Mode::no_lambda; }
  int64_t gate_columns() const { return has_lambda() ? 2 * gates() : gates(); }
  int64_t projected_columns() const { return 3 * width() + gate_columns(); }
  int64_t log_columns() const { return 2 * width() + gate_columns(); }
  int64_t state_floats() const { return heads * rank * rank; }
};

// Tokens activated at a time; what is made of them stays in the first-level cache. A tile's idle tokens fit 32 bits.
constexpr int64_t kTile = 32;
// Columns of a correction's matrix that lie beside each other; see CorrectionArgs.
constexpr int64_t kMatrixTile = 32;
// Floats that say after how many of its page's tokens a running state is.
constexpr int64_t kStampFloats = 2;
// Floats behind a packed array that a whole register may touch.
constexpr int64_t kPad = 16;

// Scratch floats of one thread: a state, a tile's q and the activation's own.
inline int64_t thread_floats(const Shape& shape) {
  const int64_t tile = shape.width() + 2 * shape.width() + shape.gate_columns() + 2 * shape.heads;
  return (shape.state_floats() + kTile * tile + 4 * kPad + 15) / 16 * 16;
}

// Which tokens of a step belong to which request, and which of them are written.
struct BatchArgs {
  const int32_t* block_table;
  int64_t table_stride;  // int32s from one request's row to the next
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* write_limit;  // by block
  const uint32_t* unwritten;   // [blocks, ceil(N / 32)]; a bit that is set: that token of the block is only read
  int64_t num_reqs;
};

// uint32s of a block's row of `unwritten`.
constexpr int64_t mask_words(int64_t block_size) { return (block_size + 31) / 32; }

// Whether a token of a block is only read.
constexpr bool only_read(const uint32_t* unwritten, int64_t block_size, int64_t block, int64_t slot) {
  return unwritten[block * mask_words(block_size) + slot / 32] >> (slot % 32) & 1;
}

// One request's part of a step, the same in every layer: looked up once. Between two layers a model's weights go through
// the caches, and each of a batch's tables would cost every request a line from memory again.
struct alignas(64) Request {
  const int32_t* blocks;     // its row of the block table
  int64_t token, stop;       // rows token ... stop-1 of projected
  int64_t position, limit;   // position: of the first of them; from the limit on tokens are only read
  int32_t behind, replayed;  // it goes on behind so many tokens of this block; 0: it begins at that block's base
  int32_t first;             // block of its first token
  bool all_written;          // none of its tokens is only read
};

// from ... to-1
struct Range {
  int64_t from, to;
};

// How a step is cut over threads. Every cut gives the same bits.
enum class Cut {
  none,      // one thread
  requests,  // a thread takes a request at a time: none resumes from a page that another one writes in this step
  tokens,    // first all tokens are activated, in pieces, then a thread takes a head of a request at a time
};

struct Plan {
  Cut cut;
  int64_t threads;
  bool independent;         // no request resumes from a page that another one writes in this step
  const Request* requests;  // that have tokens and a memory; if they are not independent: whoever writes a page before who uses it
  int64_t num_requests;
  const Range* idle;  // rows of no such request, whose reads are zero; the last range goes on to the end
  int64_t num_idle;
};

// body(context, slot) for each slot < count, at the same time where that is possible.
using Parallel = void (*)(int64_t count, void (*body)(void* context, int64_t slot), void* context);

struct Pages {
  float* data;
  int64_t stride;      // floats from one page to the next
  int64_t block_size;  // N, tokens per page
  int64_t width = 0;   // floats of a page; those behind its content are ours too

  float* base(int64_t block) const { return data + block * stride; }
  float* log(int64_t block, const Shape& shape, int64_t slot) const {
    return base(block) + shape.state_floats() + slot * shape.log_columns();
  }

  // Where a head's running state is kept, behind the page's content: a stamp of kStampFloats, then [r, r] as the kernels
  // hold it. Null where there is no room.
  float* running(int64_t block, const Shape& shape, int64_t head) const {
    const int64_t content = shape.state_floats() + block_size * shape.log_columns();
    const int64_t each = kStampFloats + shape.rank * shape.rank;
    return width - content < shape.heads * each ? nullptr : base(block) + content + head * each;
  }
};

// One layer of a step.
struct ScanArgs {
  const void* projected;     // [T, projected_columns]
  int64_t projected_stride;  // elements from one token's row to the next
  Dtype dtype;               // of projected
  const float* bias;      // [gate_columns]
  Pages pages;
  const uint32_t* unwritten;  // as in BatchArgs
  float* reads;               // [num_rows, width]
  int64_t num_rows;
};

// Floats of workspace that a step needs; T: its tokens.
inline int64_t workspace_floats(const Shape& shape, const Plan& plan, int64_t tokens) {
  return plan.threads * thread_floats(shape) + (plan.cut == Cut::tokens ? tokens * shape.width() : 0);
}

// Only the activation, for measurements and tests of it alone.
struct ActivateArgs {
  const void* projected;
  int64_t projected_stride;
  Dtype dtype;
  const float* bias;
  int64_t tokens;
  float *q, *log;    // [T, width], [T, log_columns]
  float* workspace;  // thread_floats
};

// A correction of what a linear put out; see correction.h.
struct CorrectionArgs {
  void* rows;           // [T, >= columns], of `dtype`
  int64_t stride;       // elements from one row to the next
  Dtype dtype;          // of rows and matrix
  const void* matrix;   // [ceil(columns / kMatrixTile), width, kMatrixTile]
  int64_t columns;      // to be corrected
  const float* reads;   // [T, width]
  int64_t width;        // of a token's reads
};

struct StateArgs {
  Pages pages;
  const int32_t* block_ids;
  const int32_t* counts;
  int64_t n;
  float* out;        // [n, H, r, r]
  float* workspace;  // thread_floats
};

// One build of the kernels for one instruction set. Every index must have been checked by the caller.
struct Kernels {
  const char* isa;
  void (*page_scan)(const Shape&, const ScanArgs&, const Plan&, Parallel, float* workspace);
  void (*page_state)(const Shape&, const StateArgs&);
  void (*activate)(const Shape&, const ActivateArgs&);
  void (*correct)(const CorrectionArgs&, int64_t token, int64_t stop);  // rows token ... stop-1
};

// The build in use: the best that this CPU can run, unless a test has forced another.
const Kernels& kernels();

// Use the named build from now on; false if this CPU cannot run it or there is none. "" restores the best one.
bool force_isa(const char* isa);

}  // namespace deltamem
