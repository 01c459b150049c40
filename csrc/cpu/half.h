// kLanes values of a row in its own dtype: to fp32, and back, rounded to the nearest, ties to even. NaN stays NaN.
#pragma once

#include "delta_rule.h"
#include "elementary.h"

namespace deltamem {
namespace {

template <Dtype D>
struct ElementOf { typedef uint16_t type; };
template <>
struct ElementOf<Dtype::f32> { typedef float type; };
template <Dtype D>
using Element = typename ElementOf<D>::type;

typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Words words_of(const uint16_t* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Words);
}

inline void put_words(const Words& words, uint16_t* to) {
  const Halves halves = __builtin_convertvector(words, Halves);
  memcpy(to, &halves, sizeof halves);
}

inline Words choose(const Words& mask, const Words& yes, const Words& no) { return (mask & yes) | (~mask & no); }

template <Dtype D>
inline Vec<kLanes> widened(const Element<D>* from) {
  if constexpr (D == Dtype::f32) {
    return load<kLanes>(from);
  } else if constexpr (D == Dtype::bf16) {
    return bits<Vec<kLanes>>(words_of(from) << 16);
  } else {  // as from_f16
    const Words half = words_of(from), magnitude = (half & 0x7fff) << 13;
    const Words scaled = bits<Words>(bits<Vec<kLanes>>(magnitude) * 5.192296858534828e33f);
    const Words word = choose(Words(magnitude >= 0x0f800000u), magnitude | 0x7f800000u, scaled);
    return bits<Vec<kLanes>>(word | (half & 0x8000) << 16);
  }
}

template <Dtype D>
inline void narrow(const Vec<kLanes>& value, Element<D>* to) {
  if constexpr (D == Dtype::f32) {
    store<kLanes>(to, value);
  } else if constexpr (D == Dtype::bf16) {
    const Words word = bits<Words>(value), rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    put_words(choose(Words((word & 0x7fffffff) > 0x7f800000u), Words{} + 0x7fc0, rounded), to);
  } else {
    const Words word = bits<Words>(value), sign = word >> 16 & 0x8000, size = word & 0x7fffffff;
    // Below 2^-14 a half has steps of 2^-24: adding 0.5, whose last bit is worth that, rounds there.
    const Words small = bits<Words>(bits<Vec<kLanes>>(size) + 0.5f) - 0x3f000000;
    const Words normal = (size - 0x38000000 + 0x0fff + (size >> 13 & 1)) >> 13;  // the exponent's bias from 127 to 15
    Words half = choose(Words(size < 0x38800000u), small, normal);
    half = choose(Words(size >= 0x47800000u), Words{} + 0x7c00, half);  // 65,536 and beyond
    half = choose(Words(size > 0x7f800000u), Words{} + 0x7e00, half);
    put_words(half | sign, to);
  }
}

}  // namespace
}  // namespace deltamem
