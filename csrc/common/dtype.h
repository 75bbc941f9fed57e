// Element types of features and gradients, and the two 16-bit formats' conversions. A half or bfloat16 is
// held as its bits, so that the CPU and CUDA sources need neither torch's nor CUDA's own 16-bit types.
#pragma once

#include <stdint.h>
#include <string.h>

#include "hd.h"

namespace ffr {

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };
constexpr int kNumDTypes = 4;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FFR_HD int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Arithmetic is done in Compute<T>: fp32 for the 16-bit types and fp32, fp64 for fp64.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

FFR_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FFR_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

FFR_HD float to_compute(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

FFR_HD float to_compute(Float16 value) {
#if defined(__aarch64__) && !defined(__CUDA_ARCH__)
  __fp16 half;  // has instructions of its own
  memcpy(&half, &value, sizeof(half));
  return static_cast<float>(half);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Exponent and fraction moved into fp32's places; multiplying by 2^112 mends the exponent's bias and
  // normalises subnormals exactly. Inf and NaN (exponent all ones) keep all ones instead.
  const float scaled = float_of(magnitude << 13) * 5.192296858534828e33f;
  const uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits_of(scaled);
  return float_of(bits | sign);
#endif
}

FFR_HD float to_compute(float value) { return value; }
FFR_HD double to_compute(double value) { return value; }

// One rounding, to nearest even; NaN stays NaN (quiet), overflow becomes inf.
template <typename T>
FFR_HD T from_compute(Compute<T> value) {
  return value;
}

template <>
FFR_HD BFloat16 from_compute<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return BFloat16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
FFR_HD Float16 from_compute<Float16>(float value) {
#if defined(__aarch64__) && !defined(__CUDA_ARCH__)
  const __fp16 half = static_cast<__fp16>(value);
  Float16 result;
  memcpy(&result, &half, sizeof(result));
  return result;
#else
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  // Subnormal results (below 2^-14): adding 0.5 leaves the rounded 10-bit fraction in the sum's lowest bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  // Normal results: bias 127 -> 15, round half to even on the 13 bits that go.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to inf
  half = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;
  return Float16{static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace ffr
