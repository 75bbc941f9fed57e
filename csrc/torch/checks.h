// Turns the arguments of an op into what the kernels take, and refuses everything they could not read safely.
// Shared by the CPU and the CUDA implementations; the kernels themselves check nothing. Needs only LibTorch's
// stable ABI.
//
// A message says which argument, what was expected and what came. These are the last line of defence: the
// Python layer has its own checks, with ValueError and the names its callers know.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "../common/dtype.h"
#include "../common/flow_math.h"

namespace ffr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------- single tensors

// An argument's name for messages, "features[3]"; made into text only when something is wrong.
struct Name {
  const char* argument;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  return name.index < 0 ? out : out << "[" << name.index << "]";
}

template <typename Ints>
std::string show(const Ints& ints) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < ints.size(); ++i) text << (i ? ", " : "") << ints[i];
  text << "]";
  return text.str();
}

inline std::string show_device(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  if (a.is_cpu() || b.is_cpu()) return a.is_cpu() && b.is_cpu();
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_device(const Name& name, const Tensor& t, const Name& other_name, const Tensor& other) {
  STD_TORCH_CHECK(same_device(t, other), name, " must be on the device of ", other_name, ", ",
                  show_device(other), "; got ", show_device(t));
}

// A plain vector: the argument that an op fills or reads from its first to its last element.
inline void check_vector(const Name& name, const Tensor& t, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), name, " must be contiguous with 1 dimension, got sizes ",
                  show(t.sizes()), " and strides ", show(t.strides()));
  STD_TORCH_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
}

inline DType check_dtype(const Name& name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be Half, BFloat16, Float or Double, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
  return DType::kFloat32;  // not reached
}

// Dense: the elements fill numel * element_size bytes without gaps or overlaps, in whatever order of
// dimensions.
inline bool is_dense(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t filled = 1;
  for (size_t step = 0; step < sizes.size(); ++step) {
    size_t next = sizes.size();
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] > 1 && strides[d] == filled) next = d;
    }
    if (next == sizes.size()) break;
    filled *= sizes[next];
  }
  return filled == t.numel();
}

// Whether element i of both lies at the same offset. The stride of a dimension of size 1 is arbitrary.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), others = b.sizes(), strides = a.strides(), other_strides = b.strides();
  if (sizes.size() != others.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != others[d] || (sizes[d] > 1 && strides[d] != other_strides[d])) return false;
  }
  return true;
}

// ---------------------------------------------------------------------------------- stages

struct Stage {
  DType dtype;
  StageShape shape;
  int64_t first;  // its first entry of Stages::features and Stages::grads
};

// The stages of a flow op and the pointers of all of them, one stage after another. A stage without groups
// (an empty batch with a norm per sample) has nothing to read or write and is left out.
struct Stages {
  std::vector<Stage> stages;
  std::vector<const void*> features;  // null where not read
  std::vector<void*> grads;           // null where not wanted
};

template <typename T>
int64_t size_of(const std::vector<T>& items) {
  return static_cast<int64_t>(items.size());
}

// The number of features that `lengths` stands for.
inline int64_t check_lengths(const std::vector<int64_t>& lengths, const std::vector<int64_t>& groups) {
  STD_TORCH_CHECK(groups.size() == lengths.size(), "groups must have one entry for each of the ",
                  lengths.size(), " stages of lengths, got ", groups.size());
  int64_t total = 0;
  for (int64_t s = 0; s < size_of(lengths); ++s) {
    STD_TORCH_CHECK(lengths[s] >= 0, Name{"lengths", s}, " must not be negative, got ", lengths[s]);
    total += lengths[s];
  }
  return total;
}

inline void check_groups(int64_t stage, int64_t groups, int64_t numel) {
  STD_TORCH_CHECK(numel >= 0, Name{"numels", stage}, " must not be negative, got ", numel);
  // An empty batch has no groups and no elements; it has no entries in stats either.
  STD_TORCH_CHECK(groups > 0 ? numel % groups == 0 : groups == 0 && numel == 0, Name{"groups", stage},
                  " must divide the ", numel, " elements of a feature, got ", groups);
}

// `tensors[first .. first + length)`: one dtype, one dense layout, on the device of `anchor`. `numel` is the
// expected number of elements, -1 for that of the first tensor. With `optional`, tensors without elements are
// passed over although numel is not 0. Returns the dtype and the number of elements of the stage.
struct StageType {
  DType dtype;
  int64_t numel;
};
inline StageType check_stage(const char* list, const std::vector<Tensor>& tensors, int64_t first,
                             int64_t length, int64_t numel, bool optional, const Name& anchor_name,
                             const Tensor& anchor) {
  int64_t model = -1;  // the first tensor that is there
  DType dtype = DType::kFloat32;
  for (int64_t i = first; i < first + length; ++i) {
    const Tensor& t = tensors[i];
    const int64_t elements = t.numel();
    if (optional && elements == 0) continue;
    if (numel < 0) numel = elements;
    STD_TORCH_CHECK(elements == numel, Name{list, i}, " must have the ", numel,
                    " elements of its stage, got ", elements);
    check_device(Name{list, i}, t, anchor_name, anchor);
    if (model < 0) {
      model = i;
      dtype = check_dtype(Name{list, i}, t);
      STD_TORCH_CHECK(elements == 0 || is_dense(t), Name{list, i},
                      " must be dense (no gaps, no overlaps), got sizes ", show(t.sizes()), " and strides ",
                      show(t.strides()));
      continue;
    }
    STD_TORCH_CHECK(t.scalar_type() == tensors[model].scalar_type(), Name{list, i},
                    " must have the dtype of ", Name{list, model}, " in the same stage, ",
                    torch::headeronly::toString(tensors[model].scalar_type()), "; got ",
                    torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(elements == 0 || same_layout(t, tensors[model]), Name{list, i},
                    " must have the layout of ", Name{list, model}, " in the same stage, sizes ",
                    show(tensors[model].sizes()), " and strides ", show(tensors[model].strides()), "; got ",
                    show(t.sizes()), " and ", show(t.strides()));
  }
  return {dtype, numel < 0 ? 0 : numel};
}

inline int64_t total_stats(const Stages& all) {
  int64_t total = 0;
  for (const Stage& stage : all.stages) total += stats_entries(stage.shape);
  return total;
}

inline int64_t total_sign_bytes(const Stages& all) {
  int64_t total = 0;
  for (const Stage& stage : all.stages) total += sign_bytes(stage.shape);
  return total;
}

// One number on the device of `anchor`, which is what a loss and its upstream gradient are.
inline void check_scalar(const Name& name, const Tensor& t, const Name& anchor_name, const Tensor& anchor) {
  check_device(name, t, anchor_name, anchor);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, name,
                  " must be Float or Double, got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.numel() == 1, name, " must have 1 element, got ", t.numel());
}

// The weighted sum of stats that flow_forward makes where it is asked to.
inline void check_loss(const std::optional<Tensor>& weights, const std::optional<Tensor>& loss,
                       const Tensor& stats) {
  STD_TORCH_CHECK(weights.has_value() == loss.has_value(),
                  "weights and loss must be given together, got only ",
                  weights.has_value() ? "weights" : "loss");
  if (!loss.has_value()) return;
  check_vector({"weights"}, *weights, ScalarType::Double, stats.numel());
  check_device({"weights"}, *weights, {"stats"}, stats);
  check_scalar({"loss"}, *loss, {"stats"}, stats);
}

// ---------------------------------------------------------------------------------- the flow
// ops

inline Stages check_flow_forward(const std::vector<Tensor>& features, const std::vector<int64_t>& lengths,
                                 const std::vector<int64_t>& groups, bool squared, const Tensor& stats,
                                 const Tensor& signs) {
  const int64_t total = check_lengths(lengths, groups);
  STD_TORCH_CHECK(size_of(features) == total, "features must have sum(lengths) = ", total, " tensors, got ",
                  features.size());
  Stages all;
  int64_t first = 0;
  for (int64_t s = 0; s < size_of(lengths); ++s) {
    const StageType type = check_stage("features", features, first, lengths[s], -1, false, {"stats"}, stats);
    check_groups(s, groups[s], type.numel);
    if (groups[s] > 0) all.stages.push_back({type.dtype, {lengths[s], type.numel, groups[s]}, first});
    first += lengths[s];
  }
  for (const Tensor& feature : features) all.features.push_back(feature.const_data_ptr());

  check_vector({"stats"}, stats, ScalarType::Double, total_stats(all));
  check_device({"signs"}, signs, {"stats"}, stats);
  STD_TORCH_CHECK(!squared || signs.numel() == 0, "signs must be empty with squared=True, got ",
                  signs.numel(), " bytes");
  check_vector({"signs"}, signs, ScalarType::Byte, signs.numel() ? total_sign_bytes(all) : 0);
  return all;
}

inline Stages check_flow_backward(const std::vector<Tensor>& features, const Tensor& signs,
                                  const Tensor& coef, const std::vector<int64_t>& lengths,
                                  const std::vector<int64_t>& numels, const std::vector<int64_t>& groups,
                                  bool squared, const std::vector<Tensor>& grads) {
  const int64_t total = check_lengths(lengths, groups);
  STD_TORCH_CHECK(numels.size() == lengths.size(), "numels must have one entry for each of the ",
                  lengths.size(), " stages of lengths, got ", numels.size());
  STD_TORCH_CHECK(size_of(grads) == total, "grads must have sum(lengths) = ", total, " tensors, got ",
                  grads.size());
  STD_TORCH_CHECK(size_of(features) == (squared ? total : 0), "features must have ", squared ? total : 0,
                  " tensors with squared=", squared ? "True" : "False", ", got ", features.size());
  Stages all;
  all.features.assign(total, nullptr);
  all.grads.assign(total, nullptr);
  int64_t first = 0;
  for (int64_t s = 0; s < size_of(lengths); ++s) {
    check_groups(s, groups[s], numels[s]);
    StageType type = check_stage("grads", grads, first, lengths[s], numels[s], true, {"coef"}, coef);
    if (squared) {
      type = check_stage("features", features, first, lengths[s], numels[s], false, {"coef"}, coef);
    }
    for (int64_t i = first; i < first + lengths[s]; ++i) {
      if (squared) all.features[i] = features[i].const_data_ptr();
      if (grads[i].numel() == 0) continue;
      all.grads[i] = grads[i].mutable_data_ptr();
      if (!squared) continue;
      STD_TORCH_CHECK(
          grads[i].scalar_type() == features[i].scalar_type() && same_layout(grads[i], features[i]),
          Name{"grads", i}, " must have the dtype and layout of ", Name{"features", i}, ", ",
          torch::headeronly::toString(features[i].scalar_type()), " with sizes ", show(features[i].sizes()),
          " and strides ", show(features[i].strides()), "; got ",
          torch::headeronly::toString(grads[i].scalar_type()), " with ", show(grads[i].sizes()), " and ",
          show(grads[i].strides()));
    }
    if (groups[s] > 0) all.stages.push_back({type.dtype, {lengths[s], numels[s], groups[s]}, first});
    first += lengths[s];
  }
  check_vector({"coef"}, coef, ScalarType::Double, total_stats(all));
  check_device({"signs"}, signs, {"coef"}, coef);
  check_vector({"signs"}, signs, ScalarType::Byte, squared ? 0 : total_sign_bytes(all));
  return all;
}

// One stage, or none if the batch is empty. The caller takes the pointer of `grad` itself.
inline Stages check_flow_backward_at(const std::vector<Tensor>& features, const Tensor& signs,
                                     const Tensor& coef, int64_t length, int64_t numel, int64_t groups,
                                     bool squared, int64_t index, const Tensor& grad) {
  STD_TORCH_CHECK(length >= 1, "length must be at least 1, got ", length);
  STD_TORCH_CHECK(index >= 0 && index < length, "index must be in [0, ", length, "), got ", index);
  check_groups(0, groups, numel);
  STD_TORCH_CHECK(size_of(features) == (squared ? length : 0), "features must have ", squared ? length : 0,
                  " tensors with squared=", squared ? "True" : "False", ", got ", features.size());
  const StageType type = check_stage("grad", {grad}, 0, 1, numel, false, {"coef"}, coef);
  Stages all;
  all.features.assign(length, nullptr);
  if (squared) {
    for (int64_t i = std::max<int64_t>(index - 2, 0); i < std::min(index + 3, length); ++i) {
      const Tensor& feature = features[i];
      check_device(Name{"features", i}, feature, {"coef"}, coef);
      STD_TORCH_CHECK(
          feature.scalar_type() == grad.scalar_type() && (numel == 0 || same_layout(feature, grad)),
          Name{"features", i}, " must have the dtype and layout of grad, ",
          torch::headeronly::toString(grad.scalar_type()), " with sizes ", show(grad.sizes()),
          " and strides ", show(grad.strides()), "; got ", torch::headeronly::toString(feature.scalar_type()),
          " with ", show(feature.sizes()), " and ", show(feature.strides()));
      all.features[i] = feature.const_data_ptr();
    }
  }
  if (groups > 0) all.stages.push_back({type.dtype, {length, numel, groups}, 0});
  check_vector({"coef"}, coef, ScalarType::Double, total_stats(all));
  check_device({"signs"}, signs, {"coef"}, coef);
  check_vector({"signs"}, signs, ScalarType::Byte, squared ? 0 : total_sign_bytes(all));
  return all;
}

}  // namespace ffr
