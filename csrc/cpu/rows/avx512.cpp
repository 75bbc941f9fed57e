// Row kernels for AVX-512 F + BW + VL + DQ (x86-64-v4): Intel servers since Skylake-X (2017), AMD since
// Zen 4.
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include <type_traits>

#include "rows.h"

#define FFR_INLINE inline __attribute__((always_inline))

// After the includes: what the standard headers define inline must stay runnable everywhere, since the linker
// keeps one copy of it for the whole library.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c"))), \
                             apply_to = function)
#else
// GCC 12 warns of its own _mm512_undefined_ps() (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,f16c,prefer-vector-width=512")
#endif

namespace ffr {
namespace {

constexpr int kVectorBytes = 64;

template <typename Vector>
FFR_INLINE void stream_vector(Vector* p, const Vector& value) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)value);
}

#include "block.inc"
#include "block_portable.inc"

FFR_INLINE Block<float> load(const Float16* p) {
  Block<float> r;
  for (int i = 0; i < 2; ++i)
    r.v[i] = (Block<float>::Vector)_mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * i)));
  return r;
}

FFR_INLINE void store(Float16* p, const Block<float>& a) {
  for (int i = 0; i < 2; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i),
                        _mm512_cvtps_ph((__m512)a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <int kPredicate>
FFR_INLINE __mmask16 compare_zero(const Block<float>& a, int i) {
  return _mm512_cmp_ps_mask((__m512)a.v[i], _mm512_setzero_ps(), kPredicate);
}

// Codes of vector i, times kUnit, added to the 16 bytes.
template <int kUnit>
FFR_INLINE __m128i add_codes(__m128i bytes, const Block<float>& d, const Block<float>& c, int i) {
  bytes = _mm_mask_add_epi8(bytes, compare_zero<_CMP_GT_OQ>(d, i), bytes, _mm_set1_epi8(char(1 * kUnit)));
  bytes = _mm_mask_add_epi8(bytes, compare_zero<_CMP_LT_OQ>(d, i), bytes, _mm_set1_epi8(char(2 * kUnit)));
  bytes = _mm_mask_add_epi8(bytes, compare_zero<_CMP_GT_OQ>(c, i), bytes, _mm_set1_epi8(char(4 * kUnit)));
  return _mm_mask_add_epi8(bytes, compare_zero<_CMP_LT_OQ>(c, i), bytes, _mm_set1_epi8(char(8 * kUnit)));
}

template <int kPredicate>
FFR_INLINE __mmask32 compare_zero(const Block<float>& a) {
  return _mm512_kunpackw(compare_zero<kPredicate>(a, 1), compare_zero<kPredicate>(a, 0));
}

template <bool kEvenOdd>
FFR_INLINE void pack_signs(const Block<float>& d, const Block<float>& c, uint8_t* out) {
  __m128i bytes = _mm_setzero_si128();
  if (kEvenOdd) {
    bytes = add_codes<16>(add_codes<1>(bytes, d, c, 0), d, c, 1);
  } else {
    __m256i codes = _mm256_maskz_mov_epi8(compare_zero<_CMP_GT_OQ>(d), _mm256_set1_epi8(1));
    codes = _mm256_mask_add_epi8(codes, compare_zero<_CMP_LT_OQ>(d), codes, _mm256_set1_epi8(2));
    codes = _mm256_mask_add_epi8(codes, compare_zero<_CMP_GT_OQ>(c), codes, _mm256_set1_epi8(4));
    codes = _mm256_mask_add_epi8(codes, compare_zero<_CMP_LT_OQ>(c), codes, _mm256_set1_epi8(8));
    // Neighbouring codes to one byte: low + 16 * high.
    bytes = _mm256_cvtepi16_epi8(_mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001)));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
}

// vpermps looks up one of 16 floats by the low four bits of each 32-bit index: a nibble holds two sign codes,
// so one lookup gives the sum of two products.
template <>
struct SignLookup<float> {
  static constexpr bool kPaired = true;
  __m512 first, second, third;  // by (s_prev, s), by (t_prev2, t_prev), by (any, t)

  FFR_INLINE static __m512 times(double coef, const __m512& signs) {
    return _mm512_mul_ps(_mm512_set1_ps(static_cast<float>(coef)), signs);
  }

  FFR_INLINE explicit SignLookup(const GradientCoef& k) {
    const __m512 low = _mm512_setr_ps(0, 1, -1, 0, 0, 1, -1, 0, 0, 1, -1, 0, 0, 1, -1, 0);
    const __m512 high = _mm512_setr_ps(0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1, 0, 0, 0, 0);
    first = _mm512_sub_ps(times(k.a_prev, low), times(k.a, high));
    second = _mm512_sub_ps(times(k.e_prev2, low), times(2.0 * k.e_prev, high));
    third = times(k.e, high);
  }

  // 16 nibbles as the low bits of 16 indices, nibble j in lane 2 j and nibble 8 + j in lane 2 j + 1: so a
  // plain broadcast of the 8 bytes (which the load unit does) and one shift are enough; vpermps ignores the
  // higher bits.
  FFR_INLINE static __m512i indices(const uint8_t* nibbles) {
    const __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    int64_t word;
    memcpy(&word, nibbles, sizeof(word));
    return _mm512_srlv_epi32(_mm512_set1_epi64(word), shift);
  }

  FFR_INLINE static __m512i widen(const uint8_t* nibbles) {  // of 32 elements
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
  }

  FFR_INLINE __m512 sum(const __m512i& s_pairs, const __m512i& t_pairs, const __m512i& codes) const {
    return _mm512_add_ps(
        _mm512_permutexvar_ps(s_pairs, first),
        _mm512_add_ps(_mm512_permutexvar_ps(t_pairs, second), _mm512_permutexvar_ps(codes, third)));
  }

  template <bool kEvenOdd>
  FFR_INLINE Block<float> gradient(const uint8_t* t_pairs, const uint8_t* s_pairs,
                                   const uint8_t* plane) const {
    Block<float> r;
    if (kEvenOdd) {
      const __m512i t = widen(t_pairs), s = widen(s_pairs), p = widen(plane);
      r.v[0] = (Block<float>::Vector)sum(s, t, p);
      r.v[1] = (Block<float>::Vector)sum(_mm512_srli_epi32(s, 4), _mm512_srli_epi32(t, 4),
                                         _mm512_srli_epi32(p, 4));
      return r;
    }
    const __m512i in_order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (int i = 0; i < 2; ++i) {
      const __m512 interleaved =
          sum(indices(s_pairs + 8 * i), indices(t_pairs + 8 * i), indices(plane + 8 * i));
      r.v[i] = (Block<float>::Vector)_mm512_permutexvar_ps(in_order, interleaved);
    }
    return r;
  }
};

#include "norms.inc"
#include "pairs.inc"
#include "passes.inc"
#include "table.inc"

}  // namespace

const RowKernels& avx512_rows() {
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
