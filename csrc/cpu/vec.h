// N floats side by side, and the elementary functions, written so that the same bits come out however the compiler
// vectorises: contraction is off for the whole build and every fused multiply-add is asked for by name.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace deltamem {
namespace {

// Fused where the instruction set has it, so that no build calls a library fma.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(N * sizeof(float))));
};
template <int N>
using Vec = typename Lanes<N>::type;

template <int N>
inline void load(Vec<N>& x, const float* p) { memcpy(&x, p, sizeof x); }
template <int N>
inline void store(float* p, const Vec<N>& x) { memcpy(p, &x, sizeof x); }
template <int N>
inline void spread(Vec<N>& x, float value) { x = value - Vec<N>{}; }

// c += a * b
template <int N>
inline void accumulate(Vec<N>& c, const Vec<N>& a, const Vec<N>& b) {
#if defined(__FMA__)
  if constexpr (N == 4) { c = (Vec<N>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c); return; }
  if constexpr (N == 8) { c = (Vec<N>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); return; }
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) { c = (Vec<N>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); return; }
#endif
  c = c + a * b;
}

// exp(x) = scale * (1 + fraction), |fraction| < 0.42, accurate to an ulp also where x is tiny; |x| <= 87.
inline void exp_parts(float x, float& scale, float& fraction) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = fused(x, 1.44269504f, shift);
  const float n = shifted - shift;
  float f = fused(n, -0.693359375f, x);  // ln 2 in two parts; the first has few enough bits for n * it to be exact
  f = fused(n, 2.12194440e-4f, f);
  float p = 1.0f / 5040.0f;
  p = fused(p, f, 1.0f / 720.0f);
  p = fused(p, f, 1.0f / 120.0f);
  p = fused(p, f, 1.0f / 24.0f);
  p = fused(p, f, 1.0f / 6.0f);
  p = fused(p, f, 0.5f);
  fraction = fused(f * f, p, f);
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);
  memcpy(&scale, &bits, sizeof scale);
}

// Comparisons are ordered so that NaN passes through.
inline float sigmoid(float x) {
  float y = -x;
  y = y > 87.0f ? 87.0f : y;
  y = y < -87.0f ? -87.0f : y;
  float scale, fraction;
  exp_parts(y, scale, fraction);
  return 1.0f / (1.0f + fused(scale, fraction, scale));
}

// tanh|x| = e / (e + 2) with e = exp(2|x|) - 1: no cancellation for small x, 1 exactly for large.
inline float tanh_(float x) {
  float y = __builtin_fabsf(x) * 2.0f;
  y = y > 40.0f ? 40.0f : y;
  float scale, fraction;
  exp_parts(y, scale, fraction);
  const float e = fused(scale, fraction, scale - 1.0f);
  return __builtin_copysignf(e / (e + 2.0f), x);
}

inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_f16(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  uint32_t bits = magnitude;
  float x;
  memcpy(&x, &bits, sizeof x);
  x *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias from 15 to 127, subnormals included
  memcpy(&bits, &x, sizeof bits);
  if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;  // infinity and NaN
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace
}  // namespace deltamem
