// Elementary functions from a few primitives, for float and double, scalar and vector alike.
// Errors are in units in the last place (ulp).
#pragma once

#include "common.h"

namespace jops::JOPS_ISA {

template <class A>
constexpr bool kSingle = std::is_same_v<Scalar<A>, float>;

// c[0] + c[1] x + ... by Horner's rule.
template <class A, int N>
JOPS_HD A polynomial(A x, const Scalar<A> (&c)[N]) {
  A r = A(c[N - 1]);
#pragma GCC unroll 32
  for (int i = N - 2; i >= 0; --i) r = fma(r, x, A(c[i]));
  return r;
}

// Clamps and keeps NaN.
template <class A>
JOPS_HD A clamp(A x, Scalar<A> low, Scalar<A> high) {
  return max(A(low), min(A(high), x));
}

// e^x = 2^n (1 + r + r^2 p), r = x - n ln 2 in [-ln2/2, ln2/2].
template <class A>
struct ExpParts {
  A n, r, p;
};
// `rest` gives x - n c for a c so short that n c is exact: most of ln 2.
template <class A, class Rest>
JOPS_HD ExpParts<A> exp_parts(A x, const Rest& rest) {
  using T = Scalar<A>;
  const A n = round_even(x * A(T(1.4426950408889634074)));
  A r = rest(n, A(T(kSingle<A> ? 0.693359375 : 0.693147180369123816490)));
  r = fma(n, A(T(kSingle<A> ? 2.12194440e-4 : -1.90821492927058770002e-10)), r);
  if constexpr (kSingle<A>) {
    return {n, r,
            polynomial(r, {0.5f, 0.1666657667f, 0.04166655421f, 0.008363232884f, 0.001392625083f})};
  } else {
    return {
        n, r,
        polynomial(r, {0.5000000000000001031, 0.1666666666666666746, 0.04166666666662382053,
                       0.008333333333330038197, 0.001388888891736708056, 0.0001984126986317155603,
                       0.0000248015210578682052, 2.755726827690569619e-6, 2.762020159103154879e-7,
                       2.5100472505694996e-8})};
  }
}
template <bool kNegative = false, class A>  // kNegative: x <= 0 is known
JOPS_HD ExpParts<A> exp_parts(A x) {
  using T = Scalar<A>;
  // Beyond these bounds the result is 0 or infinity; inside them n is in the range of scale2.
  x = max(A(T(kSingle<A> ? -104.5 : -746)), x);
  if constexpr (!kNegative) x = min(A(T(kSingle<A> ? 89 : 710)), x);
  return exp_parts(x, [&](A n, A c) { return fma(-n, c, x); });
}
template <class A>
JOPS_HD A exp_value(const ExpParts<A>& e) {
  return scale2(fma(e.r, fma(e.r, e.p, A(1)), A(1)), e.n);
}

template <bool kNegative = false, class A>  // 1 ulp
JOPS_HD A exp(A x) {
  return exp_value(exp_parts<kNegative>(x));
}
// e^(a b) with a product that is not rounded; it is in the bounds above. 1 ulp
template <class A>
JOPS_HD A exp_product(A a, A b) {
  return exp_value(exp_parts(a * b, [&](A n, A c) { return fma(a, b, -(n * c)); }));
}

// e = e^x and m = e^x - 1 with relative accuracy at 0. 2 ulp
template <class A>
struct ExpBoth {
  A e, m;
};
template <bool kNegative = false, class A>
JOPS_HD ExpBoth<A> exp_both(A x) {
  const ExpParts<A> parts = exp_parts<kNegative>(x);
  const A q = fma(parts.r * parts.r, parts.p, parts.r), s = scale2(A(1), parts.n);
  return {scale2(A(1) + q, parts.n), fma(q, s, s - A(1))};
}

// log(1 + e) for 0 <= e <= 1: 2 atanh(s), s = e / (2 + e). 2 ulp
template <class A>
JOPS_HD A log1p_unit(A e) {
  const A s = e / (A(2) + e);
  const A z = s * s;
  A p;
  if constexpr (kSingle<A>) {
    p = polynomial(z, {0.3333333366f, 0.1999985317f, 0.14296179f, 0.108532879f, 0.1161216461f});
  } else {
    p = polynomial(z, {0.3333333333333332928, 0.2000000000000729134, 0.1428571428355437858,
                       0.1111111135871393149, 0.09090894718066429085, 0.07692785032479311552,
                       0.06657072104827468075, 0.06000536404795356268, 0.04400369243072336941,
                       0.0808202280597176611});
  }
  const A twice = s + s;
  return fma(twice * z, p, twice);
}

// s = 1/(1+e^-x) and its complement c = 1 - s = s(-x), without cancellation; e = e^-|x|.
template <class A>
struct Logistic {
  A e, s, c;
};
template <class A>
JOPS_HD Logistic<A> logistic(A x) {
  const A e = exp<true>(-abs(x));
  const A large = reciprocal(A(1) + e);
  const A small = e * large;
  return {e, select(x < A(0), small, large), select(x < A(0), large, small)};
}

// t = tanh x with relative accuracy at 0, and d = 1 - t^2 with relative accuracy at infinity.
template <class A>
struct TanhParts {
  A t, d;
};
template <class A>
JOPS_HD TanhParts<A> tanh_parts(A x) {
  const ExpBoth<A> b = exp_both<true>(A(-2) * abs(x));
  const A r = reciprocal(A(1) + b.e);
  return {copysign(b.m * r, x), A(4) * b.e * r * r};
}

// Phi(-a) = exp(-a^2/2) Q(a), a = |x|, with Q smooth, a polynomial in 1/(1 + k a): the negative
// tail keeps its digits, which (1 + erf)/2 loses.
template <class A>
struct NormalTail {
  A a, e, q;  // |x| where that counts, exp(-a^2/2), Q(a)
};
template <class A>
JOPS_HD NormalTail<A> normal_tail(A x) {
  using T = Scalar<A>;
  const A a = min(A(T(kSingle<A> ? 14.4 : 38.6)), abs(x));  // both are 0 there
  const A e = exp_product(A(-0.5) * a, a);
  A q;
  if constexpr (kSingle<A>) {
    const A t = reciprocal(fma(a, A(0.4f), A(1)));
    q = polynomial(t,
                   {-1.290607634e-5f, 0.159923479f, 0.1556191593f, 0.1592020392f, -0.01456794888f,
                    0.2546610534f, -0.3773981333f, 0.2026485503f, -0.04007532820f});
  } else {
    const A t = A(1) / fma(a, A(0.2), A(1));  // in [1/9, 1], mapped to [-1, 1]
    q = polynomial(
        fma(t, A(2.25), A(-1.25)),
        {0.09441064130196893667,     0.1533579493936099144,      0.1160829917641642937,
         0.07395771880810396433,     0.03910858181305887106,     0.0166694632301676061,
         0.005376682002131296851,    0.001098093710415605868,    0.00002027073969427524524,
         -0.00006927146881393746837, -0.00001718469722560771363, 2.392341305890613551e-6,
         1.847671392518788949e-6,    -5.171296101542325803e-9,   -1.799442785506154161e-7,
         -9.508275171161845773e-9,   1.887805839566766652e-8,    1.138918895970101445e-9,
         -2.154316875692041897e-9,   -6.84711052506280807e-11,   2.369741434559901736e-10,
         1.837828148738456085e-13,   -1.747104287826137709e-11});
  }
  return {a, e, q};
}
// With relative errors below 2^-15, for results that will be rounded to 16 bits.
template <class A>
JOPS_HD NormalTail<A> short_normal_tail(A x) {
  const A a = min(A(13.25f), abs(x));
  const A s = a * a * A(-0.72134752f);  // a power of 2
  const A n = round_even(s);
  const A e = scale2(
      polynomial(s - n, {0.999999261f, 0.693121814f, 0.24024745f, 0.0559178633f, 0.00957009706f}),
      n);
  const A q = polynomial(
      rough_reciprocal(fma(a, A(0.35f), A(1))),
      {0.000310295202f, 0.134385107f, 0.174353096f, 0.00813831241f, 0.28156682f, -0.0987436005f});
  return {a, e, q};
}
// The normal distribution: cdf = Phi(x) = erfc(-x/sqrt 2)/2 and pdf = exp(-x^2/2)/sqrt(2 pi).
template <class A>
struct Normal {
  A cdf, pdf;
  A a, tail;  // |x| where that counts, and Phi(-|x|)
};
template <bool kShort = false, class A>
JOPS_HD Normal<A> normal(A x) {
  using T = Scalar<A>;
  NormalTail<A> n;
  if constexpr (kShort)
    n = short_normal_tail(x);
  else
    n = normal_tail(x);
  // Denormal numbers have no digits to keep, and cost some processors 100 cycles each.
  const A e = select(n.e < A(kLeastNormal<T>), A(0), n.e);
  const A tail = e * n.q;
  return {select(x < A(0), tail, A(1) - tail), e * A(T(0.39894228040143267794)), n.a, tail};
}

}  // namespace jops::JOPS_ISA
