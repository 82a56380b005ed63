// Normalization of rows: the formulas, as sums over a row in two rounds followed by a map over it.
//
// x^ = (x - mean(x)) r with r = (mean((x - mean(x))^2) + eps)^(-1/2); where a norm is not centred
// (rms_norm) every mean(.) of one quantity alone is 0. What a derivative of x^ needs of a quantity
// q is P(q) = q - mean(q) - x^ mean(x^ q), which r times is the derivative along q.
//
// Each struct says what a product needs: kIn inputs along the row, kOut outputs, kQuantities
// quantities, whether mean(q0 q1) is one of the sums (kCross), and kColumnSums numbers that are
// added up over the rows. c[] are the numbers that belong to a column. kAdded says what a further
// operand is added to, if there is one. Generic over scalars and vectors.
#pragma once

#include <cmath>

#include "common.h"

namespace jops::JOPS_ISA {

// To x first, where the sum is then an output too (a residual); or to the first output (the
// cotangent of that sum).
enum class Added { kNowhere, kInput, kOutput };

enum NormColumn { kWeight, kBias, kTangentWeight, kTangentBias, kNormColumns };

template <class A>
JOPS_HD A inverse_root(A a) {
  return A(1) / std::sqrt(a);
}

// An element and its row: x^, r, P(q), a = mean(x^ q), and
// cross = mean(q0 q1) - mean(q0) mean(q1) - a0 a1.
template <class V, int kQuantities>
struct NormAt {
  static constexpr int kCount = kQuantities > 0 ? kQuantities : 1;
  V x, r, p[kCount], a[kCount], cross;
};

struct NormRow {  // x -> y = w x^ + b
  static constexpr int kIn = 1, kOut = 1, kQuantities = 0, kColumnSums = 0;
  static constexpr bool kCross = false;
  static constexpr Added kAdded = Added::kInput;
  template <class V>
  static JOPS_HD void quantities(const V*, const V*, V*) {}
  template <class V>
  static JOPS_HD void emit(const V*, const V* c, const NormAt<V, 0>& at, V* out, V*) {
    out[0] = fma(c[kWeight], at.x, c[kBias]);
  }
};

struct NormJvpRow {  // x, tx -> y, ty = w r P(tx) + tw x^ + tb
  static constexpr int kIn = 2, kOut = 2, kQuantities = 1, kColumnSums = 0;
  static constexpr bool kCross = false;
  static constexpr Added kAdded = Added::kNowhere;
  template <class V>
  static JOPS_HD void quantities(const V* in, const V*, V* q) {
    q[0] = in[1];
  }
  template <class V>
  static JOPS_HD void emit(const V*, const V* c, const NormAt<V, 1>& at, V* out, V*) {
    out[0] = fma(c[kWeight], at.x, c[kBias]);
    out[1] = fma(c[kWeight] * at.r, at.p[0], fma(c[kTangentWeight], at.x, c[kTangentBias]));
  }
};

struct NormVjpRow {  // x, gy -> gx = r P(w gy); sums: gw = x^ gy, gb = gy
  static constexpr int kIn = 2, kOut = 1, kQuantities = 1, kColumnSums = 2;
  static constexpr bool kCross = false;
  static constexpr Added kAdded = Added::kOutput;
  template <class V>
  static JOPS_HD void quantities(const V* in, const V* c, V* q) {
    q[0] = c[kWeight] * in[1];
  }
  template <class V>
  static JOPS_HD void emit(const V* in, const V*, const NormAt<V, 1>& at, V* out, V* sums) {
    out[0] = at.r * at.p[0];
    sums[0] = at.x * in[1];
    sums[1] = in[1];
  }
};

// x, gy, tx, tgy -> gx as the VJP, tgx = r P(w tgy + tw gy) - r^2 (x^ cross + a1 P(q0) + a0 P(q1))
// with q0 = w gy, q1 = tx; sums: gw, gb, tgw = x^ tgy + gy r P(tx), tgb = tgy
struct NormVjpJvpRow {
  static constexpr int kIn = 4, kOut = 2, kQuantities = 3, kColumnSums = 4;
  static constexpr bool kCross = true;
  static constexpr Added kAdded = Added::kNowhere;
  template <class V>
  static JOPS_HD void quantities(const V* in, const V* c, V* q) {
    q[0] = c[kWeight] * in[1];
    q[1] = in[2];
    q[2] = fma(c[kWeight], in[3], c[kTangentWeight] * in[1]);
  }
  template <class V>
  static JOPS_HD void emit(const V* in, const V*, const NormAt<V, 3>& at, V* out, V* sums) {
    const V bent = fma(at.x, at.cross, fma(at.a[1], at.p[0], at.a[0] * at.p[1]));
    out[0] = at.r * at.p[0];
    out[1] = at.r * (at.p[2] - at.r * bent);
    sums[0] = at.x * in[1];
    sums[1] = in[1];
    sums[2] = fma(at.x, in[3], at.r * at.p[1] * in[1]);
    sums[3] = in[3];
  }
};

}  // namespace jops::JOPS_ISA
