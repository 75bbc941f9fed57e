// What the kernels of rows and columns share: one launch for a list of tensors, and which of them a block
// works for.
#pragma once

#include <algorithm>

#include "access.h"

namespace ffr::cuda {

constexpr int kThreads = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAccessBytes == 0; }

// The item of a launch that this block works for. Items end at `blocks_end` of this and all earlier ones.
template <typename Item>
__device__ __forceinline__ int item_of_block(const Item* items, int64_t& block) {
  int index = 0;
  while (blockIdx.x >= items[index].blocks_end) ++index;
  block = blockIdx.x - (index ? items[index - 1].blocks_end : 0);
  return index;
}

// Items are collected until the arguments are full or the grid is, then launched.
template <typename Args, int kMost, typename Run>
class Launch {
 public:
  explicit Launch(Run run) : run_(run) {}

  template <typename Item>
  cudaError_t add(Item item, int64_t blocks) {
    if (used_ == kMost || blocks_ + blocks > INT32_MAX) {
      if (const cudaError_t error = finish()) return error;
    }
    blocks_ += blocks;
    item.blocks_end = static_cast<uint32_t>(blocks_);
    args_.items[used_++] = item;
    return cudaSuccess;
  }

  cudaError_t finish() {
    if (used_ == 0) return cudaSuccess;
    run_(args_, static_cast<uint32_t>(blocks_));
    used_ = 0;
    blocks_ = 0;
    return cudaGetLastError();
  }

 private:
  Run run_;
  Args args_ = {};
  int used_ = 0;
  int64_t blocks_ = 0;
};

template <typename Args, int kMost, typename Run>
Launch<Args, kMost, Run> launch(Run run) {
  return Launch<Args, kMost, Run>(run);
}

}  // namespace ffr::cuda
