// The loop of every product of an elementwise function.
#pragma once

#include <cstring>

#include "blocks.h"
// After the vectors that it is generic over.
#include "../math/products.h"

namespace jops::JOPS_ISA {

constexpr std::int64_t kAhead = 4096;  // bytes: far enough for memory, near enough for L1

// A kernel takes this many elements at once.
constexpr int kUnroll = 2;
template <class T>
constexpr std::int64_t kStep = kUnroll * Vec<Compute<T>>::kLanes;

// Runs over n elements, whole steps of them, m its multipliers or null, add[k] what is added to
// output k or null, or add null. With `streams` the outputs, aligned to whole vectors then, are
// written past the caches.
template <class T>
using Kernel = void (*)(const Act&, const T* const* in, T* const* out, const Compute<T>* m,
                        const T* const* add, std::int64_t n, bool streams);

template <class F, class Op, class T>
__attribute__((noinline)) void steps(const Act& act, const T* const* ins, T* const* outs,
                                     const Compute<T>* m, [[maybe_unused]] const T* const* add,
                                     std::int64_t n, bool streams) {
  using V = Vec<Compute<T>>;
  constexpr int kLanes = V::kLanes;
  const Params<V, sizeof(T) == 2> params{V(act.a), V(act.b), V(act.c)};
  const T* in[Op::kIn];
  T* out[Op::kOut];
  for (int k = 0; k < Op::kIn; ++k) in[k] = ins[k];
  for (int k = 0; k < Op::kOut; ++k) out[k] = outs[k];

  V x[kUnroll][Op::kIn], y[kUnroll][Op::kOut];
  for (std::int64_t i = 0; i < n; i += kStep<T>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 4
      for (int k = 0; k < Op::kIn; ++k) {
        if (k == Op::kMayLack && !in[k]) {
          x[u][k] = V(Compute<T>(0));
          continue;
        }
        prefetch(reinterpret_cast<const char*>(in[k] + i + u * kLanes) + kAhead);
        x[u][k] = load(in[k] + i + u * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t at = i + u * kLanes;
      Op::template apply<F>(F::template jet<V>(x[u][0], params), x[u], y[u]);
#pragma GCC unroll 4
      for (int k = 0; k < Op::kOut; ++k) {
        if (m) y[u][k] *= load(m + at);
        if constexpr (Op::kAdds) {
          if (add && add[k]) y[u][k] += load(add[k] + at);
        }
      }
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
}

// Runs a kernel over any n: what fills no whole step is padded to one, so that the kernels, of
// which there are hundreds, have one loop.
template <int kIn, int kOut, class T>
void run(Kernel<T> kernel, const Act& act, const T* const* in, T* const* out, const Compute<T>* m,
         const T* const* add, std::int64_t n, bool streams) {
  const std::int64_t rest = n % kStep<T>, whole = n - rest;
  if (whole) kernel(act, in, out, m, add, whole, streams);
  if (rest == 0) return;
  alignas(64) T padded[kIn + 2 * kOut][kStep<T>] = {};
  alignas(64) Compute<T> padded_m[kStep<T>] = {};
  const T *x[kIn], *residual[kOut] = {};
  T* y[kOut];
  const auto pad = [&](const auto* from, auto* to) {
    std::memcpy(to, from + whole, static_cast<std::size_t>(rest) * sizeof(*to));
    return to;
  };
  for (int k = 0; k < kIn; ++k) x[k] = in[k] ? pad(in[k], padded[k]) : nullptr;
  for (int k = 0; k < kOut; ++k) {
    y[k] = padded[kIn + k];
    if (add && add[k]) residual[k] = pad(add[k], padded[kIn + kOut + k]);
  }
  kernel(act, x, y, m ? pad(m, padded_m) : nullptr, add ? residual : nullptr, kStep<T>, false);
  for (int k = 0; k < kOut; ++k) {
    std::memcpy(out[k] + whole, y[k], static_cast<std::size_t>(rest) * sizeof(T));
  }
}

}  // namespace jops::JOPS_ISA
