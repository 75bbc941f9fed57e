// Sharing the work on a list of tensors among threads, in chunks that do not depend on their number.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace ffr {

// Work per chunk: enough to make a thread's start-up negligible, little enough to share one layer among
// threads.
constexpr int64_t kChunkElements = 32768;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The work on a list of tensors, one after another, in whatever unit: `total` for each, in chunks of `chunk`.
struct Work {
  std::vector<int64_t> first{0};  // of tensor i, in the list's work; and the end of all
  std::vector<int64_t> chunk;

  void add(int64_t total, int64_t of_chunk) {
    first.push_back(first.back() + total);
    chunk.push_back(std::max<int64_t>(of_chunk, 1));
  }
};

// A parallel loop over the chunks of all tensors, body(tensor, chunk). Threads get equal shares of the work,
// not of the chunks: half of the tensors of a network are vectors, and most of them belong to its first half.
template <typename F>
void for_each_chunk(const Work& work, int64_t grain, ParallelFor parallel_for, const F& body) {
  const auto& first = work.first;
  parallel_call(parallel_for, first.back(), grain, [&](int64_t begin, int64_t end) {
    auto tensor =
        static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1);
    for (; tensor < work.chunk.size() && first[tensor] < end; ++tensor) {
      // The chunks that begin in [begin, end).
      const int64_t size = work.chunk[tensor], offset = first[tensor];
      const int64_t stop = std::min(end, first[tensor + 1]) - offset;
      for (int64_t chunk = ceil_div(std::max<int64_t>(begin - offset, 0), size); chunk * size < stop; ++chunk)
        body(tensor, chunk);
    }
  });
}

}  // namespace ffr
