// The ops on CUDA: checks the arguments, makes their device current, and launches csrc/cuda on torch's
// current stream. Compiled by the host's compiler, without a CUDA header; the schemas are those of
// ffr_ext/ops.py.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../cuda/filters.h"
#include "../cuda/flow.h"
#include "../cuda/groups.h"
#include "checks.h"
#include "filter_checks.h"
#include "group_checks.h"

// Weak, so that this module also loads next to a torch without CUDA, which has no such function.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace ffr {
namespace {

// The device of an op's tensors, current while this lives, and torch's current stream on it.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "the CUDA kernels of ffr_ext need a torch with CUDA; this one has none");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, ", ", cuda::error_text(error));
}

std::vector<cuda::StageView> views(const Stages& all) {
  std::vector<cuda::StageView> result;
  for (const Stage& stage : all.stages) {
    result.push_back({stage.dtype, stage.shape, all.features.data() + stage.first,
                      all.grads.empty() ? nullptr : all.grads.data() + stage.first});
  }
  return result;
}

// An operator of torch that returns one tensor.
template <typename... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor product(const Tensor& a, const Tensor& b) { return call("aten::mul", "Tensor", a, b); }

template <typename Pointer>
Pointer check_aligned(Pointer signs) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(signs) % cuda::kSignsAlign == 0,
                  "signs must begin at a multiple of ", cuda::kSignsAlign, " bytes");
  return signs;
}

void flow_forward_cuda(const std::vector<Tensor>& features, const std::vector<int64_t>& lengths,
                       const std::vector<int64_t>& groups, bool squared, const Tensor& stats,
                       const Tensor& signs, const std::optional<Tensor>& weights,
                       const std::optional<Tensor>& loss) {
  const Stages all = check_flow_forward(features, lengths, groups, squared, stats, signs);
  check_loss(weights, loss, stats);
  if (stats.numel() == 0) {
    if (loss) call("aten::zero_", "", *loss);
    return;
  }
  const std::vector<cuda::StageView> stages = views(all);
  uint8_t* planes = signs.numel() ? check_aligned(static_cast<uint8_t*>(signs.mutable_data_ptr())) : nullptr;
  const Launch launch(stats);
  // From torch's caching allocator, on the current stream: nothing waits, and a CUDA graph may capture it.
  std::optional<Tensor> scratch;
  const int64_t slots = cuda::flow_forward_scratch(stages.data(), size_of(stages), planes != nullptr);
  if (slots > 0) scratch = torch::stable::new_empty(stats, {slots});
  check_launch("flow_forward",
               cuda::flow_forward(stages.data(), size_of(stages), squared,
                                  static_cast<double*>(stats.mutable_data_ptr()), planes,
                                  scratch ? static_cast<double*>(scratch->mutable_data_ptr()) : nullptr,
                                  launch.stream()));
  if (loss) {
    Tensor sum = call("aten::sum", "", product(stats, *weights), std::optional<ScalarType>());
    call("aten::copy_", "", *loss, sum, false);
  }
}

void flow_backward_cuda(const std::vector<Tensor>& features, const Tensor& signs, const Tensor& coef,
                        const std::vector<int64_t>& lengths, const std::vector<int64_t>& numels,
                        const std::vector<int64_t>& groups, bool squared, const std::vector<Tensor>& grads,
                        const std::optional<Tensor>& upstream) {
  const Stages all = check_flow_backward(features, signs, coef, lengths, numels, groups, squared, grads);
  if (upstream) check_scalar({"upstream"}, *upstream, {"coef"}, coef);
  const std::vector<cuda::StageView> stages = views(all);
  const uint8_t* planes = check_aligned(static_cast<const uint8_t*>(signs.const_data_ptr()));
  const Launch launch(coef);
  const Tensor coefficients = upstream ? product(coef, *upstream) : coef;
  check_launch("flow_backward", cuda::flow_backward(stages.data(), size_of(stages), squared, planes,
                                                    static_cast<const double*>(coefficients.const_data_ptr()),
                                                    launch.stream()));
}

void flow_backward_at_cuda(const std::vector<Tensor>& features, const Tensor& signs, const Tensor& coef,
                           int64_t length, int64_t numel, int64_t groups, bool squared, int64_t index,
                           const Tensor& grad, bool accumulate) {
  const Stages all =
      check_flow_backward_at(features, signs, coef, length, numel, groups, squared, index, grad);
  const uint8_t* planes = check_aligned(static_cast<const uint8_t*>(signs.const_data_ptr()));
  const Launch launch(coef);
  for (const cuda::StageView& stage : views(all)) {
    check_launch(
        "flow_backward_at",
        cuda::flow_backward_at(stage, squared, planes, static_cast<const double*>(coef.const_data_ptr()),
                               index, grad.mutable_data_ptr(), accumulate, launch.stream()));
  }
}

void filter_norms_cuda(const std::vector<Tensor>& weights, const std::vector<int64_t>& dims, double p,
                       const Tensor& out) {
  const Norms norms = check_filter_norms(weights, dims, p, out);
  const Launch launch(out);
  check_launch("filter_norms", cuda::filter_norms(norms.one.data(), size_of(norms.one), p, norms.outs.data(),
                                                  launch.stream()));
  const int64_t sums = cuda::row_column_norms_scratch(norms.both.data(), size_of(norms.both));
  std::optional<Tensor> scratch;
  if (sums > 0) scratch = torch::stable::new_empty(out, {sums});
  check_launch("filter_norms",
               cuda::row_column_norms(norms.both.data(), size_of(norms.both), p,
                                      scratch ? static_cast<double*>(scratch->mutable_data_ptr()) : nullptr,
                                      launch.stream()));
}

void add_scaled_cuda(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                     const std::vector<Tensor>& rows, const std::vector<Tensor>& columns,
                     const std::vector<double>& slopes, const std::vector<double>& taus) {
  const std::vector<ScaledTensor> tensors = check_scaled(&grads, weights, rows, columns, &slopes, taus);
  if (tensors.empty()) return;
  const Launch launch(weights[0]);
  check_launch("add_scaled_", cuda::add_scaled(tensors.data(), size_of(tensors), launch.stream()));
}

void shrink_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& rows,
                 const std::vector<Tensor>& columns, const std::vector<double>& taus) {
  const std::vector<ScaledTensor> tensors = check_scaled(nullptr, weights, rows, columns, nullptr, taus);
  if (tensors.empty()) return;
  const Launch launch(weights[0]);
  check_launch("shrink_", cuda::shrink(tensors.data(), size_of(tensors), launch.stream()));
}

// The values of keep are checked where they are known without waiting for the device: by the caller, and by
// the kernel, which stops at one that is out of range.
std::tuple<std::vector<Tensor>, int64_t> compact_filters_cuda(const std::vector<Tensor>& tensors,
                                                              const std::vector<Tensor>& keep,
                                                              const std::vector<int64_t>& dims) {
  if (tensors.empty()) return {std::vector<Tensor>(), -1};
  const Launch launch(tensors[0]);
  const Gathers gathers = check_compact_filters(tensors, keep, dims);
  check_launch("compact_filters",
               cuda::compact_filters(gathers.list.data(), size_of(gathers.list), launch.stream()));
  return {gathers.outs, -1};
}

}  // namespace
}  // namespace ffr

STABLE_TORCH_LIBRARY_IMPL(ffr_ext, CUDA, m) {
  m.impl("flow_forward", TORCH_BOX(&ffr::flow_forward_cuda));
  m.impl("flow_backward", TORCH_BOX(&ffr::flow_backward_cuda));
  m.impl("flow_backward_at", TORCH_BOX(&ffr::flow_backward_at_cuda));
  m.impl("filter_norms", TORCH_BOX(&ffr::filter_norms_cuda));
  m.impl("compact_filters", TORCH_BOX(&ffr::compact_filters_cuda));
  m.impl("add_scaled_", TORCH_BOX(&ffr::add_scaled_cuda));
  m.impl("shrink_", TORCH_BOX(&ffr::shrink_cuda));
}
