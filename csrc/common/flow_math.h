// Shapes and formulas of the flow loss that the CPU and CUDA kernels share (docs/design.md, sections 1 and
// 5).
#pragma once

#include <stdint.h>

#include "hd.h"
#include "signs.h"

namespace ffr {

// `length` features of `numel` elements in one dense order; group g is the range [g, g + 1) * numel / groups.
struct StageShape {
  int64_t length;
  int64_t numel;
  int64_t groups;
};

FFR_HD int64_t num_first(const StageShape& s) { return s.length > 1 ? s.length - 1 : 0; }
FFR_HD int64_t num_second(const StageShape& s) { return s.length > 2 ? s.length - 2 : 0; }
// Entries of a stage in `stats` and in `coef`, and bytes of it in `signs`.
FFR_HD int64_t stats_entries(const StageShape& s) { return (num_first(s) + num_second(s)) * s.groups; }
FFR_HD int64_t sign_bytes(const StageShape& s) { return num_first(s) * plane_bytes(s.numel); }

// d_l and c_l. The second difference is the difference of two rounded first differences, on every backend:
// then the sign of c is the same everywhere, and equal to torch.diff(n=2)'s.
template <typename T>
FFR_HD T first_difference(T next, T current) {
  return next - current;
}
template <typename T>
FFR_HD T second_difference(T d_next, T d_current) {
  return d_next - d_current;
}

// The coefficients that meet in the gradient of feature l, zero where the term does not exist.
struct GradientCoef {
  double a_prev;   // of d_{l-1}
  double a;        // of d_l
  double e_prev2;  // of c_{l-2}
  double e_prev;   // of c_{l-1}
  double e;        // of c_l
};

// `coef`: the stage's slice, (L-1) x G rows for d, then (L-2) x G rows for c.
FFR_HD GradientCoef gradient_coef(const double* coef, const StageShape& s, int64_t group, int64_t l) {
  const int64_t firsts = num_first(s), seconds = num_second(s);
  const double* first = coef + group;
  const double* second = coef + firsts * s.groups + group;
  GradientCoef k;
  k.a_prev = l >= 1 ? first[(l - 1) * s.groups] : 0.0;
  k.a = l < firsts ? first[l * s.groups] : 0.0;
  k.e_prev2 = l >= 2 ? second[(l - 2) * s.groups] : 0.0;
  k.e_prev = l >= 1 && l - 1 < seconds ? second[(l - 1) * s.groups] : 0.0;
  k.e = l < seconds ? second[l * s.groups] : 0.0;
  return k;
}

}  // namespace ffr
