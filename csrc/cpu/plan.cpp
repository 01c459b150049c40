#include "plan.h"

#include <algorithm>
#include <cstdint>

#include "fetch.h"

namespace deltamem {
namespace {

// A step of less work than this stays on one thread, in token steps of one rank-8 head: 10 to 40 ns each, so that some
// 20 us are shared out where waking a thread costs a few.
constexpr int64_t kWorthThreads = 1024;

bool all_written(const BatchArgs& batch, const Request& request, int64_t block_size) {
  const int64_t end = request.position + (request.stop - request.token);
  if (end > request.limit) return false;
  for (int64_t position = request.position; position < end; position++)
    if (only_read(batch.unwritten, block_size, request.blocks[position / block_size], position % block_size)) return false;
  return true;
}

// Floats of pages that are asked for ahead: more lines would push each other out of the first-level cache.
constexpr int64_t kFetched = 8192;

// The requests with tokens and a memory, and the rows of none of them.
void find_requests(const BatchArgs& batch, int64_t block_size, Planned& planned) {
  planned.requests.clear();
  planned.idle.clear();
  int64_t end = 0;  // of the rows that have been seen
  for (int64_t i = 0; i < batch.num_reqs; i++) {
    const int64_t token = batch.query_start_loc[i], stop = batch.query_start_loc[i + 1];
    if (stop <= token) continue;
    const int32_t* blocks = batch.block_table + i * batch.table_stride;
    const int64_t position = batch.seq_lens[i] - (stop - token), last = position - 1;
    Request request = {blocks, token, stop, position, batch.write_limit[blocks[0]], blocks[0], 0, 0, false};
    if (request.limit < 0) continue;
    if (last >= 0) {
      request.behind = blocks[last / block_size];
      request.replayed = static_cast<int32_t>(last % block_size + 1);
    }
    request.first = blocks[position / block_size];
    request.all_written = all_written(batch, request, block_size);
    planned.requests.push_back(request);
    if (end < token) planned.idle.push_back({end, token});
    end = std::max(end, stop);
  }
  planned.idle.push_back({end, INT64_MAX});
}

// Whether a request resumes from a page that another one writes in this step: a prefix-cache hit on a block that is being
// filled, from its first token or from any later one. Hits are whole blocks, so who resumes within a block owns it.
bool shares_pages(const std::vector<Request>& requests, int64_t size, int64_t num_blocks) {
  static thread_local std::vector<uint32_t> written;  // by block: the call that last saw it written
  static thread_local uint32_t call = 0;
  const auto resumes_behind_a_block = [&](const Request& request) { return request.replayed == size; };
  if (requests.size() < 2 || std::none_of(requests.begin(), requests.end(), resumes_behind_a_block)) return false;

  if (static_cast<int64_t>(written.size()) < num_blocks) written.resize(num_blocks, 0);
  if (++call == 0) {  // counted around: no old mark may look new
    std::fill(written.begin(), written.end(), 0);
    call = 1;
  }
  for (const Request& request : requests) {
    const int64_t end = request.position + (request.stop - request.token);
    for (int64_t page = request.position / size; page * size < end; page++) written[request.blocks[page]] = call;
  }
  return std::any_of(requests.begin(), requests.end(), [&](const Request& request) {
    return resumes_behind_a_block(request) && written[request.behind] == call;
  });
}

}  // namespace

void make_plan(const Shape& shape, const Pages& pages, const BatchArgs& batch, int64_t num_blocks, int64_t threads,
               Planned& planned) {
  find_requests(batch, pages.block_size, planned);
  std::vector<Request>& requests = planned.requests;
  const bool independent = !shares_pages(requests, pages.block_size, num_blocks);
  if (!independent)  // a request that hits a page begins behind the start of any that writes it
    std::stable_sort(requests.begin(), requests.end(),
                     [](const Request& a, const Request& b) { return a.position < b.position; });
  Plan& plan = planned.plan;
  plan = {Cut::none, 1, independent, requests.data(), static_cast<int64_t>(requests.size()), planned.idle.data(),
          static_cast<int64_t>(planned.idle.size())};
  if (threads < 2) return;

  int64_t work = 0, longest = 0;
  for (const Request& request : requests) {
    const int64_t tokens = request.stop - request.token;
    work += 2 * tokens + request.replayed;
    longest = std::max(longest, tokens);
  }
  if (work * shape.state_floats() < kWorthThreads * 64) return;
  plan.threads = threads;
  plan.cut = independent && 2 * longest * threads <= work ? Cut::requests : Cut::tokens;
}

void fetch_pages(const Shape& shape, const Pages& pages, const Plan& plan) {
  const int64_t running = shape.heads * (kStampFloats + shape.rank * shape.rank);
  const int64_t requests = std::min(plan.num_requests, kFetched / (running + shape.log_columns()));
  for (int64_t i = 0; i < requests; i++) {
    const Request& request = plan.requests[i];
    if (request.replayed)
      if (const float* kept = pages.running(request.behind, shape, 0)) fetch(kept, running * sizeof(float));
    fetch(pages.log(request.first, shape, request.position % pages.block_size), shape.log_columns() * sizeof(float));
  }
}

}  // namespace deltamem
