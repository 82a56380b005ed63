// Gated units on a device: rows of any stride, so that gate and up may be the halves of one tensor.
// One kernel a product and storage type; which activation it is is a branch that all threads take
// alike.
#pragma once

#include "../math/products.h"
#include "vectors.cuh"

namespace jops::JOPS_ISA::gated {

constexpr int kThreads = 256;

template <class Op, class T>
struct Call {
  Activation code;
  const T* in[Op::kIn];  // null: zeros
  T* out[Op::kOut];
  std::int64_t in_stride[Op::kIn], out_stride[Op::kOut];  // from a row to the next one
  std::int64_t rows, cols;
  bool packs;  // every row of theirs starts and ends at sixteen bytes
};

template <class Op, class T>
__global__ void __launch_bounds__(kThreads) pointwise(Call<Op, T> call) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>;
  const std::int64_t width = (call.cols + kEach - 1) / kEach, turns = call.rows * width;
  std::int64_t turn = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; turn < turns; turn += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t row = call.rows == 1 ? 0 : turn / width;
    const std::int64_t column = (turn - row * width) * kEach;
    const int count = static_cast<int>(min_size(call.cols - column, kEach));
    A in[Op::kIn][kEach], out[Op::kOut][kEach];
#pragma unroll
    for (int k = 0; k < Op::kIn; ++k) {
      const T* from = call.in[k] + row * call.in_stride[k] + column;
      unpack<T>(call.in[k] == nullptr ? make_uint4(0, 0, 0, 0)
                : call.packs          ? dev::load16(from)
                                      : load_some(from, count),
                in[k]);
    }
    with_gate<void>(call.code, [&](auto f) {
      using F = decltype(f);
      const Params<A, sizeof(T) == 2> params{};
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        A x[Op::kIn], y[Op::kOut];
#pragma unroll
        for (int k = 0; k < Op::kIn; ++k) x[k] = in[k][i];
        Op::template apply<F>(F::jet(x[0], params), x, y);
#pragma unroll
        for (int k = 0; k < Op::kOut; ++k) out[k][i] = y[k];
      }
    });
#pragma unroll
    for (int k = 0; k < Op::kOut; ++k) {
      T* to = call.out[k] + row * call.out_stride[k] + column;
      if (call.packs)
        dev::store16(to, pack<T>(out[k]));
      else
        store_some(to, out[k], count);
    }
  }
}

}  // namespace jops::JOPS_ISA::gated
