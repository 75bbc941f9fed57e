// Device access to features, gradients and packed signs: a thread moves 16 bytes of positions at once.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "../common/signs.h"
#include "device.h"

namespace ffr::cuda {

constexpr int kAccessBytes = 16;
template <typename T>
constexpr int kVec = kAccessBytes / static_cast<int>(sizeof(T));

// The nibbles of kVec elements.
template <typename T>
using SignWord =
    std::conditional_t<kVec<T> == 8, uint32_t, std::conditional_t<kVec<T> == 4, uint16_t, uint8_t>>;

// ---------------------------------------------------------------------------------- elements

template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, Compute<T> (&x)[kVec<T>]) {
  if constexpr (std::is_same_v<T, double>) {
    x[0] = __hiloint2double(static_cast<int>(raw.y), static_cast<int>(raw.x));
    x[1] = __hiloint2double(static_cast<int>(raw.w), static_cast<int>(raw.z));
  } else if constexpr (std::is_same_v<T, float>) {
    x[0] = __uint_as_float(raw.x);
    x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z);
    x[3] = __uint_as_float(raw.w);
  } else {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) widen_pair<T>(words[i], x[2 * i], x[2 * i + 1]);
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const Compute<T> (&x)[kVec<T>]) {
  if constexpr (std::is_same_v<T, double>) {
    return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]), __double2hiint(x[1]));
  } else if constexpr (std::is_same_v<T, float>) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = round_pair<T>(x[2 * i], x[2 * i + 1]);
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The unsigned integer of T's size, and where it lies among the four words of an access.
template <typename T>
using Bits =
    std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

// `kVector`: all kVec elements exist and lie at a multiple of 16 bytes. Else `count` of them exist, anywhere.
template <typename T, bool kVector>
__device__ __forceinline__ uint4 load(const void* tensor, int64_t element, int count) {
  if constexpr (kVector) {
    // Read once: let it be the first to leave the caches.
    return __ldcs(reinterpret_cast<const uint4*>(static_cast<const T*>(tensor) + element));
  } else {
    const Bits<T>* from = static_cast<const Bits<T>*>(tensor) + element;
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      const Bits<T> bits = j < count ? from[j] : Bits<T>(0);
      if constexpr (sizeof(T) == 8) {
        words[2 * j] = static_cast<uint32_t>(bits);
        words[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
      } else if constexpr (sizeof(T) == 4) {
        words[j] = bits;
      } else {
        words[j / 2] |= static_cast<uint32_t>(bits) << (16 * (j % 2));
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

template <typename T, bool kVector>
__device__ __forceinline__ void store(void* tensor, int64_t element, int count, const uint4& raw) {
  if constexpr (kVector) {
    store_16_bytes(static_cast<T*>(tensor) + element, raw);
  } else {
    Bits<T>* to = static_cast<Bits<T>*>(tensor) + element;
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      if (j >= count) break;
      if constexpr (sizeof(T) == 8) {
        to[j] = words[2 * j] | static_cast<uint64_t>(words[2 * j + 1]) << 32;
      } else if constexpr (sizeof(T) == 4) {
        to[j] = words[j];
      } else {
        to[j] = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
      }
    }
  }
}

// ---------------------------------------------------------------------------------- packed signs

// sign_code(value) * place in two comparisons and two selections.
template <typename C>
__device__ __forceinline__ uint32_t place_code(C value, uint32_t place) {
  return value > 0 ? place : value < 0 ? 2 * place : 0;
}

// A word of nibbles in the making: the codes of kVec differences d, those of kVec differences c, and the word
// of both (each may be 0).
template <typename T>
struct SignPacker {
  // d: next - current, of which `next` and `current` are the 16 bytes.
  __device__ static uint32_t first(const uint4&, const uint4&, const Compute<T> (&d)[kVec<T>]) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) word |= place_code(d[j], 1u << (4 * j));
    return word;
  }
  __device__ static uint32_t second(const Compute<T> (&c)[kVec<T>]) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) word |= place_code(c[j], 4u << (4 * j));
    return word;
  }
  __device__ static uint32_t word(uint32_t first, uint32_t second) { return first | second; }
};

// The 16-bit types are compared two at a time (bf16: from sm_90). The sign of d is that of the features'
// order. c is rounded to 16 bits, which cannot make it zero: like all values here it is a multiple of the
// least one of its type. Without this the bf16 kernel would take 147 instructions for 640 bytes, more than an
// H200 has time for.
template <typename T>
struct PairPacker {
  // Halves hold elements 2 i and 2 i + 1, so that the even elements' nibbles fill the low half of the word.
  __device__ static uint32_t compare(const uint4& a, const uint4& b, uint32_t positive) {
    const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word |= greater_pair<T>(as[i], bs[i]) & (positive << (4 * i));
      word |= greater_pair<T>(bs[i], as[i]) & (2 * positive << (4 * i));
    }
    return word;
  }
  __device__ static uint32_t first(const uint4& next, const uint4& current, const float (&)[8]) {
    return compare(next, current, 0x00010001u);
  }
  __device__ static uint32_t second(const float (&c)[8]) {
    return compare(pack<T>(c), make_uint4(0, 0, 0, 0), 0x00040004u);
  }
  // Nibbles 0 2 4 6 1 3 5 7 into their order: bytes, then the inner two nibbles of each half.
  __device__ static uint32_t word(uint32_t first, uint32_t second) {
    const uint32_t bytes = __byte_perm(first | second, 0, 0x3120);
    const uint32_t swap = (bytes ^ (bytes >> 4)) & 0x00f000f0u;
    return bytes ^ swap ^ (swap << 4);
  }
};
template <>
struct SignPacker<Float16> : PairPacker<Float16> {};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // the host never calls either
template <>
struct SignPacker<BFloat16> : PairPacker<BFloat16> {};
#endif

// Twice the signs of d and of c. Twice, because only the top byte of 2.0f, -2.0f and 0.0f differs from zero:
// one byte permutation looks up the top bytes of four elements, whose codes are its selector, and another
// puts each in its place. That is 1.5 instructions a sign, where taking the bits apart needs four or more.
template <typename T>
__device__ __forceinline__ void unpack_twice_signs(uint32_t word, Compute<T> (&s)[kVec<T>],
                                                   Compute<T> (&t)[kVec<T>]) {
  constexpr uint32_t kTopBytes = 0x00c04000u;  // of code 0, 1, 2, 3
  const uint32_t d_codes = word & 0x33333333u, c_codes = (word >> 2) & 0x33333333u;
#pragma unroll
  for (int j = 0; j < kVec<T>; ++j) {
    const uint32_t d_top = __byte_perm(kTopBytes, 0, d_codes >> (16 * (j / 4)));
    const uint32_t c_top = __byte_perm(kTopBytes, 0, c_codes >> (16 * (j / 4)));
    const uint32_t to_top = (j % 4) << 12 | 0x444u;
    s[j] = __uint_as_float(__byte_perm(d_top, 0, to_top));
    t[j] = __uint_as_float(__byte_perm(c_top, 0, to_top));
  }
}

// The codes of `count` elements from `element` on. kVector: kVec of them, beginning at a multiple of kVec.
template <typename T, bool kVector>
__device__ __forceinline__ uint32_t load_signs(const uint8_t* plane, int64_t element, int count) {
  if constexpr (kVector) {
    return __ldcs(reinterpret_cast<const SignWord<T>*>(plane + element / 2));
  } else {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      if (j >= count) break;
      const uint32_t pair = plane[(element + j) / 2];
      word |= ((element + j) % 2 ? pair >> 4 : pair & 15u) << (4 * j);
    }
    return word;
  }
}

}  // namespace ffr::cuda
