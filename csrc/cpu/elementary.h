// exp, tanh, the logistic function and half precision, lane by lane: a value's bits do not depend on its neighbours.
#pragma once

#include "vec.h"

namespace deltamem {
namespace {

// exp(x) = scale * (1 + fraction), |fraction| < 0.42, accurate to an ulp also where x is tiny; |x| <= 87.
template <int N>
inline void exp_parts(const Vec<N>& x, Vec<N>& scale, Vec<N>& fraction) {
  const auto c = [](float value) { return spread<N>(value); };
  const Vec<N> shift = c(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec<N> shifted = fused<N>(x, c(1.44269504f), shift);
  const Vec<N> n = shifted - shift;
  Vec<N> f = fused<N>(n, c(-0.693359375f), x);  // ln 2 in two parts; the first has few enough bits for n * it to be exact
  f = fused<N>(n, c(2.12194440e-4f), f);
  Vec<N> p = c(1.0f / 5040.0f);
  p = fused<N>(p, f, c(1.0f / 720.0f));
  p = fused<N>(p, f, c(1.0f / 120.0f));
  p = fused<N>(p, f, c(1.0f / 24.0f));
  p = fused<N>(p, f, c(1.0f / 6.0f));
  p = fused<N>(p, f, c(0.5f));
  fraction = fused<N>(f * f, p, f);
  scale = bits<Vec<N>>((bits<Ints<N>>(shifted) << 23) + (127 << 23));
}

// Comparisons are ordered so that NaN passes through.
template <int N>
inline Vec<N> sigmoid(const Vec<N>& x) {
  const Vec<N> bound = spread<N>(87.0f), one = spread<N>(1.0f);
  Vec<N> y = -x, scale, fraction;
  y = y > bound ? bound : y;
  y = y < -bound ? -bound : y;
  exp_parts<N>(y, scale, fraction);
  return one / (one + fused<N>(scale, fraction, scale));
}

// tanh|x| = e / (e + 2) with e = exp(2|x|) - 1: no cancellation for small x, 1 exactly for large.
template <int N>
inline Vec<N> hyperbolic_tangent(const Vec<N>& x) {
  const Ints<N> sign = bits<Ints<N>>(x) & INT32_MIN;
  const Vec<N> bound = spread<N>(40.0f);
  Vec<N> y = bits<Vec<N>>(bits<Ints<N>>(x) & INT32_MAX) * 2.0f, scale, fraction;
  y = y > bound ? bound : y;
  exp_parts<N>(y, scale, fraction);
  const Vec<N> e = fused<N>(scale, fraction, scale - 1.0f);
  return bits<Vec<N>>(bits<Ints<N>>(e / (e + 2.0f)) | sign);
}

template <int N>
inline Vec<N> square_root(const Vec<N>& x) {
  float values[N];
  store<N>(values, x);
  for (int i = 0; i < N; i++) values[i] = __builtin_sqrtf(values[i]);
  return load<N>(values);
}

inline float from_bf16(uint16_t h) { return bits<float>(static_cast<uint32_t>(h) << 16); }

inline float from_f16(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included
  uint32_t word = bits<uint32_t>(bits<float>(magnitude) * 5.192296858534828e33f);
  if (magnitude >= 0x0f800000u) word = magnitude | 0x7f800000u;  // infinity and NaN
  return bits<float>(word | static_cast<uint32_t>(h & 0x8000) << 16);
}

}  // namespace
}  // namespace deltamem
