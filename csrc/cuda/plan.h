// What the flow kernels share: how stages become pieces, blocks and launches, and which positions are a
// warp's.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "access.h"
#include "flow.h"

namespace ffr::cuda {

constexpr int kThreads = 256;
constexpr int kWarpsShift = 3;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == 1 << kWarpsShift, "warps are shared out in powers of two");

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

// How the positions of a stage are shared out. A block takes `tiles` of a group, or, where groups are smaller
// than a tile, several groups: each by a team of as many warps as it has accesses of a warp, rounded up to a
// power of two.
struct Chunks {
  int64_t tiles;  // of a chunk
  int64_t count;  // chunks of a group; one where a group is smaller than a tile
  int64_t blocks;
  int team_shift;  // a chunk is the work of 1 << team_shift warps
};

// Every block takes about the same work, tiles times features.
struct Work {
  int64_t per_block;

  Work(const StageView* stages, int64_t num_stages, int64_t blocks) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_stages; ++i)
      total += group_tiles(stages[i]) * group_teams(stages[i]) * stages[i].shape.length;
    per_block = ceil_div(total, blocks);
  }

  static int64_t group_numel(const StageView& stage) { return stage.shape.numel / stage.shape.groups; }

  static int64_t group_tiles(const StageView& stage) {
    return std::max<int64_t>(ceil_div(group_numel(stage), tile_elements(stage.dtype)), 1);
  }

  static int team_shift(const StageView& stage) {
    int shift = 0;
    while (shift < kWarpsShift && (tile_elements(stage.dtype) / kWarps << shift) < group_numel(stage))
      ++shift;
    return shift;
  }

  // Blocks that take all groups once.
  static int64_t group_teams(const StageView& stage) {
    return ceil_div(stage.shape.groups, kWarps >> team_shift(stage));
  }

  // `features`: those that a block walks through, of the whole stage or of a piece.
  Chunks chunks(const StageView& stage, int64_t features) const {
    const int64_t tiles = group_tiles(stage);
    const int64_t wanted = std::max<int64_t>(per_block / std::max<int64_t>(features, 1), 1);
    const int64_t count = ceil_div(tiles, wanted);
    return {ceil_div(tiles, count), count, group_teams(stage) * count, team_shift(stage)};
  }
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAccessBytes == 0; }

// Whether every group of the stage can begin with a 16-byte access, given aligned pointers.
inline bool groups_aligned(const StageView& stage) {
  return stage.shape.groups == 1 ||
         stage.shape.numel / stage.shape.groups * element_size(stage.dtype) % kAccessBytes == 0;
}

// What a kernel needs to know of it, in every piece of a launch.
struct Positions {
  int64_t group_numel;
  int64_t groups;
  int64_t tiles;          // of a chunk
  uint32_t chunks;        // of a group
  uint32_t blocks_begin;  // blocks of all earlier pieces of the launch,
  uint32_t blocks_end;    // and of this one too
  uint8_t team_shift;
  bool vector;  // groups begin at whole accesses
};

inline Positions positions_of(const StageView& stage, const Chunks& chunks, bool vector) {
  return {Work::group_numel(stage),
          stage.shape.groups,
          chunks.tiles,
          static_cast<uint32_t>(chunks.count),
          0,
          0,
          static_cast<uint8_t>(chunks.team_shift),
          vector};
}

// The part of a warp: from `begin` of a group up to `end`, every access of as many as the block has warps.
struct Share {
  int64_t group;
  int64_t chunk;
  int64_t begin;
  int64_t end;  // not behind `begin`: nothing, as where the block has more teams than groups are left
};

template <typename T>
__device__ __forceinline__ Share share_of_warp(const Positions& positions, uint32_t block) {
  constexpr int kTile = kThreads * kVec<T>;
  const int warp = threadIdx.x / 32, team = warp >> positions.team_shift;
  const int rank = warp - (team << positions.team_shift);
  Share share;
  share.group = static_cast<int64_t>(block / positions.chunks) * (kWarps >> positions.team_shift) + team;
  share.chunk = block % positions.chunks;
  share.begin = share.chunk * positions.tiles * kTile + rank * (kTile / kWarps);
  share.end = (share.chunk + 1) * positions.tiles * kTile;
  if (share.end > positions.group_numel) share.end = positions.group_numel;
  if (share.group >= positions.groups) share.end = 0;
  return share;
}

// visit(vector, element, count): `count` elements from `element` on are this thread's, a whole access of them
// if `vector` is std::true_type.
template <typename T, typename Visit>
__device__ __forceinline__ void visit_tiles(const Positions& positions, const Share& share, Visit visit) {
  constexpr int V = kVec<T>;
  const int lane = threadIdx.x % 32;
  int64_t next = share.group * positions.group_numel + share.begin + lane * V;
  // A share that ends before its group does is made of whole accesses, so that its end tells what is left. In
  // 32 bits, which take fewer registers: a share is about a 4096th of all features at most.
  for (int left = static_cast<int>(share.end - share.begin); left > 0; left -= kThreads * V) {
    const int64_t element = computed_here(next);
    next += kThreads * V;
    if (positions.vector && left >= 32 * V) {
      visit(std::true_type{}, element, V);
    } else {
      const int count = left - lane * V;
      visit(std::false_type{}, element, count < 0 ? 0 : count > V ? V : count);
    }
  }
}

}  // namespace ffr::cuda
