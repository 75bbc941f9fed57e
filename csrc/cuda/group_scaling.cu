// Weights times factors of their row and column: added to a gradient, or in place. One launch for a list.

#include "group_launch.h"
#include "groups.h"

namespace ffr::cuda {
namespace {

constexpr int kAccesses = 4;  // of a thread, all in flight

template <typename T>
struct ScaleItem {
  void* weight;
  void* grad;
  const Compute<T>* first;
  const Compute<T>* second;
  int64_t numel;
  uint32_t firsts, seconds;  // slices
  uint32_t middle, inner;
  Compute<T> slope, tau;
  uint32_t blocks_end;
  bool vector;
};

template <typename T>
constexpr int kMaxScaleItems = 4096 / sizeof(ScaleItem<T>);
template <typename T>
struct ScaleArgs {
  ScaleItem<T> items[kMaxScaleItems<T>];
};
static_assert(kMaxScaleItems<float> >= 54, "the weights of a ResNet-50 are one launch");

// Where an element lies: the slices of both dimensions, and its places behind them. Found by division once
// for an access, then counted on.
template <typename T, bool kShrink>
struct Place {
  const ScaleItem<T>& item;
  uint32_t first, middle, second, inner;

  __device__ __forceinline__ Place(const ScaleItem<T>& item, uint64_t element) : item(item) {
    const uint64_t slice = element / item.inner, run = slice / item.seconds, outer = run / item.middle;
    inner = static_cast<uint32_t>(element - slice * item.inner);
    second = static_cast<uint32_t>(slice - run * item.seconds);
    middle = static_cast<uint32_t>(run - outer * item.middle);
    first = static_cast<uint32_t>(outer % item.firsts);
  }
  __device__ __forceinline__ void next() {
    if (++inner < item.inner) return;
    inner = 0;
    if (++second < item.seconds) return;
    second = 0;
    if (++middle < item.middle) return;
    middle = 0;
    if (++first == item.firsts) first = 0;
  }
  __device__ __forceinline__ Compute<T> factor() const {
    using C = Compute<T>;
    const C none = kShrink ? C(1) : C(0);
    const C a = item.first ? item.first[first] : none, b = item.second ? item.second[second] : none;
    return kShrink ? a * b : a + b;
  }
};

template <typename T, bool kShrink, bool kVector>
__device__ __forceinline__ void scale(const ScaleItem<T>& item, int64_t element, int count,
                                      const uint4& raw_weight, const uint4& raw_grad) {
  using C = Compute<T>;
  constexpr int V = kVec<T>;
  C w[V], out[V];
  unpack<T>(raw_weight, w);
  if (!kShrink) unpack<T>(raw_grad, out);
  Place<T, kShrink> place(item, static_cast<uint64_t>(element));
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (kVector || k < count) {  // no factors behind the last element
      const C factor = place.factor();
      if (kShrink) {
        const C product = w[k] * factor;
        out[k] = fabs(product) <= item.tau ? C(0) : product;
      } else {
        out[k] += w[k] * (factor + (fabs(w[k]) <= item.tau ? item.slope : C(0)));
      }
      if (k + 1 < V) place.next();
    } else {
      out[k] = 0;
    }
  }
  store<T, kVector>(kShrink ? item.weight : item.grad, element, count, pack<T>(out));
}

// Four blocks when shrinking: left to itself, ptxas takes 48 registers for sm_90 in half precision, and
// spills.
template <typename T, bool kShrink>
__global__ void __launch_bounds__(kThreads, kShrink ? 4 : 1)
    scale_kernel(const __grid_constant__ ScaleArgs<T> args) {
  constexpr int V = kVec<T>;
  int64_t block;
  const ScaleItem<T>& item = args.items[item_of_block(args.items, block)];
  const int64_t begin = block * (kThreads * V * kAccesses) + threadIdx.x * V;
  uint4 weight[kAccesses], grad[kAccesses];
  const bool whole =
      item.vector && item.numel - block * (kThreads * V * kAccesses) >= kThreads * V * kAccesses;
  if (whole) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      weight[i] = load<T, true>(item.weight, begin + i * (kThreads * V), V);
      grad[i] = kShrink ? weight[i] : load<T, true>(item.grad, begin + i * (kThreads * V), V);
    }
#pragma unroll
    for (int i = 0; i < kAccesses; ++i)
      scale<T, kShrink, true>(item, begin + i * (kThreads * V), V, weight[i], grad[i]);
  } else {
#pragma unroll 1
    for (int i = 0; i < kAccesses; ++i) {
      const int64_t element = begin + i * (kThreads * V), left = item.numel - element;
      if (left <= 0) return;
      const int count = static_cast<int>(left > V ? V : left);
      weight[0] = load<T, false>(item.weight, element, count);
      grad[0] = kShrink ? weight[0] : load<T, false>(item.grad, element, count);
      scale<T, kShrink, false>(item, element, count, weight[0], grad[0]);
    }
  }
}

bool fits(int64_t size) { return size <= UINT32_MAX; }

template <typename T, bool kShrink>
cudaError_t launch_scaling(const ScaledTensor* tensors, int64_t num_tensors, DType dtype,
                           cudaStream_t stream) {
  using C = Compute<T>;
  constexpr int64_t kBlock = kThreads * kVec<T> * kAccesses;
  auto launches = launch<ScaleArgs<T>, kMaxScaleItems<T>>([&](const ScaleArgs<T>& args, uint32_t blocks) {
    FFR_LAUNCH((scale_kernel<T, kShrink>), blocks, kThreads, 0, stream, args);
  });
  for (int64_t i = 0; i < num_tensors; ++i) {
    const ScaledTensor& t = tensors[i];
    const PairSplit& s = t.split;
    if (t.dtype != dtype || numel(s) == 0) continue;
    if (!fits(s.first) || !fits(s.second) || !fits(s.middle) || !fits(s.inner)) return cudaErrorInvalidValue;
    ScaleItem<T> item = {};
    item.weight = t.weight;
    item.grad = t.grad;
    item.first = static_cast<const C*>(first_factors(t));
    item.second = static_cast<const C*>(second_factors(t));
    item.numel = numel(s);
    item.firsts = static_cast<uint32_t>(s.first);
    item.seconds = static_cast<uint32_t>(s.second);
    item.middle = static_cast<uint32_t>(s.middle);
    item.inner = static_cast<uint32_t>(s.inner);
    item.slope = static_cast<C>(t.slope);
    item.tau = static_cast<C>(t.tau);
    item.vector = aligned(t.weight) && (kShrink || aligned(t.grad));
    if (const cudaError_t error = launches.add(item, ceil_div(item.numel, kBlock))) return error;
  }
  return launches.finish();
}

template <bool kShrink>
cudaError_t scale_all(const ScaledTensor* tensors, int64_t num_tensors, cudaStream_t stream) {
  cudaError_t error = launch_scaling<Float16, kShrink>(tensors, num_tensors, DType::kFloat16, stream);
  if (!error) error = launch_scaling<BFloat16, kShrink>(tensors, num_tensors, DType::kBFloat16, stream);
  if (!error) error = launch_scaling<float, kShrink>(tensors, num_tensors, DType::kFloat32, stream);
  if (!error) error = launch_scaling<double, kShrink>(tensors, num_tensors, DType::kFloat64, stream);
  return error;
}

}  // namespace

int add_scaled(const ScaledTensor* tensors, int64_t num_tensors, void* stream_handle) {
  return scale_all<false>(tensors, num_tensors, static_cast<cudaStream_t>(stream_handle));
}

int shrink(const ScaledTensor* tensors, int64_t num_tensors, void* stream_handle) {
  return scale_all<true>(tensors, num_tensors, static_cast<cudaStream_t>(stream_handle));
}

}  // namespace ffr::cuda
