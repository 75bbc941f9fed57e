// Op schemas, and the CPU implementations' checks and calls into csrc/cpu.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ffr_ext, m) {
  m.def(
      "flow_forward(Tensor[] features, int[] lengths, SymInt[] groups, bool squared, Tensor(a!) stats, "
      "Tensor(b!) signs) -> ()");
  m.def(
      "flow_backward(Tensor[] features, Tensor signs, Tensor coef, int[] lengths, SymInt[] numels, SymInt[] groups, "
      "bool squared, Tensor(a!)[] grads) -> ()");
  m.def(
      "flow_backward_at(Tensor[] features, Tensor signs, Tensor coef, int length, SymInt numel, SymInt groups, "
      "bool squared, int index, Tensor(a!) grad, bool accumulate) -> ()");
  m.def("filter_norms(Tensor[] weights, int[] dims, float p, Tensor(a!) out) -> ()");
  m.def("compact_filters(Tensor[] tensors, Tensor[] keep, int[] dims, Tensor(a!)[] outs) -> ()");
}
