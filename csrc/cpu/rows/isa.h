// Which instruction set the CPU kernels use: chosen once, at the first call, from what the processor has. The
// environment variable FFR_EXT_CPU_ISA=default|avx2|avx512 lowers the choice (never raises it).
#pragma once

namespace ffr {

enum class CpuIsa { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

CpuIsa cpu_isa();

// "default" (SSE2 on x86-64, NEON on aarch64), "avx2" or "avx512".
const char* cpu_isa_name();

}  // namespace ffr
