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

// 32 comparisons' results as 32 bytes, in the order in which the packs leave them: four elements of vector 0,
// 1, 2, 3 in the low half, the other four of each in the high half.
FFR_INLINE __m256i packed_compare(const __m256i m0, const __m256i m1, const __m256i m2, const __m256i m3) {
  return _mm256_packs_epi16(_mm256_packs_epi32(m0, m1), _mm256_packs_epi32(m2, m3));
}

template <int kPredicate>
FFR_INLINE __m256i compare_zero(const Block<float>& a) {
  const __m256 zero = _mm256_setzero_ps();
  return packed_compare(_mm256_castps_si256(_mm256_cmp_ps((__m256)a.v[0], zero, kPredicate)),
                        _mm256_castps_si256(_mm256_cmp_ps((__m256)a.v[1], zero, kPredicate)),
                        _mm256_castps_si256(_mm256_cmp_ps((__m256)a.v[2], zero, kPredicate)),
                        _mm256_castps_si256(_mm256_cmp_ps((__m256)a.v[3], zero, kPredicate)));
}

FFR_INLINE __m256i bit_where(const __m256i mask, char bit) {
  return _mm256_and_si256(mask, _mm256_set1_epi8(bit));
}

FFR_INLINE void pack_signs(const Block<float>& d, const Block<float>& c, uint8_t* out) {
  const __m256i of_d =
      _mm256_or_si256(bit_where(compare_zero<_CMP_GT_OQ>(d), 1), bit_where(compare_zero<_CMP_LT_OQ>(d), 2));
  const __m256i of_c =
      _mm256_or_si256(bit_where(compare_zero<_CMP_GT_OQ>(c), 4), bit_where(compare_zero<_CMP_LT_OQ>(c), 8));
  // Neighbouring codes to one byte: low + 16 * high. Then 16-bit units (4 elements) back into order.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_or_si256(of_d, of_c), _mm256_set1_epi16(0x1001));
  const __m256i bytes = _mm256_packus_epi16(pairs, pairs);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
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

  FFR_INLINE static __m256i broadcast(const uint8_t* nibbles) {
    int32_t word;
    memcpy(&word, nibbles, sizeof(word));
    return _mm256_set1_epi32(word);
  }

  FFR_INLINE Block<float> gradient(const uint8_t* plane_prev2, const uint8_t* plane_prev,
                                   const uint8_t* plane) const {
    const __m256i s_shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i t_shift = _mm256_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30);
    Block<float> r;
    for (int i = 0; i < 4; ++i) {
      const __m256i prev2 = broadcast(plane_prev2 + 4 * i), prev = broadcast(plane_prev + 4 * i);
      const __m256i current = broadcast(plane + 4 * i);
      const __m256 first = _mm256_sub_ps(_mm256_permutevar_ps(a_prev, _mm256_srlv_epi32(prev, s_shift)),
                                         _mm256_permutevar_ps(a, _mm256_srlv_epi32(current, s_shift)));
      const __m256 second =
          _mm256_sub_ps(_mm256_permutevar_ps(e_prev2, _mm256_srlv_epi32(prev2, t_shift)),
                        _mm256_permutevar_ps(e_prev_twice, _mm256_srlv_epi32(prev, t_shift)));
      const __m256 third = _mm256_permutevar_ps(e, _mm256_srlv_epi32(current, t_shift));
      r.v[i] = (Block<float>::Vector)_mm256_add_ps(first, _mm256_add_ps(second, third));
    }
    return r;
  }
};

#include "rows_impl.inc"

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
