#include "delta_rule.h"

namespace deltamem {

namespace isa_portable { extern const Kernels table; }
#ifdef DELTAMEM_X86
namespace isa_avx2 { extern const Kernels table; }
namespace isa_avx512 { extern const Kernels table; }
#endif

static const Kernels& choose() {
#ifdef DELTAMEM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma"))
    return isa_avx512::table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return isa_avx2::table;
#endif
  return isa_portable::table;
}

const Kernels& kernels() {
  static const Kernels& best = choose();
  return best;
}

}  // namespace deltamem
