// How a tensor of shape (O, I, ...) is seen from its rows (slices of dimension 0) and its columns (slices of
// dimension 1) at once, by the CPU and the CUDA kernels.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "hd.h"

namespace ffr {

// Storage is [outer][first][middle][second][inner] for any order of strides without gaps. `rows_first`:
// `first` is dimension 0 and `second` dimension 1; else the other way round. A dimension that is not there
// has size 1.
struct PairSplit {
  int64_t outer, first, middle, second, inner;
  bool rows_first;
};

// The storage as a matrix: runs of elements side by side, each in one slice of `first`.
FFR_HD int64_t num_runs(const PairSplit& s) { return s.outer * s.first * s.middle; }
FFR_HD int64_t run_length(const PairSplit& s) { return s.second * s.inner; }
FFR_HD int64_t numel(const PairSplit& s) { return num_runs(s) * run_length(s); }
FFR_HD int64_t num_rows(const PairSplit& s) { return s.rows_first ? s.first : s.second; }
FFR_HD int64_t num_columns(const PairSplit& s) { return s.rows_first ? s.second : s.first; }

// A weight, and a factor for each of its rows and columns in Compute<T> of its dtype; null where there are
// none.
struct ScaledTensor {
  DType dtype;
  PairSplit split;
  void* weight;
  void* grad;  // of the same layout; null for shrink
  const void* rows;
  const void* columns;
  double slope;
  double tau;
};

FFR_HD const void* first_factors(const ScaledTensor& t) { return t.split.rows_first ? t.rows : t.columns; }
FFR_HD const void* second_factors(const ScaledTensor& t) { return t.split.rows_first ? t.columns : t.rows; }

}  // namespace ffr
