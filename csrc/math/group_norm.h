// Statistics of a group in one visit, for the rows of norm.h: sums of x - s, for a number s that is
// near the mean of x, and of the quantities. What is subtracted from the sum of (x - s)^2 for the
// mean's distance to s is then small. Generic over scalars and vectors.
#pragma once

#include "norm.h"

namespace jops::JOPS_ISA {

template <class Row, class V>
struct GroupNorm {
  static constexpr int kQ = Row::kQuantities;
  // Of x - s, of its square, of every quantity and its product with x - s, and of q0 q1.
  static constexpr int kSums = 2 + 2 * kQ + Row::kCross;

  V mean[1 + kQ], variance;  // of x and of the quantities
  NormAt<V, kQ> at;
  bool fixed;

  static JOPS_HD void add(V x, const V* q, V* sums) {
    sums[0] += x;
    sums[1] = fma(x, x, sums[1]);
#pragma GCC unroll 3
    for (int k = 0; k < kQ; ++k) {
      sums[2 + 2 * k] += q[k];
      sums[3 + 2 * k] = fma(x, q[k], sums[3 + 2 * k]);
    }
    if constexpr (Row::kCross) sums[kSums - 1] = fma(q[0], q[1], sums[kSums - 1]);
  }

  // From the sums of `count` elements.
  JOPS_HD void measure(const V* sums, V s, V count, V eps) {
    const V apart = sums[0] / count;
    mean[0] = s + apart;
    variance = max(V(0), fma(-apart, apart, sums[1] / count));
    at.r = inverse_root(variance + eps);
#pragma GCC unroll 3
    for (int k = 0; k < kQ; ++k) {
      mean[1 + k] = sums[2 + 2 * k] / count;
      at.a[k] = fma(-apart, mean[1 + k], sums[3 + 2 * k] / count) * at.r;
    }
    if constexpr (Row::kCross) {
      at.cross = sums[kSums - 1] / count - mean[1] * mean[2] - at.a[0] * at.a[1];
    }
    fixed = false;
  }

  // From given statistics, which are constants: P(q) = q.
  JOPS_HD void take(V given_mean, V given_variance, V eps) {
    mean[0] = given_mean;
    at.r = inverse_root(given_variance + eps);
#pragma GCC unroll 3
    for (V& a : at.a) a = V(0);
    at.cross = V(0);
    fixed = true;
  }

  JOPS_HD void go_to(V x, const V* q) {
    at.x = (x - mean[0]) * at.r;
#pragma GCC unroll 3
    for (int k = 0; k < kQ; ++k) at.p[k] = fixed ? q[k] : q[k] - mean[1 + k] - at.x * at.a[k];
  }
};

}  // namespace jops::JOPS_ISA
