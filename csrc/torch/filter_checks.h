// The arguments of filter_norms and compact_filters, checked and taken apart for the kernels (see checks.h).
#pragma once

#include <cmath>

#include "../cpu/filters.h"
#include "checks.h"

namespace ffr {

// Splits a tensor at `dim`, or refuses it: no such dimension, or gaps or overlaps in its storage.
inline DimSplit check_split(const Name& name, const Tensor& t, const Name& dim_name, int64_t dim) {
  STD_TORCH_CHECK(dim >= 0 && dim < t.dim(), dim_name, " must be in [0, ", t.dim(), ") for ", name,
                  " of sizes ", show(t.sizes()), ", got ", dim);
  DimSplit split;
  STD_TORCH_CHECK(split_at_dim(t.sizes().data(), t.strides().data(), t.dim(), dim, &split), name,
                  " must be dense (no gaps, no overlaps), got sizes ", show(t.sizes()), " and strides ",
                  show(t.strides()));
  return split;
}

inline std::vector<NormTensor> check_filter_norms(const std::vector<Tensor>& weights,
                                                  const std::vector<int64_t>& dims, double p,
                                                  const Tensor& out) {
  STD_TORCH_CHECK(p == 1.0 || p == 2.0 || (std::isinf(p) && p > 0), "p must be 1, 2 or inf, got ", p);
  STD_TORCH_CHECK(dims.size() == weights.size(), "dims must have one entry for each of the ", weights.size(),
                  " weights, got ", dims.size());
  std::vector<NormTensor> tensors;
  int64_t filters = 0;
  for (int64_t i = 0; i < size_of(weights); ++i) {
    const Name name{"weights", i};
    const Tensor& weight = weights[i];
    check_device(name, weight, {"out"}, out);
    const DType dtype = check_dtype(name, weight);
    const DimSplit split = check_split(name, weight, {"dims", i}, dims[i]);
    tensors.push_back({dtype, split, weight.const_data_ptr()});
    filters += split.dim;
  }
  check_vector({"out"}, out, ScalarType::Double, filters);
  return tensors;
}

// keep's values are not looked at: on CUDA that would wait for the device.
inline std::vector<GatherTensor> check_compact_filters(const std::vector<Tensor>& tensors,
                                                       const std::vector<Tensor>& keep,
                                                       const std::vector<int64_t>& dims,
                                                       const std::vector<Tensor>& outs) {
  const auto one_each = [&](const char* list, size_t size) {
    STD_TORCH_CHECK(size == tensors.size(), list, " must have one entry for each of the ", tensors.size(),
                    " tensors, got ", size);
  };
  one_each("keep", keep.size());
  one_each("dims", dims.size());
  one_each("outs", outs.size());
  std::vector<GatherTensor> gathers;
  for (int64_t i = 0; i < size_of(tensors); ++i) {
    const Tensor &source = tensors[i], &out = outs[i];
    check_device({"tensors", i}, source, {"tensors", 0}, tensors[0]);
    check_device({"keep", i}, keep[i], {"tensors", 0}, tensors[0]);
    check_device({"outs", i}, out, {"tensors", 0}, tensors[0]);
    check_vector({"keep", i}, keep[i], ScalarType::Long, keep[i].numel());
    STD_TORCH_CHECK(out.scalar_type() == source.scalar_type(), Name{"outs", i}, " must have the dtype of ",
                    Name{"tensors", i}, ", ", torch::headeronly::toString(source.scalar_type()), "; got ",
                    torch::headeronly::toString(out.scalar_type()));
    const int64_t dim = dims[i];
    const DimSplit split = check_split({"tensors", i}, source, {"dims", i}, dim);

    // outs[i] = source.index_select(dim, keep[i]) with the source's order of strides: what lies outside of
    // `dim` moves together or apart, what lies inside stays, and `dim` itself steps over the inside.
    const auto sizes = source.sizes(), strides = source.strides();
    std::vector<int64_t> want_sizes(sizes.data(), sizes.data() + sizes.size()), want_strides(sizes.size());
    want_sizes[dim] = keep[i].numel();
    bool fits = out.dim() == source.dim();
    for (int64_t d = 0; d < source.dim(); ++d) {
      // split.dim is 0 only in a tensor without elements, whose strides say nothing.
      const bool outside = d != dim && split.dim > 0 && strides[d] >= split.inner * split.dim;
      want_strides[d] = d == dim  ? split.inner
                        : outside ? strides[d] / split.dim * want_sizes[dim]
                                  : strides[d];
      fits = fits && out.size(d) == want_sizes[d] &&
             (want_sizes[d] <= 1 || out.numel() == 0 || out.stride(d) == want_strides[d]);
    }
    STD_TORCH_CHECK(fits, Name{"outs", i}, " must have sizes ", show(want_sizes), " and strides ",
                    show(want_strides), "; got ", show(out.sizes()), " and ", show(out.strides()));
    gathers.push_back({static_cast<int64_t>(source.element_size()), split, source.const_data_ptr(),
                       static_cast<const int64_t*>(keep[i].const_data_ptr()), keep[i].numel(),
                       out.mutable_data_ptr()});
  }
  return gathers;
}

}  // namespace ffr
