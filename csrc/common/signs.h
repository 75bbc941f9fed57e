// The packed-sign format: what the forward pass keeps so that the l1 gradient needs no feature.
//
// A stage of L features of N elements has L - 1 planes of plane_bytes(N) bytes, one after another. In plane l
// element i owns the nibble of byte i / 2 (low half for even i):
//   bits 0-1: code of d_l,   bits 2-3: code of c_l (0 in the last plane, which has no c)
// Codes: 0 zero or NaN (torch.sign gives 0 for both), 1 positive, 2 negative; 3 is never written.
// The bytes behind element N - 1 are padding and undefined.
#pragma once

#include <stdint.h>

#include "hd.h"

namespace ffr {

constexpr int64_t kPlaneElements = 32;  // a plane is padded to this many elements ...
constexpr int64_t kPlaneAlign = 16;     // ... which are this many bytes

FFR_HD int64_t plane_bytes(int64_t numel) {
  return (numel + kPlaneElements - 1) / kPlaneElements * kPlaneAlign;
}

template <typename T>
FFR_HD uint32_t sign_code(T value) {
  return static_cast<uint32_t>(value > T(0)) | (static_cast<uint32_t>(value < T(0)) << 1);
}

template <typename T>
FFR_HD uint32_t pack_nibble(T d, T c) {
  return sign_code(d) | (sign_code(c) << 2);
}

// The sign -1, 0 or +1 of the lowest two bits of `code`.
FFR_HD int32_t sign_value(uint32_t code) {
  return static_cast<int32_t>(code & 1u) - static_cast<int32_t>((code >> 1) & 1u);
}

}  // namespace ffr
