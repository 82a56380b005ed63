// Words that every formula header uses. All of csrc/math is compiled once per instruction set, so
// it lives in the namespace jops::<isa>: without it the linker would merge inline functions that
// were compiled for different machines, and the baseline might run AVX-512 code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifndef JOPS_ISA  // set by the build: baseline, avx2, avx512, avx512bf16, amx, neon, cuda
#define JOPS_ISA baseline
#endif

#ifdef __CUDACC__
#define JOPS_HD __host__ __device__ __forceinline__
#else
#define JOPS_HD inline __attribute__((always_inline))
#endif

namespace jops::JOPS_ISA {

template <class T>
using IntOf = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

// 16-bit storage types.
struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// The type in which a storage type is computed.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kLeastNormal = std::numeric_limits<T>::min();

// The scalar type of a scalar or of a vector (specialised in simd.h).
template <class A>
struct ScalarOf {
  using type = A;
};
template <class A>
using Scalar = typename ScalarOf<A>::type;

// Primitives, scalar forms. simd.h overloads each one for vectors; formulas use no others.

template <class T>
JOPS_HD T select(bool c, T a, T b) {
  return c ? a : b;
}
// As maxps and minps: the second operand if either is NaN.
template <class T, class = std::enable_if_t<std::is_floating_point_v<T>>>
JOPS_HD T max(T a, T b) {
  return a > b ? a : b;
}
template <class T, class = std::enable_if_t<std::is_floating_point_v<T>>>
JOPS_HD T min(T a, T b) {
  return a < b ? a : b;
}
JOPS_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
JOPS_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
JOPS_HD float abs(float a) { return ::fabsf(a); }
JOPS_HD double abs(double a) { return ::fabs(a); }
JOPS_HD float copysign(float a, float b) { return ::copysignf(a, b); }
JOPS_HD double copysign(double a, double b) { return ::copysign(a, b); }
JOPS_HD float reciprocal(float a) { return 1 / a; }
JOPS_HD double reciprocal(double a) { return 1 / a; }
// With a relative error of at most 2^-14.
JOPS_HD float rough_reciprocal(float a) { return 1 / a; }
JOPS_HD float round_even(float a) { return ::rintf(a); }
JOPS_HD double round_even(double a) { return ::rint(a); }
JOPS_HD float log(float a) { return ::logf(a); }
JOPS_HD double log(double a) { return ::log(a); }
// 2^n for n in the normal exponent range.
template <class T>
JOPS_HD T power2(int n) {
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
  constexpr int kBias = std::numeric_limits<T>::max_exponent - 1;
  using Bits = std::make_unsigned_t<IntOf<T>>;  // callers may select away an n out of range
  const Bits bits = static_cast<Bits>(n + kBias) << kMantissa;
  T power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}
// a * 2^n for an integral n, up to twice the exponent range: in two exact steps, but for the last
// rounding.
template <class T, class = std::enable_if_t<std::is_floating_point_v<T>>>
JOPS_HD T scale2(T a, T n) {
  const int whole = static_cast<int>(n), half = whole / 2;
  return a * power2<T>(half) * power2<T>(whole - half);
}

}  // namespace jops::JOPS_ISA
