// flow_backward: all gradients of a stage in one pass, from packed signs or from the features.
//
// "Plane" l is the pair d_l, c_l (or its signs). With a and e the coefficients of its two terms it adds
//     -a d + e c  to gradient l,     a d - 2 e c  to gradient l + 1,     e c  to gradient l + 2.
// So a thread that walks along the planes with its 16 bytes of positions needs two running sums: `here` and
// `after`, what earlier planes have given to gradients l and l + 1.

#include "plan.h"

namespace ffr::cuda {
namespace {

constexpr int kAhead = 4;  // planes or features in flight

struct BackwardPiece {
  Positions positions;
  int64_t plane_bytes;
  const uint8_t* signs;  // the first plane read
  const double*
      first;  // coefficient of the first plane's d and c in group 0; the next plane's lies `groups` on
  const double* second;
  uint16_t first_feature;  // first pointer to a feature
  uint16_t first_grad;     // first pointer to a gradient
  uint16_t features;       // read; 0 when the gradients come from signs
  uint16_t planes;         // with a d
  uint16_t seconds;        // with a c
  uint16_t lead;           // planes before that of the first gradient, which still reach into it: up to 2
  uint16_t length;         // gradients
};

struct BackwardArgs {
  BackwardPiece pieces[kMaxPieces];
  void* pointers[kMaxPointers];
};
static_assert(sizeof(BackwardArgs) <= 4096, "kernel arguments");

template <typename T, bool kVector>
__device__ __forceinline__ void write(void* grad, int64_t element, int count,
                                      const Compute<T> (&value)[kVec<T>]) {
  if (grad != nullptr) store<T, kVector>(grad, element, count, pack<T>(value));
}

// `firsts`, `seconds`: the coefficients of the piece's planes, already multiplied by the constant that
// belongs to what is read: one half for twice a sign, two for a difference.
template <typename T, bool kSquared, bool kVector>
__device__ __forceinline__ void walk(const BackwardArgs& args, const BackwardPiece& piece, int64_t element,
                                     int count, const Compute<T>* firsts, const Compute<T>* seconds) {
  using C = Compute<T>;
  constexpr int V = kVec<T>;
  // Step m reads feature m and completes plane m - 2, or simply reads the packed plane m - 2.
  constexpr int kBegin = kSquared ? 0 : 2;
  const int steps = kSquared ? piece.features : piece.planes + 2;
  void* const* features = args.pointers + piece.first_feature;
  void* const* grads = args.pointers + piece.first_grad;
  const uint8_t* signs = piece.signs;

  uint4 raw[kAhead];
  uint32_t words[kAhead];
  auto fetch = [&](int j, int step) {
    if (step >= steps) return;
    if constexpr (kSquared) {
      raw[j] = load<T, kVector>(features[step], element, count);
    } else {
      words[j] = load_signs<T, kVector>(signs + (step - kBegin) * piece.plane_bytes, element, count);
    }
  };
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    raw[j] = make_uint4(0, 0, 0, 0);
    words[j] = 0;
    fetch(j, kBegin + j);
  }
  C x[V], d[V], here[V], after[V];
#pragma unroll
  for (int k = 0; k < V; ++k) x[k] = d[k] = here[k] = after[k] = 0;

  for (int base = kBegin; base < steps; base += kAhead) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int step = base + j, plane = step - 2;
      C first[V], second[V];  // d and c of the plane, or twice their signs
      if constexpr (kSquared) {
        C x_before[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          x_before[k] = x[k];
          first[k] = d[k];
        }
        unpack<T>(raw[j], x);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          d[k] = first_difference(x[k], x_before[k]);
          second[k] = second_difference(d[k], first[k]);
        }
      } else {
        unpack_twice_signs<T>(words[j], first, second);
      }
      fetch(j, step + kAhead);
      if (step >= 2) {
        const C a = firsts[plane], e = seconds[plane];
        C value[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          value[k] = here[k] - a * first[k] + e * second[k];
          here[k] = after[k] + a * first[k] - 2 * e * second[k];
          after[k] = e * second[k];
        }
        if (plane >= piece.lead) {
          write<T, kVector>(grads[plane - piece.lead], element, count, value);
        }
      }
      if (step + 1 >= steps) break;
    }
  }
  // Of the stage's last plane only d exists, and its last gradient has no plane.
  if (kSquared && piece.planes > 0 && piece.planes + 1 == piece.features) {
    const int plane = piece.planes - 1;
    const C a = firsts[plane];
    C value[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      value[k] = here[k] - a * d[k];
      here[k] = after[k] + a * d[k];
    }
    if (plane >= piece.lead) write<T, kVector>(grads[plane - piece.lead], element, count, value);
  }
  if (piece.lead + piece.length > piece.planes) {
    write<T, kVector>(grads[piece.length - 1], element, count, here);
  }
}

template <typename T, bool kSquared>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ BackwardArgs args) {
  using C = Compute<T>;
  __shared__ C coefs[kWarps][2][kMaxLength + 4];
  int index = 0;
  while (blockIdx.x >= args.pieces[index].positions.blocks_end) ++index;
  const BackwardPiece& piece = args.pieces[index];
  const Positions& positions = piece.positions;
  const uint32_t block = blockIdx.x - positions.blocks_begin;
  const Share share = share_of_warp<T>(positions, block);
  if (share.group >= positions.groups) return;

  // Each warp for itself: its group may be another than its neighbour's, and nobody waits for the block.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  C *firsts = coefs[warp][0], *seconds = coefs[warp][1];
  const double factor = kSquared ? 2.0 : 0.5;
#pragma unroll 1
  for (int i = lane; i < piece.lead + piece.length; i += 32) {
    const int64_t row = i * positions.groups + share.group;
    firsts[i] = i < piece.planes ? static_cast<C>(factor * piece.first[row]) : C(0);
    seconds[i] = i < piece.seconds ? static_cast<C>(factor * piece.second[row]) : C(0);
  }
  __syncwarp();

  visit_tiles<T>(positions, share, [&](auto vector, int64_t element, int count) {
    walk<T, kSquared, decltype(vector)::value>(args, piece, element, count, firsts, seconds);
  });
}

// ---------------------------------------------------------------------------------- launches

template <bool kSquared>
cudaError_t launch(const BackwardArgs& args, uint32_t blocks, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat16:
      FFR_LAUNCH((backward_kernel<Float16, kSquared>), blocks, kThreads, 0, stream, args);
      break;
    case DType::kBFloat16:
      FFR_LAUNCH((backward_kernel<BFloat16, kSquared>), blocks, kThreads, 0, stream, args);
      break;
    case DType::kFloat32:
      FFR_LAUNCH((backward_kernel<float, kSquared>), blocks, kThreads, 0, stream, args);
      break;
    case DType::kFloat64:
      FFR_LAUNCH((backward_kernel<double, kSquared>), blocks, kThreads, 0, stream, args);
      break;
  }
  return cudaGetLastError();
}

// The launch that is being filled: pieces of one dtype.
class BackwardLaunch {
 public:
  BackwardLaunch(DType dtype, bool squared, cudaStream_t stream)
      : dtype_(dtype), squared_(squared), stream_(stream) {}

  // Launches what is there first if the new piece does not fit. `features`: those it reads, if any.
  cudaError_t add(BackwardPiece piece, const void* const* features, void* const* grads, int64_t blocks) {
    const int pointers = piece.features + piece.length;
    if (pieces_ == kMaxPieces || pointers_ + pointers > kMaxPointers || blocks_ + blocks > INT32_MAX) {
      if (const cudaError_t error = run()) return error;
    }
    piece.first_feature = static_cast<uint16_t>(pointers_);
    for (int i = 0; i < piece.features; ++i) args_.pointers[pointers_++] = const_cast<void*>(features[i]);
    piece.first_grad = static_cast<uint16_t>(pointers_);
    for (int i = 0; i < piece.length; ++i) args_.pointers[pointers_++] = grads[i];
    piece.positions.blocks_begin = static_cast<uint32_t>(blocks_);
    blocks_ += blocks;
    piece.positions.blocks_end = static_cast<uint32_t>(blocks_);
    args_.pieces[pieces_++] = piece;
    return cudaSuccess;
  }

  cudaError_t run() {
    if (pieces_ == 0) return cudaSuccess;
    const uint32_t blocks = static_cast<uint32_t>(blocks_);
    pieces_ = pointers_ = 0;
    blocks_ = 0;
    return squared_ ? launch<true>(args_, blocks, dtype_, stream_)
                    : launch<false>(args_, blocks, dtype_, stream_);
  }

 private:
  BackwardArgs args_ = {};
  DType dtype_;
  bool squared_;
  cudaStream_t stream_;
  int pieces_ = 0, pointers_ = 0;
  int64_t blocks_ = 0;
};

// Gradients of features begin .. end, of which `grads` are the pointers.
cudaError_t add_piece(BackwardLaunch& launch, const StageView& stage, const Chunks& chunks, bool squared,
                      const uint8_t* signs, const double* coef, int64_t begin, int64_t end,
                      void* const* grads) {
  const StageShape& shape = stage.shape;
  if (std::all_of(grads, grads + (end - begin), [](const void* p) { return p == nullptr; }))
    return cudaSuccess;
  const int64_t firsts = num_first(shape), seconds = num_second(shape);
  const int64_t plane = std::max<int64_t>(begin - 2, 0);  // the first that reaches into gradient `begin`
  const int64_t planes_end = std::min(end, firsts);
  const int64_t features_end = squared ? std::min(planes_end + 2, shape.length) : plane;

  bool vector = groups_aligned(stage);
  for (int64_t i = 0; i < end - begin; ++i) vector = vector && aligned(grads[i]);
  for (int64_t i = plane; i < features_end; ++i) vector = vector && aligned(stage.features[i]);

  BackwardPiece piece = {};
  piece.positions = positions_of(stage, chunks, vector);
  piece.plane_bytes = plane_bytes(shape.numel);
  piece.signs = squared ? nullptr : signs + plane * piece.plane_bytes;
  piece.first = coef + plane * shape.groups;
  piece.second = coef + (firsts + plane) * shape.groups;
  piece.features = static_cast<uint16_t>(features_end - plane);
  piece.planes = static_cast<uint16_t>(std::max<int64_t>(planes_end - plane, 0));
  piece.seconds = static_cast<uint16_t>(std::max<int64_t>(std::min(end, seconds) - plane, 0));
  piece.lead = static_cast<uint16_t>(begin - plane);
  piece.length = static_cast<uint16_t>(end - begin);
  return launch.add(piece, squared ? stage.features + plane : nullptr, grads, chunks.blocks);
}

}  // namespace

int flow_backward(const StageView* stages, int64_t num_stages, bool squared, const uint8_t* signs,
                  const double* coef, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const Work work(stages, num_stages, kBackwardBlocks);
  // A piece of a squared stage carries as many features as gradients and up to four more.
  const int64_t longest = std::min(kMaxLength, squared ? kMaxPointers / 2 - 4 : kMaxLength);
  for (int d = 0; d < kNumDTypes; ++d) {
    const DType dtype = static_cast<DType>(d);
    BackwardLaunch launch(dtype, squared, stream);
    const uint8_t* stage_signs = signs;
    const double* stage_coef = coef;
    for (int64_t i = 0; i < num_stages; ++i) {
      const StageView& stage = stages[i];
      if (stage.dtype == dtype && stage.shape.numel > 0) {
        for (int64_t begin = 0; begin < stage.shape.length; begin += longest) {
          const int64_t end = std::min(begin + longest, stage.shape.length);
          const cudaError_t error = add_piece(launch, stage, work.chunks(stage, end - begin), squared,
                                              stage_signs, stage_coef, begin, end, stage.grads + begin);
          if (error) return error;
        }
      }
      stage_coef += stats_entries(stage.shape);
      if (!squared) stage_signs += sign_bytes(stage.shape);
    }
    if (const cudaError_t error = launch.run()) return error;
  }
  return cudaSuccess;
}

}  // namespace ffr::cuda
