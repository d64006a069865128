// The two half-precision formats as storage, with exact conversions (ties to even) in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace airl_fast {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

namespace {

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return float_of(std::uint32_t{x.bits} << 16); }

inline float widen(Float16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The same digits under float's exponent bias, 112 higher; exact for subnormals too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline void narrow(float x, float* out) { *out = x; }

inline void narrow(float x, BFloat16* out) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out->bits = static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u);
}

inline void narrow(float x, Float16* out) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u;
  const float magnitude = float_of(bits & 0x7fffffffu);
  std::uint32_t half;
  if (!(magnitude < 65520.0f)) {
    half = magnitude == magnitude ? 0x7c00u : 0x7e00u;
  } else if (magnitude < 0x1p-14f) {
    half = bits_of(magnitude + 0.5f) - bits_of(0.5f);  // 0.5 has the spacing of half's subnormals
  } else {
    const std::uint32_t digits = bits_of(magnitude);
    half = (digits + 0xfffu + (digits >> 13 & 1u) - (112u << 23)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}

}  // namespace
}  // namespace airl_fast
