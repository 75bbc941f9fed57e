// flow_backward_at: the gradient of one feature. At most three planes of signs or five features reach into
// it, and nothing that a thread reads depends on anything else it reads, so all of it is on its way at once:
// the old gradient, the planes or features, and the coefficients.

#include "plan.h"

namespace ffr::cuda {
namespace {

// The terms that the gradient of feature l has, by the coefficients that they have in it:
//     c_{l-2} e,   d_{l-1} a,   c_{l-1} (-2 e),   d_l (-a),   c_l e
constexpr int kTerms = 5;
// Read are planes l - 2 .. l, or features l - 2 .. l + 2.
constexpr int kPlanes = 3;
constexpr int kFeatures = 5;

struct GradientArgs {
  Positions positions;
  const void* sources[kFeatures];  // planes of signs or features; null where there is none
  const double* coef[kTerms];      // of group 0; null where there is no such term
  void* grad;
  bool accumulate;
};

// d and c in the order of the terms, or twice their signs; zero where there is none.
template <typename T, bool kSquared, bool kVector>
struct Sources {
  uint32_t words[kPlanes];
  uint4 raw[kFeatures];

  __device__ __forceinline__ void fetch(const GradientArgs& args, int64_t element, int count) {
    if constexpr (kSquared) {
#pragma unroll
      for (int i = 0; i < kFeatures; ++i) {
        raw[i] = args.sources[i] ? load<T, kVector>(args.sources[i], element, count) : make_uint4(0, 0, 0, 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPlanes; ++i) {
        const uint8_t* plane = static_cast<const uint8_t*>(args.sources[i]);
        words[i] = plane ? load_signs<T, kVector>(plane, element, count) : 0;
      }
    }
  }

  __device__ __forceinline__ void terms(const GradientArgs& args, Compute<T> (&t)[kTerms][kVec<T>]) const {
    constexpr int V = kVec<T>;
    if constexpr (kSquared) {
      Compute<T> x[kFeatures][V];
#pragma unroll
      for (int i = 0; i < kFeatures; ++i) unpack<T>(raw[i], x[i]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        Compute<T> d[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) d[i] = first_difference(x[i + 1][k], x[i][k]);
        t[0][k] = second_difference(d[1], d[0]);
        t[1][k] = d[1];
        t[2][k] = second_difference(d[2], d[1]);
        t[3][k] = d[2];
        t[4][k] = second_difference(d[3], d[2]);
      }
      // Of features that do not exist: what is not finite next to them must not become 0 times inf.
#pragma unroll
      for (int i = 0; i < kTerms; ++i) {
#pragma unroll
        for (int k = 0; k < V; ++k) t[i][k] = args.coef[i] ? t[i][k] : 0;
      }
    } else {
      Compute<T> none[V];
      unpack_twice_signs<T>(words[0], none, t[0]);
      unpack_twice_signs<T>(words[1], t[1], t[2]);
      unpack_twice_signs<T>(words[2], t[3], t[4]);
    }
  }
};

// Blocks on a multiprocessor, as many as registers without spilling allow.
template <typename T>
constexpr int resident_blocks() {
  return sizeof(T) == 2 ? 3 : sizeof(T) == 4 ? 5 : 4;
}

template <typename T, bool kSquared>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>())
    gradient_kernel(const __grid_constant__ GradientArgs args) {
  using C = Compute<T>;
  constexpr int V = kVec<T>;
  const int lane = threadIdx.x % 32;
  const Share share = share_of_warp<T>(args.positions, blockIdx.x);
  visit_tiles<T>(args.positions, share, [&](auto vector, int64_t element, int count) {
    constexpr bool kVector = decltype(vector)::value;
    const uint4 old = args.accumulate ? load<T, kVector>(args.grad, element, count) : make_uint4(0, 0, 0, 0);
    Sources<T, kSquared, kVector> sources;
    sources.fetch(args, element, count);
    // Lane i reads the coefficient of term i for the whole warp.
    const double* from = args.coef[lane < kTerms ? lane : 0];
    const double coef = from ? from[share.group] : 0;

    C t[kTerms][V], value[V], before[V];
    sources.terms(args, t);
    constexpr C kFactors[kTerms] = {1, 1, -2, -1, 1};
    const C weight = static_cast<C>((kSquared ? 2.0 : 0.5) * coef);
#pragma unroll
    for (int k = 0; k < V; ++k) value[k] = 0;
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      const C w = kFactors[i] * __shfl_sync(0xffffffffu, weight, i);
#pragma unroll
      for (int k = 0; k < V; ++k) value[k] += w * t[i][k];
    }
    unpack<T>(old, before);
#pragma unroll
    for (int k = 0; k < V; ++k) value[k] += before[k];
    store<T, kVector>(args.grad, element, count, pack<T>(value));
  });
}

template <bool kSquared>
cudaError_t launch(const GradientArgs& args, uint32_t blocks, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat16:
      FFR_LAUNCH((gradient_kernel<Float16, kSquared>), blocks, kThreads, 0, stream, args);
      break;
    case DType::kBFloat16:
      FFR_LAUNCH((gradient_kernel<BFloat16, kSquared>), blocks, kThreads, 0, stream, args);
      break;
    case DType::kFloat32:
      FFR_LAUNCH((gradient_kernel<float, kSquared>), blocks, kThreads, 0, stream, args);
      break;
    case DType::kFloat64:
      FFR_LAUNCH((gradient_kernel<double, kSquared>), blocks, kThreads, 0, stream, args);
      break;
  }
  return cudaGetLastError();
}

// Points at what exists of `sources` and `coef`.
void point(GradientArgs& args, const StageView& stage, bool squared, const uint8_t* signs, const double* coef,
           int64_t index) {
  const StageShape& shape = stage.shape;
  const int64_t firsts = num_first(shape), seconds = num_second(shape);
  for (int i = 0; i < (squared ? kFeatures : kPlanes); ++i) {
    const int64_t at = index - 2 + i;  // a feature or a plane
    if (at < 0 || at >= (squared ? shape.length : firsts)) continue;
    args.sources[i] = squared ? stage.features[at] : signs + at * plane_bytes(shape.numel);
  }
  for (int i = 0; i < kTerms; ++i) {
    const bool second = i % 2 == 0;
    const int64_t plane = index - 2 + (i + 1) / 2;
    if (plane < 0 || plane >= (second ? seconds : firsts)) continue;
    args.coef[i] = coef + (second ? firsts + plane : plane) * shape.groups;
  }
}

}  // namespace

int flow_backward_at(const StageView& stage, bool squared, const uint8_t* signs, const double* coef,
                     int64_t index, void* grad, bool accumulate, void* stream_handle) {
  if (stage.shape.numel == 0) return cudaSuccess;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  GradientArgs args = {};
  point(args, stage, squared, signs, coef, index);
  args.grad = grad;
  args.accumulate = accumulate;
  bool vector = groups_aligned(stage) && aligned(grad);
  if (squared)
    for (const void* source : args.sources) vector = vector && aligned(source);
  StageView one = stage;  // the work is that of one feature
  one.shape.length = 1;
  const Chunks chunks = Work(&one, 1, kBackwardBlocks).chunks(one, 1);
  args.positions = positions_of(stage, chunks, vector);
  return squared ? launch<true>(args, static_cast<uint32_t>(chunks.blocks), stage.dtype, stream)
                 : launch<false>(args, static_cast<uint32_t>(chunks.blocks), stage.dtype, stream);
}

}  // namespace ffr::cuda
