// Normalization of rows on a device. The formulas are in math/norm.h. A block takes rows one after
// another, its threads the same columns of each: in registers where the row fits (`held`), or read
// again for every pass, mostly from the cache (`sweep`). So a thread alone adds up its columns'
// sums over the block's rows; columns.cuh adds the blocks'.
#pragma once

#include "../math/norm.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace jops::JOPS_ISA::norm {

constexpr int kMaxIn = 4, kMaxOut = 2;

template <class T>
struct Call {
  using A = Compute<T>;
  const T* in[kMaxIn];
  const T* of_column[kNormColumns];
  T* out[kMaxOut];
  const T* added;  // or null, and where the sum goes if that is to x
  T* sum;
  A* partial;  // sums over the rows of a block: (kColumnSums, blocks, n)
  std::int64_t rows, n;
  A eps;
  bool packs;  // every row and column vector starts and ends at sixteen bytes
};

// Threads of a block: fewer where four inputs and their sums take more than 128 registers.
template <class Row>
constexpr int kMostThreads = Row::kIn < 4 ? 512 : 256;
// Packs that a thread holds of each input.
template <class Row>
constexpr int kHeldPacks = Row::kIn == 1   ? 4
                           : Row::kIn == 2 ? 2
                                           : 1;

template <class Row, bool kCentred, class T, bool kHeld>
struct Block {
  using A = Compute<T>;
  static constexpr int kEach = kPack<T>, kPacks = kHeld ? kHeldPacks<Row> : 1;
  static constexpr int kQ = Row::kQuantities, kSums = 1 + kQ + Row::kCross;
  static constexpr int kKinds = Row::kColumnSums > 0 ? Row::kColumnSums : 1;

  const Call<T>& call;
  std::int64_t row = 0;
  uint4 raw[kPacks][Row::kIn];
  A columns[kHeld ? kKinds : 1][kHeld ? kPacks * kEach : 1] = {};

  __device__ __forceinline__ explicit Block(const Call<T>& call) : call(call) {}

  __device__ __forceinline__ int count_at(std::int64_t j) const {
    const std::int64_t left = call.n - j;
    return left < 0 ? 0 : left < kEach ? static_cast<int>(left) : kEach;
  }
  __device__ __forceinline__ std::int64_t column(int p) const {
    return static_cast<std::int64_t>(p * static_cast<int>(blockDim.x) +
                                     static_cast<int>(threadIdx.x)) *
           kEach;
  }
  __device__ __forceinline__ uint4 words(const T* from, std::int64_t at, int count) const {
    if (from == nullptr || count == 0) return make_uint4(0, 0, 0, 0);
    return call.packs ? dev::load16(from + at) : load_some(from + at, count);
  }
  __device__ __forceinline__ void write(T* to, const A (&numbers)[kEach], std::int64_t j) const {
    if (call.packs)
      dev::store16(to + row * call.n + j, pack<T>(numbers));
    else
      store_some(to + row * call.n + j, numbers, count_at(j));
  }
  __device__ __forceinline__ void add(A (&numbers)[kEach], std::int64_t j) const {
    A more[kEach];
    unpack<T>(words(call.added, row * call.n + j, count_at(j)), more);
#pragma unroll
    for (int i = 0; i < kEach; ++i) numbers[i] += more[i];
  }
  // `last`: whether these are read for the last time.
  __device__ __forceinline__ void read(int p, std::int64_t j, bool last) {
    const int count = count_at(j);
#pragma unroll
    for (int k = 0; k < Row::kIn; ++k) raw[p][k] = words(call.in[k], row * call.n + j, count);
    if constexpr (Row::kAdded == Added::kInput) {
      if (call.added == nullptr || count == 0) return;
      A sum[kEach];
      unpack<T>(raw[p][0], sum);
      add(sum, j);
      raw[p][0] = pack<T>(sum);
      if (last) write(call.sum, sum, j);
    }
  }

  // f(p, j, i, in, c, q) for every element j + i of the thread, pack p.
  template <class F>
  __device__ __forceinline__ void elements(int p, std::int64_t j, const F& f) const {
    const int count = count_at(j);
    A in[Row::kIn][kEach], c[kNormColumns][kEach];
#pragma unroll
    for (int k = 0; k < Row::kIn; ++k) unpack<T>(raw[p][k], in[k]);
#pragma unroll
    for (int k = 0; k < kNormColumns; ++k) unpack<T>(words(call.of_column[k], j, count), c[k]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i >= count) continue;
      A one[Row::kIn], of[kNormColumns], q[kQ > 0 ? kQ : 1];
#pragma unroll
      for (int k = 0; k < Row::kIn; ++k) one[k] = in[k][i];
#pragma unroll
      for (int k = 0; k < kNormColumns; ++k) of[k] = c[k][i];
      if (call.of_column[kWeight] == nullptr) of[kWeight] = 1;
      Row::quantities(one, of, q);
      f(i, one, of, q);
    }
  }
  // f(p, j) for the thread's packs of the row; they are in raw[p].
  template <class F>
  __device__ __forceinline__ void packs(bool last, const F& f) {
    if constexpr (kHeld) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) f(p, column(p));
    } else {
#pragma unroll 1
      for (std::int64_t j = column(0); j < call.n; j += static_cast<int>(blockDim.x) * kEach) {
        read(0, j, last);
        f(0, j);
      }
    }
  }

  __device__ __forceinline__ void normalize(std::int64_t first) {
    const A inverse = A(1) / static_cast<A>(call.n);
    if constexpr (kHeld) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) read(p, column(p), true);
    }
    A mean[1 + kQ] = {};
    if constexpr (kCentred) {
      packs(false, [&](int p, std::int64_t j) {
        elements(p, j, [&](int, const A* in, const A*, const A* q) {
          mean[0] += in[0];
#pragma unroll
          for (int k = 0; k < kQ; ++k) mean[1 + k] += q[k];
        });
      });
      over_block<Sum>(mean);
#pragma unroll
      for (int k = 0; k < 1 + kQ; ++k) mean[k] *= inverse;
    }
    A sum[kSums] = {};
    packs(false, [&](int p, std::int64_t j) {
      elements(p, j, [&](int, const A* in, const A*, const A* q) {
        const A x = in[0] - mean[0];
        sum[0] = fma(x, x, sum[0]);
#pragma unroll
        for (int k = 0; k < kQ; ++k) sum[1 + k] = fma(x, q[k], sum[1 + k]);
        if constexpr (Row::kCross) sum[1 + kQ] = fma(q[0] - mean[1], q[1], sum[1 + kQ]);
      });
    });
    over_block<Sum>(sum);
    NormAt<A, kQ> at;
    at.r = inverse_root(fma(sum[0], inverse, call.eps));
#pragma unroll
    for (int k = 0; k < kQ; ++k) at.a[k] = sum[1 + k] * inverse * at.r;
    if constexpr (Row::kCross) at.cross = sum[1 + kQ] * inverse - at.a[0] * at.a[1];

    packs(true, [&](int p, std::int64_t j) {
      if (count_at(j) == 0) return;
      A out[Row::kOut][kEach];
      elements(p, j, [&](int i, const A* in, const A* c, const A* q) {
        at.x = (in[0] - mean[0]) * at.r;
#pragma unroll
        for (int k = 0; k < kQ; ++k) at.p[k] = q[k] - mean[1 + k] - at.x * at.a[k];
        A result[Row::kOut], terms[kKinds];
        Row::emit(in, c, at, result, terms);
#pragma unroll
        for (int k = 0; k < Row::kOut; ++k) out[k][i] = result[k];
#pragma unroll
        for (int k = 0; k < Row::kColumnSums; ++k) {
          if constexpr (kHeld) {
            columns[k][p * kEach + i] += terms[k];
          } else {
            A& to = partial(k, j + i);
            to = row == first ? terms[k] : to + terms[k];
          }
        }
      });
      if constexpr (Row::kAdded == Added::kOutput) {
        if (call.added) add(out[0], j);
      }
#pragma unroll
      for (int k = 0; k < Row::kOut; ++k) write(call.out[k], out[k], j);
    });
  }

  __device__ __forceinline__ void write_sums() const {
    if constexpr (kHeld && Row::kColumnSums > 0) {
#pragma unroll
      for (int k = 0; k < Row::kColumnSums; ++k) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            if (column(p) + i < call.n) partial(k, column(p) + i) = columns[k][p * kEach + i];
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ A& partial(int kind, std::int64_t j) const {
    return call.partial[(static_cast<std::int64_t>(kind) * gridDim.x + blockIdx.x) * call.n + j];
  }
};

template <class Row, bool kCentred, class T, bool kHeld>
__device__ __forceinline__ void rows_of_block(const Call<T>& call) {
  const std::int64_t blocks = gridDim.x, block = blockIdx.x;
  const std::int64_t first = call.rows * block / blocks, last = call.rows * (block + 1) / blocks;
  Block<Row, kCentred, T, kHeld> here(call);
#pragma unroll 1
  for (here.row = first; here.row < last; ++here.row) here.normalize(first);
  here.write_sums();
}

template <class Row, bool kCentred, class T>
__global__ void __launch_bounds__(kMostThreads<Row>, 1) held(Call<T> call) {
  rows_of_block<Row, kCentred, T, true>(call);
}
template <class Row, bool kCentred, class T>
__global__ void __launch_bounds__(kMostThreads<Row>, 1) sweep(Call<T> call) {
  rows_of_block<Row, kCentred, T, false>(call);
}

}  // namespace jops::JOPS_ISA::norm
