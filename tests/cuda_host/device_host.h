// C++ versions of the functions in csrc/cuda/device.cuh that use inline assembly.
#pragma once

#include <math.h>

namespace tokfuse {
namespace cuda {

struct Mbarrier {
  int32_t arrivals, pending;  // arrivals per phase, and those missing in this phase
  int64_t bytes;              // pending bytes of bulk copies in this phase
  uint32_t phase;
};

}  // namespace cuda

namespace host {

using Mbarrier = cuda::Mbarrier;

unsigned cluster_rank();
unsigned cluster_blocks();
void cluster_meet();
const void* cluster_address(const void* mine, unsigned rank);
void mbarrier_init(Mbarrier* barrier, unsigned arrivals);
void mbarrier_expect(Mbarrier* barrier, unsigned bytes);
void mbarrier_wait(Mbarrier* barrier, unsigned parity);
void bulk_load(void* to, const void* from, unsigned bytes, Mbarrier* barrier);
// Stops the run if the device loaded code for an architecture before `arch`.
void check_code(int arch);
void check_aligned(const void* at, size_t bytes);

}  // namespace host

namespace cuda {

template <Keep kKeep>
uint64_t l2_policy() {
  return 0;
}

// One access of 16 bytes for the checker's count.
typedef uint32_t Word4 __attribute__((vector_size(16), may_alias));

inline Vec16 load16(const void* from) {
  host::check_aligned(from, 16);
  const Word4 v = *static_cast<const Word4*>(from);
  return {{v[0], v[1], v[2], v[3]}};
}

inline Vec16 load16(const void* from, uint64_t) { return load16(from); }

inline void store16(void* to, const Vec16& v) {
  host::check_aligned(to, 16);
  *static_cast<Word4*>(to) = Word4{v.word[0], v.word[1], v.word[2], v.word[3]};
}

inline void store16(void* to, const Vec16& v, uint64_t) { store16(to, v); }

inline Vec16 shared_load16(const void* from) { return load16(from); }
inline void shared_store16(void* to, const Vec16& v) { store16(to, v); }

inline uint32_t load4(const void* from) {
  typedef uint32_t Word __attribute__((may_alias));
  host::check_aligned(from, 4);
  return *static_cast<const Word*>(from);
}

TOKFUSE_HOST_RAW float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

TOKFUSE_HOST_RAW uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Has the largest error that the hardware may have: a relative 2^-22.5, with a sign that depends on
// the argument. Integers are exact, as in hardware.
inline float exp2_fast(float x) {
  constexpr float kError = 1.6858e-7f;
  const float y = exp2f(x);
  if (y < 1.17549435e-38f) return 0.0f;
  if (x == floorf(x)) return y;
  return (bits_of(x) >> 15 & 1u) != 0 ? y * (1.0f + kError) : y * (1.0f - kError);
}

// As far off as its contract allows.
inline float log2_fast(float x) {
  constexpr float kError = 0x1p-22f;
  const float y = log2f(x);
  if (x == 1.0f || y == floorf(y)) return y;
  const float error = kError * fmaxf(1.0f, fabsf(y));
  return (bits_of(x) >> 13 & 1u) != 0 ? y + error : y - error;
}

// Off by 1 ulp, with a sign that depends on the argument. Powers of two are exact, as in hardware.
inline float reciprocal_fast(float x) {
  const uint32_t bits = bits_of(1.0f / x);
  if ((bits_of(x) & 0x7fffffu) == 0 || (bits & 0x7f800000u) == 0x7f800000u) return float_of(bits);
  return float_of((bits_of(x) >> 9 & 1u) != 0 ? bits + 1 : bits - 1);
}

inline float max_nan(float a, float b) { return a != a || b != b ? NAN : (a < b ? b : a); }
inline float min_nan(float a, float b) { return a != a || b != b ? NAN : (b < a ? b : a); }

inline Pair add2(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
inline Pair mul2(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
inline Pair fma2(Pair a, Pair b, Pair c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }

TOKFUSE_HOST_RAW float half_to_float(uint16_t bits) {
  _Float16 h;
  memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}

TOKFUSE_HOST_RAW uint32_t float_to_half(float value) {
  const _Float16 h = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}

inline uint32_t float_to_bfloat(float value) {
  if (value != value) return 0x7fffu;  // the result of cvt.rn.bf16x2
  const uint32_t bits = bits_of(value);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline Pair unpack(BFloat16, uint32_t word) {
  return {float_of(word << 16), float_of(word & 0xffff0000u)};
}

inline Pair unpack(Float16, uint32_t word) {
  return {half_to_float(static_cast<uint16_t>(word)),
          half_to_float(static_cast<uint16_t>(word >> 16))};
}

inline uint32_t pack(BFloat16, Pair v) { return float_to_bfloat(v.x) | float_to_bfloat(v.y) << 16; }

inline uint32_t pack(Float16, Pair v) { return float_to_half(v.x) | float_to_half(v.y) << 16; }

// fmaxf of two values of the type returns one of them, so the result is exact.
template <class T>
uint32_t max2(T type, uint32_t a, uint32_t b) {
  const Pair x = unpack(type, a), y = unpack(type, b);
  return pack(type, {fmaxf(x.x, y.x), fmaxf(x.y, y.y)});
}

inline void trap() { host::fail("a trap"); }

inline unsigned cluster_rank() {
  host::check_code(90);
  return host::cluster_rank();
}
inline unsigned cluster_blocks() {
  host::check_code(90);
  return host::cluster_blocks();
}
inline void cluster_sync() {
  host::check_code(90);
  host::cluster_meet();
}

inline float cluster_load(const float* mine, unsigned rank) {
  host::check_code(90);
  return *static_cast<const float*>(host::cluster_address(mine, rank));
}

inline void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  host::check_code(90);
  host::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_expect(Mbarrier* barrier, unsigned bytes) {
  host::mbarrier_expect(barrier, bytes);
}
inline void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  host::mbarrier_wait(barrier, parity);
}
inline void bulk_load(void* to, const void* from, unsigned bytes, Mbarrier* barrier, uint64_t) {
  host::check_code(90);
  host::bulk_load(to, from, bytes, barrier);
}

}  // namespace cuda
}  // namespace tokfuse
