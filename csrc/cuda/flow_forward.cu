// flow_forward: one pass over the features of all stages.
//
// A thread owns 16 bytes of positions and walks along the depth with the last feature and the last difference
// in registers; four features are in flight. The sums of a term over a warp's 512 bytes are wanted at every
// step, and a plain reduction of both would take ten shuffles. Instead four steps are gathered and their
// eight numbers reduced together: nine shuffles, each halving the numbers a lane still has to care for. What
// is left, one number for each quad of lanes, is added to the warp's own fp64 sums in shared memory, without
// a barrier. At its end a block writes one slot per term; a second launch adds the slots of each term in a
// fixed order.

#include "flow_slots.h"

namespace ffr::cuda {
namespace {

constexpr int kAhead = 4;  // features in flight, and steps whose sums are reduced together

enum class Mode { kAbs, kAbsSigns, kSquared };

struct ForwardPiece {
  Positions positions;
  int64_t plane_bytes;
  uint8_t* signs;     // the piece's first plane
  double* slots;      // [entries of the stage][chunks]
  int64_t first_row;  // entry of the piece's first |d| in group 0, and of its first |c|
  int64_t second_row;
  uint16_t first_pointer;
  uint16_t length;  // features read
  uint16_t firsts;  // terms owned
  uint16_t seconds;
  bool last;  // the last plane is the stage's last, which has no c
};

struct ForwardArgs {
  ForwardPiece pieces[kMaxPieces];
  const void* features[kMaxPointers];
};
static_assert(sizeof(ForwardArgs) <= 4096, "kernel arguments");

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ double shuffle_xor(double value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Afterwards every lane of quad q (lanes 4 q .. 4 q + 3) holds the sum of values[q] over the warp.
template <typename C>
__device__ __forceinline__ C reduce_to_quads(C (&values)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4, bit = 16; half >= 1; half /= 2, bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const C send = upper ? values[i] : values[i + half];
      const C keep = upper ? values[i + half] : values[i];
      values[i] = keep + shuffle_xor(send, bit);
    }
  }
  C sum = values[0] + shuffle_xor(values[0], 2);
  return sum + shuffle_xor(sum, 1);
}

__device__ __forceinline__ float magnitude_of(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude_of(double x) { return fabs(x); }

template <typename T, Mode mode>
__device__ __forceinline__ Compute<T> magnitude(const Compute<T> (&x)[kVec<T>]) {
  Compute<T> sum = 0;
#pragma unroll
  for (int j = 0; j < kVec<T>; ++j) {
    if constexpr (mode == Mode::kSquared) {
      sum += x[j] * x[j];
    } else {
      sum += magnitude_of(x[j]);
    }
  }
  return sum;
}

// Blocks on a multiprocessor, as many as registers without spilling allow (tests/native/test_gpu_compile.py
// holds this): a block has 16 KiB in flight, an H200 wants about 25 for each of its multiprocessors (4.8 TB/s
// x 0.7 us / 132).
template <typename T, Mode mode>
constexpr int resident_blocks() {
  if (mode == Mode::kAbsSigns) return sizeof(T) == 4 ? 3 : 2;
  return sizeof(T) == 4 ? 4 : sizeof(T) == 8 ? 2 : 3;
}

// Room for the sums of all steps, kAhead of which are written at once.
FFR_HD constexpr int sums_stride(int length) { return (length - 1 + kAhead - 1) / kAhead * kAhead; }

// Walks along the depth at positions element .. element + count. `sums`: the warp's [2][stride] of |d| and
// |c|; d_l lies at l and c_l at l + 1. Other places hold nothing of meaning.
template <typename T, Mode mode, bool kVector>
__device__ __forceinline__ void walk(const ForwardArgs& args, const ForwardPiece& piece, int64_t element,
                                     int count, double* sums, int stride) {
  using C = Compute<T>;
  constexpr int V = kVec<T>;
  constexpr bool kSigns = mode == Mode::kAbsSigns;
  // Behind the first feature, step l reads one, makes d_l and c_{l-1}, and so completes plane l - 1.
  const void* const* features = args.features + piece.first_pointer + 1;
  const int steps = static_cast<int>(computed_here(piece.length - 1));  // not anew in every round
  uint8_t* plane = kSigns ? piece.signs + element / 2 : nullptr;
  auto put = [&](uint32_t word) {
    if (kVector || count > 0) *reinterpret_cast<SignWord<T>*>(plane) = static_cast<SignWord<T>>(word);
  };

  const int lane = threadIdx.x % 32;
  double* mine = sums + lane / 16 * stride + lane / 4 % kAhead;  // of this lane's quad
  uint4 raw = load<T, kVector>(features[-1], element, count);
  uint4 ahead[kAhead];
  auto fetch = [&](int j, int step) {
    if (step < steps) ahead[j] = load<T, kVector>(features[step], element, count);
  };
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    ahead[j] = make_uint4(0, 0, 0, 0);
    fetch(j, j);
  }
  C x[V], d[V];
  unpack<T>(raw, x);
  uint32_t d_codes = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) d[j] = 0;

  // The kAhead steps up to `end`; in the last round only those that there are, and nothing is left to load.
  auto round = [&](int end, auto is_last) {
    constexpr bool kLast = decltype(is_last)::value;
    C values[2 * kAhead] = {};
    uint4 now[kAhead];
#pragma unroll
    for (int j = 0; kSigns && j < kAhead; ++j) {
      now[j] = ahead[j];
      // No load is moved across the stores of signs, so that those of the next steps go before all of them.
      if constexpr (!kLast) fetch(j, end + j);
    }
#pragma unroll
    for (int j = 0; j < kAhead - kLast; ++j) {
      const int step = end - kAhead + j;
      if (kLast && j > 0 && step >= steps) break;
      C x_before[V], d_before[V], c[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        x_before[k] = x[k];
        d_before[k] = d[k];
      }
      [[maybe_unused]] const uint4 raw_before = raw;
      raw = kSigns ? now[j] : ahead[j];
      unpack<T>(raw, x);
      if constexpr (!kSigns && !kLast) fetch(j, end + j);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        d[k] = first_difference(x[k], x_before[k]);
        c[k] = second_difference(d[k], d_before[k]);
      }
      values[j] = magnitude<T, mode>(d);
      values[kAhead + j] = magnitude<T, mode>(c);
      if constexpr (kSigns) {
        // Made in any case, so that only the store is conditional.
        const uint32_t word = SignPacker<T>::word(d_codes, SignPacker<T>::second(c));
        d_codes = SignPacker<T>::first(raw, raw_before, d);
        if (j > 0 || step > 0) {  // the first step completes none
          put(word);
          plane += piece.plane_bytes;
        }
      }
    }
    const double sum = reduce_to_quads(values);
    if (lane % 4 == 0) *mine += sum;
    mine += kAhead;
  };
  int end = kAhead;
#pragma unroll 1
  for (; end <= steps; end += kAhead) round(end, std::false_type{});
  if (end - kAhead < steps) round(end, std::true_type{});
  // The stage's last plane has no c.
  if (kSigns && piece.last) put(SignPacker<T>::word(d_codes, 0));
}

template <typename T, Mode mode>
__global__ void __launch_bounds__(kThreads, resident_blocks<T, mode>())
    forward_kernel(const __grid_constant__ ForwardArgs args) {
  FFR_DYNAMIC_SHARED(double, shared_sums);  // [warp][2][stride]
  int index = 0;
  while (blockIdx.x >= args.pieces[index].positions.blocks_end) ++index;
  const ForwardPiece& piece = args.pieces[index];
  const Positions& positions = piece.positions;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stride = sums_stride(piece.length);
  double* sums = shared_sums + warp * 2 * stride;
#pragma unroll 1
  for (int i = lane; i < 2 * stride; i += 32) sums[i] = 0;
  __syncwarp();

  const Share share = share_of_warp<T>(positions, blockIdx.x - positions.blocks_begin);
  visit_tiles<T>(positions, share, [&](auto vector, int64_t element, int count) {
    walk<T, mode, decltype(vector)::value>(args, piece, element, count, sums, stride);
  });
  __syncthreads();

  // A thread takes a term of a team's group: the sums of the team's warps.
  const uint32_t block = static_cast<uint32_t>(computed_here(blockIdx.x)) - positions.blocks_begin;
  const int teams_shift = kWarpsShift - positions.team_shift;
#pragma unroll 1
  for (int i = threadIdx.x; i < (piece.firsts + piece.seconds) << teams_shift; i += kThreads) {
    const int entry = i >> teams_shift, team = i - (entry << teams_shift);
    const int64_t group = (static_cast<int64_t>(block / positions.chunks) << teams_shift) + team;
    if (group >= positions.groups) continue;
    const bool second = entry >= piece.firsts;
    const int term = second ? entry - piece.firsts : entry;
    const double* from = shared_sums + (team << positions.team_shift) * 2 * stride;
    from += second ? stride + term + 1 : term;
    double total = 0;
#pragma unroll 1
    for (int w = 0; w < 1 << positions.team_shift; ++w) total += from[w * 2 * stride];
    const int64_t row = (second ? piece.second_row : piece.first_row) + term * positions.groups + group;
    piece.slots[row * positions.chunks + block % positions.chunks] = total;
  }
}

// ---------------------------------------------------------------------------------- launches

template <typename T>
cudaError_t launch_as(const ForwardArgs& args, uint32_t blocks, size_t shared, Mode mode,
                      cudaStream_t stream) {
  switch (mode) {
    case Mode::kAbs:
      FFR_LAUNCH((forward_kernel<T, Mode::kAbs>), blocks, kThreads, shared, stream, args);
      break;
    case Mode::kAbsSigns:
      FFR_LAUNCH((forward_kernel<T, Mode::kAbsSigns>), blocks, kThreads, shared, stream, args);
      break;
    case Mode::kSquared:
      FFR_LAUNCH((forward_kernel<T, Mode::kSquared>), blocks, kThreads, shared, stream, args);
      break;
  }
  return cudaGetLastError();
}

// The launch that is being filled: pieces of one dtype.
class ForwardLaunch {
 public:
  ForwardLaunch(DType dtype, Mode mode, cudaStream_t stream) : dtype_(dtype), mode_(mode), stream_(stream) {}

  // Launches what is there first if the new piece does not fit.
  cudaError_t add(ForwardPiece piece, const void* const* features, int64_t blocks) {
    if (pieces_ == kMaxPieces || pointers_ + piece.length > kMaxPointers || blocks_ + blocks > INT32_MAX) {
      if (const cudaError_t error = run()) return error;
    }
    std::copy(features, features + piece.length, args_.features + pointers_);
    piece.first_pointer = static_cast<uint16_t>(pointers_);
    pointers_ += piece.length;
    piece.positions.blocks_begin = static_cast<uint32_t>(blocks_);
    blocks_ += blocks;
    piece.positions.blocks_end = static_cast<uint32_t>(blocks_);
    args_.pieces[pieces_++] = piece;
    longest_ = std::max<int>(longest_, piece.length);
    return cudaSuccess;
  }

  cudaError_t run() {
    if (pieces_ == 0) return cudaSuccess;
    const size_t shared = sizeof(double) * kWarps * 2 * sums_stride(longest_);
    const uint32_t blocks = static_cast<uint32_t>(blocks_);
    pieces_ = pointers_ = longest_ = 0;
    blocks_ = 0;
    switch (dtype_) {
      case DType::kFloat16:
        return launch_as<Float16>(args_, blocks, shared, mode_, stream_);
      case DType::kBFloat16:
        return launch_as<BFloat16>(args_, blocks, shared, mode_, stream_);
      case DType::kFloat32:
        return launch_as<float>(args_, blocks, shared, mode_, stream_);
      case DType::kFloat64:
        return launch_as<double>(args_, blocks, shared, mode_, stream_);
    }
    return cudaErrorInvalidValue;
  }

 private:
  ForwardArgs args_ = {};
  DType dtype_;
  Mode mode_;
  cudaStream_t stream_;
  int pieces_ = 0, pointers_ = 0, longest_ = 0;
  int64_t blocks_ = 0;
};

// Nibbles of two groups may share a byte, which two blocks would then write: such a stage takes one pass for
// the signs, over the whole feature as one group, and one for the sums. No norm of this package asks for
// both.
bool needs_two_passes(const StageView& stage, bool signs) { return signs && stage.shape.groups > 1; }

StageView as_one_group(StageView stage) {
  stage.shape.groups = 1;
  return stage;
}

cudaError_t add_stage(ForwardLaunch& launch, const StageView& stage, const Work& work, uint8_t* signs,
                      double* slots) {
  const StageShape& shape = stage.shape;
  const Chunks chunks = work.chunks(stage, stage.shape.length);
  const bool vector = groups_aligned(stage) && std::all_of(stage.features, stage.features + shape.length,
                                                           [](const void* p) { return aligned(p); });
  const int64_t firsts = num_first(shape), seconds = num_second(shape);
  for (int64_t begin = 0; begin < firsts; begin += kMaxLength - 2) {
    const int64_t end = std::min(begin + kMaxLength - 2, firsts);
    ForwardPiece piece = {};
    piece.positions = positions_of(stage, chunks, vector);
    piece.plane_bytes = plane_bytes(shape.numel);
    piece.signs = signs ? signs + begin * piece.plane_bytes : nullptr;
    piece.slots = slots;
    piece.first_row = begin * shape.groups;
    piece.second_row = (firsts + begin) * shape.groups;
    piece.length = static_cast<uint16_t>(std::min(end + 2, shape.length) - begin);  // two features of halo
    piece.firsts = static_cast<uint16_t>(end - begin);
    piece.seconds = static_cast<uint16_t>(std::min(end, seconds) - std::min(begin, seconds));
    piece.last = end == firsts;
    if (const cudaError_t error = launch.add(piece, stage.features + begin, chunks.blocks)) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t flow_forward_scratch(const StageView* stages, int64_t num_stages, bool signs) {
  const Work work(stages, num_stages, kForwardBlocks);
  int64_t total = 0;
  int64_t signs_pass = 0;  // its sums are thrown away, into one place for all such stages
  for (int64_t i = 0; i < num_stages; ++i) {
    total += slots_of(stages[i], work);
    if (needs_two_passes(stages[i], signs)) {
      const StageView whole = as_one_group(stages[i]);
      signs_pass =
          std::max(signs_pass, stats_entries(whole.shape) * work.chunks(whole, whole.shape.length).count);
    }
  }
  return total + signs_pass;
}

int flow_forward(const StageView* stages, int64_t num_stages, bool squared, double* stats, uint8_t* signs,
                 double* scratch, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const Work work(stages, num_stages, kForwardBlocks);
  int64_t all_slots = 0;
  for (int64_t i = 0; i < num_stages; ++i) all_slots += slots_of(stages[i], work);
  for (int d = 0; d < kNumDTypes; ++d) {
    const DType dtype = static_cast<DType>(d);
    ForwardLaunch sums(dtype, squared ? Mode::kSquared : Mode::kAbs, stream);
    ForwardLaunch sums_and_signs(dtype, Mode::kAbsSigns, stream);
    double *stage_stats = stats, *stage_slots = scratch;
    uint8_t* stage_signs = signs;
    for (int64_t i = 0; i < num_stages; ++i) {
      const StageView& stage = stages[i];
      if (stage.dtype == dtype && stage.shape.length > 1) {
        double* slots = slots_of(stage, work) ? stage_slots : stage_stats;
        cudaError_t error = cudaSuccess;
        if (needs_two_passes(stage, signs != nullptr)) {
          error = add_stage(sums_and_signs, as_one_group(stage), work, stage_signs, scratch + all_slots);
          if (!error) error = add_stage(sums, stage, work, nullptr, slots);
        } else {
          error = add_stage(signs ? sums_and_signs : sums, stage, work, stage_signs, slots);
        }
        if (error) return error;
      }
      stage_stats += stats_entries(stage.shape);
      stage_slots += slots_of(stage, work);
      if (signs) stage_signs += sign_bytes(stage.shape);
    }
    if (const cudaError_t error = sums.run()) return error;
    if (const cudaError_t error = sums_and_signs.run()) return error;
  }
  return add_slots(stages, num_stages, work, stats, scratch, stream);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ffr::cuda
