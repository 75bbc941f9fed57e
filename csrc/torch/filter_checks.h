// The arguments of filter_norms and compact_filters, checked and taken apart for the kernels (see checks.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "../cpu/filters.h"
#include "../cpu/groups.h"
#include "checks.h"

namespace ffr {

inline void check_dim(const Name& name, const Tensor& t, const Name& dim_name, int64_t dim) {
  STD_TORCH_CHECK(dim >= 0 && dim < t.dim(), dim_name, " must be in [0, ", t.dim(), ") for ", name,
                  " of sizes ", show(t.sizes()), ", got ", dim);
}

// Splits a tensor at `dim`, or refuses it: no such dimension, or gaps or overlaps in its storage.
inline DimSplit check_split(const Name& name, const Tensor& t, const Name& dim_name, int64_t dim) {
  check_dim(name, t, dim_name, dim);
  DimSplit split;
  STD_TORCH_CHECK(split_at_dim(t.sizes().data(), t.strides().data(), t.dim(), dim, &split), name,
                  " must be dense (no gaps, no overlaps), got sizes ", show(t.sizes()), " and strides ",
                  show(t.strides()));
  return split;
}

inline PairSplit check_pair_split(const Name& name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() > 0, name, " must have at least 1 dimension");
  PairSplit split;
  STD_TORCH_CHECK(split_at_rows_and_columns(t.sizes().data(), t.strides().data(), t.dim(), &split), name,
                  " must be dense (no gaps, no overlaps), got sizes ", show(t.sizes()), " and strides ",
                  show(t.strides()));
  return split;
}

// The weights whose filters are the slices of one dimension, and those that want rows and columns.
struct Norms {
  std::vector<NormTensor> one;
  std::vector<double*> outs;  // of each of `one`
  std::vector<PairNormTensor> both;
};

// dims[i] = -1: the norms of the slices of dimension 0, then those of dimension 1.
inline Norms check_filter_norms(const std::vector<Tensor>& weights, const std::vector<int64_t>& dims,
                                double p, const Tensor& out) {
  STD_TORCH_CHECK(p == 1.0 || p == 2.0 || (std::isinf(p) && p > 0), "p must be 1, 2 or inf, got ", p);
  STD_TORCH_CHECK(dims.size() == weights.size(), "dims must have one entry for each of the ", weights.size(),
                  " weights, got ", dims.size());
  check_vector({"out"}, out, ScalarType::Double, out.numel());
  Norms norms;
  double* to = static_cast<double*>(out.mutable_data_ptr());
  int64_t filters = 0;
  for (int64_t i = 0; i < size_of(weights); ++i) {
    const Name name{"weights", i};
    const Tensor& weight = weights[i];
    check_device(name, weight, {"out"}, out);
    const DType dtype = check_dtype(name, weight);
    if (dims[i] == -1) {
      STD_TORCH_CHECK(weight.dim() > 1, name, " must have 2 dimensions or more for dims[", i,
                      "] = -1, got sizes ", show(weight.sizes()));
      const PairSplit split = check_pair_split(name, weight);
      norms.both.push_back(
          {dtype, split, weight.const_data_ptr(), to + filters, to + filters + weight.size(0)});
      filters += weight.size(0) + weight.size(1);
    } else {
      const DimSplit split = check_split(name, weight, {"dims", i}, dims[i]);
      norms.one.push_back({dtype, split, weight.const_data_ptr()});
      norms.outs.push_back(to + filters);
      filters += split.dim;
    }
  }
  check_vector({"out"}, out, ScalarType::Double, filters);
  return norms;
}

// What is left of a tensor when `kept` slices of dimension `dim` stay: its dimensions in the same order in
// memory, without gaps. Dimensions whose strides tie keep their order, so that a [8, 4, 1, 1] weight in
// channels_last, with strides (4, 1, 4, 4), stays in channels_last.
struct KeptLayout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};
inline KeptLayout kept_layout(const Tensor& source, int64_t dim, int64_t kept) {
  const auto sizes = source.sizes(), strides = source.strides();
  KeptLayout layout{{sizes.data(), sizes.data() + sizes.size()}, std::vector<int64_t>(sizes.size())};
  layout.sizes[dim] = kept;
  std::vector<int64_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  int64_t stride = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    layout.strides[*d] = stride;
    stride *= std::max<int64_t>(layout.sizes[*d], 1);
  }
  return layout;
}

inline Tensor new_compacted(const Tensor& source, int64_t dim, int64_t kept) {
  const KeptLayout layout = kept_layout(source, dim, kept);
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(source.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(source.get(), &device_type));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(source.dim(), layout.sizes.data(), layout.strides.data(),
                                                  dtype, device_type, source.get_device_index(), &out));
  return Tensor(out);
}

inline void check_one_each(const char* list, size_t size, size_t tensors) {
  STD_TORCH_CHECK(size == tensors, list, " must have one entry for each of the ", tensors, " tensors, got ",
                  size);
}

// The gathers of a list, and the tensors they will fill.
struct Gathers {
  std::vector<Tensor> outs;
  std::vector<GatherTensor> list;
};

// keep's values are not looked at: on CUDA that would wait for the device.
inline Gathers check_compact_filters(const std::vector<Tensor>& tensors, const std::vector<Tensor>& keep,
                                     const std::vector<int64_t>& dims) {
  check_one_each("keep", keep.size(), tensors.size());
  check_one_each("dims", dims.size(), tensors.size());
  Gathers gathers;
  for (int64_t i = 0; i < size_of(tensors); ++i) {
    const Tensor& source = tensors[i];
    check_device({"tensors", i}, source, {"tensors", 0}, tensors[0]);
    check_device({"keep", i}, keep[i], {"tensors", 0}, tensors[0]);
    check_vector({"keep", i}, keep[i], ScalarType::Long, keep[i].numel());
    const DimSplit split = check_split({"tensors", i}, source, {"dims", i}, dims[i]);
    gathers.outs.push_back(new_compacted(source, dims[i], keep[i].numel()));
    gathers.list.push_back({static_cast<int64_t>(source.element_size()), split, source.const_data_ptr(),
                            static_cast<const int64_t*>(keep[i].const_data_ptr()), keep[i].numel(),
                            gathers.outs.back().mutable_data_ptr()});
  }
  return gathers;
}

}  // namespace ffr
