// Rows and columns of weights on the CPU: torch-free entry points. Nothing is checked here.
#pragma once

#include "../common/groups.h"
#include "parallel.h"

namespace ffr {

// Splits a dense tensor at dimensions 0 and 1 (a 1-D tensor has one column). False when the strides are not
// dense.
bool split_at_rows_and_columns(const int64_t* sizes, const int64_t* strides, int64_t rank, PairSplit* split);

struct PairNormTensor {
  DType dtype;
  PairSplit split;
  const void* data;
  double* rows;
  double* columns;
};

// The p-norms (1, 2 or infinity) of all rows and columns, each tensor read once, accumulated in fp64. NaN
// gives NaN.
void row_column_norms(const PairNormTensor* tensors, int64_t num_tensors, double p, ParallelFor parallel_for);

// G += W * (r + q + slope [|W| <= tau]), and W *= r * q, 0 where |W| <= tau, of every tensor in one parallel
// loop.
void add_scaled(const ScaledTensor* tensors, int64_t num_tensors, ParallelFor parallel_for);
void shrink(const ScaledTensor* tensors, int64_t num_tensors, ParallelFor parallel_for);

}  // namespace ffr
