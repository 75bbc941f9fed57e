// filter_norms and compact_filters: one launch for a list of tensors of any shapes and dtypes.

#if defined(__CUDACC__)
#include <cub/block/block_reduce.cuh>
#endif

#include <algorithm>
#include <cmath>

#include "device.h"
#include "filters.h"

namespace ffr::cuda {
namespace {

constexpr int kThreads = 256;
// Tensors of a launch: their descriptions fill less than the 4 KiB of arguments that every toolkit and GPU
// takes. A ResNet-50 has 54 weights.
constexpr int kMaxTensors = 56;

// ---------------------------------------------------------------------------------- norms

enum class Norm : int32_t { kOne, kTwo, kInf };

struct NormItem {
  const void* data;
  int64_t outer;
  int64_t inner;
  double* norms;
  uint32_t filters;
  uint32_t blocks_end;  // a block is a filter: of this and all earlier tensors of the launch
  DType dtype;
};

struct NormArgs {
  NormItem items[kMaxTensors];
  Norm norm;
};
static_assert(sizeof(NormArgs) <= 4096, "kernel arguments");

__device__ __forceinline__ double element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat16:
      return to_compute(static_cast<const Float16*>(data)[i]);
    case DType::kBFloat16:
      return to_compute(static_cast<const BFloat16*>(data)[i]);
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kFloat64:
      return static_cast<const double*>(data)[i];
  }
  return 0;
}

// The larger one, or NaN if one of them is: fmax would drop it.
struct MaxOrNan {
  __device__ __forceinline__ double operator()(double a, double b) const { return a > b || a != a ? a : b; }
};

__global__ void __launch_bounds__(kThreads) norms_kernel(const __grid_constant__ NormArgs args) {
  int index = 0;
  while (blockIdx.x >= args.items[index].blocks_end) ++index;
  const NormItem& item = args.items[index];
  const int64_t filter = blockIdx.x - (index ? args.items[index - 1].blocks_end : 0);
  double result = 0;
  // The storage is [outer][filters][inner]. Threads run along a filter's inner elements; when those are few
  // (a 3 x 3 kernel seen from its input channels), over several outer ones at a time.
  const int64_t columns = std::min<int64_t>(item.inner, kThreads);
  const int64_t rows = columns > 0 ? kThreads / columns : 0;  // outer elements at a time
  const int64_t row = columns > 0 ? threadIdx.x / columns : 0,
                column = columns > 0 ? threadIdx.x % columns : 0;
  if (row < rows) {
    for (int64_t outer = row; outer < item.outer; outer += rows) {
      const int64_t begin = (outer * item.filters + filter) * item.inner;
      for (int64_t i = column; i < item.inner; i += columns) {
        const double value = element(item.data, item.dtype, begin + i);
        if (args.norm == Norm::kTwo) {
          result += value * value;
        } else if (args.norm == Norm::kOne) {
          result += fabs(value);
        } else {
          result = MaxOrNan()(fabs(value), result);
        }
      }
    }
  }
  using Reduce = cub::BlockReduce<double, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  result = args.norm == Norm::kInf ? Reduce(storage).Reduce(result, MaxOrNan()) : Reduce(storage).Sum(result);
  if (threadIdx.x == 0) item.norms[filter] = args.norm == Norm::kTwo ? sqrt(result) : result;
}

// ---------------------------------------------------------------------------------- gathering

constexpr int kUnitsPerThread = 4;

// A row is the `inner` part of one index: contiguous in source and target, moved in units of 1 to 16 bytes.
struct GatherItem {
  const char* source;
  char* target;
  const int64_t* keep;
  int64_t dim;
  int64_t units;  // in all: outer * num_keep * row_units
  int64_t row_units;
  uint32_t num_keep;
  uint32_t blocks_end;  // of this and all earlier tensors of the launch
  int32_t unit;         // bytes
};

struct GatherArgs {
  GatherItem items[kMaxTensors];
};
static_assert(sizeof(GatherArgs) <= 4096, "kernel arguments");

template <typename Unit>
__device__ __forceinline__ void gather(const GatherItem& item, int64_t first) {
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit >= item.units) return;
    const int64_t row = unit / item.row_units, column = unit % item.row_units;
    const int64_t outer = row / item.num_keep, kept = item.keep[row % item.num_keep];
    if (kept < 0 || kept >= item.dim) __trap();  // would read past the tensor
    reinterpret_cast<Unit*>(item.target)[unit] =
        reinterpret_cast<const Unit*>(item.source)[(outer * item.dim + kept) * item.row_units + column];
  }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherArgs args) {
  int index = 0;
  while (blockIdx.x >= args.items[index].blocks_end) ++index;
  const GatherItem& item = args.items[index];
  const int64_t block = blockIdx.x - (index ? args.items[index - 1].blocks_end : 0);
  const int64_t first = block * kThreads * kUnitsPerThread + threadIdx.x;
  switch (item.unit) {
    case 16:
      return gather<uint4>(item, first);
    case 8:
      return gather<uint64_t>(item, first);
    case 4:
      return gather<uint32_t>(item, first);
    case 2:
      return gather<uint16_t>(item, first);
    default:
      return gather<uint8_t>(item, first);
  }
}

// The widest unit that divides a row and the addresses it starts from.
int32_t widest_unit(const GatherTensor& tensor, int64_t row_bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(tensor.source) |
                        reinterpret_cast<uintptr_t>(tensor.target) | static_cast<uint64_t>(row_bytes) | 16u;
  return static_cast<int32_t>(bits & (~bits + 1));
}

}  // namespace

int filter_norms(const NormTensor* tensors, int64_t num_tensors, double p, double* const* norms,
                 void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  NormArgs args = {};
  args.norm = p == 1.0 ? Norm::kOne : p == 2.0 ? Norm::kTwo : Norm::kInf;
  int used = 0;
  int64_t blocks = 0;
  for (int64_t i = 0; i <= num_tensors; ++i) {
    const int64_t filters = i < num_tensors ? tensors[i].split.dim : 0;
    if (used > 0 && (i == num_tensors || used == kMaxTensors || blocks + filters > INT32_MAX)) {
      FFR_LAUNCH(norms_kernel, static_cast<uint32_t>(blocks), kThreads, 0, stream, args);
      if (const cudaError_t error = cudaGetLastError()) return error;
      used = 0;
      blocks = 0;
    }
    if (filters == 0) continue;
    const DimSplit& split = tensors[i].split;
    blocks += filters;
    args.items[used++] = {tensors[i].data, split.inner > 0 ? split.outer : 0, split.inner,
                          norms[i],        static_cast<uint32_t>(filters),    static_cast<uint32_t>(blocks),
                          tensors[i].dtype};
  }
  return cudaSuccess;
}

int compact_filters(const GatherTensor* tensors, int64_t num_tensors, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  GatherArgs args = {};
  int used = 0;
  int64_t blocks = 0;
  for (int64_t i = 0; i <= num_tensors; ++i) {
    GatherItem item = {};
    int64_t needed = 0;
    if (i < num_tensors) {
      const GatherTensor& tensor = tensors[i];
      const int64_t row_bytes = tensor.split.inner * tensor.element_size;
      item.unit = widest_unit(tensor, row_bytes);
      item.row_units = row_bytes / item.unit;
      item.units = tensor.split.outer * tensor.num_keep * item.row_units;
      item.source = static_cast<const char*>(tensor.source);
      item.target = static_cast<char*>(tensor.target);
      item.keep = tensor.keep;
      item.dim = tensor.split.dim;
      item.num_keep = static_cast<uint32_t>(tensor.num_keep);
      needed = (item.units + kThreads * kUnitsPerThread - 1) / (kThreads * kUnitsPerThread);
    }
    if (used > 0 && (i == num_tensors || used == kMaxTensors || blocks + needed > INT32_MAX)) {
      FFR_LAUNCH(gather_kernel, static_cast<uint32_t>(blocks), kThreads, 0, stream, args);
      if (const cudaError_t error = cudaGetLastError()) return error;
      used = 0;
      blocks = 0;
    }
    if (needed == 0) continue;
    blocks += needed;
    item.blocks_end = static_cast<uint32_t>(blocks);
    args.items[used++] = item;
  }
  return cudaSuccess;
}

}  // namespace ffr::cuda
