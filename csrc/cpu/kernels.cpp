// The kernels, compiled once per instruction set (DELTAMEM_ISA names the namespace; see csrc/CMakeLists.txt).
//
// No function here may be shared between builds: everything but the table is local, and no standard container is used,
// because the linker would keep one copy of a shared inline function and run AVX-512 code on a CPU without it.
#include "activation.h"
#include "correction.h"
#include "delta_rule.h"
#include "spans.h"

namespace deltamem {
namespace DELTAMEM_ISA {
namespace {

// base [value, key] <-> state [key, value] of one head
void transpose(int64_t r, const float* from, float* to) {
  for (int64_t i = 0; i < r; i++)
    for (int64_t j = 0; j < r; j++) to[i * r + j] = from[j * r + i];
}

// What every thread of a step shares.
struct Step {
  const Shape& shape;
  const ScanArgs& args;
  const Plan& plan;
  float* workspace;
  Span span;
  Activate activate;
  int64_t taken;  // pieces of work that threads have taken so far

  int64_t take() { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); }
  float* scratch(int64_t slot) const { return workspace + slot * thread_floats(shape); }
  float* all_q() const { return scratch(plan.threads); }
};

// The running state of an open page: the state after its last token, beside the content from which it can be replayed,
// so that a decode step does not replay up to N tokens. It is never needed for a right answer, and never outlives what
// it was made from: whoever writes a page takes its stamp away first, and stamps it again where a step ends in it.
struct Stamp {
  uint32_t mark, tokens;
};
static_assert(sizeof(Stamp) == kStampFloats * sizeof(float), "a stamp fills its floats");
constexpr uint32_t kMark = 0x7fa3d317;  // as a float a signalling NaN, which no arithmetic leaves in a page

// Copies the state after `tokens` tokens of a page, if that is what is kept there. Only of a page that is not full: such
// a page is one request's own.
bool find_running(const Step& step, int64_t block, int64_t tokens, int64_t head, float* state) {
  const float* kept = step.args.pages.running(block, step.shape, head);
  Stamp stamp;
  if (!kept || tokens >= step.args.pages.block_size) return false;
  memcpy(&stamp, kept, sizeof stamp);
  if (stamp.mark != kMark || stamp.tokens != tokens) return false;
  memcpy(state, kept + kStampFloats, step.shape.rank * step.shape.rank * sizeof(float));
  return true;
}

void forget_running(const Step& step, int64_t block, int64_t head) {
  if (float* kept = step.args.pages.running(block, step.shape, head)) memset(kept, 0, sizeof(Stamp));
}

// The block of a page of a request, without its row of the block table where that is known.
int64_t block_of(const Request& request, int64_t page, int64_t size) {
  return page == request.position / size ? request.first : request.blocks[page];
}

// Keep the state after a request's last token of this step.
void keep_running(const Step& step, const Request& request, int64_t head, const float* state) {
  const int64_t size = step.args.pages.block_size, last = request.position + (request.stop - request.token) - 1;
  float* kept = step.args.pages.running(block_of(request, last / size, size), step.shape, head);
  if (!kept || last % size + 1 == size) return;
  const Stamp stamp = {kMark, static_cast<uint32_t>(last % size + 1)};
  memcpy(kept, &stamp, sizeof stamp);
  memcpy(kept + kStampFloats, state, step.shape.rank * step.shape.rank * sizeof(float));
}

// Bring one head's `state` (transposed) to where a request's first token of this step finds it.
void resume(const Step& step, const Request& request, int64_t head, float* state) {
  const Pages& pages = step.args.pages;
  const int64_t r = step.shape.rank;
  if (request.replayed && find_running(step, request.behind, request.replayed, head, state)) return;
  transpose(r, pages.base(request.behind) + head * r * r, state);
  if (request.replayed) step.span(step.shape, head, request.replayed, nullptr, pages.log(request.behind, step.shape, 0), nullptr, state);
}

// The tokens of a request from `token` on that share a block, at most `most`.
struct Run {
  int64_t block, slot, n;
};
Run run_at(const Step& step, const Request& request, int64_t token, int64_t most) {
  const int64_t size = step.args.pages.block_size, position = request.position + (token - request.token);
  const int64_t slot = position % size, left = size - slot;
  return {block_of(request, position / size, size), slot, most < left ? most : left};
}

void activate_run(const Step& step, const Request& request, int64_t token, const Run& run, float* q, float* scratch) {
  const ScanArgs& args = step.args;
  const int64_t position = request.position + (token - request.token);
  uint32_t idle = 0;
  for (int64_t t = 0; t < run.n && !request.all_written; t++) {
    const bool read = only_read(args.unwritten, args.pages.block_size, run.block, run.slot + t);
    idle |= static_cast<uint32_t>(read || position + t >= request.limit) << t;
  }
  const void* rows = static_cast<const char*>(args.projected) + token * args.projected_stride * bytes_of(args.dtype);
  const Tile tile = {rows, args.projected_stride, args.dtype, args.bias, idle, run.n};
  step.activate(step.shape, tile, q, args.pages.log(run.block, step.shape, run.slot), scratch);
}

// One head's read and write of a run that has been activated; a page that begins keeps the state before it.
void scan_run(const Step& step, const Request& request, int64_t token, const Run& run, int64_t head, const float* q, float* state) {
  const Pages& pages = step.args.pages;
  const int64_t r = step.shape.rank;
  if (run.slot == 0 || token == request.token) forget_running(step, run.block, head);
  if (run.slot == 0 && (token > request.token || request.position > 0)) transpose(r, state, pages.base(run.block) + head * r * r);
  float* reads = step.args.reads + token * step.shape.width();
  step.span(step.shape, head, run.n, q, pages.log(run.block, step.shape, run.slot), reads, state);
}

// A whole request on one thread, tile by tile.
void whole_request(const Step& step, const Request& request, float* scratch) {
  const int64_t heads = step.shape.heads, square = step.shape.rank * step.shape.rank;
  float *state = scratch, *q = state + step.shape.state_floats(), *own = q + kTile * step.shape.width();
  for (int64_t head = 0; head < heads; head++) resume(step, request, head, state + head * square);
  for (int64_t token = request.token; token < request.stop;) {
    const int64_t left = request.stop - token;
    const Run run = run_at(step, request, token, left < kTile ? left : kTile);
    activate_run(step, request, token, run, q, own);
    for (int64_t head = 0; head < heads; head++) scan_run(step, request, token, run, head, q, state + head * square);
    token += run.n;
  }
  for (int64_t head = 0; head < heads; head++) keep_running(step, request, head, state + head * square);
}

void requests_of_a_thread(void* context, int64_t slot) {
  Step& step = *static_cast<Step*>(context);
  for (int64_t next; (next = step.take()) < step.plan.num_requests;)
    whole_request(step, step.plan.requests[next], step.scratch(slot));
}

// Tokens that a thread activates at a time.
constexpr int64_t kPiece = 4 * kTile;

void activations_of_a_thread(void* context, int64_t slot) {
  Step& step = *static_cast<Step*>(context);
  float* own = step.scratch(slot) + step.shape.state_floats() + kTile * step.shape.width();
  int64_t wanted = step.take(), first = 0;  // the first piece of request i
  for (int64_t i = 0; i < step.plan.num_requests; i++) {
    const Request& request = step.plan.requests[i];
    const int64_t pieces = (request.stop - request.token + kPiece - 1) / kPiece;
    for (; wanted < first + pieces; wanted = step.take()) {
      int64_t token = request.token + (wanted - first) * kPiece;
      const int64_t stop = token + kPiece < request.stop ? token + kPiece : request.stop;
      while (token < stop) {
        const Run run = run_at(step, request, token, stop - token < kTile ? stop - token : kTile);
        activate_run(step, request, token, run, step.all_q() + token * step.shape.width(), own);
        token += run.n;
      }
    }
    first += pieces;
  }
}

void scan_head(const Step& step, const Request& request, int64_t head, float* state) {
  resume(step, request, head, state);
  for (int64_t token = request.token; token < request.stop;) {
    const Run run = run_at(step, request, token, request.stop - token);
    scan_run(step, request, token, run, head, step.all_q() + token * step.shape.width(), state);
    token += run.n;
  }
  keep_running(step, request, head, state);
}

void heads_of_a_thread(void* context, int64_t slot) {
  Step& step = *static_cast<Step*>(context);
  const int64_t heads = step.shape.heads, requests = step.plan.num_requests;
  const int64_t together = step.plan.independent ? 1 : requests;  // requests that one thread must take in their order
  for (int64_t next; (next = step.take()) < heads * requests / together;)
    for (int64_t i = 0; i < together; i++)
      scan_head(step, step.plan.requests[next / heads * together + i], next % heads, step.scratch(slot));
}

// Zero the reads of rows that belong to no request with memory; a request's own rows are all overwritten.
void clear_reads(const Shape& shape, const ScanArgs& args, const Plan& plan) {
  const int64_t width = shape.width();
  for (int64_t i = 0; i < plan.num_idle; i++) {
    const auto [from, to] = plan.idle[i];
    const int64_t stop = to < args.num_rows ? to : args.num_rows;
    if (from < stop) memset(args.reads + from * width, 0, (stop - from) * width * sizeof(float));
  }
}

void page_scan(const Shape& shape, const ScanArgs& args, const Plan& plan, Parallel parallel, float* workspace) {
  Step step = {shape, args, plan, workspace, span_for(shape), activate_for(shape), 0};
  clear_reads(shape, args, plan);
  if (plan.cut == Cut::none) {
    requests_of_a_thread(&step, 0);
  } else if (plan.cut == Cut::requests) {
    parallel(plan.threads, requests_of_a_thread, &step);
  } else {
    parallel(plan.threads, activations_of_a_thread, &step);
    step.taken = 0;
    parallel(plan.threads, heads_of_a_thread, &step);
  }
}

void page_state(const Shape& shape, const StateArgs& args) {
  const Span span = span_for(shape);
  const int64_t r = shape.rank;
  float* state = args.workspace;
  for (int64_t i = 0; i < args.n; i++)
    for (int64_t head = 0; head < shape.heads; head++) {
      transpose(r, args.pages.base(args.block_ids[i]) + head * r * r, state);
      span(shape, head, args.counts[i], nullptr, args.pages.log(args.block_ids[i], shape, 0), nullptr, state);
      transpose(r, state, args.out + i * shape.state_floats() + head * r * r);
    }
}

void activate_all(const Shape& shape, const ActivateArgs& args) {
  const Activate function = activate_for(shape);
  for (int64_t token = 0; token < args.tokens; token += kTile) {
    const int64_t n = args.tokens - token < kTile ? args.tokens - token : kTile;
    const void* rows = static_cast<const char*>(args.projected) + token * args.projected_stride * bytes_of(args.dtype);
    const Tile tile = {rows, args.projected_stride, args.dtype, args.bias, 0, n};
    function(shape, tile, args.q + token * shape.width(), args.log + token * shape.log_columns(), args.workspace);
  }
}

void correct(const CorrectionArgs& args, int64_t token, int64_t stop) {
  switch (args.dtype) {
    case Dtype::f32: return correct_rows<Dtype::f32>(args, token, stop);
    case Dtype::bf16: return correct_rows<Dtype::bf16>(args, token, stop);
    case Dtype::f16: return correct_rows<Dtype::f16>(args, token, stop);
  }
}

}  // namespace

#define DELTAMEM_STRING_(x) #x
#define DELTAMEM_STRING(x) DELTAMEM_STRING_(x)
extern const Kernels table;
const Kernels table = {DELTAMEM_STRING(DELTAMEM_ISA) + 4 /* drops "isa_" */, page_scan, page_state, activate_all,
                      correct};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
