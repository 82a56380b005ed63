// y = m x and y = residual + m x on a device; the mask is computed again wherever it is needed.
#pragma once

#include "multipliers.cuh"
#include "vectors.cuh"

namespace jops::JOPS_ISA::dropout {

constexpr int kThreads = 256, kPacks = 2;  // packs of each tensor on the way, a thread
template <class T>
constexpr int kTile = kThreads * kPacks * kPack<T>;  // elements of a block's turn

template <class T>
struct Tensors {
  const T *x, *residual;  // residual: with kAdd
  T* y;
  std::int64_t size;
  bool packs;  // all of them start at sixteen bytes
};

template <class T, bool kAdd>
__global__ void __launch_bounds__(kThreads) multiply(Tensors<T> t, Dropout<Compute<T>> dropout) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>, kIn = kAdd ? 2 : 1;
  const T* const from[2] = {t.x, t.residual};
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kTile<T>;
  std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kTile<T> + threadIdx.x * kEach;
  for (; begin < t.size; begin += step) {
    uint4 raw[kPacks][kIn];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::int64_t at = begin + p * kThreads * kEach;
#pragma unroll
      for (int k = 0; k < kIn; ++k) {
        if (t.packs && at + kEach <= t.size)
          raw[p][k] = dev::load16(from[k] + at);
        else if (at < t.size)
          raw[p][k] = load_some(from[k] + at, static_cast<int>(min_size(t.size - at, kEach)));
        else
          raw[p][k] = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::int64_t at = begin + p * kThreads * kEach;
      if (at >= t.size) break;
      const unsigned bits = dropout.seeds ? kept<kEach>(dropout, at) : ~0u;
      A x[kEach], add[kEach];
      unpack<T>(raw[p][0], x);
      if constexpr (kAdd) unpack<T>(raw[p][1], add);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        x[i] *= multiplier(dropout, bits, i);
        if constexpr (kAdd) x[i] += add[i];
      }
      if (t.packs && at + kEach <= t.size)
        dev::store16(t.y + at, pack<T>(x));
      else
        store_some(t.y + at, x, static_cast<int>(min_size(t.size - at, kEach)));
    }
  }
}

}  // namespace jops::JOPS_ISA::dropout
