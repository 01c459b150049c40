#include "delta_rule.h"

#include <atomic>
#include <cstring>

namespace deltamem {

namespace isa_portable { extern const Kernels table; }
#ifdef DELTAMEM_X86
namespace isa_avx2 { extern const Kernels table; }
namespace isa_avx512 { extern const Kernels table; }
#endif

namespace {

// The best build that this CPU can run, or the named one, or null.
const Kernels* find(const char* isa) {
  const auto wanted = [isa](const Kernels& table) { return !*isa || !strcmp(isa, table.isa); };
#ifdef DELTAMEM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (avx512 && wanted(isa_avx512::table)) return &isa_avx512::table;
  if (avx2 && wanted(isa_avx2::table)) return &isa_avx2::table;
#endif
  return wanted(isa_portable::table) ? &isa_portable::table : nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{find("")};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool force_isa(const char* isa) {
  const Kernels* table = find(isa);
  if (table) current() = table;
  return table != nullptr;
}

}  // namespace deltamem
