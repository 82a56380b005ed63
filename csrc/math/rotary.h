// Rotary position embedding: every pair (a, b) of a vector is turned by an angle of its own. The
// Jacobian is orthogonal, and its transpose the rotation by -s. Su et al., 2021, arXiv:2104.09864.
// Generic over scalars and vectors.
#pragma once

#include "common.h"

namespace jops::JOPS_ISA {

template <class A>
struct Pair {
  A a, b;
};

// c and s: cosine and sine.
template <class A>
JOPS_HD Pair<A> rotate(const Pair<A>& p, A c, A s) {
  return {fma(p.a, c, -(p.b * s)), fma(p.b, c, p.a * s)};
}

}  // namespace jops::JOPS_ISA
