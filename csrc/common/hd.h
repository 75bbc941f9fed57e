// FFR_HD marks a function that g++ and nvcc both compile: `__host__` alone does not exist for g++, and
// torch's C10_HOST_DEVICE would drag a torch header into the .cu files.
#pragma once

#if defined(__CUDACC__)
#define FFR_HD __host__ __device__ __forceinline__
#else
#define FFR_HD inline __attribute__((always_inline))
#endif
