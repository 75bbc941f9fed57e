// Norms and gathering of whole filters on the CPU: torch-free entry points. Nothing is checked here.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "parallel.h"

namespace ffr {

// A dense tensor seen from one of its dimensions: storage is [outer][dim][inner] for any order of strides.
struct DimSplit {
  int64_t outer;
  int64_t dim;
  int64_t inner;
};

// Splits a dense tensor (contiguous, channels_last or any permutation without gaps or overlaps) at dimension
// `dim`. False when the strides are not dense: make a contiguous copy first.
bool split_at_dim(const int64_t* sizes, const int64_t* strides, int64_t rank, int64_t dim, DimSplit* split);

struct NormTensor {
  DType dtype;
  DimSplit split;
  const void* data;
};

// p is 1, 2 or infinity. norms[i]: the split.dim entries of tensor i, accumulated in fp64. NaN gives NaN for
// every p; a filter without elements has norm 0.
void filter_norms(const NormTensor* tensors, int64_t num_tensors, double p, double* const* norms,
                  ParallelFor parallel_for);

struct GatherTensor {
  int64_t element_size;  // bytes: any
  DimSplit split;        // of the source
  const void* source;
  const int64_t* keep;  // num_keep indices into split.dim, in range (checked by the caller), any order
  int64_t num_keep;
  void* target;  // dense, [outer][num_keep][inner], in the source's order of strides
};

// target = source.index_select(dim, keep) for every tensor, in one parallel loop.
void compact_filters(const GatherTensor* tensors, int64_t num_tensors, ParallelFor parallel_for);

}  // namespace ffr
