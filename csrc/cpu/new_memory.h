// Memory that the operating system has not handed out yet. A large tensor begins as such: each 4 KB of it
// costs an interruption when first written, and arrives in the cache, zeroed.
#pragma once

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ffr {

#if defined(__linux__)
inline uintptr_t page_bytes() {
  static const uintptr_t bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Whether the page that `p` lies in is still to come.
inline bool is_new_memory(const void* p) {
  const uintptr_t page = reinterpret_cast<uintptr_t>(p) / page_bytes() * page_bytes();
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(page), 1, &resident) == 0 && (resident & 1) == 0;
}

// Asks for the pages of `bytes` bytes at once. A kernel before 5.14 refuses; then they come one by one.
inline void request_pages(void* p, int64_t bytes) {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers do not have
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) / page_bytes() * page_bytes();
  const uintptr_t end = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes);
  static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite));
}
#else
inline bool is_new_memory(const void*) { return false; }
inline void request_pages(void*, int64_t) {}
#endif

}  // namespace ffr
