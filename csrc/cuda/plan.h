// Host side of the flow kernels: how stages become pieces, blocks and launches.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "access.h"
#include "flow.h"

namespace ffr::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A launch carries its pointers by value: 256 of them and 16 pieces fill less than the 4 KiB of arguments
// that every toolkit and GPU takes (12.1 and sm_70 take 32 KiB, but a launch copies what it is given). So the
// three or four stages of a network are one launch; a network of more simply takes two.
constexpr int kMaxPointers = 256;
constexpr int kMaxPieces = 16;

// Features of a stage that one piece reads. Limits its shared memory: 2 x 8 warps x 8 bytes a feature, 16
// KiB.
constexpr int64_t kMaxLength = 128;

// Blocks that share the sums of all stages. Each leaves an fp64 slot per term; 4096 blocks of 256 threads are
// some four fillings of a large GPU, enough to level out what they do, and their slots are added up in
// microseconds. A constant, so that the order of the sums does not depend on the GPU.
#ifndef FFR_FORWARD_BLOCKS  // the tests without a GPU ask for a few, to give small tensors several tiles per
                            // block
#define FFR_FORWARD_BLOCKS 4096
#endif
constexpr int64_t kForwardBlocks = FFR_FORWARD_BLOCKS;
// Backward blocks leave nothing behind; a few more even out better.
#ifndef FFR_BACKWARD_BLOCKS
#define FFR_BACKWARD_BLOCKS 16384
#endif
constexpr int64_t kBackwardBlocks = FFR_BACKWARD_BLOCKS;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 32 lanes x 8 warps x 16 bytes of every feature.
inline int64_t tile_elements(DType dtype) { return kThreads * (kAccessBytes / element_size(dtype)); }

// How the positions of a group are shared out. Every block takes about the same work, tiles times features.
struct Chunks {
  int64_t tiles;  // of a chunk
  int64_t count;  // chunks of a group
};

struct Work {
  int64_t per_block;  // tiles times features

  Work(const StageView* stages, int64_t num_stages, int64_t blocks) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_stages; ++i)
      total += group_tiles(stages[i]) * stages[i].shape.groups * stages[i].shape.length;
    per_block = ceil_div(total, blocks);
  }

  static int64_t group_tiles(const StageView& stage) {
    return std::max<int64_t>(ceil_div(stage.shape.numel / stage.shape.groups, tile_elements(stage.dtype)), 1);
  }

  // `features`: those that a block walks through, of the whole stage or of a piece.
  Chunks chunks(const StageView& stage, int64_t features) const {
    const int64_t tiles = group_tiles(stage);
    const int64_t wanted = std::max<int64_t>(per_block / std::max<int64_t>(features, 1), 1);
    const int64_t count = ceil_div(tiles, wanted);
    return {ceil_div(tiles, count), count};
  }
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAccessBytes == 0; }

// Whether every group of the stage can begin with a 16-byte access, given aligned pointers.
inline bool groups_aligned(const StageView& stage) {
  return stage.shape.groups == 1 ||
         stage.shape.numel / stage.shape.groups * element_size(stage.dtype) % kAccessBytes == 0;
}

}  // namespace ffr::cuda
