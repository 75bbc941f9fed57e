// Runs one CPU kernel of the flow loss once, for callgrind to count its instructions: no torch, one thread.
//   count_flow forward|forward_signs|forward_squared|backward|backward_squared  float32|bfloat16  LENGTH
//   NUMEL
// Prints the instruction set that was chosen.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/flow.h"
#include "cpu/rows/isa.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const bool squared = strstr(argv[1], "squared") != nullptr;
  const bool backward = strncmp(argv[1], "backward", 8) == 0;
  const bool signs_wanted = backward ? !squared : strstr(argv[1], "signs") != nullptr;
  const ffr::DType dtype = strcmp(argv[2], "bfloat16") == 0 ? ffr::DType::kBFloat16 : ffr::DType::kFloat32;
  const ffr::StageShape shape{atoll(argv[3]), atoll(argv[4]), 1};

  // Aligned as torch aligns tensors: the row kernels' first and last vectors depend on it.
  const size_t bytes = static_cast<size_t>(shape.numel * ffr::element_size(dtype) + 63) / 64 * 64;
  std::vector<const void*> features;
  std::vector<void*> grads;
  unsigned state = 1;
  for (int64_t l = 0; l < shape.length; ++l) {
    void* feature = aligned_alloc(64, bytes);
    for (int64_t i = 0; i < shape.numel; ++i) {
      state = state * 1664525u + 1013904223u;
      const float value = state >> 31 ? static_cast<float>(state >> 8) * 1e-7f : 0.0f;  // half are zeros
      if (dtype == ffr::DType::kFloat32) {
        static_cast<float*>(feature)[i] = value;
      } else {
        static_cast<ffr::BFloat16*>(feature)[i] = ffr::from_compute<ffr::BFloat16>(value);
      }
    }
    features.push_back(feature);
    grads.push_back(aligned_alloc(64, bytes));
  }
  std::vector<double> stats(static_cast<size_t>(ffr::stats_entries(shape)), 1.0);
  const size_t sign_bytes = static_cast<size_t>(ffr::sign_bytes(shape) + 63) / 64 * 64;
  auto* signs = static_cast<uint8_t*>(aligned_alloc(64, sign_bytes));
  memset(signs, 0x61, sign_bytes);
  ffr::StageView stage{dtype, shape, features.data(), backward ? grads.data() : nullptr};
  uint8_t* planes = signs_wanted ? signs : nullptr;
  if (backward) {
    ffr::flow_backward(&stage, 1, squared, planes, stats.data(), ffr::serial_for);
  } else {
    ffr::flow_forward(&stage, 1, squared, stats.data(), planes, ffr::serial_for);
  }
  std::puts(ffr::cpu_isa_name());
  return 0;
}
