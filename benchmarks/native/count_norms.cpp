// Runs the filter norms of one weight once, for callgrind to count its instructions: no torch, one thread.
//   count_norms norms|norms_of_columns|norms_of_biases  float32|bfloat16  FILTERS  NUMEL
// norms: filters one after another; norms_of_columns: side by side; norms_of_biases: one element each (NUMEL
// counts). Prints the instruction set that was chosen.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/filters.h"
#include "cpu/rows/isa.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const bool biases = strstr(argv[1], "biases") != nullptr, columns = strstr(argv[1], "columns") != nullptr;
  const ffr::DType dtype = strcmp(argv[2], "bfloat16") == 0 ? ffr::DType::kBFloat16 : ffr::DType::kFloat32;
  const int64_t numel = atoll(argv[4]), filters = biases ? numel : atoll(argv[3]), each = numel / filters;
  const size_t bytes = static_cast<size_t>(numel * ffr::element_size(dtype) + 63) / 64 * 64;
  void* weight = aligned_alloc(64, bytes);
  memset(weight, 0x3d, bytes);
  const ffr::DimSplit split{columns ? each : 1, filters, columns ? 1 : each};
  const ffr::NormTensor tensor{dtype, split, weight};
  std::vector<double> norms(static_cast<size_t>(filters));
  double* out = norms.data();
  ffr::filter_norms(&tensor, 1, 2.0, &out, ffr::serial_for);
  std::puts(ffr::cpu_isa_name());
  return 0;
}
