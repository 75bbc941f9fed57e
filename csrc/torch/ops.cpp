// The CPU implementations of the ops, whose schemas ffr_ext/ops.py declares: they check the arguments and
// hand plain pointers to csrc/cpu. csrc/torch/ops_cuda.cpp does the same for CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/flow.h"
#include "checks.h"
#include "filter_checks.h"
#include "group_checks.h"

namespace ffr {
namespace {

// torch's own threads, so that torch.set_num_threads counts; no OpenMP of our own.
void torch_threads(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

std::vector<StageView> views(const Stages& all) {
  std::vector<StageView> result;
  for (const Stage& stage : all.stages) {
    result.push_back({stage.dtype, stage.shape, all.features.data() + stage.first,
                      all.grads.empty() ? nullptr : all.grads.data() + stage.first});
  }
  return result;
}

double number(const Tensor& scalar) {
  const void* value = scalar.const_data_ptr();
  return scalar.scalar_type() == ScalarType::Float ? *static_cast<const float*>(value)
                                                   : *static_cast<const double*>(value);
}

// In the order of the entries: the same number with any number of threads.
void write_weighted_sum(const Tensor& stats, const Tensor& weights, const Tensor& loss) {
  const double* entries = static_cast<const double*>(stats.const_data_ptr());
  const double* factors = static_cast<const double*>(weights.const_data_ptr());
  double sum = 0;
  for (int64_t i = 0; i < stats.numel(); ++i) sum += entries[i] * factors[i];
  if (loss.scalar_type() == ScalarType::Float) {
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(sum);
  } else {
    *static_cast<double*>(loss.mutable_data_ptr()) = sum;
  }
}

void flow_forward_cpu(const std::vector<Tensor>& features, const std::vector<int64_t>& lengths,
                      const std::vector<int64_t>& groups, bool squared, const Tensor& stats,
                      const Tensor& signs, const std::optional<Tensor>& weights,
                      const std::optional<Tensor>& loss) {
  const Stages all = check_flow_forward(features, lengths, groups, squared, stats, signs);
  check_loss(weights, loss, stats);
  const std::vector<StageView> stages = views(all);
  uint8_t* sign_planes = signs.numel() ? static_cast<uint8_t*>(signs.mutable_data_ptr()) : nullptr;
  flow_forward(stages.data(), size_of(stages), squared, static_cast<double*>(stats.mutable_data_ptr()),
               sign_planes, torch_threads);
  if (loss) write_weighted_sum(stats, *weights, *loss);
}

void flow_backward_cpu(const std::vector<Tensor>& features, const Tensor& signs, const Tensor& coef,
                       const std::vector<int64_t>& lengths, const std::vector<int64_t>& numels,
                       const std::vector<int64_t>& groups, bool squared, const std::vector<Tensor>& grads,
                       const std::optional<Tensor>& upstream) {
  const Stages all = check_flow_backward(features, signs, coef, lengths, numels, groups, squared, grads);
  const double* coefficients = static_cast<const double*>(coef.const_data_ptr());
  std::vector<double> scaled;
  if (upstream) {
    check_scalar({"upstream"}, *upstream, {"coef"}, coef);
    scaled.assign(coefficients, coefficients + coef.numel());
    const double factor = number(*upstream);
    for (double& entry : scaled) entry *= factor;
    coefficients = scaled.data();
  }
  const std::vector<StageView> stages = views(all);
  flow_backward(stages.data(), size_of(stages), squared, static_cast<const uint8_t*>(signs.const_data_ptr()),
                coefficients, torch_threads);
}

void flow_backward_at_cpu(const std::vector<Tensor>& features, const Tensor& signs, const Tensor& coef,
                          int64_t length, int64_t numel, int64_t groups, bool squared, int64_t index,
                          const Tensor& grad, bool accumulate) {
  const Stages all =
      check_flow_backward_at(features, signs, coef, length, numel, groups, squared, index, grad);
  for (const StageView& stage : views(all)) {
    flow_backward_at(stage, squared, static_cast<const uint8_t*>(signs.const_data_ptr()),
                     static_cast<const double*>(coef.const_data_ptr()), index, grad.mutable_data_ptr(),
                     accumulate, torch_threads);
  }
}

void filter_norms_cpu(const std::vector<Tensor>& weights, const std::vector<int64_t>& dims, double p,
                      const Tensor& out) {
  const Norms norms = check_filter_norms(weights, dims, p, out);
  filter_norms(norms.one.data(), size_of(norms.one), p, norms.outs.data(), torch_threads);
  row_column_norms(norms.both.data(), size_of(norms.both), p, torch_threads);
}

void add_scaled_cpu(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& rows, const std::vector<Tensor>& columns,
                    const std::vector<double>& slopes, const std::vector<double>& taus) {
  const std::vector<ScaledTensor> tensors = check_scaled(&grads, weights, rows, columns, &slopes, taus);
  add_scaled(tensors.data(), size_of(tensors), torch_threads);
}

void shrink_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& rows,
                const std::vector<Tensor>& columns, const std::vector<double>& taus) {
  const std::vector<ScaledTensor> tensors = check_scaled(nullptr, weights, rows, columns, nullptr, taus);
  shrink(tensors.data(), size_of(tensors), torch_threads);
}

// The first gather whose indices are out of range or not unique, or -1.
int64_t first_wrong(const std::vector<GatherTensor>& gathers) {
  std::vector<bool> taken;
  for (int64_t i = 0; i < size_of(gathers); ++i) {
    const GatherTensor& gather = gathers[i];
    taken.assign(gather.split.dim, false);
    for (int64_t k = 0; k < gather.num_keep; ++k) {
      const int64_t filter = gather.keep[k];
      if (filter < 0 || filter >= gather.split.dim || taken[filter]) return i;
      taken[filter] = true;
    }
  }
  return -1;
}

std::tuple<std::vector<Tensor>, int64_t> compact_filters_cpu(const std::vector<Tensor>& tensors,
                                                             const std::vector<Tensor>& keep,
                                                             const std::vector<int64_t>& dims) {
  const Gathers gathers = check_compact_filters(tensors, keep, dims);
  const int64_t wrong = first_wrong(gathers.list);
  if (wrong < 0) compact_filters(gathers.list.data(), size_of(gathers.list), torch_threads);
  return {gathers.outs, wrong};
}

}  // namespace
}  // namespace ffr

STABLE_TORCH_LIBRARY_IMPL(ffr_ext, CPU, m) {
  m.impl("flow_forward", TORCH_BOX(&ffr::flow_forward_cpu));
  m.impl("flow_backward", TORCH_BOX(&ffr::flow_backward_cpu));
  m.impl("flow_backward_at", TORCH_BOX(&ffr::flow_backward_at_cpu));
  m.impl("filter_norms", TORCH_BOX(&ffr::filter_norms_cpu));
  m.impl("compact_filters", TORCH_BOX(&ffr::compact_filters_cpu));
  m.impl("add_scaled_", TORCH_BOX(&ffr::add_scaled_cpu));
  m.impl("shrink_", TORCH_BOX(&ffr::shrink_cpu));
}
