// Cross-entropy of rows on a device. The formulas are in math/cross_entropy.h. Maximum and sums are
// taken online, each thread with a maximum of its own; a map reads the row a second time, in
// reverse order, so that what was read last is still in the cache.
//   rows     contiguous rows, one a block;
//   columns  rows along another dimension: a thread has a column, neighbours are adjacent in
//            memory, and kLines threads share a column's sums.
#pragma once

#include "../math/cross_entropy.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace jops::JOPS_ISA::entropy {

template <class T>
struct Call {
  using A = Compute<T>;
  const T *x, *tx, *p;  // p may be null, and what a product has no use for
  const std::int64_t* classes;
  const A *weight, *g, *tg;  // weight and tg may be null
  A *loss, *tloss;
  T* out[2];
  std::int64_t outer, n, inner, ignore_index;
  A keep, base;
  bool spreads;  // whether q has a part that is spread over the row
  bool packs;    // every row starts and ends at sixteen bytes
};

// What a row wants: its class, -1 for none, and what that weighs.
template <class T>
struct Wanted {
  using A = Compute<T>;
  std::int64_t at = -1;
  A weight = 0, base;

  __device__ __forceinline__ Wanted(const Call<T>& call, std::int64_t row) : base(call.base) {
    if (call.classes == nullptr) return;
    const std::int64_t j = call.classes[row];
    if (j == call.ignore_index) {
      base = 0;
    } else if (j < 0 || j >= call.n) {
      at = 0;
      weight = kInfinity<A> - kInfinity<A>;
    } else {
      at = j;
      weight = call.keep * (call.weight ? call.weight[j] : A(1));
    }
  }
  // For the losses: the class's own logit, and its tangent.
  template <class Row>
  __device__ __forceinline__ Hot<A> hot(const Call<T>& call, std::int64_t start) const {
    if (at < 0) return {};
    const std::int64_t place = start + at * call.inner;
    return {weight, dev::widen(call.x[place]), Row::kTangent ? dev::widen(call.tx[place]) : A(0)};
  }
  __device__ __forceinline__ A of(std::int64_t j) const { return j == at ? weight : A(0); }
  // The spread part of q.
  __device__ __forceinline__ A spread(const Call<T>& call, std::int64_t j, A p) const {
    return call.spreads ? (call.weight ? call.weight[j] : A(1)) * fma(call.keep, p, base) : A(0);
  }
};

// The sums of a thread, relative to the largest logit that it saw.
template <class Row, class A>
struct Online {
  A top = -kInfinity<A>, sum[kEntropySums] = {};

  // Any number serves while there is nothing but -infinity.
  __device__ __forceinline__ A reference() const { return top == -kInfinity<A> ? A(0) : top; }
  __device__ __forceinline__ void raise(A larger) {
    if (!(larger > top)) return;
    const A before = top, reference_before = reference();
    top = larger;
    Row::raise(reference_before, top, exp(before - top), sum);
  }
};

template <class Row, class T>
__device__ __forceinline__ EntropyMap<Compute<T>> map_of(const Call<T>& call, std::int64_t row,
                                                         const Compute<T>* sum,
                                                         const Wanted<T>& wanted) {
  const Hot<Compute<T>> hot = {wanted.weight, 0, 0};
  return entropy_map(sum, hot, call.g[row], call.tg ? call.tg[row] : Compute<T>(0));
}

template <class Row, class T>
__device__ __forceinline__ void finish(const Call<T>& call, std::int64_t row, std::int64_t start,
                                       const Compute<T>* sum, Compute<T> top,
                                       const Wanted<T>& wanted) {
  const Hot<Compute<T>> hot = wanted.template hot<Row>(call, start);
  call.loss[row] = entropy_loss(sum, top, hot);
  if constexpr (Row::kTangent) call.tloss[row] = entropy_tangent(sum, hot);
}

// A pack of a row.
template <class Row, class T>
struct Numbers {
  using A = Compute<T>;
  static constexpr int kEach = kPack<T>;
  A x[kEach], tx[kEach], p[kEach];
  int count;

  __device__ __forceinline__ void read(const Call<T>& call, std::int64_t start, std::int64_t j) {
    const std::int64_t left = call.n - j;
    count = left < kEach ? static_cast<int>(left) : kEach;
    const auto words = [&](const T* from) {
      return call.packs ? dev::load16(from + start + j) : load_some(from + start + j, count);
    };
    unpack<T>(words(call.x), x);
    unpack<T>(Row::kTangent ? words(call.tx) : make_uint4(0, 0, 0, 0), tx);
    unpack<T>(call.p ? words(call.p) : make_uint4(0, 0, 0, 0), p);
  }
};

constexpr int kMostThreads = dev::kWarp * kMostWarps;
template <class Row, class T>
__global__ void __launch_bounds__(kMostThreads, 1) rows(Call<T> call) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>;
  const std::int64_t row = blockIdx.x, start = row * call.n;
  const int turn = static_cast<int>(blockDim.x) * kEach;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kEach;
  const Wanted<T> wanted(call, row);
  Online<Row, A> online;
  Numbers<Row, T> at;
#pragma unroll 1
  for (std::int64_t j = first; j < call.n; j += turn) {
    at.read(call, start, j);
    A larger = -kInfinity<A>;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i < at.count) larger = max(larger, at.x[i]);
    }
    online.raise(larger);
    const A reference = online.reference();
    A part[kEntropySums] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i >= at.count) continue;
      const A r = wanted.spread(call, j + i, at.p[i]);
      Row::template add<true>(at.x[i] - reference, at.tx[i], r, part);
    }
#pragma unroll
    for (int k = 0; k < kEntropySums; ++k) online.sum[k] += part[k];
  }
  A top[1] = {online.top};
  over_block<Larger>(top);
  online.raise(top[0]);
  over_block<Sum>(online.sum);
  const A reference = online.reference();
  if constexpr (!Row::kMaps) {
    if (threadIdx.x == 0) finish<Row>(call, row, start, online.sum, reference, wanted);
  } else {
    const EntropyMap<A> of = map_of<Row>(call, row, online.sum, wanted);
#pragma unroll 1
    for (std::int64_t j = first + (call.n - 1) / turn * turn; j >= 0; j -= turn) {
      if (j >= call.n) continue;
      at.read(call, start, j);
      A out[Row::kOut][kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const A r = i < at.count ? wanted.spread(call, j + i, at.p[i]) : A(0);
        A result[Row::kOut];
        entropy_emit<Row>(of, at.x[i] - reference, at.tx[i], r + wanted.of(j + i), result);
#pragma unroll
        for (int k = 0; k < Row::kOut; ++k) out[k][i] = result[k];
      }
#pragma unroll
      for (int k = 0; k < Row::kOut; ++k) {
        T* to = call.out[k] + start + j;
        if (call.packs)
          dev::store16(to, pack<T>(out[k]));
        else
          store_some(to, out[k], at.count);
      }
    }
  }
}

// The outer x inner columns of (outer, n, inner): kWidth of them side by side, kLines threads each.
constexpr int kWidth = 32, kLines = 8;

template <class A>
struct OfLines {
  A top[kLines][kWidth], sum[kEntropySums][kLines][kWidth];
};

template <class Row, class T>
__global__ void __launch_bounds__(kWidth* kLines, 1) columns(Call<T> call) {
  using A = Compute<T>;
  const int lane = threadIdx.x % kWidth, line = threadIdx.x / kWidth;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kWidth + lane;
  const std::int64_t outer = column / call.inner;
  const std::int64_t start = outer * call.n * call.inner + column % call.inner;
  const bool there = outer < call.outer;
  const Wanted<T> wanted(call, there ? column : 0);
  const auto number = [&](const T* from, std::int64_t row) {
    return from ? dev::widen(from[start + row * call.inner]) : A(0);
  };
  Online<Row, A> online;
  if (there) {
#pragma unroll 2
    for (std::int64_t row = line; row < call.n; row += kLines) {
      const A x = number(call.x, row), tx = Row::kTangent ? number(call.tx, row) : A(0);
      const A r = wanted.spread(call, row, number(call.p, row));
      online.raise(x);
      Row::template add<true>(x - online.reference(), tx, r, online.sum);
    }
  }

  auto& lines = dev::shared<OfLines<A>>();
  lines.top[line][lane] = online.top;
#pragma unroll
  for (int k = 0; k < kEntropySums; ++k) lines.sum[k][line][lane] = online.sum[k];
  __syncthreads();
  if (!there) return;
  A top = -kInfinity<A>, sum[kEntropySums] = {};
#pragma unroll
  for (int i = 0; i < kLines; ++i) top = max(top, lines.top[i][lane]);
#pragma unroll
  for (int i = 0; i < kLines; ++i) {
    Online<Row, A> other;
    other.top = lines.top[i][lane];
#pragma unroll
    for (int k = 0; k < kEntropySums; ++k) other.sum[k] = lines.sum[k][i][lane];
    other.raise(top);
#pragma unroll
    for (int k = 0; k < kEntropySums; ++k) sum[k] += other.sum[k];
  }
  if (top == -kInfinity<A>) top = 0;
  if constexpr (!Row::kMaps) {
    if (line == 0) finish<Row>(call, column, start, sum, top, wanted);
  } else {
    const EntropyMap<A> of = map_of<Row>(call, column, sum, wanted);
#pragma unroll 2
    for (std::int64_t row = line; row < call.n; row += kLines) {
      const A x = number(call.x, row), tx = Row::kTangent ? number(call.tx, row) : A(0);
      const A q = wanted.spread(call, row, number(call.p, row)) + wanted.of(row);
      A out[Row::kOut];
      entropy_emit<Row>(of, x - top, tx, q, out);
#pragma unroll
      for (int k = 0; k < Row::kOut; ++k) {
        call.out[k][start + row * call.inner] = dev::narrow<T>(out[k]);
      }
    }
  }
}

}  // namespace jops::JOPS_ISA::entropy
