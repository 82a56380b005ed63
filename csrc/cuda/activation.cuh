// Elementwise activations on a device. One kernel a product and storage type: which activation it
// is, and whether a mask is drawn, are branches that all threads take alike.
#pragma once

#include "../math/products.h"
#include "columns.cuh"
#include "multipliers.cuh"
#include "vectors.cuh"

namespace jops::JOPS_ISA::activation {

constexpr int kThreads = 256;

// Packs of each tensor that a thread has on the way: enough bytes in flight, few enough registers.
template <class Op>
constexpr int kPacks = Op::kIn == 1 ? 2 : 1;
template <class Op, class T>
constexpr int kTile = kThreads * kPacks<Op> * kPack<T>;  // elements of a block's turn

// What an activation is made of: its code and the parameters of its formulas.
template <class T>
struct Function {
  Activation code;
  Compute<T> a, b, c;

  explicit Function(const Act& act)
      : code(act.code),
        a(static_cast<Compute<T>>(act.a)),
        b(static_cast<Compute<T>>(act.b)),
        c(static_cast<Compute<T>>(act.c)) {}

  // Outputs of kCount elements, times their multipliers.
  template <class Op, int kCount>
  __device__ __forceinline__ void apply(const Compute<T> (&in)[Op::kIn][kCount],
                                        Compute<T> (&out)[Op::kOut][kCount]) const {
    using A = Compute<T>;
    Params<A, sizeof(T) == 2> params{a, b, c};
    if (code == Activation::kHardtanh) {  // bounds are numbers of the storage type, as in torch
      params.a = dev::widen(dev::narrow<T>(a));
      params.b = dev::widen(dev::narrow<T>(b));
    }
    with_activation<void>(code, [&](auto f) {
      using F = decltype(f);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        A x[Op::kIn], y[Op::kOut];
#pragma unroll
        for (int k = 0; k < Op::kIn; ++k) x[k] = in[k][i];
        Op::template apply<F>(F::jet(x[0], params), x, y);
#pragma unroll
        for (int k = 0; k < Op::kOut; ++k) out[k][i] = y[k];
      }
    });
  }
};

template <class Op, class T>
struct Tensors {
  const T* in[Op::kIn];
  T* out[Op::kOut];
  const T* add[Op::kAdds ? Op::kOut : 1];  // residuals, or null
  std::int64_t size;
  bool packs;  // all of them start at sixteen bytes

  // The pack of one of them from element `at` on.
  __device__ __forceinline__ uint4 load(const T* from, std::int64_t at) const {
    if (packs && at + kPack<T> <= size) return dev::load16(from + at);
    if (at < size) return load_some(from + at, static_cast<int>(min_size(size - at, kPack<T>)));
    return make_uint4(0, 0, 0, 0);
  }
};

template <class Op, class T>
__global__ void __launch_bounds__(kThreads)
    pointwise(Function<T> f, Tensors<Op, T> t, Dropout<Compute<T>> dropout) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kTile<Op, T>;
  std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kTile<Op, T> + threadIdx.x * kEach;
  for (; begin < t.size; begin += step) {
    uint4 raw[kPacks<Op>][Op::kIn], residual[kPacks<Op>][Op::kOut];
#pragma unroll
    for (int p = 0; p < kPacks<Op>; ++p) {
      const std::int64_t at = begin + p * kThreads * kEach;
#pragma unroll
      for (int k = 0; k < Op::kIn; ++k) {
        const bool given = k != Op::kMayLack || t.in[k];
        raw[p][k] = given ? t.load(t.in[k], at) : make_uint4(0, 0, 0, 0);
      }
      if constexpr (Op::kAdds) {
#pragma unroll
        for (int k = 0; k < Op::kOut; ++k) {
          if (t.add[k]) residual[p][k] = t.load(t.add[k], at);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPacks<Op>; ++p) {
      const std::int64_t at = begin + p * kThreads * kEach;
      if (at >= t.size) break;
      A in[Op::kIn][kEach], out[Op::kOut][kEach];
#pragma unroll
      for (int k = 0; k < Op::kIn; ++k) unpack<T>(raw[p][k], in[k]);
      f.template apply<Op>(in, out);
      if (dropout.seeds) {
        const unsigned bits = kept<kEach>(dropout, at);
#pragma unroll
        for (int k = 0; k < Op::kOut; ++k) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) out[k][i] *= multiplier(dropout, bits, i);
        }
      }
      if constexpr (Op::kAdds) {
#pragma unroll
        for (int k = 0; k < Op::kOut; ++k) {
          if (!t.add[k]) continue;
          A more[kEach];
          unpack<T>(residual[p][k], more);
#pragma unroll
          for (int i = 0; i < kEach; ++i) out[k][i] += more[i];
        }
      }
#pragma unroll
      for (int k = 0; k < Op::kOut; ++k) {
        if (t.packs && at + kEach <= t.size)
          dev::store16(t.out[k] + at, pack<T>(out[k]));
        else
          store_some(t.out[k] + at, out[k], static_cast<int>(min_size(t.size - at, kEach)));
      }
    }
  }
}

// gx and its sums over n of an (outer, n, inner) buffer, in the blocks of columns.cuh: this is the
// first stage of the sums.
template <class T>
__global__ void __launch_bounds__(columns::kThreads)
    vjp_sum(Function<T> f, Tensors<Vjp<1>, T> t, Rows rows, int parts, Compute<T>* partial,
            Dropout<Compute<T>> dropout) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>, kColumns = columns::kColumns, kLines = columns::kLines;
  const int lane = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const std::int64_t strips = (rows.inner + kColumns * kEach - 1) / (kColumns * kEach);
  const std::int64_t strip = blockIdx.x % strips, outer = blockIdx.x / strips;
  const int part = blockIdx.y;
  const std::int64_t column = (strip * kColumns + lane) * kEach;
  const int count = static_cast<int>(min_size(rows.inner - column, kEach));
  const std::int64_t first = rows.n * part / parts, last = rows.n * (part + 1) / parts;

  LongSum<A> long_sum[kEach];
  if (count > 0) {
#pragma unroll 1
    for (std::int64_t row = first + line; row < last; row += kLines) {
      const std::int64_t at = (outer * rows.n + row) * rows.inner + column;
      A in[2][kEach], out[1][kEach];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        unpack<T>(t.packs ? dev::load16(t.in[k] + at) : load_some(t.in[k] + at, count), in[k]);
      }
      f.template apply<Vjp<1>>(in, out);
      const unsigned bits = dropout.seeds ? kept<kEach>(dropout, at) : ~0u;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        out[0][i] *= multiplier(dropout, bits, i);
        if (i < count) long_sum[i].add(out[0][i]);
      }
      if (t.packs)
        dev::store16(t.out[0] + at, pack<T>(out[0]));
      else
        store_some(t.out[0] + at, out[0], count);
    }
  }
  A sum[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum[i] = long_sum[i].sum;
  columns::add_lines(sum, lane, line);
  if (line > 0) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i < count) partial[(outer * parts + part) * rows.inner + column + i] = sum[i];
  }
}

}  // namespace jops::JOPS_ISA::activation
