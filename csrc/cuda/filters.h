// Norms and gathering of whole filters on NVIDIA GPUs: torch-free entry points, under the rules of flow.h.
#pragma once

#include "../cpu/filters.h"

namespace ffr::cuda {

// As ffr::filter_norms and ffr::compact_filters, with device pointers, on `stream`. An index of `keep` that
// is out of range stops the kernel with an error, like torch's own indexing.
int filter_norms(const NormTensor* tensors, int64_t num_tensors, double p, double* const* norms,
                 void* stream);
int compact_filters(const GatherTensor* tensors, int64_t num_tensors, void* stream);

}  // namespace ffr::cuda
