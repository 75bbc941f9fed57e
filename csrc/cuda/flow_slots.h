// What the blocks of the forward kernel leave, and the launch that adds it up in a fixed order.
#pragma once

#if defined(__CUDACC__)
#include <cub/block/block_reduce.cuh>
#endif

#include "plan.h"

namespace ffr::cuda {

// A slot per term and chunk; none where a group is one chunk, whose sum is the result.
inline int64_t slots_of(const StageView& stage, const Work& work) {
  const int64_t chunks = work.chunks(stage, stage.shape.length).count;
  return chunks > 1 ? stats_entries(stage.shape) * chunks : 0;
}

struct SlotRows {
  const double* slots;  // [rows][chunks]
  double* stats;        // [rows]
  int64_t chunks;
  int64_t rows_end;  // rows of this and all earlier entries
};

struct AddArgs {
  SlotRows stages[kMaxPieces];
};

static __global__ void __launch_bounds__(kThreads) add_slots_kernel(const __grid_constant__ AddArgs args) {
  int index = 0;
  while (blockIdx.x >= args.stages[index].rows_end) ++index;
  const SlotRows& stage = args.stages[index];
  const int64_t row = blockIdx.x - (index ? args.stages[index - 1].rows_end : 0);
  const double* slots = stage.slots + row * stage.chunks;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < stage.chunks; i += kThreads) sum += slots[i];
  using Reduce = cub::BlockReduce<double, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) stage.stats[row] = sum;
}

inline cudaError_t add_slots(const StageView* stages, int64_t num_stages, const Work& work, double* stats,
                             double* scratch, cudaStream_t stream) {
  AddArgs args = {};
  int used = 0;
  int64_t rows = 0;
  for (int64_t i = 0; i <= num_stages; ++i) {
    if (used == kMaxPieces || (i == num_stages && used > 0)) {
      FFR_LAUNCH((add_slots_kernel), static_cast<uint32_t>(rows), kThreads, 0, stream, args);
      if (const cudaError_t error = cudaGetLastError()) return error;
      used = 0;
      rows = 0;
    }
    if (i == num_stages) break;
    const int64_t entries = stats_entries(stages[i].shape), slots = slots_of(stages[i], work);
    if (slots > 0) {
      rows += entries;
      args.stages[used++] = {scratch, stats, work.chunks(stages[i], stages[i].shape.length).count, rows};
    }
    stats += entries;
    scratch += slots;
  }
  return cudaSuccess;
}

}  // namespace ffr::cuda
