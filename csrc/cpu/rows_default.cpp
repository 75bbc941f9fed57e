// Row kernels with the instructions every processor of the target has: SSE2 on x86-64, NEON on aarch64.
#include <string.h>

#include <type_traits>

#include "rows.h"

#define FFR_INLINE inline __attribute__((always_inline))

namespace ffr {
namespace {

constexpr int kVectorBytes = 16;

#include "block.inc"
#include "block_portable.inc"

FFR_INLINE Block<float> load(const Float16* p) {
  float values[Block<float>::kElements];
  for (int i = 0; i < Block<float>::kElements; ++i) values[i] = to_compute(p[i]);
  return load(values);
}

FFR_INLINE void store(Float16* p, const Block<float>& a) {
  float values[Block<float>::kElements];
  memcpy(values, &a, sizeof(values));
  for (int i = 0; i < Block<float>::kElements; ++i) p[i] = from_compute<Float16>(values[i]);
}

#include "rows_impl.inc"

}  // namespace

const RowKernels& default_rows() {
  static const RowKernels kernels = make_rows();
  return kernels;
}

}  // namespace ffr
