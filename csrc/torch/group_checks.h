// The arguments of add_scaled_ and shrink_, checked and taken apart for the kernels (see checks.h).
#pragma once

#include "filter_checks.h"

namespace ffr {

// A vector of factors in the compute dtype of its weight, or null for one without elements.
inline const void* check_factors(const Name& name, const Tensor& factors, const Name& weight_name,
                                 const Tensor& weight, int64_t entries) {
  if (factors.numel() == 0) return nullptr;
  check_device(name, factors, weight_name, weight);
  check_vector(name, factors,
               weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, entries);
  return factors.const_data_ptr();
}

// `grads` and `slopes` null: for shrink_.
inline std::vector<ScaledTensor> check_scaled(
    const std::vector<Tensor>* grads, const std::vector<Tensor>& weights, const std::vector<Tensor>& rows,
    const std::vector<Tensor>& columns, const std::vector<double>* slopes, const std::vector<double>& taus) {
  const size_t count = weights.size();
  if (grads) check_one_each("grads", grads->size(), count);
  check_one_each("rows", rows.size(), count);
  check_one_each("columns", columns.size(), count);
  if (slopes) check_one_each("slopes", slopes->size(), count);
  check_one_each("taus", taus.size(), count);
  std::vector<ScaledTensor> tensors;
  for (int64_t i = 0; i < size_of(weights); ++i) {
    const Name name{"weights", i};
    const Tensor& weight = weights[i];
    check_device(name, weight, {"weights", 0}, weights[0]);
    ScaledTensor t = {};
    t.dtype = check_dtype(name, weight);
    t.split = check_pair_split(name, weight);
    t.weight = weight.mutable_data_ptr();
    if (grads) {
      const Tensor& grad = (*grads)[i];
      check_device({"grads", i}, grad, name, weight);
      STD_TORCH_CHECK(grad.scalar_type() == weight.scalar_type() &&
                          (weight.numel() == 0 ? grad.numel() == 0 : same_layout(grad, weight)),
                      Name{"grads", i}, " must have the dtype and layout of ", name, ", ",
                      torch::headeronly::toString(weight.scalar_type()), " with sizes ", show(weight.sizes()),
                      " and strides ", show(weight.strides()), "; got ",
                      torch::headeronly::toString(grad.scalar_type()), " with ", show(grad.sizes()), " and ",
                      show(grad.strides()));
      t.grad = grad.mutable_data_ptr();
    }
    t.rows = check_factors({"rows", i}, rows[i], name, weight, weight.size(0));
    t.columns =
        check_factors({"columns", i}, columns[i], name, weight, weight.dim() > 1 ? weight.size(1) : 0);
    t.slope = slopes ? (*slopes)[i] : 0.0;
    t.tau = taus[i];
    STD_TORCH_CHECK(t.tau >= 0, Name{"taus", i}, " must be 0 or more, got ", t.tau);
    if (weight.numel() > 0) tensors.push_back(t);
  }
  return tensors;
}

}  // namespace ffr
