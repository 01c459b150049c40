#include "plan.h"

#include <algorithm>
#include <vector>

namespace deltamem {
namespace {

// A step of less work than this stays on one thread, in token steps of one rank-8 head: 10 to 40 ns each, so that some
// 20 us are shared out where waking a thread costs a few.
constexpr int64_t kWorthThreads = 1024;

struct Span {
  int64_t tokens, context, replayed;
};
Span span_of(const ScanArgs& args, int64_t i) {
  const int64_t tokens = std::max(0, args.query_start_loc[i + 1] - args.query_start_loc[i]);
  const int64_t context = args.seq_lens[i] - tokens;
  if (!tokens || args.write_limit[args.block_table[i * args.table_stride]] < 0) return {0, 0, 0};
  return {tokens, context, context ? (context - 1) % args.pages.block_size + 1 : 0};
}

// Whether a request resumes from a page that another one writes in this step: a prefix-cache hit on a block that is being
// filled, from its first token or from any later one. Hits are whole blocks, so who resumes within a block owns it.
bool shares_pages(const ScanArgs& args, int64_t num_blocks) {
  static thread_local std::vector<uint32_t> written;  // by block: the call that last saw it written
  static thread_local uint32_t call = 0;
  const int64_t size = args.pages.block_size;
  const auto resumes_behind_a_block = [&](const Span& span) { return span.tokens && span.context && span.context % size == 0; };
  bool any = false;
  for (int64_t i = 0; i < args.num_reqs && !any; i++) any = resumes_behind_a_block(span_of(args, i));
  if (!any) return false;

  if (static_cast<int64_t>(written.size()) < num_blocks) written.resize(num_blocks, 0);
  if (++call == 0) {  // counted around: no old mark may look new
    std::fill(written.begin(), written.end(), 0);
    call = 1;
  }
  for (int64_t i = 0; i < args.num_reqs; i++) {
    const Span span = span_of(args, i);
    const int32_t* blocks = args.block_table + i * args.table_stride;
    for (int64_t page = span.context / size; page * size < span.context + span.tokens; page++) written[blocks[page]] = call;
  }
  for (int64_t i = 0; i < args.num_reqs; i++) {
    const Span span = span_of(args, i);
    if (!resumes_behind_a_block(span)) continue;
    if (written[args.block_table[i * args.table_stride + span.context / size - 1]] == call) return true;
  }
  return false;
}

}  // namespace

Plan make_plan(const Shape& shape, const ScanArgs& args, int64_t num_blocks, int64_t threads) {
  static thread_local std::vector<int32_t> order;
  if (static_cast<int64_t>(order.size()) < args.num_reqs) order.resize(args.num_reqs);
  for (int64_t i = 0; i < args.num_reqs; i++) order[i] = static_cast<int32_t>(i);
  const bool independent = args.num_reqs < 2 || !shares_pages(args, num_blocks);
  if (!independent)  // a request that hits a page begins behind the start of any that writes it
    std::sort(order.begin(), order.begin() + args.num_reqs, [&](int32_t a, int32_t b) {
      const int64_t first = span_of(args, a).context, second = span_of(args, b).context;
      return first < second || (first == second && a < b);
    });
  Plan plan = {Cut::none, 1, independent, order.data()};
  if (threads < 2) return plan;

  int64_t work = 0, longest = 0;
  for (int64_t i = 0; i < args.num_reqs; i++) {
    const Span span = span_of(args, i);
    work += 2 * span.tokens + span.replayed;
    longest = std::max(longest, span.tokens);
  }
  if (work * shape.state_floats() < kWorthThreads * 64) return plan;
  plan.threads = threads;
  plan.cut = independent && 2 * longest * threads <= work ? Cut::requests : Cut::tokens;
  return plan;
}

}  // namespace deltamem
