// Attention's formulas for one score s = scale q.k + bias of a query and a key; the sums over
// queries and keys are the kernels'. Generic over scalars and vectors.
//
// p = e^(s - lse) is a row's softmax, m a dropout multiplier and dp = m (go . v) the cotangent of
// p. delta = go . o = sum p dp over the keys, so that the cotangent of s needs no sweep of its own.
// mu = sum p ts over the keys is the tangent of lse.
//
// References: Rabe and Staats, 2021, arXiv:2112.05682; Dao et al., FlashAttention, 2022,
// arXiv:2205.14135; the tangent inside the online softmax: Lu and Song, 2024, arXiv:2410.11081.
#pragma once

#include "functions.h"

namespace jops::JOPS_ISA {

// lse is +infinity for a row without keys: every p is 0 then.
template <class A>
JOPS_HD A attention_weight(A s, A lse) {
  return exp(s - lse);
}

// A maximum to subtract: 0 where nothing but -infinity was seen.
template <class A>
JOPS_HD A attention_shift(A maximum) {
  return select(maximum == A(-kInfinity<Scalar<A>>), A(0), maximum);
}

// The tangent of s; what is masked out has none, whatever the numbers there are.
template <class A>
JOPS_HD A score_tangent(A s, A ts) {
  return select(s == A(-kInfinity<Scalar<A>>), A(0), ts);
}

template <class A>
JOPS_HD A weight_tangent(A p, A ts, A mu) {
  return p * (ts - mu);
}

// The cotangent of s, and its tangent.
template <class A>
JOPS_HD A score_cotangent(A p, A dp, A delta) {
  return p * (dp - delta);
}
template <class A>
JOPS_HD A score_cotangent_tangent(A p, A tp, A dp, A tdp, A delta, A tdelta) {
  return fma(tp, dp - delta, p * (tdp - tdelta));
}

}  // namespace jops::JOPS_ISA
