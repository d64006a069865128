// Sixteen floats at a time, for kernels that are written over a vector type (rows_kernels.h). To be
// included between AIRL_FAST_BEGIN_TARGET and its end, after immintrin.h.
#pragma once

#include "half.h"

namespace airl_fast {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  static constexpr bool kMasks = true;
  using F = __m512;

  static __m512i bits(F x) { return _mm512_castps_si512(x); }
  static F floats(__m512i x) { return _mm512_castsi512_ps(x); }
  static __m256i raw(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static __mmask16 lanes(std::int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1u);
  }
  static void put(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const BFloat16* p) {
    return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw(p)), 16));
  }
  static F load(const Float16* p) { return _mm512_cvtph_ps(raw(p)); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(BFloat16* p, F x) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits(x), 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits(x), half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    put(p, _mm512_cvtepi32_epi16(
               _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
  }
  static void store(Float16* p, F x) {
    put(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The first lanes alone: of memory that ends there.
  static F load_first(const float* p, std::int64_t count) {
    return _mm512_maskz_loadu_ps(lanes(count), p);
  }
  static void store_first(float* p, F x, std::int64_t count) {
    _mm512_mask_storeu_ps(p, lanes(count), x);
  }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F x) { return _mm512_abs_ps(x); }
  static F with_sign_of(F x, F sign) {
    return floats(_mm512_or_si512(
        bits(abs(x)), _mm512_and_si512(bits(sign), _mm512_set1_epi32(INT32_MIN))));
  }
  static F where_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static F zero_below(F value, F x, float edge) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set(edge), _CMP_NLT_UQ), value);
  }
  static F first(F x, std::int64_t count) {
    return _mm512_maskz_mov_ps(lanes(count), x);
  }
  static F nearest(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F times_power_of_two(F p, F n) { return _mm512_scalef_ps(p, n); }
  static float sum(F x) { return _mm512_reduce_add_ps(x); }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }
};

}  // namespace
}  // namespace airl_fast
