// Rows and columns of weights on NVIDIA GPUs: torch-free entry points, under the rules of flow.h.
#pragma once

#include "../cpu/groups.h"

namespace ffr::cuda {

// Doubles of scratch that row_column_norms needs.
int64_t row_column_norms_scratch(const PairNormTensor* tensors, int64_t num_tensors);

// As their namesakes in ffr, with device pointers, on `stream`.
int row_column_norms(const PairNormTensor* tensors, int64_t num_tensors, double p, double* scratch,
                     void* stream);
int add_scaled(const ScaledTensor* tensors, int64_t num_tensors, void* stream);
int shrink(const ScaledTensor* tensors, int64_t num_tensors, void* stream);

}  // namespace ffr::cuda
