// The loop of every product of an elementwise function.
#pragma once

#include "blocks.h"
// After the vectors that it is generic over.
#include "../math/products.h"

namespace jops::JOPS_ISA {

// Runs over n elements, m its multipliers or null, add[k] what is added to output k or null, or add
// null. With `streams` the outputs, aligned to whole vectors then, are written past the caches.
template <class T>
using Kernel = void (*)(const Act&, const T* const* in, T* const* out, const Compute<T>* m,
                        const T* const* add, std::int64_t n, bool streams);

constexpr std::int64_t kAhead = 4096;  // bytes: far enough for memory, near enough for L1

template <class F, class Op, class T>
void run(const Act& act, const T* const* ins, T* const* outs, const Compute<T>* m,
         [[maybe_unused]] const T* const* add, std::int64_t n, bool streams) {
  using V = Vec<Compute<T>>;
  constexpr int kLanes = V::kLanes, kUnroll = 2;
  const Params<V, sizeof(T) == 2> params{V(act.a), V(act.b), V(act.c)};
  const T* in[Op::kIn];
  T* out[Op::kOut];
  for (int k = 0; k < Op::kIn; ++k) in[k] = ins[k];
  for (int k = 0; k < Op::kOut; ++k) out[k] = outs[k];

  V x[kUnroll][Op::kIn], y[kUnroll][Op::kOut];
  const auto apply = [&](int u, V scale) __attribute__((always_inline)) {
    Op::template apply<F>(F::template jet<V>(x[u][0], params), x[u], y[u]);
    if (m == nullptr) return;
#pragma GCC unroll 4
    for (int k = 0; k < Op::kOut; ++k) y[u][k] *= scale;
  };
  const auto add_residuals = [&](int u, std::int64_t at, int count) __attribute__((always_inline)) {
    if constexpr (Op::kAdds) {
      if (add == nullptr) return;
#pragma GCC unroll 4
      for (int k = 0; k < Op::kOut; ++k) {
        if (add[k]) y[u][k] += count == kLanes ? load(add[k] + at) : load_n(add[k] + at, count);
      }
    }
  };
  std::int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 4
      for (int k = 0; k < Op::kIn; ++k) {
        prefetch(reinterpret_cast<const char*>(in[k] + i + u * kLanes) + kAhead);
        x[u][k] = load(in[k] + i + u * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      apply(u, m ? load(m + i + u * kLanes) : V());
      add_residuals(u, i + u * kLanes, kLanes);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 4
      for (int k = 0; k < Op::kOut; ++k) {
        if (streams)
          stream(out[k] + i + u * kLanes, y[u][k]);
        else
          store(out[k] + i + u * kLanes, y[u][k]);
      }
    }
  }
  for (; i < n; i += kLanes) {
    const int count = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    for (int k = 0; k < Op::kIn; ++k) x[0][k] = load_n(in[k] + i, count);
    apply(0, m ? load_n(m + i, count) : V());
    add_residuals(0, i, count);
    for (int k = 0; k < Op::kOut; ++k) store_n(out[k] + i, y[0][k], count);
  }
}

}  // namespace jops::JOPS_ISA
