// What the kernels ask of the hardware by name, and how they are launched. Each function has a second body in
// plain C++: tests/support/cuda_on_cpu compiles the kernels with the host's compiler and runs them without a
// GPU.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FFR_LAUNCH(kernel, blocks, threads, shared_bytes, stream, args) \
  kernel<<<blocks, threads, shared_bytes, stream>>>(args)
#define FFR_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#include "cuda_on_cpu.h"
#endif

namespace ffr::cuda {

// Two 16-bit elements, the first in the low half of the word.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
#if defined(__CUDACC__)
  uint32_t pair;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  return from_compute<T>(first).bits | static_cast<uint32_t>(from_compute<T>(second).bits) << 16;
#endif
}

template <typename T>
__device__ __forceinline__ void widen_pair(uint32_t pair, float& first, float& second) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xffff0000u);
  } else {
    // The hardware's conversion: the portable one takes ten instructions.
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(first), "=f"(second)
        : "r"(pair));
  }
#else
  first = to_compute(T{static_cast<uint16_t>(pair)});
  second = to_compute(T{static_cast<uint16_t>(pair >> 16)});
#endif
}

// 0xffff in each half where a > b; never for NaN. For BFloat16 from sm_90 on.
template <typename T>
__device__ __forceinline__ uint32_t greater_pair(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t mask;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
  } else {
    asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
  }
  return mask;
#else
  float a_first, a_second, b_first, b_second;
  widen_pair<T>(a, a_first, a_second);
  widen_pair<T>(b, b_first, b_second);
  return (a_first > b_first ? 0xffffu : 0u) | (a_second > b_second ? 0xffff0000u : 0u);
#endif
}

// The value, which the compiler computes where this stands. It moves arithmetic that only conditional loads
// need to each of them: 15 instructions a load in the forward kernels, for a product of 64 bits.
__device__ __forceinline__ int64_t computed_here(int64_t value) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(value));
#endif
  return value;
}

// 16 bytes with one access. An assignment of a uint4 becomes four stores where the compiler has taken it
// apart.
__device__ __forceinline__ void store_16_bytes(void* to, const uint4& value) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#else
  memcpy(to, &value, sizeof(value));
#endif
}

}  // namespace ffr::cuda
