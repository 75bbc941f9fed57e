// Row kernels: the innermost loops, over one tile of one feature or over one run of a filter. Compiled once
// for each instruction set: default.cpp, avx2.cpp and avx512.cpp include the same text, in
// six parts,
//   block.inc           a block of elements in vector registers
//   block_portable.inc  packing, unpacking and conversion that the AVX files replace in part by their own
//   norms.inc           norms of filters
//   pairs.inc           rows and columns of weights
//   passes.inc          forward and backward pass
//   table.inc           the table of these
// inside an unnamed namespace, under the file's target attributes. Every instruction set gives bit-identical
// results, because the order of additions is fixed and no multiply-add is contracted.
#pragma once

#include <stdint.h>

#include "../../common/dtype.h"
#include "../../common/flow_math.h"
#include "isa.h"

namespace ffr {

// Bytes of one feature in a tile of the forward and of the backward pass. Three features' tiles are read at
// once in the forward pass: 24 KiB, which fit an L1 cache of 32 KiB. The backward pass writes long runs
// instead (docs/log/cpu-kernels.md).
constexpr int64_t kForwardTileBytes = 8192;
constexpr int64_t kMostBackwardTileBytes = 131072;
// Elements handled per step; rows start on multiples of it within a group, and only a group's last row may
// end off it.
constexpr int64_t kBlockBytes = 128;

// d = x1 - x0 and c = (x2 - x1) - d, `count` elements: adds sum phi(d) to sums[0] and sum phi(c) to sums[1].
// x2 may be null: no c. `signs`: where the codes of d and c go (signs kernel only). `ahead`: address to
// prefetch while walking (the same elements of the feature that is needed next), or null.
using ForwardRow = void (*)(const void* x0, const void* x1, const void* x2, int64_t count, uint8_t* signs,
                            const void* ahead, double* sums);

// grad = the gradient of feature l from the planes of l-2, l-1 and l. Coefficients of planes that do not
// exist are zero; the pointers must be readable all the same.
using BackwardSignsRow = void (*)(const uint8_t* plane_prev2, const uint8_t* plane_prev, const uint8_t* plane,
                                  const GradientCoef& coef, int64_t count, void* grad);

// grad = the gradient of feature l for sums of squares; x = features l-2 .. l+2, null where there is none.
using BackwardSquaredRow = void (*)(const void* const x[5], const GradientCoef& coef, int64_t count,
                                    void* grad, const void* ahead);

enum class Norm { kL1 = 0, kL2 = 1, kInf = 2 };
constexpr int kNumNorms = 3;

// sum |x|, sum x^2 or max |x| of `count` elements side by side, in fp64; NaN gives NaN.
using NormOfRun = double (*)(const void* x, int64_t count);

inline Norm norm_of(double p) { return p == 1.0 ? Norm::kL1 : p == 2.0 ? Norm::kL2 : Norm::kInf; }

// A NaN gets into the maximum by the second test, and stays since nothing is greater than it.
inline double combine(Norm norm, double a, double b) {
  if (norm != Norm::kInf) return a + b;
  return (b > a || b != b) ? b : a;
}

// The same element by element: columns[i] takes x[i] in. There is room for a multiple of 32 columns.
using AddNormColumns = void (*)(const void* x, int64_t count, double* columns);

// Both in one pass.
using AddNorms = double (*)(const void* x, int64_t count, double* columns);

// `count` elements of grad += weight * (factor + factors + slope [|weight| <= tau]), and of weight *= factor
// * factors, then 0 where |weight| <= tau. Factors are fp32, of fp64 weights fp64.
using AddScaledRun = void (*)(void* grad, const void* weight, const void* factors, double factor,
                              int64_t count, double slope, double tau);
using ShrinkRun = void (*)(void* weight, const void* factors, double factor, int64_t count, double tau);

// How a gradient gets to memory: over what is there, added to it, or over it and past the cache (float16 and
// gradients that do not lie on whole vectors are stored instead).
enum class Write { kStore = 0, kAdd = 1, kStream = 2 };
constexpr int kNumWrites = 3;

// Indexed by DType, and then by Write or Norm.
struct RowKernels {
  ForwardRow forward_abs[kNumDTypes];
  ForwardRow forward_signs[kNumDTypes];
  ForwardRow forward_squared[kNumDTypes];
  BackwardSignsRow backward_signs[kNumDTypes][kNumWrites];
  BackwardSquaredRow backward_squared[kNumDTypes][kNumWrites];
  NormOfRun norm_of_run[kNumDTypes][kNumNorms];
  AddNormColumns add_norm_columns[kNumDTypes][kNumNorms];
  AddNorms add_norms[kNumDTypes][kNumNorms];
  AddScaledRun add_scaled[kNumDTypes];
  ShrinkRun shrink[kNumDTypes];
};

const RowKernels& default_rows();
#if defined(__x86_64__)
const RowKernels& avx2_rows();
const RowKernels& avx512_rows();
#endif

// The kernels of cpu_isa().
const RowKernels& row_kernels();

}  // namespace ffr
