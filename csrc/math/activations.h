// The activations: for each, ONE function giving the jet (f, f', f'', f''') at x, generic over
// float, double and their vectors. The orders share the exponential; the compiler removes those
// that a kernel does not use.
//
// Values at kinks, infinities and NaN are torch's (finite limits where torch gives NaN for silu,
// gelu and mish: hence the clamps, which keep 0 * infinity away).
#pragma once

#include "functions.h"

namespace jops::JOPS_ISA {

template <class A>
struct Jet {
  A f, d1, d2, d3;
};

// The parameters of an activation; their meaning stands at the struct. kShort: results will be
// rounded to 16 bits, so shorter series do.
template <class A, bool kShort = false>
struct Params {
  A a, b, c;
};

// g times a derivative d. A struct with kGates passes nothing where its derivative is 0, be g
// infinite or NaN, as torch does.
template <class F, class A>
JOPS_HD A times(A d, A g) {
  if constexpr (F::kGates)
    return select(d == A(0), A(0), d * g);
  else
    return d * g;
}

struct Smooth {
  static constexpr bool kGates = false;
};
struct Gate {
  static constexpr bool kGates = true;
};

struct Identity : Smooth {
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    return {x, A(1), A(0), A(0)};
  }
};

struct Relu : Gate {  // f'(0) = 0, f'(NaN) = 1
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    const auto off = x <= A(0);
    return {select(off, A(0), x), select(off, A(0), A(1)), A(0), A(0)};
  }
};

struct LeakyRelu : Smooth {  // a: slope
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>& p) {
    const auto on = x > A(0);
    return {select(on, x, p.a * x), select(on, A(1), p.a), A(0), A(0)};
  }
};

struct Elu : Smooth {  // x > 0: b x, else a b (e^(c x) - 1); selu and celu are elu
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>& p) {
    const ExpBoth<A> b = exp_both(p.c * x);
    const A scale = p.a * p.b;
    const A d1 = scale * p.c * b.e, d2 = p.c * d1;
    const auto inside = x < A(0);
    return {select(x > A(0), p.b * x, scale * b.m), select(x <= A(0), d1, p.b),
            select(inside, d2, A(0)), select(inside, p.c * d2, A(0))};
  }
};

struct Hardtanh : Gate {  // min(max(x, a), b); relu6 is hardtanh(0, 6)
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>& p) {
    return {max(p.a, min(p.b, x)), select((x <= p.a) | (x >= p.b), A(0), A(1)), A(0), A(0)};
  }
};

struct Sigmoid : Smooth {
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    const Logistic<A> l = logistic(x);
    const A d = l.s * l.c;
    return {l.s, d, d * (l.c - l.s), d * (A(1) - A(6) * d)};
  }
};

struct Tanh : Smooth {
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    const TanhParts<A> h = tanh_parts(x);
    return {h.t, h.d, A(-2) * h.t * h.d, h.d * fma(A(6) * h.t, h.t, A(-2))};
  }
};

struct Gelu : Smooth {  // x Phi(x) = max(x, 0) - |x| Phi(-|x|)
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    const Normal<A> n = normal<kShort>(x);
    const A z = clamp(x, -40, 40);
    const A square = z * z;
    return {fma(-n.a, n.tail, max(A(0), x)), fma(z, n.pdf, n.cdf), n.pdf * (A(2) - square),
            n.pdf * z * (square - A(4))};
  }
};

struct GeluTanh
    : Smooth {  // x (1 + t)/2, t = tanh(u), u = beta (x + kappa x^3); (1 + t)/2 = sigmoid(2u)
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    using T = Scalar<A>;
    constexpr T kBeta = T(0.79788456080286535588), kKappa = T(0.044715);
    const A z = clamp(x, -32, 32);
    const A square = z * z;
    const A u = z * fma(square, A(kBeta * kKappa), A(kBeta));
    const Logistic<A> l = logistic(u + u);
    const A t = l.s - l.c;
    const A d = A(4) * l.s * l.c;                              // 1 - t^2
    const A a = fma(square, A(3 * kBeta * kKappa), A(kBeta));  // u'
    const A b = A(6 * kBeta * kKappa) * z;                     // u''
    const A c = A(6 * kBeta * kKappa);                         // u'''
    const A t1 = d * a;
    const A t2 = d * (b - A(2) * t * a * a);
    const A t3 = d * (c - A(6) * t * a * b + a * a * a * (A(6) * t * t - A(2)));
    const A half = A(0.5) * z;
    return {max(A(-32), x) * l.s, fma(half, t1, l.s), fma(half, t2, t1),
            fma(half, t3, A(1.5) * t2)};
  }
};

struct Silu : Smooth {  // x sigmoid(x)
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    const A z = clamp(x, -1000, 1000);
    const Logistic<A> l = logistic(x);
    const A s1 = l.s * l.c;
    const A s2 = s1 * (l.c - l.s);
    const A s3 = s1 * (A(1) - A(6) * s1);
    return {max(A(-1000), x) * l.s, fma(z, s1, l.s), fma(z, s2, A(2) * s1), fma(z, s3, A(3) * s2)};
  }
};

struct Softplus : Smooth {  // a: beta, b: threshold. a x > b: x, else log(1 + e^(a x))/a
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>& p) {
    const A z = p.a * x;
    const auto linear = z > p.b;
    const Logistic<A> l = logistic(z);
    const A d = p.a * l.s * l.c;
    const A f = (select(z > A(0), z, A(0)) + log1p_unit(l.e)) / p.a;
    return {select(linear, x, f), select(linear, A(1), l.s), select(linear, A(0), d),
            select(linear, A(0), p.a * d * (l.c - l.s))};
  }
};

struct Mish : Smooth {  // x w, w = tanh(softplus(x)) = n/(n + 2), n = e^x (e^x + 2)
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    const A z = clamp(x, -1000, 1000);
    const auto one = x > A(20);  // there w = 1 to the last digit
    const A e = exp(min(A(20), x));
    const A n = e * (e + A(2));
    const A r = reciprocal(n + A(2));
    const A w = select(one, A(1), n * r);
    const A d = select(one, A(0), A(4) * (n + A(1)) * r * r);  // 1 - w^2
    const A c = reciprocal(A(1) + e);
    const A s = e * c;                   // sigmoid(x); c is its complement
    const A g = s * (c - A(2) * w * s);  // w' = d s, w'' = d g, w''' = d (g' - 2 w s g)
    const A g1 = s * (c * (c - s) - s * (A(2) * d * s + A(4) * w * c));
    const A w1 = d * s;
    const A w2 = d * g;
    const A w3 = d * (g1 - A(2) * w * s * g);
    return {max(A(-1000), x) * w, fma(z, w1, w), fma(z, w2, A(2) * w1), fma(z, w3, A(3) * w2)};
  }
};

struct Hardswish : Gate {  // x min(max(x + 3, 0), 6)/6; f'(3) = 1, f'(-3) = 0, f''(+-3) = 0
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    const A gate = max(A(0), min(A(6), x + A(3)));
    const auto low = x <= A(-3);
    const auto middle = x < A(3);
    return {x * gate / A(6), select(low, A(0), select(middle, x / A(3) + A(0.5), A(1))),
            select(low, A(0), select(middle, A(1) / A(3), A(0))), A(0)};
  }
};

struct Hardsigmoid : Gate {  // min(max(x + 3, 0), 6)/6
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    return {max(A(0), min(A(6), x + A(3))) / A(6),
            select((x > A(-3)) & (x < A(3)), A(1) / A(6), A(0)), A(0), A(0)};
  }
};

struct Logsigmoid : Smooth {  // min(x, 0) - log(1 + e^-|x|)
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A x, const Params<A, kShort>&) {
    const Logistic<A> l = logistic(x);
    const A d = l.s * l.c;
    return {select(x < A(0), x, A(0)) - log1p_unit(l.e), l.c, -d, d * (l.s - l.c)};
  }
};

// Derivatives from the saved output: functions F of y with F'(y) = f'(x); the value is not used.

struct SigmoidY : Smooth {
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A y, const Params<A, kShort>&) {
    return {y, y * (A(1) - y), A(1) - A(2) * y, A(-2)};
  }
};

struct TanhY : Smooth {
  template <class A, bool kShort>
  static JOPS_HD Jet<A> jet(A y, const Params<A, kShort>&) {
    return {y, fma(-y, y, A(1)), A(-2) * y, A(-2)};
  }
};

}  // namespace jops::JOPS_ISA
