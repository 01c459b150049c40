// How a step is cut over threads, and in which order its requests run.
#pragma once

#include "delta_rule.h"

namespace deltamem {

// Every index of `args` must have been checked. The plan's order is valid until this thread's next call.
Plan make_plan(const Shape& shape, const ScanArgs& args, int64_t num_blocks, int64_t threads);

}  // namespace deltamem
