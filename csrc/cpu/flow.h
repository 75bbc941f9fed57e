// The flow loss on the CPU: torch-free entry points. Meaning, layouts and rounding: docs/design.md,
// section 5. Nothing is checked here; the caller (csrc/torch) has checked every argument. Small scratch
// memory is allocated inside; std::bad_alloc is the only exception.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/flow_math.h"
#include "parallel.h"

namespace ffr {

struct StageView {
  DType dtype;
  StageShape shape;             // length >= 0, numel >= 0, groups >= 1 (numel divisible by groups)
  const void* const* features;  // shape.length pointers; may be null where only signs are read
  void* const* grads;           // shape.length pointers, null = not wanted; unused (null) in the forward pass
};

// stats: all entries of all stages are written. signs: the planes of all stages, or null when not wanted;
// only with squared = false.
void flow_forward(const StageView* stages, int64_t num_stages, bool squared, double* stats, uint8_t* signs,
                  ParallelFor parallel_for);

// squared = false reads `signs` only, squared = true the features only.
void flow_backward(const StageView* stages, int64_t num_stages, bool squared, const uint8_t* signs,
                   const double* coef, ParallelFor parallel_for);

// The gradient of feature `index` of one stage, into (or, with accumulate, added to) `grad`. signs and coef
// are the stage's slices. squared = true reads stage.features[index - 2 .. index + 2]; stage.grads is not
// used.
void flow_backward_at(const StageView& stage, bool squared, const uint8_t* signs, const double* coef,
                      int64_t index, void* grad, bool accumulate, ParallelFor parallel_for);

}  // namespace ffr
