// Runs one of the kernels on rows and columns of a weight once, for callgrind to count its instructions: no
// torch, one thread.
//   count_groups norms_of_both|add_scaled|shrink  float32|bfloat16  ROWS  NUMEL
// The weight has ROWS rows, and columns of 9 elements in each. Prints the instruction set that was chosen.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/groups.h"
#include "cpu/rows/isa.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const ffr::DType dtype = strcmp(argv[2], "bfloat16") == 0 ? ffr::DType::kBFloat16 : ffr::DType::kFloat32;
  const int64_t rows = atoll(argv[3]), columns = atoll(argv[4]) / rows / 9, numel = rows * columns * 9;
  const size_t bytes = static_cast<size_t>(numel * ffr::element_size(dtype) + 63) / 64 * 64;
  void *weight = aligned_alloc(64, bytes), *grad = aligned_alloc(64, bytes);
  memset(weight, 0x3d, bytes);
  memset(grad, 0x3d, bytes);
  const ffr::PairSplit split{1, rows, 1, columns, 9, true};
  if (strcmp(argv[1], "norms_of_both") == 0) {
    std::vector<double> norms(static_cast<size_t>(rows + columns));
    const ffr::PairNormTensor tensor{dtype, split, weight, norms.data(), norms.data() + rows};
    ffr::row_column_norms(&tensor, 1, 2.0, ffr::serial_for);
  } else {
    const std::vector<float> factors(static_cast<size_t>(rows + columns), 0.5f);
    const ffr::ScaledTensor tensor{dtype, split, weight, grad, factors.data(), factors.data() + rows,
                                   0.5,   0.1};
    if (strcmp(argv[1], "shrink") == 0) {
      ffr::shrink(&tensor, 1, ffr::serial_for);
    } else {
      ffr::add_scaled(&tensor, 1, ffr::serial_for);
    }
  }
  std::puts(ffr::cpu_isa_name());
  return 0;
}
