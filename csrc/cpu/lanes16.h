// 16-bit logits, one register at a time: conversion to two registers of float32 and back, and their
// range.
#pragma once

#include "cpu/vec.h"

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

namespace tokfuse {
namespace TOKFUSE_ISA {

constexpr int64_t kLanes16 = 2 * kLanes;  // values in a register
typedef int16_t Signed16 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Unsigned16 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Unsigned16At __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

// split converts kLanes16 values to float32, join rounds them to nearest even. The two registers
// hold the even and the odd columns of bfloat16, and the first and the second half of float16.
template <class T>
struct Lanes16 {
  static constexpr bool kExists = false;
};

// Shifts and masks keep the width of the lanes. Unpack and pack instructions cost more than the
// conversion itself.
template <>
struct Lanes16<BFloat16> {
  static constexpr bool kExists = true;

  static void split(const BFloat16* from, Lanes* even, Lanes* odd) {
    const WordLanes pairs = *reinterpret_cast<const WordLanesAt*>(from);
    *even = float_of(pairs << 16);
    *odd = float_of(pairs & 0xffff0000u);
  }

  // Each value must be a number, or a NaN whose lower 16 bits are 0: another NaN could carry into
  // the sign.
  static void join(Lanes even, Lanes odd, BFloat16* to) {
    const WordLanes a = bits_of(even), b = bits_of(odd);
#if defined(__SSE4_1__)
    // A value is rounded up if its lower half is above 0x8000, or 0x8000 below an odd upper half.
    // For both registers together this takes 8 instructions. Separately it takes 11.
    const Unsigned16 upper = odd_of_second(a >> 16, b), lower = odd_of_second(a, b << 16);
    const Unsigned16 even_upper = ~upper & uint16_t{1};
    const Signed16 up = (Signed16)minus_or_0(lower, even_upper) < 0;  // -1 where true
    *reinterpret_cast<Unsigned16At*>(to) = upper - (Unsigned16)up;
#else
    *reinterpret_cast<WordLanesAt*>(to) = rounded(a) >> 16 | (rounded(b) & 0xffff0000u);
#endif
  }

 private:
#if defined(__AVX512BW__)
  static Unsigned16 odd_of_second(WordLanes a, WordLanes b) {
    return (Unsigned16)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)a, (__m512i)b);
  }
  static Unsigned16 minus_or_0(Unsigned16 a, Unsigned16 b) {
    return (Unsigned16)_mm512_subs_epu16((__m512i)a, (__m512i)b);
  }
#elif defined(__AVX2__)
  static Unsigned16 odd_of_second(WordLanes a, WordLanes b) {
    return (Unsigned16)_mm256_blend_epi16((__m256i)a, (__m256i)b, 0xaa);
  }
  static Unsigned16 minus_or_0(Unsigned16 a, Unsigned16 b) {
    return (Unsigned16)_mm256_subs_epu16((__m256i)a, (__m256i)b);
  }
#elif defined(__SSE4_1__)
  static Unsigned16 odd_of_second(WordLanes a, WordLanes b) {
    return (Unsigned16)_mm_blend_epi16((__m128i)a, (__m128i)b, 0xaa);
  }
  static Unsigned16 minus_or_0(Unsigned16 a, Unsigned16 b) {
    return (Unsigned16)_mm_subs_epu16((__m128i)a, (__m128i)b);
  }
#else
  static WordLanes rounded(WordLanes v) { return v + 0x7fffu + ((v >> 16) & 1u); }
#endif
};

// With conversion instructions. Without them, float16 is converted by a separate loop.
#if defined(__F16C__) && defined(__AVX2__)
template <>
struct Lanes16<Float16> {
  static constexpr bool kExists = true;

  static void split(const Float16* from, Lanes* first, Lanes* second) {
    *first = lanes_at(from);
    *second = lanes_at(from + kLanes);
  }

  static void join(Lanes first, Lanes second, Float16* to) {
    store_lanes(first, to);
    store_lanes(second, to + kLanes);
  }

 private:
#if defined(__AVX512F__)
  // With a mask, because g++ 12 warns about the other form.
  static Lanes lanes_at(const Float16* from) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_maskz_cvtph_ps(0xffff, v);
  }
  static void store_lanes(Lanes v, Float16* to) {
    const __m256i rounded = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
  }
#else
  static Lanes lanes_at(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void store_lanes(Lanes v, Float16* to) {
    const __m128i rounded = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), rounded);
  }
#endif
};
#endif

static inline uint16_t least_of(Unsigned16 v) {
#if defined(__SSE4_1__)
  __m128i part[kLanes / 4];
  memcpy(part, &v, sizeof(v));
  for (int i = 1; i < kLanes / 4; i++) part[0] = _mm_min_epu16(part[0], part[i]);
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(part[0])));
#else
  uint16_t least = v[0];
  for (int i = 1; i < kLanes16; i++) least = v[i] < least ? v[i] : least;
  return least;
#endif
}

// The range of many logits. Their bits are compared as integers, which have the order of the
// logits, except that two negative ones have the reverse order.
template <class T>
struct Range16 {
  Signed16 largest = Signed16{} + static_cast<int16_t>(INT16_MIN);
  Unsigned16 least = ~Unsigned16{}, most = {};

  void add(const T* logits) {
    const Unsigned16 v = *reinterpret_cast<const Unsigned16At*>(logits);
    const Signed16 w = (Signed16)v;
    largest = largest > w ? largest : w;
    least = least < v ? least : v;
    most = most > v ? most : v;
  }

  // The maximum; may be NaN if one of the logits is.
  float max() const {
    // INT16_MAX - largest, from 0 to 65535; it does not fit into int16_t.
    const Unsigned16 below = static_cast<uint16_t>(INT16_MAX) - (Unsigned16)largest;
    const int high = INT16_MAX - least_of(below);
    return logit(high >= 0 ? static_cast<uint16_t>(high) : least_of(least));
  }

  // The minimum, or 0 if no logit has a sign; NaN if one is a NaN with a sign.
  float min() const {
    const uint16_t high = static_cast<uint16_t>(~least_of(~most));
    return high < 0x8000u ? 0.0f : logit(high);
  }

 private:
  static float logit(uint16_t bits) {
    const T t = {bits};
    return load(&t, 0);
  }
};

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
