// N floats side by side. The same bits come out however the compiler vectorises: contraction is off for the whole build
// and every fused multiply-add is asked for by name.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace deltamem {
namespace {

// Floats in the widest register of this build.
#if defined(DELTAMEM_LANES)  // a test's: the code for wider registers, on a CPU without them
constexpr int kLanes = DELTAMEM_LANES;
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Vector registers of this build.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <int N>
struct Lanes {
  typedef float floats __attribute__((vector_size(N * sizeof(float))));
  typedef int32_t ints __attribute__((vector_size(N * sizeof(float))));
};
template <int N>
using Vec = typename Lanes<N>::floats;
template <int N>
using Ints = typename Lanes<N>::ints;

template <int N>
inline Vec<N> load(const float* p) {
  Vec<N> x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <int N>
inline void store(float* p, const Vec<N>& x) { memcpy(p, &x, sizeof x); }
template <int N>
inline Vec<N> spread(float value) { return value - Vec<N>{}; }

// The same bits as another type of the same size.
template <typename To, typename From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// a * b + c, fused where the instruction set has it, so that no build calls a library fma.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

template <int N>
inline Vec<N> fused(const Vec<N>& a, const Vec<N>& b, const Vec<N>& c) {
  if constexpr (N == 1) return Vec<N>{fused(a[0], b[0], c[0])};
#if defined(__FMA__)
  if constexpr (N == 4) return (Vec<N>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  if constexpr (N == 8) return (Vec<N>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#if defined(__AVX512F__)
  if constexpr (N == 16) return (Vec<N>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#elif defined(__aarch64__)
  if constexpr (N == 4) return (Vec<N>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
  if constexpr (N > 4) {  // wider than a register: by halves
    Vec<N> result;
    Vec<N / 2> x[2], y[2], z[2];
    memcpy(x, &a, sizeof a);
    memcpy(y, &b, sizeof b);
    memcpy(z, &c, sizeof c);
    for (int half = 0; half < 2; half++) z[half] = fused<N / 2>(x[half], y[half], z[half]);
    memcpy(&result, z, sizeof result);
    return result;
  }
}

}  // namespace
}  // namespace deltamem
