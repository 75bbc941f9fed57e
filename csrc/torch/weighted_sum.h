// The loss from the kernels' sums, by torch's own operators: on every device it is then, to the last bit,
// what
// `(stats * weights).sum()` gives in Python, which other ways through the loss use.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace ffr {

// An operator of torch that returns one tensor.
template <typename... Arguments>
torch::stable::Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

inline torch::stable::Tensor product(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return call("aten::mul", "Tensor", a, b);
}

inline void write_weighted_sum(const torch::stable::Tensor& stats, const torch::stable::Tensor& weights,
                               const torch::stable::Tensor& loss) {
  const std::optional<torch::headeronly::ScalarType> dtype;  // that of the addends
  call("aten::copy_", "", loss, call("aten::sum", "", product(stats, weights), dtype), false);
}

}  // namespace ffr
