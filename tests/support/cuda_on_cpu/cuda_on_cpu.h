// As much of CUDA as csrc/cuda uses, for the host's compiler: the kernels run here without a GPU, one block
// after another, every CUDA thread a fiber of its own. What is proven is the logic: indices, tails, barriers,
// reductions, launch plans. Shared memory is filled with NaN before each block, and a shuffle or barrier that
// not all of its threads reach aborts. This is a test tool; it is slow, and no fallback of the package.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one after another

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};

class Grid {
 public:
  static Grid& instance() {
    static Grid grid;
    return grid;
  }

  void launch(const std::function<void()>& kernel, unsigned blocks, unsigned threads, size_t shared_bytes);
  void wait(bool whole_block);  // until all threads of the block, or of the warp, are here

  Index thread_index, block_index;
  uint64_t exchange[1024];  // a slot per thread, for shuffles
  int64_t launches = 0, blocks = 0, shuffles = 0;  // shuffles: of single threads
  std::vector<double> dynamic_shared;

 private:
  enum class State { kReady, kAtWarp, kAtBlock, kDone };
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 17);
    State state;
  };
  static void enter() {
    Grid& grid = instance();
    (*grid.kernel_)();
    grid.fibers_[grid.current_]->state = State::kDone;
    swapcontext(&grid.fibers_[grid.current_]->context, &grid.scheduler_);
  }
  void run_block(unsigned threads);
  bool release(unsigned begin, unsigned end, State waiting);

  std::vector<Fiber*> fibers_;
  unsigned current_ = 0;
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
};

inline void fail(const char* message) {
  fprintf(stderr, "cuda_on_cpu: %s\n", message);
  abort();
}

// Lets the threads go on if all of them wait; aborts if one has gone another way.
inline bool Grid::release(unsigned begin, unsigned end, State waiting) {
  unsigned there = 0;
  for (unsigned i = begin; i < end; ++i) there += fibers_[i]->state == waiting;
  if (there < end - begin) return false;
  for (unsigned i = begin; i < end; ++i) fibers_[i]->state = State::kReady;
  return true;
}

inline void Grid::run_block(unsigned threads) {
  while (fibers_.size() < threads) fibers_.push_back(new Fiber);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers_[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
  }
  for (;;) {
    bool ran = false;
    unsigned done = 0;
    for (unsigned i = 0; i < threads; ++i) {
      done += fibers_[i]->state == State::kDone;
      if (fibers_[i]->state != State::kReady) continue;
      current_ = i;
      thread_index.x = i;
      ran = true;
      swapcontext(&scheduler_, &fibers_[i]->context);
    }
    for (unsigned i = 0; i < threads; i += 32) ran |= release(i, std::min(i + 32, threads), State::kAtWarp);
    ran |= release(0, threads, State::kAtBlock);
    if (done == threads) return;
    if (!ran) fail("a barrier or shuffle was not reached by all of its threads");
  }
}

inline void Grid::launch(const std::function<void()>& kernel, unsigned blocks, unsigned threads,
                         size_t shared_bytes) {
  if (blocks == 0) fail("a launch of no blocks");  // an error on a GPU too
  if (shared_bytes > 48 << 10) fail("more dynamic shared memory than a launch may have without asking");
  kernel_ = &kernel;
  ++launches;
  this->blocks += blocks;
  for (unsigned block = 0; block < blocks; ++block) {
    block_index.x = block;
    dynamic_shared.assign((shared_bytes + 7) / 8, NAN);
    run_block(threads);
  }
}

inline void Grid::wait(bool whole_block) {
  fibers_[current_]->state = whole_block ? State::kAtBlock : State::kAtWarp;
  const unsigned self = current_;
  swapcontext(&fibers_[self]->context, &scheduler_);
}

// The value of the warp's lane `source`.
template <typename T>
T shuffle(T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "");
  Grid& grid = Grid::instance();
  const unsigned self = grid.thread_index.x;
  ++grid.shuffles;
  memcpy(&grid.exchange[self], &value, sizeof(T));
  grid.wait(false);
  T result;
  memcpy(&result, &grid.exchange[self / 32 * 32 + source], sizeof(T));
  grid.wait(false);
  return result;
}

}  // namespace cuda_on_cpu

#define FFR_LAUNCH(kernel, blocks, threads, shared_bytes, stream, args) \
  ((void)(stream), cuda_on_cpu::Grid::instance().launch([&] { kernel(args); }, blocks, threads, shared_bytes))
#define FFR_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(cuda_on_cpu::Grid::instance().dynamic_shared.data())
#define threadIdx (cuda_on_cpu::Grid::instance().thread_index)
#define blockIdx (cuda_on_cpu::Grid::instance().block_index)

inline void __syncthreads() { cuda_on_cpu::Grid::instance().wait(true); }
inline void __syncwarp() { cuda_on_cpu::Grid::instance().wait(false); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shuffle(value, threadIdx.x % 32 ^ static_cast<unsigned>(mask));
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return cuda_on_cpu::shuffle(value, static_cast<unsigned>(source));
}
inline void __trap() { cuda_on_cpu::fail("the kernel stopped itself"); }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <typename T>
T __ldcs(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) cuda_on_cpu::fail("misaligned access");
  return *from;
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t __float_as_uint(float value) { return bits_as<uint32_t>(value); }
inline double __hiloint2double(int high, int low) {
  return bits_as<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                         static_cast<uint32_t>(low));
}
inline int __double2loint(double value) { return static_cast<int>(bits_as<uint64_t>(value)); }
inline int __double2hiint(double value) { return static_cast<int>(bits_as<uint64_t>(value) >> 32); }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}

namespace cub {

template <typename T, int kThreads>
struct BlockReduce {
  struct TempStorage {
    T values[kThreads];
  };
  explicit BlockReduce(TempStorage& storage) : storage(storage) {}

  template <typename Operator>
  T Reduce(T value, Operator combine) {
    storage.values[threadIdx.x] = value;
    __syncthreads();
    T total = storage.values[0];
    for (int i = 1; i < kThreads; ++i) total = combine(total, storage.values[i]);
    __syncthreads();
    return total;
  }
  T Sum(T value) {
    return Reduce(value, [](T a, T b) { return a + b; });
  }

  TempStorage& storage;
};

}  // namespace cub
