// half.hpp: 16-bit floats as plain bits, widened to float32 without branches: loops vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace bonsai_fast {
// Every file compiles its own copy: some use instructions that others must not contain.
namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct BFloat16 {
  uint16_t bits;
  explicit operator float() const { return float_from_bits(uint32_t{bits} << 16); }
};

struct Float16 {
  uint16_t bits;
  explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    // Moves the exponent from bias 15 to bias 127; Inf and NaN get the largest exponent.
    const uint32_t normal =
        (magnitude << 13) + (112u << 23) + (magnitude >= 0x7c00u ? 112u << 23 : 0u);
    // A subnormal is a multiple of 2^-24, the spacing of float32 in [0.5, 1).
    const float subnormal = float_from_bits(0x3f000000u | magnitude) - 0.5f;
    uint32_t subnormal_bits;
    std::memcpy(&subnormal_bits, &subnormal, sizeof subnormal);
    return float_from_bits(sign | (magnitude < 0x0400u ? subnormal_bits : normal));
  }
};

static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2, "arrays of uint16 are read as these");

}  // namespace
}  // namespace bonsai_fast
