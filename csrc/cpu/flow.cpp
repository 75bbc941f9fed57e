// The drivers: cut all stages into chunks of about equal work, walk each chunk tile by tile along the depth,
// and hand every tile of every feature to a row kernel. So a feature's element comes from memory once (the
// tiles of its neighbours are still in the L1 cache), and no difference tensor exists.
#include "flow.h"

#include <string.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "new_memory.h"
#include "rows/rows.h"
#include "stream.h"

namespace ffr {
namespace {

// Elements per chunk (over all features of the stage). It gives each of 64 threads work from 2M elements on,
// and a thread's start-up costs nothing against it. The partition depends on shapes alone, never on threads.
constexpr int64_t kChunkElements = 32768;

const char* at(const void* base, DType dtype, int64_t element) {
  return static_cast<const char*>(base) + element * element_size(dtype);
}
char* at(void* base, DType dtype, int64_t element) {
  return static_cast<char*>(base) + element * element_size(dtype);
}

struct Range {
  int64_t begin;
  int64_t end;
};

// The chunks of one stage: `per_group` for each group, one after another.
struct Chunks {
  int64_t per_group;
  int64_t group_size;
  int64_t size;  // positions per chunk, whole tiles
  int64_t tile;  // positions per tile

  // walked: how many features' elements a position stands for.
  Chunks(DType dtype, const StageShape& shape, int64_t walked, int64_t tile_bytes) {
    group_size = shape.numel / shape.groups;
    tile = tile_bytes / element_size(dtype);
    size = std::max<int64_t>(kChunkElements / (tile * std::max<int64_t>(walked, 1)), 1) * tile;
    per_group = (group_size + size - 1) / size;
  }

  Range positions(int64_t group, int64_t chunk) const {
    const int64_t begin = group * group_size;
    return {begin + chunk * size, begin + std::min((chunk + 1) * size, group_size)};
  }
};

// One stage's share of a call.
struct Job {
  StageView stage;
  int64_t walked;
  Chunks chunks;
  int64_t first_work = 0;   // elements walked before this job's first chunk, as `work` counts them
  double* stats = nullptr;  // forward: null when only signs are wanted from this job
  uint8_t* signs = nullptr;
  double* partial = nullptr;  // forward: a row of rows() sums per chunk, where a group has several chunks
  const uint8_t* planes = nullptr;
  const double* coef = nullptr;
  const uint8_t* new_memory = nullptr;  // backward: a gradient each, whether its memory is still to come

  int64_t num_chunks() const { return chunks.per_group * stage.shape.groups; }
  int64_t rows() const { return num_first(stage.shape) + num_second(stage.shape); }
  // Elements that a chunk walks; the last of a group may have less to do.
  int64_t chunk_work() const {
    return std::max<int64_t>(std::min(chunks.size, chunks.group_size) * walked, 1);
  }
  int64_t end_of_work() const { return first_work + num_chunks() * chunk_work(); }
};

// Runs body(job, group, chunk) for all chunks of all jobs in one parallel loop. Threads share out the
// elements, not the chunks, which are of different sizes where stages are; a chunk is its first element's
// thread's.
template <typename F>
void for_each_chunk(const std::vector<Job>& jobs, ParallelFor parallel_for, const F& body) {
  const int64_t elements = jobs.empty() ? 0 : jobs.back().end_of_work();
  parallel_call(parallel_for, elements, kChunkElements, [&](int64_t begin, int64_t end) {
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin,
                                [](int64_t work, const Job& j) { return work < j.first_work; }) -
               1;
    int64_t chunk = (begin - job->first_work + job->chunk_work() - 1) / job->chunk_work();
    for (;; ++chunk) {
      for (; job != jobs.end() && chunk >= job->num_chunks(); ++job) chunk = 0;
      if (job == jobs.end() || job->first_work + chunk * job->chunk_work() >= end) return;
      body(*job, chunk / job->chunks.per_group, chunk % job->chunks.per_group);
    }
  });
}

void forward_chunk(const Job& job, ForwardRow row_kernel, int64_t group, int64_t chunk) {
  const StageShape& shape = job.stage.shape;
  const void* const* x = job.stage.features;
  const DType dtype = job.stage.dtype;
  const int64_t firsts = num_first(shape), seconds = num_second(shape);
  const bool direct = job.chunks.per_group == 1 && job.stats != nullptr;
  double* sums =
      direct ? job.stats + group : job.partial + (group * job.chunks.per_group + chunk) * job.rows();
  const int64_t stride = direct ? shape.groups : 1;
  for (int64_t row = 0; row < job.rows(); ++row) sums[row * stride] = 0.0;

  const Range range = job.chunks.positions(group, chunk);
  for (int64_t i = range.begin; i < range.end; i += job.chunks.tile) {
    const int64_t count = std::min(job.chunks.tile, range.end - i);
    for (int64_t l = 0; l < firsts; ++l) {
      const bool second = l < seconds;
      const void* ahead = l + 3 < shape.length ? at(x[l + 3], dtype, i) : nullptr;
      uint8_t* signs = job.signs == nullptr ? nullptr : job.signs + l * plane_bytes(shape.numel) + i / 2;
      double row_sums[2] = {0.0, 0.0};
      row_kernel(at(x[l], dtype, i), at(x[l + 1], dtype, i), second ? at(x[l + 2], dtype, i) : nullptr, count,
                 signs, ahead, row_sums);
      sums[l * stride] += row_sums[0];
      if (second) sums[(firsts + l) * stride] += row_sums[1];
    }
  }
}

// Adds the chunks' sums to the stage's statistics, in the order of the chunks.
void combine(const Job& job) {
  const int64_t groups = job.stage.shape.groups, rows = job.rows();
  std::fill(job.stats, job.stats + rows * groups, 0.0);
  const double* partial = job.partial;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t chunk = 0; chunk < job.chunks.per_group; ++chunk, partial += rows)
      for (int64_t row = 0; row < rows; ++row) job.stats[row * groups + group] += partial[row];
}

// A NaN in one of the coefficients as the plainest NaN there is, which the rounding to bfloat16 relies on.
GradientCoef without_payload(GradientCoef coef) {
  for (double* c : {&coef.a_prev, &coef.a, &coef.e_prev2, &coef.e_prev, &coef.e})
    if (*c != *c) *c = std::numeric_limits<double>::quiet_NaN();
  return coef;
}

struct BackwardOptions {
  bool squared;
  Write write;
  bool walk;  // the gradients of all features, one after another
};

// The gradient of feature l at positions [i, i + count) of one group.
void backward_tile(const Job& job, const RowKernels& rows, const BackwardOptions& options,
                   const GradientCoef& coef, int64_t l, int64_t i, int64_t count, void* grad) {
  const StageShape& shape = job.stage.shape;
  const DType dtype = job.stage.dtype;
  const int type = static_cast<int>(dtype), write = static_cast<int>(options.write);
  if (options.squared) {
    const void* x[5];
    for (int k = 0; k < 5; ++k) {
      const int64_t feature = l + k - 2;
      x[k] = feature < 0 || feature >= shape.length ? nullptr : at(job.stage.features[feature], dtype, i);
    }
    const bool next = options.walk && l + 3 < shape.length;
    const void* ahead = next ? at(job.stage.features[l + 3], dtype, i) : nullptr;
    rows.backward_squared[type][write](x, coef, count, grad, ahead);
    return;
  }
  // Where there is no such plane any other will do: its coefficients are zero.
  const auto plane = [&](int64_t p) {
    return job.planes + std::clamp<int64_t>(p, 0, num_first(shape) - 1) * plane_bytes(shape.numel) + i / 2;
  };
  rows.backward_signs[type][write](plane(l - 2), plane(l - 1), plane(l), coef, count, grad);
}

// Positions [i, i + count) of one group's gradient of feature l.
void backward_positions(const Job& job, const RowKernels& rows, const BackwardOptions& options,
                        const GradientCoef& coef, int64_t l, int64_t i, int64_t count, void* grad_base) {
  const DType dtype = job.stage.dtype;
  const int64_t size = element_size(dtype);
  char* grad = at(grad_base, dtype, i);
  if (job.stage.shape.length < 2) {  // no term: the gradient is zero
    if (options.write != Write::kAdd) memset(grad, 0, static_cast<size_t>(count * size));
    return;
  }
  if (!options.squared && i % 2 != 0) {
    // A group that starts inside a byte: its first element by way of the pair that the byte holds.
    alignas(double) char pair[2 * sizeof(double)];
    memcpy(pair + size, grad, static_cast<size_t>(size));
    backward_tile(job, rows, options, coef, l, i - 1, 2, pair);
    memcpy(grad, pair + size, static_cast<size_t>(size));
    if (count > 1) backward_positions(job, rows, options, coef, l, i + 1, count - 1, grad_base);
    return;
  }
  backward_tile(job, rows, options, coef, l, i, count, grad);
}

void backward_chunk(const Job& job, const RowKernels& rows, const BackwardOptions& options, int64_t group,
                    int64_t chunk) {
  const StageShape& shape = job.stage.shape;
  const Range range = job.chunks.positions(group, chunk);
  for (int64_t i = range.begin; i < range.end; i += job.chunks.tile) {
    const int64_t count = std::min(job.chunks.tile, range.end - i);
    for (int64_t l = 0; l < shape.length; ++l) {
      if (job.stage.grads[l] == nullptr) continue;
      const GradientCoef coef = without_payload(gradient_coef(job.coef, shape, group, l));
      BackwardOptions own = options;
      if (job.new_memory != nullptr && job.new_memory[l]) {
        // Its pages arrive in the cache, from where a streamed store would have to drive them out.
        own.write = Write::kStore;
        request_pages(at(job.stage.grads[l], job.stage.dtype, i), count * element_size(job.stage.dtype));
      }
      backward_positions(job, rows, own, coef, l, i, count, job.stage.grads[l]);
    }
  }
}

Job make_job(const StageView& stage, int64_t walked, int64_t tile_bytes, const std::vector<Job>& before) {
  Job job{stage, walked, Chunks(stage.dtype, stage.shape, walked, tile_bytes)};
  if (!before.empty()) job.first_work = before.back().end_of_work();
  return job;
}

// Long runs are what the backward pass writes best, but a small feature must still have tiles for several
// threads.
int64_t backward_tile_bytes(const StageView& stage) {
  const int64_t part = stage.shape.numel * element_size(stage.dtype) / 16 / kBlockBytes * kBlockBytes;
  return std::clamp(part, kForwardTileBytes, kMostBackwardTileBytes);
}

// For each gradient whether its memory is still to come, judged by its middle.
std::vector<uint8_t> find_new_memory(const std::vector<Job>& jobs) {
  std::vector<uint8_t> found;
  for (const Job& job : jobs)
    for (int64_t l = 0; l < job.stage.shape.length; ++l) {
      const void* grad = job.stage.grads[l];
      found.push_back(grad != nullptr && is_new_memory(at(grad, job.stage.dtype, job.stage.shape.numel / 2)));
    }
  return found;
}

}  // namespace

void flow_forward(const StageView* stages, int64_t num_stages, bool squared, double* stats, uint8_t* signs,
                  ParallelFor parallel_for) {
  std::vector<Job> jobs;
  int64_t num_partial = 0;
  const auto add_job = [&](const StageView& stage, double* job_stats, uint8_t* job_signs) {
    Job job = make_job(stage, stage.shape.length, kForwardTileBytes, jobs);
    job.stats = job_stats;
    job.signs = job_signs;
    num_partial += job.num_chunks() * job.rows();
    jobs.push_back(job);
  };
  for (int64_t s = 0; s < num_stages; ++s) {
    const StageView& stage = stages[s];
    const bool halves_a_byte = stage.shape.groups > 1 && stage.shape.numel / stage.shape.groups % 2 != 0;
    if (signs != nullptr && halves_a_byte) {
      // Two groups, so two threads, would write one byte: the signs get a pass of their own, as one group.
      add_job(stage, stats, nullptr);
      StageView whole = stage;
      whole.shape.groups = 1;
      add_job(whole, nullptr, signs);
    } else {
      add_job(stage, stats, signs);
    }
    stats += stats_entries(stage.shape);
    if (signs != nullptr) signs += sign_bytes(stage.shape);
  }
  std::vector<double> partial(static_cast<size_t>(num_partial));
  double* next = partial.data();
  for (Job& job : jobs) {
    job.partial = next;
    next += job.num_chunks() * job.rows();
  }

  const RowKernels& rows = row_kernels();
  for_each_chunk(jobs, parallel_for, [&](const Job& job, int64_t group, int64_t chunk) {
    const int type = static_cast<int>(job.stage.dtype);
    const ForwardRow row_kernel = squared                ? rows.forward_squared[type]
                                  : job.signs != nullptr ? rows.forward_signs[type]
                                                         : rows.forward_abs[type];
    forward_chunk(job, row_kernel, group, chunk);
  });
  for (const Job& job : jobs)
    if (job.stats != nullptr && job.chunks.per_group != 1) combine(job);
}

void flow_backward(const StageView* stages, int64_t num_stages, bool squared, const uint8_t* signs,
                   const double* coef, ParallelFor parallel_for) {
  std::vector<Job> jobs;
  for (int64_t s = 0; s < num_stages; ++s) {
    const StageView& stage = stages[s];
    Job job = make_job(stage, stage.shape.length, backward_tile_bytes(stage), jobs);
    job.planes = signs;
    job.coef = coef;
    jobs.push_back(job);
    coef += stats_entries(stage.shape);
    if (!squared) signs += sign_bytes(stage.shape);
  }
  int64_t bytes = 0;
  for (const Job& job : jobs) {
    const StageShape& shape = job.stage.shape;
    const auto wanted = shape.length - std::count(job.stage.grads, job.stage.grads + shape.length, nullptr);
    bytes += wanted * shape.numel * element_size(job.stage.dtype);
  }
  const bool large = bytes >= kStreamBytes;
  // The limits are measured: docs/log/cpu-kernels.md, 10 and 11.
  const bool stream = bytes >= (squared ? kStreamBytes : 2 * kStreamBytes);
  const std::vector<uint8_t> new_memory = large ? find_new_memory(jobs) : std::vector<uint8_t>();
  const uint8_t* next = new_memory.data();
  if (large)
    for (Job& job : jobs) {
      job.new_memory = next;
      next += job.stage.shape.length;
    }
  const BackwardOptions options{squared, stream ? Write::kStream : Write::kStore, true};
  const RowKernels& rows = row_kernels();
  for_each_chunk(jobs, parallel_for, [&](const Job& job, int64_t group, int64_t chunk) {
    backward_chunk(job, rows, options, group, chunk);
    if (options.write == Write::kStream) stream_fence();
  });
}

void flow_backward_at(const StageView& stage, bool squared, const uint8_t* signs, const double* coef,
                      int64_t index, void* grad, bool accumulate, ParallelFor parallel_for) {
  Job job = make_job(stage, 1, backward_tile_bytes(stage), {});
  job.planes = signs;
  job.coef = coef;
  const BackwardOptions options{squared, accumulate ? Write::kAdd : Write::kStore, false};
  const RowKernels& rows = row_kernels();
  for_each_chunk({job}, parallel_for, [&](const Job& job, int64_t group, int64_t chunk) {
    const Range range = job.chunks.positions(group, chunk);
    const GradientCoef k = without_payload(gradient_coef(job.coef, job.stage.shape, group, index));
    for (int64_t i = range.begin; i < range.end; i += job.chunks.tile)
      backward_positions(job, rows, options, k, index, i, std::min(job.chunks.tile, range.end - i), grad);
  });
}

}  // namespace ffr
