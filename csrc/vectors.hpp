// vectors.hpp: the widest registers of the instruction set in use, as the compiler's vector types.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "half.hpp"

#define BONSAI_FAST_INLINE inline __attribute__((always_inline))

namespace bonsai_fast {
namespace {

#if defined(__AVX512F__)
#define BONSAI_FAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define BONSAI_FAST_VECTOR_BYTES 32
#else
#define BONSAI_FAST_VECTOR_BYTES 16
#endif

constexpr int64_t kLanes = BONSAI_FAST_VECTOR_BYTES / sizeof(float);

typedef float Floats __attribute__((vector_size(BONSAI_FAST_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(BONSAI_FAST_VECTOR_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(BONSAI_FAST_VECTOR_BYTES)));  // 2 * kLanes

template <typename To, typename From>
BONSAI_FAST_INLINE void copy_bits(const From& from, To& to) {
  static_assert(sizeof from == sizeof to, "the same bits under another type");
  std::memcpy(&to, &from, sizeof to);
}

BONSAI_FAST_INLINE void load(const float* source, Floats& out) {
  std::memcpy(&out, source, sizeof out);
}

BONSAI_FAST_INLINE void load(const Float16* source, Floats& out) {
#if defined(__AVX512F__)
  copy_bits(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))), out);
#elif defined(__F16C__)
  copy_bits(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))), out);
#else
  typedef uint16_t Halves __attribute__((vector_size(BONSAI_FAST_VECTOR_BYTES / 2)));
  Halves halves;
  std::memcpy(&halves, source, sizeof halves);
  // As `Float16` does it, lane by lane.
  const Ints bits = __builtin_convertvector(halves, Ints);
  const Ints magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const Ints normal =
      (magnitude << 13) + (112 << 23) + ((magnitude >= 0x7c00) & static_cast<int32_t>(112 << 23));
  Floats subnormal;
  copy_bits(magnitude | 0x3f000000, subnormal);
  subnormal -= 0.5f;
  Ints subnormal_bits;
  copy_bits(subnormal, subnormal_bits);
  copy_bits(sign | (magnitude < 0x0400 ? subnormal_bits : normal), out);
#endif
}

// sum += x * x, rounded twice.
BONSAI_FAST_INLINE void add_square(const Floats& x, Floats& sum) { sum += x * x; }

// The same for 16-bit floats: their square is exact in float32, so one rounding gives equal bits.
BONSAI_FAST_INLINE void add_exact_square(const Floats& x, Floats& sum) {
#if defined(__AVX512F__)
  __m512 value, total;
  copy_bits(x, value);
  copy_bits(sum, total);
  copy_bits(_mm512_fmadd_ps(value, value, total), sum);
#elif defined(__FMA__)
  __m256 value, total;
  copy_bits(x, value);
  copy_bits(sum, total);
  copy_bits(_mm256_fmadd_ps(value, value, total), sum);
#else
  add_square(x, sum);
#endif
}

template <typename Vector>
BONSAI_FAST_INLINE void raise_to(const Vector& value, Vector& largest) {
  largest = value > largest ? value : largest;
}

BONSAI_FAST_INLINE void add_to(float* sums, const Floats& x) {
  Floats sum;
  std::memcpy(&sum, sums, sizeof sum);
  sum += x;
  std::memcpy(sums, &sum, sizeof sum);
}

BONSAI_FAST_INLINE void raise_to(int32_t* largest, const Ints& x) {
  Ints before;
  std::memcpy(&before, largest, sizeof before);
  raise_to(x, before);
  std::memcpy(largest, &before, sizeof before);
}

}  // namespace
}  // namespace bonsai_fast
