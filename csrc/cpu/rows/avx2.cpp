// Row kernels for AVX2 with F16C: every x86-64 processor since Haswell (2013) and Zen (2017).
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include <type_traits>

#include "rows.h"

#define FFR_INLINE inline __attribute__((always_inline))

// After the includes: what the standard headers define inline must stay runnable everywhere, since the linker
// keeps one copy of it for the whole library.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

namespace ffr {
namespace {

constexpr int kVectorBytes = 32;

template <typename Vector>
FFR_INLINE void stream_vector(Vector* p, const Vector& value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)value);
}

#include "block.inc"
#include "block_portable.inc"

FFR_INLINE Block<float> load(const Float16* p) {
  Block<float> r;
  for (int i = 0; i < 4; ++i)
    r.v[i] =
        (Block<float>::Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
  return r;
}

FFR_INLINE void store(Float16* p, const Block<float>& a) {
  for (int i = 0; i < 4; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i),
                     _mm256_cvtps_ph((__m256)a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 32 comparisons' results as 32 bytes, in the order in which the packs leave them: in the low half four
// elements of vector 0, 1, 2, 3, in the high half the other four of each.
template <int kPredicate>
FFR_INLINE __m256i compare_zero(const Block<float>& a) {
  const __m256 zero = _mm256_setzero_ps();
  __m256i m[4];
  for (int i = 0; i < 4; ++i) m[i] = _mm256_castps_si256(_mm256_cmp_ps((__m256)a.v[i], zero, kPredicate));
  return _mm256_packs_epi16(_mm256_packs_epi32(m[0], m[1]), _mm256_packs_epi32(m[2], m[3]));
}

FFR_INLINE __m256i bit_where(const __m256i& mask, char bit) {
  return _mm256_and_si256(mask, _mm256_set1_epi8(bit));
}

template <bool kEvenOdd>
FFR_INLINE void pack_signs(const Block<float>& d, const Block<float>& c, uint8_t* out) {
  const __m256i of_d =
      _mm256_or_si256(bit_where(compare_zero<_CMP_GT_OQ>(d), 1), bit_where(compare_zero<_CMP_LT_OQ>(d), 2));
  const __m256i of_c =
      _mm256_or_si256(bit_where(compare_zero<_CMP_GT_OQ>(c), 4), bit_where(compare_zero<_CMP_LT_OQ>(c), 8));
  const __m256i codes = _mm256_or_si256(of_d, of_c);
  __m128i bytes;
  if (kEvenOdd) {
    // Vectors 0, 1 (even) to the low nibbles, 2, 3 (odd) to the high ones. Then units of four bytes back into
    // order.
    const __m256i pairs = _mm256_or_si256(codes, _mm256_slli_epi16(_mm256_srli_si256(codes, 8), 4));
    bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  } else {
    // Neighbouring codes to one byte: low + 16 * high. Then units of two bytes back into order.
    __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));
    pairs = _mm256_packus_epi16(pairs, pairs);
    bytes = _mm_unpacklo_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
}

// A product coefficient * sign by vpermilps, which looks up one of four floats by two bits of each 32-bit
// index.
template <>
struct SignLookup<float> {
  static constexpr bool kPaired = false;
  __m256 a_prev, a, e_prev2, e_prev_twice, e;

  FFR_INLINE static __m256 products(double coef) {
    const __m256 signs = _mm256_setr_ps(0, 1, -1, 0, 0, 1, -1, 0);
    return _mm256_mul_ps(_mm256_set1_ps(static_cast<float>(coef)), signs);
  }

  FFR_INLINE explicit SignLookup(const GradientCoef& k)
      : a_prev(products(k.a_prev)),
        a(products(k.a)),
        e_prev2(products(k.e_prev2)),
        e_prev_twice(products(2.0 * k.e_prev)),
        e(products(k.e)) {}

  // Codes of s at bits 0-1 and of t at bits 2-3 of each index.
  FFR_INLINE __m256 sum(const __m256i& s_prev, const __m256i& s, const __m256i& t_prev2,
                        const __m256i& t_prev, const __m256i& t) const {
    const __m256 first = _mm256_sub_ps(_mm256_permutevar_ps(a_prev, s_prev), _mm256_permutevar_ps(a, s));
    const __m256 second =
        _mm256_sub_ps(_mm256_permutevar_ps(e_prev2, t_prev2), _mm256_permutevar_ps(e_prev_twice, t_prev));
    return _mm256_add_ps(first, _mm256_add_ps(second, _mm256_permutevar_ps(e, t)));
  }

  FFR_INLINE static __m256i broadcast(const uint8_t* nibbles) {  // of 8 elements
    int32_t word;
    memcpy(&word, nibbles, sizeof(word));
    return _mm256_set1_epi32(word);
  }

  FFR_INLINE static __m256i widen(const uint8_t* nibbles) {  // of 16 elements
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(nibbles)));
  }

  template <bool kEvenOdd>
  FFR_INLINE Block<float> gradient(const uint8_t* plane_prev2, const uint8_t* plane_prev,
                                   const uint8_t* plane) const {
    Block<float> r;
    if (kEvenOdd) {
      for (int i = 0; i < 2; ++i) {
        const __m256i p2 = widen(plane_prev2 + 8 * i), p1 = widen(plane_prev + 8 * i),
                      p0 = widen(plane + 8 * i);
        r.v[i] = (Block<float>::Vector)sum(p1, p0, _mm256_srli_epi32(p2, 2), _mm256_srli_epi32(p1, 2),
                                           _mm256_srli_epi32(p0, 2));
        r.v[2 + i] = (Block<float>::Vector)sum(_mm256_srli_epi32(p1, 4), _mm256_srli_epi32(p0, 4),
                                               _mm256_srli_epi32(p2, 6), _mm256_srli_epi32(p1, 6),
                                               _mm256_srli_epi32(p0, 6));
      }
      return r;
    }
    const __m256i s_shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i t_shift = _mm256_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30);
    for (int i = 0; i < 4; ++i) {
      const __m256i p2 = broadcast(plane_prev2 + 4 * i), p1 = broadcast(plane_prev + 4 * i),
                    p0 = broadcast(plane + 4 * i);
      r.v[i] = (Block<float>::Vector)sum(_mm256_srlv_epi32(p1, s_shift), _mm256_srlv_epi32(p0, s_shift),
                                         _mm256_srlv_epi32(p2, t_shift), _mm256_srlv_epi32(p1, t_shift),
                                         _mm256_srlv_epi32(p0, t_shift));
    }
    return r;
  }
};

#include "norms.inc"
#include "pairs.inc"
#include "passes.inc"
#include "table.inc"

}  // namespace

const RowKernels& avx2_rows() {
  static const RowKernels kernels = make_rows();
  return kernels;
}

}  // namespace ffr

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
