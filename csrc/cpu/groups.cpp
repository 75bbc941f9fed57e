#include "groups.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "filters.h"
#include "rows/rows.h"
#include "work.h"

namespace ffr {
namespace {

// ---------------------------------------------------------------------------------- norms

// A chunk is some runs, and of long runs a strip: its sums of the columns must stay in the second-level
// cache.
constexpr int64_t kStrip = 8192;           // 64 KiB of sums
constexpr int64_t kNormChunk = 4 * 32768;  // elements: the columns of a chunk are added up a second time

struct NormChunks {
  int64_t strip, strips;  // elements of a run
  int64_t runs, chunks;   // runs of a chunk

  explicit NormChunks(const PairSplit& s) {
    strips = ceil_div(run_length(s), kStrip);
    strip = ceil_div(ceil_div(run_length(s), strips), s.inner) * s.inner;  // whole slices of `second`
    strips = ceil_div(run_length(s), strip);
    runs = std::max<int64_t>(kNormChunk / strip, 1);
    chunks = ceil_div(num_runs(s), runs);
  }
};

// Where the sums of one tensor lie: of each run and strip, and of each slice of `second` and chunk.
struct NormSums {
  double* of_runs;     // [strips][runs]
  double* of_seconds;  // [chunks][second]
};

void sums_of_chunk(const PairNormTensor& t, Norm norm, const NormChunks& chunks, int64_t number,
                   const NormSums& sums) {
  const PairSplit& s = t.split;
  const int64_t chunk = number / chunks.strips, strip = number % chunks.strips;
  const int64_t begin = strip * chunks.strip, count = std::min(chunks.strip, run_length(s) - begin);
  const AddNorms add = row_kernels().add_norms[static_cast<int>(t.dtype)][static_cast<int>(norm)];
  std::vector<double> columns(static_cast<size_t>(count) + 32);
  const int64_t end = std::min((chunk + 1) * chunks.runs, num_runs(s));
  for (int64_t run = chunk * chunks.runs; run < end; ++run) {
    const char* data =
        static_cast<const char*>(t.data) + (run * run_length(s) + begin) * element_size(t.dtype);
    sums.of_runs[strip * num_runs(s) + run] = add(data, count, columns.data());
  }
  double* second = sums.of_seconds + chunk * s.second + begin / s.inner;
  const double* column = columns.data();
  for (int64_t i = 0; i < count; i += s.inner, ++second) {
    double sum = 0.0;
    for (int64_t k = 0; k < s.inner; ++k) sum = combine(norm, sum, *column++);
    *second = sum;
  }
}

void finish(Norm norm, double* norms, int64_t count) {
  if (norm != Norm::kL2) return;
  for (int64_t i = 0; i < count; ++i) norms[i] = sqrt(norms[i]);
}

void add_sums(const PairNormTensor& t, Norm norm, const NormChunks& chunks, const NormSums& sums) {
  const PairSplit& s = t.split;
  double *firsts = s.rows_first ? t.rows : t.columns, *seconds = s.rows_first ? t.columns : t.rows;
  std::fill(firsts, firsts + s.first, 0.0);
  std::fill(seconds, seconds + s.second, 0.0);
  for (int64_t i = 0; i < chunks.strips * num_runs(s); ++i) {
    double& sum = firsts[i / s.middle % s.first];
    sum = combine(norm, sum, sums.of_runs[i]);
  }
  for (int64_t chunk = 0; chunk < chunks.chunks; ++chunk)
    for (int64_t i = 0; i < s.second; ++i)
      seconds[i] = combine(norm, seconds[i], sums.of_seconds[chunk * s.second + i]);
  finish(norm, firsts, s.first);
  finish(norm, seconds, s.second);
}

// One slice of `second`: its norm is that of the norms of the others.
void norms_beside_one(const PairNormTensor& t, double p, ParallelFor parallel_for) {
  const PairSplit& s = t.split;
  double *firsts = s.rows_first ? t.rows : t.columns, *second = s.rows_first ? t.columns : t.rows;
  const NormTensor tensor{t.dtype, {s.outer, s.first, s.middle * s.inner}, t.data};
  filter_norms(&tensor, 1, p, &firsts, parallel_for);
  const Norm norm = norm_of(p);
  double sum = 0.0;
  for (int64_t i = 0; i < s.first; ++i)
    sum = combine(norm, sum, norm == Norm::kL2 ? firsts[i] * firsts[i] : firsts[i]);
  *second = norm == Norm::kL2 ? sqrt(sum) : sum;
}

// ---------------------------------------------------------------------------------- scaling

// Runs shorter than this get their factors one by one, several runs at a time.
constexpr int64_t kLongRun = 128;
constexpr int64_t kFactors = 2048;

// The factors of a chunk's elements, one after another in memory, and one more for all of them.
template <typename C, bool kProduct>
class Factors {
 public:
  explicit Factors(const ScaledTensor& t)
      : split_(t.split),
        first_(static_cast<const C*>(first_factors(t))),
        second_(static_cast<const C*>(second_factors(t))),
        length_(run_length(t.split)) {
    if (second_ == nullptr) {
      buffer_.assign(kFactors, kNone);
    } else if (length_ < kLongRun) {
      buffer_.resize(kFactors);
    } else if (split_.inner > 1) {  // every run has the same: spread once
      buffer_.resize(static_cast<size_t>(length_));
      spread(0, length_, buffer_.data());
    }
  }

  // body(element, count, factor, factors) for pieces of [begin, end).
  template <typename F>
  void for_each_piece(int64_t begin, int64_t end, const F& body) {
    for (int64_t at = begin; at < end;) {
      const int64_t run = at / length_, column = at % length_;
      int64_t count = std::min(length_ - column, end - at);
      if (second_ != nullptr && length_ >= kLongRun) {
        body(at, count, of_run(run), (split_.inner > 1 ? buffer_.data() : second_) + column);
      } else if (length_ >= kLongRun) {
        count = std::min(count, kFactors);
        body(at, count, of_run(run), buffer_.data());
      } else {
        count = std::min(kFactors, end - at);
        fill(run, column, count);
        body(at, count, kNone, buffer_.data());
      }
      at += count;
    }
  }

 private:
  static constexpr C kNone = kProduct ? C(1) : C(0);

  C of_run(int64_t run) const { return first_ ? first_[run / split_.middle % split_.first] : kNone; }

  void spread(int64_t begin, int64_t end, C* to) const {
    for (int64_t i = begin; i < end;) {
      const int64_t stop = std::min((i / split_.inner + 1) * split_.inner, end);
      const C factor = second_[i / split_.inner];
      for (; i < stop; ++i) *to++ = factor;
    }
  }

  void fill(int64_t run, int64_t column, int64_t count) {
    C* to = buffer_.data();
    for (; count > 0; ++run, column = 0) {
      const int64_t here = std::min(length_ - column, count);
      const C factor = of_run(run);
      if (second_ == nullptr) {
        std::fill(to, to + here, factor);
      } else {
        spread(column, column + here, to);
        for (int64_t i = 0; i < here; ++i) to[i] = kProduct ? factor * to[i] : factor + to[i];
      }
      to += here;
      count -= here;
    }
  }

  const PairSplit& split_;
  const C *first_, *second_;
  int64_t length_;
  std::vector<C> buffer_;
};

template <typename C, bool kProduct>
void scale_chunk(const ScaledTensor& t, int64_t begin, int64_t end) {
  const int type = static_cast<int>(t.dtype);
  const int64_t size = element_size(t.dtype);
  char *weight = static_cast<char*>(t.weight), *grad = static_cast<char*>(t.grad);
  const RowKernels& kernels = row_kernels();
  Factors<C, kProduct>(t).for_each_piece(
      begin, end, [&](int64_t at, int64_t count, C factor, const C* factors) {
        if (kProduct) {
          kernels.shrink[type](weight + at * size, factors, factor, count, t.tau);
        } else {
          kernels.add_scaled[type](grad + at * size, weight + at * size, factors, factor, count, t.slope,
                                   t.tau);
        }
      });
}

template <bool kProduct>
void scale(const ScaledTensor* tensors, int64_t num_tensors, ParallelFor parallel_for) {
  Work work;
  for (int64_t i = 0; i < num_tensors; ++i) work.add(numel(tensors[i].split), kChunkElements);
  for_each_chunk(work, kChunkElements, parallel_for, [&](size_t number, int64_t chunk) {
    const ScaledTensor& t = tensors[number];
    const int64_t begin = chunk * kChunkElements, end = std::min(begin + kChunkElements, numel(t.split));
    if (t.dtype == DType::kFloat64) {
      scale_chunk<double, kProduct>(t, begin, end);
    } else {
      scale_chunk<float, kProduct>(t, begin, end);
    }
  });
}

}  // namespace

bool split_at_rows_and_columns(const int64_t* sizes, const int64_t* strides, int64_t rank, PairSplit* split) {
  DimSplit rows, columns{1, 1, 1};
  if (!split_at_dim(sizes, strides, rank, 0, &rows)) return false;
  if (rank > 1) split_at_dim(sizes, strides, rank, 1, &columns);
  const int64_t elements = rows.outer * rows.dim * rows.inner;
  if (elements == 0) {
    *split = {0, rows.dim, 1, columns.dim, 1, true};
  } else if (columns.dim == 1) {
    *split = {rows.outer, rows.dim, 1, 1, rows.inner, true};
  } else if (rows.dim == 1) {
    *split = {columns.outer, columns.dim, 1, 1, columns.inner, false};
  } else if (rows.inner > columns.inner) {
    *split = {rows.outer,  rows.dim,      rows.inner / (columns.dim * columns.inner),
              columns.dim, columns.inner, true};
  } else {
    *split = {columns.outer, columns.dim, columns.inner / (rows.dim * rows.inner),
              rows.dim,      rows.inner,  false};
  }
  return true;
}

void row_column_norms(const PairNormTensor* tensors, int64_t num_tensors, double p,
                      ParallelFor parallel_for) {
  const Norm norm = norm_of(p);
  std::vector<const PairNormTensor*> pairs;
  std::vector<NormChunks> chunks;
  Work work, adding;
  int64_t places = 0;
  std::vector<int64_t> first_place;
  for (int64_t i = 0; i < num_tensors; ++i) {
    const PairNormTensor& t = tensors[i];
    const PairSplit& s = t.split;
    if (numel(s) == 0) {
      std::fill(t.rows, t.rows + num_rows(s), 0.0);
      std::fill(t.columns, t.columns + num_columns(s), 0.0);
    } else if (s.second == 1) {
      norms_beside_one(t, p, parallel_for);
    } else {
      const NormChunks of_tensor(s);
      pairs.push_back(&t);
      chunks.push_back(of_tensor);
      first_place.push_back(places);
      const int64_t sums = of_tensor.strips * num_runs(s) + of_tensor.chunks * s.second;
      places += sums;
      const int64_t of_chunk = of_tensor.runs * of_tensor.strip;
      work.add(of_tensor.chunks * of_tensor.strips * of_chunk, of_chunk);
      adding.add(sums, sums);
    }
  }
  std::vector<double> sums(static_cast<size_t>(places));
  const auto sums_of = [&](size_t i) {
    double* of_runs = sums.data() + first_place[i];
    return NormSums{of_runs, of_runs + chunks[i].strips * num_runs(pairs[i]->split)};
  };
  for_each_chunk(work, kChunkElements, parallel_for, [&](size_t i, int64_t chunk) {
    sums_of_chunk(*pairs[i], norm, chunks[i], chunk, sums_of(i));
  });
  for_each_chunk(adding, kChunkElements, parallel_for,
                 [&](size_t i, int64_t) { add_sums(*pairs[i], norm, chunks[i], sums_of(i)); });
}

void add_scaled(const ScaledTensor* tensors, int64_t num_tensors, ParallelFor parallel_for) {
  scale<false>(tensors, num_tensors, parallel_for);
}

void shrink(const ScaledTensor* tensors, int64_t num_tensors, ParallelFor parallel_for) {
  scale<true>(tensors, num_tensors, parallel_for);
}

}  // namespace ffr
