#include "isa.h"

#include <stdlib.h>
#include <string.h>

#include "rows.h"

namespace ffr {
namespace {

CpuIsa supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Also asks the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return CpuIsa::kAvx512;
  if (avx2) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kDefault;
}

CpuIsa choose_isa() {
  const CpuIsa best = supported_isa();
  const char* wanted = getenv("FFR_EXT_CPU_ISA");
  if (wanted == nullptr) return best;
  if (strcmp(wanted, "default") == 0) return CpuIsa::kDefault;
  if (strcmp(wanted, "avx2") == 0 && best > CpuIsa::kAvx2) return CpuIsa::kAvx2;
  return best;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa chosen = choose_isa();
  return chosen;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return avx512_rows();
  if (cpu_isa() == CpuIsa::kAvx2) return avx2_rows();
#endif
  return default_rows();
}

}  // namespace ffr
