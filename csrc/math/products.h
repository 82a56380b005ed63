// The products of an elementwise activation f: what each reads, and what it writes given the jet
// of f at in[0], which is x. A dropout multiplier scales all outputs; kAdds: residuals may be added
// to them after that; kMayLack: an input that may be null, for zeros.
//
// Gated units: Shazeer, GLU variants improve transformer, 2020, arXiv:2002.05202.
#pragma once

#include "../kernels.h"
#include "activations.h"

namespace jops::JOPS_ISA {

template <int kOrder, class V>
JOPS_HD V derivative(const Jet<V>& j) {
  return kOrder == 1 ? j.d1 : kOrder == 2 ? j.d2 : j.d3;
}

struct Value {  // x -> y
  static constexpr int kIn = 1, kOut = 1, kMayLack = -1;
  static constexpr bool kAdds = true;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V*, V* out) {
    out[0] = j.f;
  }
};

template <int kOrder>
struct Vjp {  // x, gy -> gx
  static constexpr int kIn = 2, kOut = 1, kMayLack = -1;
  static constexpr bool kAdds = false;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    out[0] = times<F>(derivative<kOrder>(j), in[1]);
  }
};

struct Jvp {  // x, tx -> y, ty
  static constexpr int kIn = 2, kOut = 2, kMayLack = -1;
  static constexpr bool kAdds = true;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    out[0] = j.f;
    out[1] = times<F>(j.d1, in[1]);
  }
};

template <int kOrder>
struct VjpVjp {  // x, gy, h -> hx, hgy
  static constexpr int kIn = 3, kOut = 2, kMayLack = -1;
  static constexpr bool kAdds = false;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    out[0] = times<F>(derivative<kOrder + 1>(j), in[1] * in[2]);
    out[1] = times<F>(derivative<kOrder>(j), in[2]);
  }
};

template <int kOrder>
struct VjpJvp {  // x, gy, tx, tgy -> gx, tgx
  static constexpr int kIn = 4, kOut = 2, kMayLack = 3;
  static constexpr bool kAdds = false;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    out[0] = times<F>(derivative<kOrder>(j), in[1]);
    out[1] = times<F>(derivative<kOrder + 1>(j), in[1] * in[2]);
    out[1] += times<F>(derivative<kOrder>(j), in[3]);
  }
};

// The products of a gated unit y = f(a) b: in[0] is a, in[1] is b.

struct GatedValue {  // a, b -> y
  static constexpr int kIn = 2, kOut = 1, kMayLack = -1;
  static constexpr bool kAdds = false;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    out[0] = j.f * in[1];
  }
};

struct GatedJvp {  // a, b, ta, tb -> y, ty = f' b ta + f tb
  static constexpr int kIn = 4, kOut = 2, kMayLack = -1;
  static constexpr bool kAdds = false;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    out[0] = j.f * in[1];
    out[1] = fma(j.d1 * in[1], in[2], j.f * in[3]);
  }
};

struct GatedVjp {  // a, b, gy -> ga = f' b gy, gb = f gy
  static constexpr int kIn = 3, kOut = 2, kMayLack = -1;
  static constexpr bool kAdds = false;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    out[0] = j.d1 * in[1] * in[2];
    out[1] = j.f * in[2];
  }
};

struct GatedVjpVjp {  // a, b, gy, h of ga and of gb -> the cotangents of a, b and gy
  static constexpr int kIn = 5, kOut = 3, kMayLack = -1;
  static constexpr bool kAdds = false;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    out[0] = in[2] * fma(j.d2 * in[1], in[3], j.d1 * in[4]);
    out[1] = j.d1 * in[2] * in[3];
    out[2] = fma(j.d1 * in[1], in[3], j.f * in[4]);
  }
};

// a, b, gy, ta, tb, tgy -> ga, gb, tga = f'' b gy ta + f' (gy tb + b tgy), tgb = f' gy ta + f tgy
struct GatedVjpJvp {
  static constexpr int kIn = 6, kOut = 4, kMayLack = -1;
  static constexpr bool kAdds = false;
  template <class F, class V>
  static JOPS_HD void apply(const Jet<V>& j, const V* in, V* out) {
    const V along = j.d1 * in[2];
    out[0] = along * in[1];
    out[1] = j.f * in[2];
    out[2] = fma(j.d2 * in[1] * in[2], in[3], fma(along, in[4], j.d1 * in[1] * in[5]));
    out[3] = fma(along, in[3], j.f * in[5]);
  }
};

// Calls f(F()) with the struct of an activation that gates.
template <class Result, class Callback>
JOPS_HD Result with_gate(Activation code, const Callback& f) {
  switch (code) {
    case Activation::kGelu:
      return f(Gelu());
    case Activation::kGeluTanh:
      return f(GeluTanh());
    default:
      return f(Silu());
  }
}

// Calls f(F()) with the activation's struct.
template <class Result, class Callback>
JOPS_HD Result with_activation(Activation code, const Callback& f) {
  switch (code) {
    case Activation::kRelu:
      return f(Relu());
    case Activation::kLeakyRelu:
      return f(LeakyRelu());
    case Activation::kElu:
      return f(Elu());
    case Activation::kHardtanh:
      return f(Hardtanh());
    case Activation::kSigmoid:
      return f(Sigmoid());
    case Activation::kTanh:
      return f(Tanh());
    case Activation::kGelu:
      return f(Gelu());
    case Activation::kGeluTanh:
      return f(GeluTanh());
    case Activation::kSilu:
      return f(Silu());
    case Activation::kSoftplus:
      return f(Softplus());
    case Activation::kMish:
      return f(Mish());
    case Activation::kHardswish:
      return f(Hardswish());
    case Activation::kHardsigmoid:
      return f(Hardsigmoid());
    case Activation::kLogsigmoid:
      return f(Logsigmoid());
    case Activation::kSigmoidY:
      return f(SigmoidY());
    case Activation::kTanhY:
      return f(TanhY());
    case Activation::kIdentity:
    case Activation::kCount:
      break;
  }
  return f(Identity());
}

}  // namespace jops::JOPS_ISA
