// The vector type: Vec<float> and Vec<double>, as wide as the instruction set's registers, over
// GCC/Clang vector extensions. Intrinsics appear only where the extensions cannot say what is
// meant.
//
// Storage types are float, double, Bf16 and F16; load() and store() convert (16-bit types to and
// from Vec<float>, rounding to nearest even, NaN kept). Compiled with -ffp-contract=off, so that an
// element's bits do not depend on its place in an array: a fused multiply-add is written fma().
#pragma once

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <utility>

namespace jops::JOPS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The compilers' own vector types (GCC drops the attribute when it overloads on a dependent one).
template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Real __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  typedef double Real __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t Bits __attribute__((vector_size(kVectorBytes)));
};

// Lane-wise truth: the result of a comparison.
template <class T>
struct Bool {
  using Native = typename Lanes<T>::Bits;
  Native v;
  JOPS_HD friend Bool operator&(Bool a, Bool b) { return {a.v & b.v}; }
  JOPS_HD friend Bool operator|(Bool a, Bool b) { return {a.v | b.v}; }
  JOPS_HD friend Bool operator!(Bool a) { return {~a.v}; }
};

template <class T>
struct Vec {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  using Native = typename Lanes<T>::Real;
  using Bits = typename Lanes<T>::Bits;
  Native v;

  Vec() = default;
  JOPS_HD Vec(Native native) : v(native) {}
  // Broadcast; `- 0` rather than `+ 0` keeps the sign of -0.
  JOPS_HD Vec(T scalar) : v(scalar - Native{}) {}
  template <class S, class = std::enable_if_t<std::is_arithmetic_v<S> && !std::is_same_v<S, T>>>
  JOPS_HD Vec(S scalar) : Vec(static_cast<T>(scalar)) {}

  JOPS_HD T operator[](int i) const { return v[i]; }
  JOPS_HD Vec operator-() const { return -v; }
  JOPS_HD friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  JOPS_HD friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  JOPS_HD friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  JOPS_HD friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  JOPS_HD Vec& operator+=(Vec b) { return *this = *this + b; }
  JOPS_HD Vec& operator-=(Vec b) { return *this = *this - b; }
  JOPS_HD Vec& operator*=(Vec b) { return *this = *this * b; }
  JOPS_HD friend Bool<T> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  JOPS_HD friend Bool<T> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  JOPS_HD friend Bool<T> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  JOPS_HD friend Bool<T> operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
  JOPS_HD friend Bool<T> operator==(Vec a, Vec b) { return {a.v == b.v}; }
  JOPS_HD friend Bool<T> operator!=(Vec a, Vec b) { return {a.v != b.v}; }
};

template <class T>
struct ScalarOf<Vec<T>> {
  using type = T;
};

template <class T>
JOPS_HD typename Vec<T>::Bits bits(Vec<T> a) {
  return reinterpret_cast<typename Vec<T>::Bits>(a.v);
}
template <class T>
JOPS_HD Vec<T> from_bits(typename Vec<T>::Bits b) {
  return reinterpret_cast<typename Vec<T>::Native>(b);
}

template <class T>
JOPS_HD Vec<T> select(Bool<T> c, Vec<T> a, Vec<T> b) {
  return c.v ? a.v : b.v;
}
// GCC makes a comparison and a blend of `a > b ? a : b`, hence the intrinsics.
template <class T>
JOPS_HD Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_max_ps(a.v, b.v);
  if constexpr (std::is_same_v<T, double>) return _mm512_max_pd(a.v, b.v);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return _mm256_max_ps(a.v, b.v);
  if constexpr (std::is_same_v<T, double>) return _mm256_max_pd(a.v, b.v);
#elif defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) return _mm_max_ps(a.v, b.v);
  if constexpr (std::is_same_v<T, double>) return _mm_max_pd(a.v, b.v);
#else
  return a.v > b.v ? a.v : b.v;
#endif
}
template <class T>
JOPS_HD Vec<T> min(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_min_ps(a.v, b.v);
  if constexpr (std::is_same_v<T, double>) return _mm512_min_pd(a.v, b.v);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return _mm256_min_ps(a.v, b.v);
  if constexpr (std::is_same_v<T, double>) return _mm256_min_pd(a.v, b.v);
#elif defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) return _mm_min_ps(a.v, b.v);
  if constexpr (std::is_same_v<T, double>) return _mm_min_pd(a.v, b.v);
#else
  return a.v < b.v ? a.v : b.v;
#endif
}
template <class T>
JOPS_HD Vec<T> abs(Vec<T> a) {
  return from_bits<T>(bits(a) & std::numeric_limits<IntOf<T>>::max());
}
template <class T>
JOPS_HD Vec<T> copysign(Vec<T> a, Vec<T> b) {
  constexpr IntOf<T> kMagnitude = std::numeric_limits<IntOf<T>>::max();
  return from_bits<T>((bits(a) & kMagnitude) | (bits(b) & ~kMagnitude));
}

template <class T>
JOPS_HD Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  [[maybe_unused]] constexpr bool kFloat = std::is_same_v<T, float>;
#if defined(__AVX512F__)
  if constexpr (kFloat) return _mm512_fmadd_ps(a.v, b.v, c.v);
  if constexpr (!kFloat) return _mm512_fmadd_pd(a.v, b.v, c.v);
#elif defined(__FMA__)
  if constexpr (kFloat) return _mm256_fmadd_ps(a.v, b.v, c.v);
  if constexpr (!kFloat) return _mm256_fmadd_pd(a.v, b.v, c.v);
#elif defined(__aarch64__)
  if constexpr (kFloat) return vfmaq_f32(c.v, a.v, b.v);
  if constexpr (!kFloat) return vfmaq_f64(c.v, a.v, b.v);
#else
  return a * b + c;
#endif
}
// Mixed scalar and vector arguments.
template <class T, class B, class C>
JOPS_HD Vec<T> fma(Vec<T> a, B b, C c) {
  return fma(a, Vec<T>(b), Vec<T>(c));
}
// Lane by lane through the C library: for one number a column, not for every element.
template <class T>
JOPS_HD Vec<T> log(Vec<T> a) {
  for (int i = 0; i < Vec<T>::kLanes; ++i) a.v[i] = log(a.v[i]);
  return a;
}

// 1/a for normal a with a relative error of at most 2^-14, and to about an ulp, by a step of
// Newton's. A whole division takes the place of ten multiplications.
JOPS_HD Vec<float> rough_reciprocal(Vec<float> a) {
#if defined(__AVX512F__)
  return _mm512_rcp14_ps(a.v);
#else
  return Vec<float>(1.0f) / a;
#endif
}
template <class T>
JOPS_HD Vec<T> reciprocal(Vec<T> a) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const Vec<T> r = rough_reciprocal(a);
    return fma(r, fma(-a, r, Vec<T>(T(1))), r);
  }
#endif
  return Vec<T>(T(1)) / a;
}

// Nearest integer, ties to even; |a| < 2^(mantissa bits - 1).
template <class T>
JOPS_HD Vec<T> round_even(Vec<T> a) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT);
  if constexpr (std::is_same_v<T, double>)
    return _mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec<T> magic(T(1.5) / std::numeric_limits<T>::epsilon());
  return (a + magic) - magic;
#endif
}

// 2^n for an integral n in the normal exponent range.
template <class T>
JOPS_HD Vec<T> exp2i(Vec<T> n) {
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
  // n + (1.5 * 2^mantissa + bias) has n + bias in its low bits; the shift drops the rest.
  constexpr T kMagic =
      T(1.5) / std::numeric_limits<T>::epsilon() + (std::numeric_limits<T>::max_exponent - 1);
  return from_bits<T>(bits(n + Vec<T>(kMagic)) << kMantissa);
}

// a * 2^n for an integral n, |n| at most twice the exponent range: overflow and gradual underflow
// are right.
template <class T>
JOPS_HD Vec<T> scale2(Vec<T> a, Vec<T> n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_scalef_ps(a.v, n.v);
  if constexpr (!std::is_same_v<T, float>) return _mm512_scalef_pd(a.v, n.v);
#else
  const Vec<T> half = round_even(n * Vec<T>(0.5));
  return a * exp2i(half) * exp2i(n - half);
#endif
}

template <class T>
JOPS_HD bool any(Bool<T> c) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask(reinterpret_cast<__m512i>(c.v)) != 0;
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask(reinterpret_cast<__m512i>(c.v)) != 0;
#else
  std::uint64_t w[kVectorBytes / 8], r = 0;
  std::memcpy(w, &c.v, kVectorBytes);
  for (std::uint64_t x : w) r |= x;
  return r != 0;
#endif
}

// Unsigned 64-bit lanes, for the generator.
typedef std::uint64_t U64 __attribute__((vector_size(kVectorBytes)));
constexpr int kWords = kVectorBytes / 8;

JOPS_HD U64 multiply_low32(U64 a, std::uint32_t b) {
  [[maybe_unused]] const U64 factor = U64{} + b;
#if defined(__AVX512F__)
  return reinterpret_cast<U64>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(factor)));
#elif defined(__x86_64__)
  return reinterpret_cast<U64>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(factor)));
#elif defined(__aarch64__)
  return reinterpret_cast<U64>(
      vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), vdup_n_u32(b)));
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// The upper 32 bits, in the low ones; what is above them does not count. A shuffle, as products
// keep the port of shifts busy.
JOPS_HD U64 high32(U64 a) {
#if defined(__AVX512F__)
  constexpr auto kOdd = static_cast<_MM_PERM_ENUM>(0xf5);
  return reinterpret_cast<U64>(_mm512_shuffle_epi32(reinterpret_cast<__m512i>(a), kOdd));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(a), 0xf5));
#else
  return a >> 32;
#endif
}

// Of pairs (a_i, b_i): the first half of them, or the second, in order.
namespace detail {
template <int... I>
JOPS_HD U64 shuffle(U64 a, U64 b, std::integer_sequence<int, I...>, int first) {
#if defined(__clang__)
  if (first == 0) return __builtin_shufflevector(a, b, (I / 2 + I % 2 * kWords)...);
  return __builtin_shufflevector(a, b, (kWords / 2 + I / 2 + I % 2 * kWords)...);
#else
  const U64 index = {static_cast<std::uint64_t>(first + I / 2 + I % 2 * kWords)...};
  return __builtin_shuffle(a, b, index);
#endif
}
}  // namespace detail
JOPS_HD U64 interleave_low(U64 a, U64 b) {
  return detail::shuffle(a, b, std::make_integer_sequence<int, kWords>(), 0);
}
JOPS_HD U64 interleave_high(U64 a, U64 b) {
  return detail::shuffle(a, b, std::make_integer_sequence<int, kWords>(), kWords / 2);
}

// total += more; `lost` is what rounding took from the total (Kahan), 0 where that is infinite.
template <class T>
JOPS_HD void add_compensated(Vec<T> more, Vec<T>& total, Vec<T>& lost) {
  const Vec<T> term = more - lost, sum = total + term, rest = (sum - total) - term;
  lost = select(rest == rest, rest, Vec<T>(T(0)));
  total = sum;
}

// Reductions, by halves: a fixed order of additions.
namespace detail {
template <class T, int N, class Op>
struct Halves {
  typedef T Whole __attribute__((vector_size(N * sizeof(T))));
  typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
  template <int... I>
  static JOPS_HD T reduce(Whole a, std::integer_sequence<int, I...>) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    const Half low = __builtin_shufflevector(a, a, I...);
    const Half high = __builtin_shufflevector(a, a, (I + N / 2)...);
#else
    Half parts[2];
    std::memcpy(parts, &a, sizeof(a));
    const Half low = parts[0], high = parts[1];
#endif
    return Halves<T, N / 2, Op>::run(Op::apply(low, high));
  }
  static JOPS_HD T run(Whole a) { return reduce(a, std::make_integer_sequence<int, N / 2>()); }
};
template <class T, class Op>
struct Halves<T, 2, Op> {
  typedef T Whole __attribute__((vector_size(2 * sizeof(T))));
  static JOPS_HD T run(Whole a) { return Op::apply(a[0], a[1]); }
};
struct Add {
  template <class V>
  static JOPS_HD V apply(V a, V b) {
    return a + b;
  }
};
struct Max {
  template <class V>
  static JOPS_HD V apply(V a, V b) {
    return a > b ? a : b;
  }
};
}  // namespace detail

template <class T>
JOPS_HD T sum(Vec<T> a) {
  return detail::Halves<T, Vec<T>::kLanes, detail::Add>::run(a.v);
}
// A NaN in a lane may or may not come out.
template <class T>
JOPS_HD T max_lane(Vec<T> a) {
  return detail::Halves<T, Vec<T>::kLanes, detail::Max>::run(a.v);
}

// 16-bit conversions on the bits: used by every instruction set for bf16, by the baseline for fp16.
namespace detail {
constexpr int kFloats = kVectorBytes / 4;
typedef std::uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
using V32 = Vec<float>;

JOPS_HD U32 word(V32 a) { return reinterpret_cast<U32>(a.v); }
JOPS_HD V32 real(U32 a) { return reinterpret_cast<V32::Native>(a); }

// gcc's own conversion takes the halves one by one.
JOPS_HD U32 widen(U16 h) {
#if defined(__AVX512F__)
  return reinterpret_cast<U32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return reinterpret_cast<U32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, U32);
#endif
}

// Adding 0x7fff plus the lowest kept bit rounds to nearest even; NaN bypasses it, as it could wrap.
JOPS_HD U16 to_bf16(V32 a) {
#if defined(__AVX512BF16__)
  // The instruction takes denormal numbers for zeros.
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, kDenormal) == 0, 1)) {
    return reinterpret_cast<U16>(_mm512_cvtneps_pbh(a.v));
  }
#endif
  const U32 u = word(a);
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(a.v == a.v ? rounded : (u >> 16) | 0x40u, U16);
}
JOPS_HD V32 from_bf16(U16 h) { return real(widen(h) << 16); }

#if !defined(__F16C__) && !defined(__AVX512F__) && !defined(__aarch64__)
JOPS_HD V32 from_f16(U16 h) {
  const U32 u = widen(h);
  const U32 magnitude = u & 0x7fffu;
  typedef std::int32_t I32 __attribute__((vector_size(kVectorBytes)));
  const V32 tiny =
      V32(__builtin_convertvector(reinterpret_cast<I32>(magnitude), V32::Native)) * V32(0x1p-24f);
  const U32 normal = (magnitude << 13) + (112u << 23);
  const U32 special = normal + (112u << 23);
  U32 r = magnitude >= 0x7c00u ? special : normal;
  r = magnitude < 0x400u ? word(tiny) : r;
  return real(r | ((u & 0x8000u) << 16));
}
JOPS_HD U16 to_f16(V32 a) {
  const U32 u = word(a);
  const U32 magnitude = u & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 has the half's denormal mantissa, rounded, in its low bits.
  const U32 tiny = word(real(magnitude) + V32(0.5f)) - word(V32(0.5f));
  const U32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  U32 r = magnitude < (113u << 23) ? tiny : normal;
  r = magnitude >= 0x477ff000u ? (U32{} + 0x7c00u) : r;  // 65520 and above round to infinity
  r = magnitude > 0x7f800000u ? (U32{} + 0x7e00u) : r;
  return __builtin_convertvector(r | ((u >> 16) & 0x8000u), U16);
}
#endif
}  // namespace detail

// One full vector from, or to, any storage type; no alignment needed.
template <class T>
JOPS_HD Vec<Compute<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    Vec<T> r;
    std::memcpy(&r.v, p, kVectorBytes);
    return r;
  } else {
    detail::U16 h;
    std::memcpy(&h, p, sizeof(h));
    if constexpr (std::is_same_v<T, Bf16>) return detail::from_bf16(h);
#if defined(__AVX512F__)
    else
      return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
#elif defined(__F16C__)
    else
      return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#elif defined(__aarch64__)
    else
      return vcvt_f32_f16(reinterpret_cast<float16x4_t>(h));
#else
    else
      return detail::from_f16(h);
#endif
  }
}

template <class T>
JOPS_HD void store(T* p, Vec<Compute<T>> a) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    std::memcpy(p, &a.v, kVectorBytes);
  } else {
    detail::U16 h;
    if constexpr (std::is_same_v<T, Bf16>) h = detail::to_bf16(a);
#if defined(__AVX512F__)
    else
      h = reinterpret_cast<detail::U16>(
          _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    else
      h = reinterpret_cast<detail::U16>(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    else
      h = reinterpret_cast<detail::U16>(vcvt_f16_f32(a.v));
#else
    else
      h = detail::to_f16(a);
#endif
    std::memcpy(p, &h, sizeof(h));
  }
}

// The first n lanes, 0 <= n <= kLanes; the others are `fill`. For tails: without masks it goes
// through a buffer.
template <class T>
JOPS_HD Vec<Compute<T>> load_n(const T* p, int n, Compute<T> fill = 0) {
  using A = Compute<T>;
  constexpr int kLanes = Vec<A>::kLanes;
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__)
  const auto mask = static_cast<std::uint16_t>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_loadu_ps(Vec<A>(fill).v, mask, p);
  } else if constexpr (std::is_same_v<T, double>) {
    return _mm512_mask_loadu_pd(Vec<A>(fill).v, static_cast<std::uint8_t>(mask), p);
  } else {
    alignas(32) T narrow[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(narrow), _mm256_maskz_loadu_epi16(mask, p));
    return _mm512_mask_mov_ps(Vec<A>(fill).v, mask, load(narrow).v);
  }
#else
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(T));
  const Vec<A> r = load(buffer);
  if (fill == 0) return r;
  A lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<A>(i);
  return select(load(lane) < Vec<A>(static_cast<A>(n)), r, Vec<A>(fill));
#endif
}
template <class T>
JOPS_HD void store_n(T* p, Vec<Compute<T>> a, int n) {
#if defined(__AVX512F__)
  const auto mask = static_cast<std::uint16_t>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, mask, a.v);
  if constexpr (std::is_same_v<T, double>) {
    return _mm512_mask_storeu_pd(p, static_cast<std::uint8_t>(mask), a.v);
  }
#endif
  T buffer[Vec<Compute<T>>::kLanes];
  store(buffer, a);
  std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(T));
}

// A store past the caches; p is aligned to what is stored. stream_fence() ends a run of them.
template <class T>
JOPS_HD void stream(T* p, Vec<Compute<T>> a) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 2) {
#if defined(__AVX512F__)
    __m256i narrow;
#elif defined(__AVX2__)
    __m128i narrow;
#else
    long long narrow;
#endif
    store(reinterpret_cast<T*>(&narrow), a);
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow);
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow);
#else
    _mm_stream_si64(reinterpret_cast<long long*>(p), narrow);
#endif
  } else {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(a.v));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(a.v));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(a.v));
#endif
  }
#else
  store(p, a);
#endif
}
JOPS_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
JOPS_HD void prefetch(const void* p) { __builtin_prefetch(p); }
// Into the second cache: for lines that would push each other out of the first one.
JOPS_HD void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace jops::JOPS_ISA
