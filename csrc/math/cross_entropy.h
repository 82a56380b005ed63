// Cross-entropy of a row of logits x: the formulas, as sums over the row, one number from them, and
// a map over the row.
//
//   loss = sum_j q_j (lse(x) - x_j),  q_j = w_j (keep p_j + base) + hot [j = class]:
// the first term of q is spread over the row (probabilities p, or the smoothing of a class), the
// second is what a class puts on its own logit. With A = sum_j q_j and s = softmax(x):
//   tloss = A <s, tx> - <q, tx>,  gx = g (A s - q),
//   tgx = tg (A s - q) + g A s (tx - <s, tx>).
// Where q_j = 0, x_j may be infinite: no product of the two is formed. Generic over scalars and
// vectors.
#pragma once

#include "functions.h"

namespace jops::JOPS_ISA {

// Sums over a row, relative to a number `top`: e^(x - top), the same times tx, the spread part r of
// q, r (top - x), r tx.
enum EntropySum { kExp, kExpTangent, kSpread, kSpreadLoss, kSpreadTangent, kEntropySums };

// x[, tx] -> loss[, tloss]; with a map, x, g[, tx, tg] -> gx[, tgx].
template <bool kTangentToo, bool kMap>
struct EntropyRow {
  static constexpr bool kTangent = kTangentToo, kMaps = kMap;
  static constexpr int kOut = kMap ? 1 + kTangentToo : 0;

  // d = x - top.
  template <bool kSpreads, class V>
  static JOPS_HD void add(V d, V tx, V r, V* sum) {
    const V e = exp<true>(d);
    sum[kExp] += e;
    if constexpr (kTangent) sum[kExpTangent] = fma(e, tx, sum[kExpTangent]);
    if constexpr (kSpreads) {
      sum[kSpread] += r;
      if constexpr (!kMaps) {
        sum[kSpreadLoss] -= select(r == V(0), V(0), r * d);
        if constexpr (kTangent) sum[kSpreadTangent] += select(r == V(0), V(0), r * tx);
      }
    }
  }
  // The sums relative to a larger `top`; factor = e^(before - now).
  template <class V>
  static JOPS_HD void raise(V before, V now, V factor, V* sum) {
    sum[kExp] *= factor;
    sum[kExpTangent] *= factor;
    const V moved = select(sum[kSpread] == V(0), V(0), sum[kSpread] * (now - before));
    sum[kSpreadLoss] += moved;
  }
};

// A class's own logit. `weight` is 0 where there is no class, or it is ignored.
template <class A>
struct Hot {
  A weight = 0, x = 0, tx = 0;
};

template <class A>
JOPS_HD A entropy_loss(const A* sum, A top, const Hot<A>& hot) {
  const A total = sum[kSpread] + hot.weight;
  const A own = hot.weight == 0 ? A(0) : hot.weight * (top - hot.x);
  return (total == 0 ? A(0) : total * log(sum[kExp])) + (sum[kSpreadLoss] + own);
}
template <class A>
JOPS_HD A entropy_tangent(const A* sum, const Hot<A>& hot) {
  const A total = sum[kSpread] + hot.weight;
  const A own = hot.weight == 0 ? A(0) : hot.weight * hot.tx;
  return (total == 0 ? A(0) : total * (sum[kExpTangent] / sum[kExp])) - (sum[kSpreadTangent] + own);
}

// What the map takes from the sums: A / sum e, <s, tx>, g and tg.
template <class V>
struct EntropyMap {
  V scale, mean, g, tg;
};
template <class A>
JOPS_HD EntropyMap<A> entropy_map(const A* sum, const Hot<A>& hot, A g, A tg) {
  const A total = sum[kSpread] + hot.weight, inverse = A(1) / sum[kExp];
  return {total == 0 ? A(0) : total * inverse, sum[kExpTangent] * inverse, g, tg};
}
template <class Row, class V>
JOPS_HD void entropy_emit(const EntropyMap<V>& of, V d, V tx, V q, V* out) {
  const V y = select(of.scale == V(0), V(0), exp<true>(d) * of.scale);
  out[0] = of.g * (y - q);
  if constexpr (Row::kTangent) {
    const V bent = select(of.scale == V(0), V(0), of.g * y * (tx - of.mean));
    out[1] = fma(of.tg, y - q, bent);
  }
}

}  // namespace jops::JOPS_ISA
