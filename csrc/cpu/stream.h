// Stores past the cache: a line that is stored whole need not be read first, which saves a third of a copy's
// traffic. Worth it for results that would not stay in the cache anyway (docs/log/cpu-kernels.md).
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace ffr {

// Results of at least so many bytes do not stay in most last-level caches. Smaller ones are better found
// there by who reads them next.
constexpr int64_t kStreamBytes = 32 << 20;

// Streamed stores are ordered after nothing else: a thread waits for its own before another may read them.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace ffr
