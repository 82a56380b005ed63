// Sums over rows on a device: bias gradients. See columns.h.
#pragma once

#include "vectors.cuh"

namespace jops::JOPS_ISA::columns {

// A block takes kColumns packs side by side, its kLines lines of threads every kLines-th row.
constexpr int kColumns = 32, kLines = 8, kThreads = kColumns * kLines;

template <class A, int kEach>
struct Lines {
  A of[kLines][kEach][kColumns];
};

// Adds up the lines of a block; the first line of threads gets the result.
template <class A, int kEach>
__device__ __forceinline__ void add_lines(A (&sum)[kEach], int lane, int line) {
  auto& lines = dev::shared<Lines<A, kEach>>();
#pragma unroll
  for (int i = 0; i < kEach; ++i) lines.of[line][i][lane] = sum[i];
  __syncthreads();
  if (line > 0) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    sum[i] = 0;
#pragma unroll
    for (int other = 0; other < kLines; ++other) sum[i] += lines.of[other][i][lane];
  }
}

// The first stage for a matrix of any strides.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_parts(Matrix x, bool packs, int parts, Compute<T>* partial) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>;
  const int lane = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const std::int64_t strips = (x.cols + kColumns * kEach - 1) / (kColumns * kEach);
  const std::int64_t strip = blockIdx.x % strips, batch = blockIdx.x / strips;
  const int part = blockIdx.y;
  const std::int64_t column = (strip * kColumns + lane) * kEach;
  const std::int64_t left = x.cols - column;
  const int count = left < kEach ? static_cast<int>(left) : kEach;
  const std::int64_t first = x.rows * part / parts, last = x.rows * (part + 1) / parts;
  const T* from = static_cast<const T*>(x.data) + batch * x.batch_stride + column * x.col_stride;

  LongSum<A> long_sum[kEach];
  if (count > 0) {
#pragma unroll 2
    for (std::int64_t row = first + line; row < last; row += kLines) {
      const T* at = from + row * x.row_stride;
      A numbers[kEach];
      if (packs) {
        unpack<T>(dev::load16(at), numbers);
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          numbers[i] = i < count ? dev::widen(at[i * x.col_stride]) : A(0);
        }
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) long_sum[i].add(numbers[i]);
    }
  }
  A sum[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum[i] = long_sum[i].sum;
  add_lines(sum, lane, line);
  if (line > 0) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i < count) partial[(batch * parts + part) * x.cols + column + i] = sum[i];
  }
}

// The second stage: (outer, parts, inner) -> (outer, inner).
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts(const Compute<T>* partial, int parts, std::int64_t inner, T* sum) {
  using A = Compute<T>;
  const int lane = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const std::int64_t strips = (inner + kColumns - 1) / kColumns;
  const std::int64_t column = blockIdx.x % strips * kColumns + lane, outer = blockIdx.x / strips;
  LongSum<A> long_sum;
  if (column < inner) {
#pragma unroll 4
    for (int part = line; part < parts; part += kLines) {
      long_sum.add(partial[(outer * parts + part) * inner + column]);
    }
  }
  A total[1] = {long_sum.sum};
  add_lines(total, lane, line);
  if (line == 0 && column < inner) sum[outer * inner + column] = dev::narrow<T>(total[0]);
}

}  // namespace jops::JOPS_ISA::columns
