// The row kernels in plain C++: arrays of four, which any compiler turns into vector code.
#include "rows_kernels.h"

namespace airl_fast {
namespace {

struct Portable {
  static constexpr int kWidth = 4;
  static constexpr bool kMasks = false;
  struct F {
    float lane[kWidth];
  };

  template <class Op>
  static F each(Op op) {
    F out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = op(i);
    return out;
  }

  template <class T>
  static F load(const T* p) {
    return each([=](int i) { return widen(p[i]); });
  }
  template <class T>
  static void store(T* p, F x) {
    for (int i = 0; i < kWidth; ++i) narrow(x.lane[i], p + i);
  }
  static F set(float x) {
    return each([=](int) { return x; });
  }
  static F add(F a, F b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static F fma(F a, F b, F c) { return add(mul(a, b), c); }
  static F fnma(F a, F b, F c) { return sub(c, mul(a, b)); }
  static F max(F a, F b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F abs(F x) {
    return each([&](int i) { return float_of(bits_of(x.lane[i]) & 0x7fffffffu); });
  }
  static F with_sign_of(F x, F sign) {
    return each([&](int i) {
      return float_of((bits_of(x.lane[i]) & 0x7fffffffu) | (bits_of(sign.lane[i]) & 0x80000000u));
    });
  }
  static F where_less(F a, F b, F yes, F no) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]; });
  }
  static F zero_below(F value, F x, float edge) {
    return each([&](int i) { return x.lane[i] < edge ? 0.0f : value.lane[i]; });
  }
  static F first(F x, std::int64_t count) {
    return each([&](int i) { return i < count ? x.lane[i] : 0.0f; });
  }
  // Adding 1.5 2^23 rounds to an integer, which is then the low digits of the sum.
  static F nearest(F x) {
    return each([&](int i) { return (x.lane[i] + 12582912.0f) - 12582912.0f; });
  }
  static F times_power_of_two(F p, F n) {
    return each([&](int i) {
      const std::uint32_t power = bits_of(n.lane[i] + 12582912.0f) - bits_of(12582912.0f);
      return p.lane[i] * float_of((power + 127u) << 23);
    });
  }
  static float sum(F x) { return (x.lane[0] + x.lane[2]) + (x.lane[1] + x.lane[3]); }
  static float largest(F x) {
    float m = x.lane[0];
    for (int i = 1; i < kWidth; ++i) m = x.lane[i] > m ? x.lane[i] : m;
    return m;
  }
};

}  // namespace

const RowKernels& portable_kernels() { return kernels_of<Portable>(); }

}  // namespace airl_fast
