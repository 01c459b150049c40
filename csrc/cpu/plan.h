// How a step is cut over threads, and in which order its requests run.
#pragma once

#include <vector>

#include "delta_rule.h"

namespace deltamem {

// A plan, and what it points into.
struct Planned {
  Plan plan;
  std::vector<Request> requests;
  std::vector<Range> idle;
};

// Every index of `batch` must have been checked. The plan is valid until `planned` is used again, and points into the
// block table.
void make_plan(const Shape& shape, const Pages& pages, const BatchArgs& batch, int64_t num_blocks, int64_t threads,
               Planned& planned);

// Ask for what a step's first requests will need of their pages, so that it is on its way while other things are looked at.
void fetch_pages(const Shape& shape, const Pages& pages, const Plan& plan);

}  // namespace deltamem
