// How the CPU kernels get threads: the caller passes a parallel-for, so that this code knows neither torch
// nor OpenMP. The torch ops pass torch's own pool (it follows torch.set_num_threads).
#pragma once

#include <stdint.h>

namespace ffr {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body(b, e, context) on disjoint ranges that cover [begin, end), each at least `grain` long except the
// last; returns when all are done. Same parameters as torch_parallel_for of LibTorch's stable C shim.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

inline void serial_for(int64_t begin, int64_t end, int64_t /*grain*/, ParallelBody body, void* context) {
  if (begin < end) body(begin, end, context);
}

// parallel_for with a callable in the place of a function and its context.
template <typename F>
inline void parallel_call(ParallelFor parallel_for, int64_t count, int64_t grain, const F& body) {
  const ParallelBody call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  if (count > 0) parallel_for(0, count, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace ffr
