// C functions for ctypes. Each returns the number of kernels launched, or minus the error.

#include <vector>

#include "../../../csrc/cuda/filters.h"
#include "../../../csrc/cuda/flow.h"
#include "../../../csrc/cuda/groups.h"
#include "cuda_on_cpu.h"

namespace {

std::vector<ffr::cuda::StageView> stages_of(int64_t count, const int32_t* dtypes, const int64_t* lengths,
                                            const int64_t* numels, const int64_t* groups, void** features,
                                            void** grads) {
  std::vector<ffr::cuda::StageView> stages;
  for (int64_t i = 0, first = 0; i < count; first += lengths[i++]) {
    stages.push_back({static_cast<ffr::DType>(dtypes[i]),
                      {lengths[i], numels[i], groups[i]},
                      features ? features + first : nullptr,
                      grads ? grads + first : nullptr});
  }
  return stages;
}

ffr::PairSplit pair_split(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5] != 0}; }

template <typename Call>
int64_t counted(Call call) {
  const int64_t before = cuda_on_cpu::Grid::instance().launches;
  const int error = call();
  return error ? -error : cuda_on_cpu::Grid::instance().launches - before;
}

}  // namespace

extern "C" {

int64_t flow_forward(int64_t count, const int32_t* dtypes, const int64_t* lengths, const int64_t* numels,
                     const int64_t* groups, void** features, int32_t squared, double* stats, uint8_t* signs) {
  const auto stages = stages_of(count, dtypes, lengths, numels, groups, features, nullptr);
  std::vector<double> scratch(ffr::cuda::flow_forward_scratch(stages.data(), count, signs != nullptr), NAN);
  return counted([&] {
    return ffr::cuda::flow_forward(stages.data(), count, squared, stats, signs, scratch.data(), nullptr);
  });
}

int64_t flow_backward(int64_t count, const int32_t* dtypes, const int64_t* lengths, const int64_t* numels,
                      const int64_t* groups, void** features, int32_t squared, const uint8_t* signs,
                      const double* coef, void** grads) {
  const auto stages = stages_of(count, dtypes, lengths, numels, groups, features, grads);
  return counted(
      [&] { return ffr::cuda::flow_backward(stages.data(), count, squared, signs, coef, nullptr); });
}

int64_t flow_backward_at(int32_t dtype, int64_t length, int64_t numel, int64_t groups, void** features,
                         int32_t squared, const uint8_t* signs, const double* coef, int64_t index, void* grad,
                         int32_t accumulate) {
  const auto stages = stages_of(1, &dtype, &length, &numel, &groups, features, nullptr);
  return counted([&] {
    return ffr::cuda::flow_backward_at(stages[0], squared, signs, coef, index, grad, accumulate, nullptr);
  });
}

int64_t filter_norms(int64_t count, const int32_t* dtypes, const int64_t* splits, void** data, double p,
                     double* out) {
  std::vector<ffr::NormTensor> tensors;
  std::vector<double*> outs;
  for (int64_t i = 0; i < count; ++i) {
    tensors.push_back(
        {static_cast<ffr::DType>(dtypes[i]), {splits[3 * i], splits[3 * i + 1], splits[3 * i + 2]}, data[i]});
    outs.push_back(out);
    out += splits[3 * i + 1];
  }
  return counted([&] { return ffr::cuda::filter_norms(tensors.data(), count, p, outs.data(), nullptr); });
}

// splits: outer, first, middle, second, inner, rows_first of each tensor.
int64_t row_column_norms(int64_t count, const int32_t* dtypes, const int64_t* splits, void** data, double p,
                         double* out) {
  std::vector<ffr::PairNormTensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const ffr::PairSplit split = pair_split(splits + 6 * i);
    tensors.push_back({static_cast<ffr::DType>(dtypes[i]), split, data[i], out, out + num_rows(split)});
    out += num_rows(split) + num_columns(split);
  }
  std::vector<double> scratch(ffr::cuda::row_column_norms_scratch(tensors.data(), count), NAN);
  return counted(
      [&] { return ffr::cuda::row_column_norms(tensors.data(), count, p, scratch.data(), nullptr); });
}

// Of no grads: shrink.
int64_t scale(int64_t count, const int32_t* dtypes, const int64_t* splits, void** weights, void** grads,
              void** rows, void** columns, const double* slopes, const double* taus) {
  std::vector<ffr::ScaledTensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    tensors.push_back({static_cast<ffr::DType>(dtypes[i]), pair_split(splits + 6 * i), weights[i],
                       grads ? grads[i] : nullptr, rows[i], columns[i], slopes[i], taus[i]});
  }
  return counted([&] {
    return grads ? ffr::cuda::add_scaled(tensors.data(), count, nullptr)
                 : ffr::cuda::shrink(tensors.data(), count, nullptr);
  });
}

// Blocks of all kernels that were launched since the last question.
int64_t take_blocks() {
  const int64_t blocks = cuda_on_cpu::Grid::instance().blocks;
  cuda_on_cpu::Grid::instance().blocks = 0;
  return blocks;
}

// Shuffles of all threads since the last question.
int64_t take_shuffles() {
  const int64_t shuffles = cuda_on_cpu::Grid::instance().shuffles;
  cuda_on_cpu::Grid::instance().shuffles = 0;
  return shuffles;
}

int64_t compact_filters(int64_t count, const int64_t* element_sizes, const int64_t* splits, void** sources,
                        void** keeps, const int64_t* num_keep, void** targets) {
  std::vector<ffr::GatherTensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    tensors.push_back({element_sizes[i],
                       {splits[3 * i], splits[3 * i + 1], splits[3 * i + 2]},
                       sources[i],
                       static_cast<const int64_t*>(keeps[i]),
                       num_keep[i],
                       targets[i]});
  }
  return counted([&] { return ffr::cuda::compact_filters(tensors.data(), count, nullptr); });
}

}  // extern "C"
