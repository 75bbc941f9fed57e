#include "filters.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "rows/rows.h"
#include "stream.h"
#include "work.h"

namespace ffr {
namespace {

constexpr int64_t kChunkBytes = 131072;

// Filters whose elements lie in many short runs (dim 1, or channels_last) or in one very short run (a bias):
// a column of sums for each place in a run is kept, and the runs of neighbouring filters are added to the
// columns as one long run.
constexpr int64_t kColumns = 1024;  // 8 KiB of sums: a quarter of the L1 cache

bool by_columns(const DimSplit& split) {
  return split.inner <= (split.outer > 1 ? kColumns / 8 : kColumns / 128);
}

int64_t filters_per_chunk(const DimSplit& split) {
  const int64_t wanted = kChunkElements / std::max<int64_t>(split.outer * split.inner, 1);
  if (!by_columns(split)) return std::max<int64_t>(wanted, 1);
  // At least 128 elements side by side, so that a chunk does not share most of its cache lines with the next.
  const int64_t inner = std::max<int64_t>(split.inner, 1);
  return std::clamp(wanted, ceil_div(128, inner), kColumns / inner);
}

void norms_of_chunk(const NormTensor& tensor, Norm norm, int64_t begin, int64_t end, double* norms) {
  const DimSplit& split = tensor.split;
  const int type = static_cast<int>(tensor.dtype);
  const auto at = [&](int64_t outer, int64_t filter) {
    const int64_t element = (outer * split.dim + filter) * split.inner;
    return static_cast<const char*>(tensor.data) + element * element_size(tensor.dtype);
  };
  std::fill(norms + begin, norms + end, 0.0);
  if (by_columns(split)) {
    const AddNormColumns add = row_kernels().add_norm_columns[type][static_cast<int>(norm)];
    double columns[kColumns] = {};
    const int64_t count = (end - begin) * split.inner;
    for (int64_t outer = 0; outer < split.outer; ++outer) add(at(outer, begin), count, columns);
    const double* column = columns;
    for (int64_t filter = begin; filter < end; ++filter)
      for (int64_t i = 0; i < split.inner; ++i) norms[filter] = combine(norm, norms[filter], *column++);
  } else {
    const NormOfRun norm_of_run = row_kernels().norm_of_run[type][static_cast<int>(norm)];
    for (int64_t outer = 0; outer < split.outer; ++outer)
      for (int64_t filter = begin; filter < end; ++filter)
        norms[filter] = combine(norm, norms[filter], norm_of_run(at(outer, filter), split.inner));
  }
  if (norm == Norm::kL2)
    for (int64_t filter = begin; filter < end; ++filter) norms[filter] = sqrt(norms[filter]);
}

// Copies `rows` slices of a fixed small size by index; the compiler turns each copy into one load and one
// store.
template <int kBytes>
void gather_fixed(const char* source, const int64_t* keep, int64_t rows, char* target) {
  for (int64_t k = 0; k < rows; ++k) memcpy(target + k * kBytes, source + keep[k] * kBytes, kBytes);
}

// The processor prefetches along a row by itself once it has seen a few lines of it.
void prefetch_start(const char* row, int64_t bytes) {
  for (int64_t byte = 0; byte < std::min<int64_t>(bytes, 1024); byte += 64) __builtin_prefetch(row + byte);
}

constexpr int64_t kLine = 64;

// Copies past the cache: whole lines of the target, and what is left at both ends as usual.
void stream(char* target, const char* source, int64_t bytes) {
#if defined(__x86_64__)
  const int64_t head = std::min<int64_t>(-reinterpret_cast<intptr_t>(target) & (kLine - 1), bytes);
  memcpy(target, source, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
    for (int64_t part = 0; part < kLine; part += 16) {
      const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at + part), word);
    }
  }
  memcpy(target + at, source + at, static_cast<size_t>(bytes - at));
#else
  memcpy(target, source, static_cast<size_t>(bytes));
#endif
}

void gather(const char* source, const int64_t* keep, int64_t rows, int64_t bytes, bool streamed,
            char* target) {
  switch (bytes) {
    case 1:
      return gather_fixed<1>(source, keep, rows, target);
    case 2:
      return gather_fixed<2>(source, keep, rows, target);
    case 4:
      return gather_fixed<4>(source, keep, rows, target);
    case 8:
      return gather_fixed<8>(source, keep, rows, target);
    case 16:
      return gather_fixed<16>(source, keep, rows, target);
    case 18:  // 3x3 of half
      return gather_fixed<18>(source, keep, rows, target);
    case 36:  // 3x3 of fp32
      return gather_fixed<36>(source, keep, rows, target);
  }
  // Indices that follow each other are one copy.
  for (int64_t k = 0; k < rows;) {
    int64_t run = 1;
    while (k + run < rows && keep[k + run] == keep[k] + run) ++run;
    if (k + run < rows) prefetch_start(source + keep[k + run] * bytes, bytes);
    char* to = target + k * bytes;
    const char* from = source + keep[k] * bytes;
    if (streamed && run * bytes >= 4 * kLine) {
      stream(to, from, run * bytes);
    } else {
      memcpy(to, from, static_cast<size_t>(run * bytes));
    }
    k += run;
  }
}

}  // namespace

bool split_at_dim(const int64_t* sizes, const int64_t* strides, int64_t rank, int64_t dim, DimSplit* split) {
  int64_t numel = 1;
  std::vector<int64_t> order;
  for (int64_t i = 0; i < rank; ++i) {
    numel *= sizes[i];
    if (sizes[i] != 1) order.push_back(i);  // the stride of a dimension of one element means nothing
  }
  if (numel == 0 || sizes[dim] == 1) {
    int64_t others = 1;
    for (int64_t i = 0; i < rank; ++i) others *= i == dim ? 1 : sizes[i];
    *split = {1, sizes[dim], others};
    if (numel == 0) return true;
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const int64_t i : order) {
    if (strides[i] != expected) return false;
    if (i == dim) *split = {numel / (expected * sizes[i]), sizes[i], expected};
    expected *= sizes[i];
  }
  return true;
}

void filter_norms(const NormTensor* tensors, int64_t num_tensors, double p, double* const* norms,
                  ParallelFor parallel_for) {
  const Norm norm = norm_of(p);
  Work work;  // in elements, and for each filter what its root and its share of the calls cost
  for (int64_t i = 0; i < num_tensors; ++i) {
    const DimSplit& split = tensors[i].split;
    const int64_t of_filter = split.outer * split.inner + 8;
    work.add(split.dim * of_filter, filters_per_chunk(split) * of_filter);
  }
  for_each_chunk(work, kChunkElements, parallel_for, [&](size_t number, int64_t chunk) {
    const NormTensor& tensor = tensors[number];
    const int64_t size = filters_per_chunk(tensor.split), begin = chunk * size;
    norms_of_chunk(tensor, norm, begin, std::min(begin + size, tensor.split.dim), norms[number]);
  });
}

void compact_filters(const GatherTensor* tensors, int64_t num_tensors, ParallelFor parallel_for) {
  // A chunk is a range of slices [outer][kept] of one target.
  const auto slice_bytes = [](const GatherTensor& t) { return t.split.inner * t.element_size; };
  const auto slices_per_chunk = [&](const GatherTensor& t) {
    return std::max<int64_t>(kChunkBytes / std::max<int64_t>(slice_bytes(t), 1), 1);
  };
  Work work;  // in bytes
  for (int64_t i = 0; i < num_tensors; ++i) {
    const GatherTensor& t = tensors[i];
    work.add(t.split.outer * t.num_keep * slice_bytes(t), slices_per_chunk(t) * slice_bytes(t));
  }
  const bool streamed = work.first.back() >= kStreamBytes;
  for_each_chunk(work, kChunkBytes, parallel_for, [&](size_t number, int64_t chunk) {
    const GatherTensor& t = tensors[number];
    const int64_t size = slice_bytes(t), slices = t.split.outer * t.num_keep;
    const int64_t end = std::min((chunk + 1) * slices_per_chunk(t), slices);
    for (int64_t slice = chunk * slices_per_chunk(t); slice < end;) {
      const int64_t outer = slice / t.num_keep, k = slice % t.num_keep;
      const int64_t rows = std::min(t.num_keep - k, end - slice);
      gather(static_cast<const char*>(t.source) + outer * t.split.dim * size, t.keep + k, rows, size,
             streamed, static_cast<char*>(t.target) + slice * size);
      slice += rows;
    }
    if (streamed) stream_fence();
  });
}

}  // namespace ffr
