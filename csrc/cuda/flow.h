// The flow loss on NVIDIA GPUs: torch-free entry points. Meaning, layouts and rounding: docs/design.md,
// section 5. Nothing is checked here; the caller (csrc/torch/ops_cuda.cpp) has checked every argument and
// made the stages' device current. Every function only launches kernels on `stream` (a cudaStream_t): it
// waits for nothing, allocates nothing and copies nothing, so that it can be captured in a CUDA graph. The
// result is a cudaError_t.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/flow_math.h"

namespace ffr::cuda {

struct StageView {
  DType dtype;
  StageShape shape;             // groups >= 1, numel divisible by groups
  const void* const* features;  // shape.length device pointers; null where only signs are read
  void* const* grads;           // shape.length device pointers, null = not wanted; unused in the forward pass
};

// signs must begin at a multiple of 16 bytes, which every allocation of torch does.
constexpr int64_t kSignsAlign = 16;

// fp64 numbers of scratch memory that flow_forward wants: one for each block and term.
int64_t flow_forward_scratch(const StageView* stages, int64_t num_stages, bool signs);

int flow_forward(const StageView* stages, int64_t num_stages, bool squared, double* stats, uint8_t* signs,
                 double* scratch, void* stream);

int flow_backward(const StageView* stages, int64_t num_stages, bool squared, const uint8_t* signs,
                  const double* coef, void* stream);

int flow_backward_at(const StageView& stage, bool squared, const uint8_t* signs, const double* coef,
                     int64_t index, void* grad, bool accumulate, void* stream);

const char* error_text(int error);

}  // namespace ffr::cuda
