// Sums over the rows of a matrix: bias gradients.
#pragma once

#include <new>

#include "blocks.h"

namespace jops::JOPS_ISA {

template <class N>
inline N up(N a, N b) {
  return (a + b - 1) / b;
}
template <class N>
inline N least(N a, N b) {
  return a < b ? a : b;
}
template <class N>
inline N most(N a, N b) {
  return a > b ? a : b;
}

template <class N>
struct Aligned {
  N* data;
  explicit Aligned(std::int64_t n)
      : data(static_cast<N*>(::operator new(n * sizeof(N), std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

// Sums of kSumRows rows first, kSumPairs at a time by halves, then of those: the order is fixed,
// and rounding does not grow with the number of rows.
constexpr std::int64_t kSumRows = 128, kSumPairs = 8, kSumCols = 4096;

// n adjacent elements of a row, as a vector; zeros past them.
template <class T>
JOPS_HD Vec<Compute<T>> strided(const T* p, std::int64_t stride, int n) {
  if (stride == 1) return n >= Vec<Compute<T>>::kLanes ? load(p) : load_n(p, n);
  T near[Vec<Compute<T>>::kLanes] = {};
  for (int i = 0; i < n; ++i) near[i] = p[i * stride];
  return load(near);
}

// y = the sums over `count` parts of n numbers in whole vectors, from one part to the next
// `stride`.
template <class T>
void add_parts(const Compute<T>* parts, std::int64_t count, std::int64_t stride, std::int64_t n,
               T* y) {
  using V = Vec<Compute<T>>;
  for (std::int64_t j = 0; j < n; j += V::kLanes) {
    V total(Compute<T>(0)), lost(Compute<T>(0));
    for (std::int64_t part = 0; part < count; ++part) {
      add_compensated(load(parts + part * stride + j), total, lost);
    }
    if (j + V::kLanes <= n)
      store(y + j, total);
    else
      store_n(y + j, total, static_cast<int>(n - j));
  }
}

// y = the sums of x over its rows. `prepare(row, count)` comes before `count` of them are read, if
// it makes them (kMade); it sees whole rows then.
template <bool kMade, class T, class Prepare>
void sum_columns(const Matrix& x, std::int64_t batch, T* y, int threads, const Prepare& prepare) {
  using A = Compute<T>;
  using V = Vec<A>;
  const T* from = static_cast<const T*>(x.data) + batch * x.batch_stride;
  const std::int64_t M = x.rows, N = x.cols;
  threads = useful_threads(M * N, threads);
  const std::int64_t parts = M == 0 ? 1 : up(M, kSumRows);
  // Long runs of a row, but a strip for every thread.
  const std::int64_t strips =
      kMade ? 1 : most<std::int64_t>(up(N, kSumCols), up<std::int64_t>(threads, parts));
  const std::int64_t width = up<std::int64_t>(up(N, strips), V::kLanes) * V::kLanes;
  const std::int64_t pitch = up<std::int64_t>(N, V::kLanes) * V::kLanes;
  Aligned<A> sums(parts * pitch);
  parallel(parts * strips, threads, [&](std::int64_t task) {
    const std::int64_t part = task / strips, col = task % strips * width, row = part * kSumRows;
    const std::int64_t rows = M - row < kSumRows ? M - row : kSumRows;
    const std::int64_t cols = most<std::int64_t>(0, least(N - col, width));
    A* to = sums.data + part * pitch + col;
    const T* corner = from + row * x.row_stride + col * x.col_stride;
    for (std::int64_t j = 0; j < cols; j += V::kLanes) store(to + j, V(A(0)));
    for (std::int64_t i = 0; i < rows; i += kSumPairs) {
      prepare(row + i, least(kSumPairs, rows - i));
      for (std::int64_t j = 0; j < cols; j += V::kLanes) {
        const int n = static_cast<int>(least<std::int64_t>(cols - j, V::kLanes));
        const T* p = corner + i * x.row_stride + j * x.col_stride;
        V part[kSumPairs];
        if (x.col_stride == 1 && n == V::kLanes && i + kSumPairs <= rows) {
#pragma GCC unroll 8
          for (int r = 0; r < kSumPairs; ++r) {
            prefetch(p + (r + kSumPairs) * x.row_stride);
            part[r] = load(p + r * x.row_stride);
          }
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < kSumPairs; ++r) {
            part[r] = i + r < rows ? strided(p + r * x.row_stride, x.col_stride, n) : V(A(0));
          }
        }
#pragma GCC unroll 3
        for (int half = kSumPairs / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
          for (int r = 0; r < half; ++r) part[r] += part[r + half];
        }
        store(to + j, load(to + j) + part[0]);
      }
    }
  });
  add_parts(sums.data, parts, pitch, N, y);
}

template <class T>
void sum_columns(const Matrix& x, std::int64_t batch, T* y, int threads) {
  sum_columns<false>(x, batch, y, threads, [](std::int64_t, std::int64_t) {});
}

}  // namespace jops::JOPS_ISA
