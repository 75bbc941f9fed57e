// Norms of rows and columns in one read; a second launch adds up what the blocks have left.

#include "group_launch.h"
#include "groups.h"

namespace ffr::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

enum class Norm : int32_t { kOne, kTwo, kInf };

template <Norm kNorm>
__device__ __forceinline__ double combine(double a, double b) {
  if (kNorm != Norm::kInf) return a + b;
  return b > a || b != b ? b : a;  // a NaN gets in by the second test, and stays
}

template <Norm kNorm>
__device__ __forceinline__ double term(double x) {
  return kNorm == Norm::kTwo ? x * x : fabs(x);
}

// A block's tile of the matrix of runs: an access of each lane wide, and kRowsAhead rows, all in flight,
// twice for each warp. 128 rows leave 8 bytes of sums for every 512 bytes of fp32 in either direction.
constexpr int kRowsAhead = 8;
constexpr int kWarpRows = 2 * kRowsAhead;
constexpr int kTileRows = kWarps * kWarpRows;
inline int64_t tile_columns(DType dtype) { return 32 * kAccessBytes / element_size(dtype); }

struct Tiles {
  int64_t down, across;
  explicit Tiles(const PairNormTensor& t)
      : down(ceil_div(num_runs(t.split), kTileRows)),
        across(ceil_div(run_length(t.split), tile_columns(t.dtype))) {}
};

// The sums of a tensor: of each run in each tile [across][runs], then of each column in each tile
// [down][columns].
int64_t num_sums(const PairNormTensor& t) {
  const Tiles tiles(t);
  return tiles.across * num_runs(t.split) + tiles.down * run_length(t.split);
}

struct NormItem {
  const void* data;
  double* sums;
  int64_t runs;
  int64_t columns;
  uint32_t across;
  uint32_t blocks_end;
  bool vector;
};

constexpr int kMaxNormItems = 84;
struct NormArgs {
  NormItem items[kMaxNormItems];
};
static_assert(sizeof(NormArgs) <= 4096, "kernel arguments");

__device__ __forceinline__ double shuffle_double(double value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Afterwards every lane of quad q (lanes 4 q .. 4 q + 3) holds the combination of values[q] over the warp.
template <Norm kNorm>
__device__ __forceinline__ double reduce_to_quads(double (&values)[kRowsAhead]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = kRowsAhead / 2, bit = 16; half >= 1; half /= 2, bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const double send = upper ? values[i] : values[i + half];
      const double keep = upper ? values[i + half] : values[i];
      values[i] = combine<kNorm>(keep, shuffle_double(send, bit));
    }
  }
  const double sum = combine<kNorm>(values[0], shuffle_double(values[0], 2));
  return combine<kNorm>(sum, shuffle_double(sum, 1));
}

template <typename T, Norm kNorm, bool kVector>
__device__ __forceinline__ void sum_rows(const NormItem& item, int64_t row, int64_t column, int count,
                                         double* of_rows, double (&of_columns)[kVec<T>]) {
  uint4 raw[kRowsAhead];
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    raw[i] = make_uint4(0, 0, 0, 0);  // adds nothing to any norm
    if (row + i < item.runs && count > 0)
      raw[i] = load<T, kVector>(item.data, (row + i) * item.columns + column, count);
  }
  double sums[kRowsAhead];
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    Compute<T> x[kVec<T>];
    unpack<T>(raw[i], x);
    sums[i] = 0;
#pragma unroll
    for (int k = 0; k < kVec<T>; ++k) {
      const double value = term<kNorm>(x[k]);
      sums[i] = combine<kNorm>(sums[i], value);
      of_columns[k] = combine<kNorm>(of_columns[k], value);
    }
  }
  const double sum = reduce_to_quads<kNorm>(sums);
  const int lane = threadIdx.x % 32;
  if (lane % 4 == 0 && row + lane / 4 < item.runs) of_rows[row + lane / 4] = sum;
}

template <typename T, Norm kNorm>
__global__ void __launch_bounds__(kThreads) pair_norms_kernel(const __grid_constant__ NormArgs args) {
  constexpr int V = kVec<T>, kColumns = 32 * V;
  __shared__ double of_warps[kWarps][kColumns];
  int64_t block;
  const NormItem& item = args.items[item_of_block(args.items, block)];
  const int64_t down = block / item.across, across = block % item.across;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = across * kColumns + lane * V, left = item.columns - column;
  const int count = static_cast<int>(left < 0 ? 0 : left > V ? V : left);
  double* of_rows = item.sums + across * item.runs;
  double of_columns[V];
#pragma unroll
  for (int k = 0; k < V; ++k) of_columns[k] = 0;
  const bool whole = item.vector && item.columns - across * kColumns >= kColumns;  // the same for all lanes
#pragma unroll 1
  for (int part = 0; part < kWarpRows / kRowsAhead; ++part) {
    const int64_t row = down * kTileRows + warp * kWarpRows + part * kRowsAhead;
    if (whole) {
      sum_rows<T, kNorm, true>(item, row, column, V, of_rows, of_columns);
    } else {
      sum_rows<T, kNorm, false>(item, row, column, count, of_rows, of_columns);
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) of_warps[warp][lane * V + k] = of_columns[k];
  __syncthreads();
  double* sums = item.sums + item.across * item.runs + down * item.columns;
  for (int i = threadIdx.x; i < kColumns; i += kThreads) {
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum = combine<kNorm>(sum, of_warps[w][i]);
    if (across * kColumns + i < item.columns) sums[across * kColumns + i] = sum;
  }
}

struct AddItem {
  const double* sums;
  double* firsts;
  double* seconds;
  int64_t outer, middle, inner;
  uint32_t first, second;
  uint32_t across, down;
  uint32_t blocks_end;
};

constexpr int kMaxAddItems = 56;
struct AddArgs {
  AddItem items[kMaxAddItems];
};
static_assert(sizeof(AddArgs) <= 4096, "kernel arguments");

// A warp for each slice.
template <Norm kNorm>
__global__ void __launch_bounds__(kThreads) add_sums_kernel(const __grid_constant__ AddArgs args) {
  int64_t block;
  const AddItem& item = args.items[item_of_block(args.items, block)];
  const int64_t slice = block * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t runs = item.outer * item.first * item.middle;
  double sum = 0;
  if (slice < item.first) {
    const int64_t each = item.outer * item.middle;
    for (int64_t i = lane; i < item.across * each; i += 32) {
      const int64_t outer = i % each / item.middle;
      const int64_t run = (outer * item.first + slice) * item.middle + i % item.middle;
      sum = combine<kNorm>(sum, item.sums[i / each * runs + run]);
    }
  } else if (slice < static_cast<int64_t>(item.first) + item.second) {
    const double* sums = item.sums + item.across * runs;
    const int64_t columns = item.second * item.inner, begin = (slice - item.first) * item.inner;
    for (int64_t i = lane; i < item.down * item.inner; i += 32)
      sum = combine<kNorm>(sum, sums[i / item.inner * columns + begin + i % item.inner]);
  }
#pragma unroll
  for (int bit = 16; bit >= 1; bit /= 2) sum = combine<kNorm>(sum, shuffle_double(sum, bit));
  if (kNorm == Norm::kTwo) sum = sqrt(sum);
  if (lane != 0) return;
  if (slice < item.first) {
    item.firsts[slice] = sum;
  } else if (slice < static_cast<int64_t>(item.first) + item.second) {
    item.seconds[slice - item.first] = sum;
  }
}
template <typename T, Norm kNorm>
cudaError_t launch_norms(const PairNormTensor* tensors, int64_t num_tensors, DType dtype, double* sums,
                         cudaStream_t stream) {
  auto launches = launch<NormArgs, kMaxNormItems>([&](const NormArgs& args, uint32_t blocks) {
    FFR_LAUNCH((pair_norms_kernel<T, kNorm>), blocks, kThreads, 0, stream, args);
  });
  for (int64_t i = 0; i < num_tensors; sums += num_sums(tensors[i++])) {
    const PairNormTensor& t = tensors[i];
    if (t.dtype != dtype || numel(t.split) == 0) continue;
    const Tiles tiles(t);
    const int64_t columns = run_length(t.split);
    const bool vector = aligned(t.data) && columns * element_size(dtype) % kAccessBytes == 0;
    const NormItem item = {t.data, sums,  num_runs(t.split), columns, static_cast<uint32_t>(tiles.across),
                           0,      vector};
    if (const cudaError_t error = launches.add(item, tiles.down * tiles.across)) return error;
  }
  return launches.finish();
}

template <Norm kNorm>
cudaError_t launch_adding(const PairNormTensor* tensors, int64_t num_tensors, const double* sums,
                          cudaStream_t stream) {
  auto launches = launch<AddArgs, kMaxAddItems>([&](const AddArgs& args, uint32_t blocks) {
    FFR_LAUNCH((add_sums_kernel<kNorm>), blocks, kThreads, 0, stream, args);
  });
  for (int64_t i = 0; i < num_tensors; sums += num_sums(tensors[i++])) {
    const PairNormTensor& t = tensors[i];
    const PairSplit& s = t.split;
    const Tiles tiles(t);
    const int64_t slices = s.first + s.second;
    if (slices == 0) continue;
    AddItem item = {};
    item.sums = sums;
    item.firsts = s.rows_first ? t.rows : t.columns;
    item.seconds = s.rows_first ? t.columns : t.rows;
    item.outer = s.outer;
    item.middle = s.middle;
    item.inner = s.inner;
    item.first = static_cast<uint32_t>(s.first);
    item.second = static_cast<uint32_t>(s.second);
    item.across = static_cast<uint32_t>(tiles.across);
    item.down = static_cast<uint32_t>(tiles.down);
    if (const cudaError_t error = launches.add(item, ceil_div(slices, kWarps))) return error;
  }
  return launches.finish();
}

template <Norm kNorm>
cudaError_t norms_of(const PairNormTensor* tensors, int64_t num_tensors, double* sums, cudaStream_t stream) {
  cudaError_t error = launch_norms<Float16, kNorm>(tensors, num_tensors, DType::kFloat16, sums, stream);
  if (!error) error = launch_norms<BFloat16, kNorm>(tensors, num_tensors, DType::kBFloat16, sums, stream);
  if (!error) error = launch_norms<float, kNorm>(tensors, num_tensors, DType::kFloat32, sums, stream);
  if (!error) error = launch_norms<double, kNorm>(tensors, num_tensors, DType::kFloat64, sums, stream);
  return error ? error : launch_adding<kNorm>(tensors, num_tensors, sums, stream);
}

}  // namespace

int64_t row_column_norms_scratch(const PairNormTensor* tensors, int64_t num_tensors) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_tensors; ++i) total += num_sums(tensors[i]);
  return total;
}

int row_column_norms(const PairNormTensor* tensors, int64_t num_tensors, double p, double* scratch,
                     void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (p == 1.0) return norms_of<Norm::kOne>(tensors, num_tensors, scratch, stream);
  if (p == 2.0) return norms_of<Norm::kTwo>(tensors, num_tensors, scratch, stream);
  return norms_of<Norm::kInf>(tensors, num_tensors, scratch, stream);
}

}  // namespace ffr::cuda
