// linear: y = x w^T + bias (+ y), of any strides; linear_act_dropout: z = x w^T + bias, y = m f(z);
// column_sum: the bias gradient.
//
// x and w are packed into panels (gemm.h), a chunk at a time, and every task computes a block of y
// whose panels stay in L2. The inner dimension runs in order through blocks of fixed depth, in
// float or double, so the bits depend neither on the number of threads nor on the blocks of y. A
// tile is finished while it is in L1: bias, activation and mask cost no pass over memory, and
// 16-bit results are rounded once.
#include <new>

#include "gemm.h"

namespace jops::JOPS_ISA {
namespace {

constexpr std::int64_t kDepth =
    256;  // k of one visit to a tile: short sums round less, panels stay near
constexpr std::int64_t kChunkBytes = 16 << 20;  // packed at once, of x and of w each
constexpr int kBlockRows = 8, kBlockCols = 2;   // tiles of a task
constexpr std::int64_t kFewRows = 4;            // up to here w is read in place

template <class N>
N up(N a, N b) {
  return (a + b - 1) / b;
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

// What happens to a block of sums on its way to memory.
template <class T>
struct Epilogue {
  using A = Compute<T>;
  const T* bias;  // of this batch index, or null
  T* y;           // this batch index
  T* z;           // or null
  std::int64_t y_stride, z_stride, cols;
  bool accumulate;
  ActivationBlock<A> activation;  // or null
  const Act* act;
  const Mask* mask;  // or null
  std::int64_t sample;

  // Row-major sums of `rows` x `width`, rows `pitch` apart, that belong at (row, col) of y.
  void operator()(A* sums, int pitch, std::int64_t row, std::int64_t col, int rows,
                  int width) const {
    if (bias) {
      for (int i = 0; i < rows; ++i) {
        A* s = sums + i * pitch;
        for_segment(
            width, [&](int j, int n) { store(s + j, load(s + j) + load_part(bias + col + j, n)); });
      }
    }
    if (z) {
      for (int i = 0; i < rows; ++i) copy(z + (row + i) * z_stride + col, sums + i * pitch, width);
    }
    if (activation) activation(*act, sums, sums, static_cast<std::int64_t>(rows) * pitch);
    if (mask) {
      alignas(64) A m[kMaxWidth];
      for (int i = 0; i < rows; ++i) {
        A* s = sums + i * pitch;
        dropout_block(*mask, sample, (row + i) * cols + col, m, width);
        for_segment(width, [&](int j, int) { store(s + j, load(s + j) * load(m + j)); });
      }
    }
    for (int i = 0; i < rows; ++i) {
      A* s = sums + i * pitch;
      T* to = y + (row + i) * y_stride + col;
      if (accumulate) {
        for_segment(width, [&](int j, int n) { store(s + j, load(s + j) + load_part(to + j, n)); });
      }
      copy(to, s, width);
    }
  }

  static constexpr int kMaxWidth = 128;

  // Whole vectors; the last may be part of one. Blocks of sums are padded to whole vectors.
  template <class F>
  static JOPS_HD void for_segment(int width, const F& f) {
    constexpr int kLanes = Vec<A>::kLanes;
    for (int j = 0; j < width; j += kLanes) f(j, width - j < kLanes ? width - j : kLanes);
  }
  static JOPS_HD Vec<A> load_part(const T* p, int n) {
    return n == Vec<A>::kLanes ? load(p) : load_n(p, n);
  }
  static JOPS_HD void copy(T* to, const A* from, int width) {
    for_segment(width, [&](int j, int n) {
      if (n == Vec<A>::kLanes)
        store(to + j, load(from + j));
      else
        store_n(to + j, load(from + j), n);
    });
  }
};

// Panels of lines [first, first + count) of a matrix whose lines are rows, into `to`.
template <class P, int kWidth, class T>
void pack(const Matrix& a, std::int64_t batch, std::int64_t first, std::int64_t count, int threads,
          typename P::Packed* to) {
  const T* from = static_cast<const T*>(a.data) + batch * a.batch_stride + first * a.row_stride;
  const std::int64_t panel = up<std::int64_t>(a.cols, P::kStep) * kWidth;
  parallel(up<std::int64_t>(count, kWidth), threads, [&](std::int64_t i) {
    const std::int64_t left = count - i * kWidth;
    pack_panel<P, kWidth>(from + i * kWidth * a.row_stride, a.row_stride, a.col_stride,
                          static_cast<int>(left < kWidth ? left : kWidth), a.cols, to + i * panel);
  });
}

// One block of y: its tiles' sums over the whole depth, then the epilogue.
template <class P, class T>
void block_product(const typename P::Packed* x, const typename P::Packed* w, std::int64_t steps,
                   std::int64_t row, std::int64_t col, std::int64_t rows, std::int64_t cols,
                   const Epilogue<T>& finish) {
  constexpr int kTile = P::kRows * P::kCols;
  constexpr std::int64_t kSteps = kDepth / P::kStep;
  const int tile_rows = static_cast<int>(up<std::int64_t>(rows, P::kRows));
  const int tile_cols = static_cast<int>(up<std::int64_t>(cols, P::kCols));
  alignas(64) typename P::Compute sums[kBlockRows * kBlockCols][kTile];
  std::int64_t first = 0;
  do {  // once even without any k: y is then the bias
    const std::int64_t n = steps - first < kSteps ? steps - first : kSteps;
    for (int j = 0; j < tile_cols; ++j) {
      for (int i = 0; i < tile_rows; ++i) {
        auto* tile = sums[i * kBlockCols + j];
        tile_product<P>(x + (i * steps + first) * P::kRows, w + (j * steps + first) * P::kCols, n,
                        first > 0, tile);
        if (first + n < steps) continue;
        const std::int64_t r = i * P::kRows, c = j * P::kCols;
        finish(tile, P::kCols, row + r, col + c,
               static_cast<int>(rows - r < P::kRows ? rows - r : P::kRows),
               static_cast<int>(cols - c < P::kCols ? cols - c : P::kCols));
      }
    }
    first += kSteps;
  } while (first < steps);
}

template <class T>
void packed_product(const Matrix& x, const Matrix& w, std::int64_t batch, int threads,
                    const Epilogue<T>& finish) {
  using P = typename ProductOf<T>::type;
  using Packed = typename P::Packed;
  const std::int64_t M = x.rows, N = w.rows, steps = up<std::int64_t>(x.cols, P::kStep);
  const std::int64_t line = (steps + 1) * static_cast<std::int64_t>(sizeof(Packed));
  const auto chunk = [&](std::int64_t lines, int width) {
    const std::int64_t most = kChunkBytes / line / width * width;
    const std::int64_t all = up<std::int64_t>(lines, width) * width;
    return most < width ? static_cast<std::int64_t>(width) : most < all ? most : all;
  };
  const std::int64_t chunk_rows = chunk(M, P::kRows), chunk_cols = chunk(N, P::kCols);
  Aligned<Packed> xs(chunk_rows * steps), ws(chunk_cols * steps);

  for (std::int64_t col = 0; col < N; col += chunk_cols) {
    const std::int64_t cols = N - col < chunk_cols ? N - col : chunk_cols;
    pack<P, P::kCols, T>(w, batch, col, cols, threads, ws.data);
    for (std::int64_t row = 0; row < M; row += chunk_rows) {
      const std::int64_t rows = M - row < chunk_rows ? M - row : chunk_rows;
      if (col == 0 || chunk_rows < M) pack<P, P::kRows, T>(x, batch, row, rows, threads, xs.data);

      // Small problems get smaller blocks, so that every thread has one.
      int block_rows = kBlockRows * P::kRows, block_cols = kBlockCols * P::kCols;
      while (up<std::int64_t>(rows, block_rows) * up<std::int64_t>(cols, block_cols) <
                 2 * threads &&
             (block_rows > P::kRows || block_cols > P::kCols)) {
        if (block_cols > P::kCols)
          block_cols = P::kCols;
        else
          block_rows /= 2, block_rows = static_cast<int>(up(block_rows, P::kRows)) * P::kRows;
      }
      const std::int64_t down = up<std::int64_t>(rows, block_rows);
      parallel(down * up<std::int64_t>(cols, block_cols), threads, [&](std::int64_t task) {
        // Down the rows first: a thread keeps its panels of w in L2.
        const std::int64_t r = task % down * block_rows, c = task / down * block_cols;
        block_product<P>(xs.data + r * steps, ws.data + c * steps, steps, row + r, col + c,
                         rows - r < block_rows ? rows - r : block_rows,
                         cols - c < block_cols ? cols - c : block_cols, finish);
      });
    }
  }
}

// Few rows, both operands contiguous along k: packing w would cost more than the products.
template <class T>
void few_rows_product(const Matrix& x, const Matrix& w, std::int64_t batch, int threads,
                      const Epilogue<T>& finish) {
  using A = Compute<T>;
  using V = Vec<A>;
  constexpr int kWidth = 16;
  const T* xs = static_cast<const T*>(x.data) + batch * x.batch_stride;
  const T* ws = static_cast<const T*>(w.data) + batch * w.batch_stride;
  const std::int64_t M = x.rows, N = w.rows, K = x.cols, whole = K / V::kLanes * V::kLanes;
  parallel(up<std::int64_t>(N, kWidth), threads, [&](std::int64_t task) {
    const std::int64_t col = task * kWidth;
    const int cols = static_cast<int>(N - col < kWidth ? N - col : kWidth);
    alignas(64) A sums[kFewRows][kWidth] = {};
    for (int j = 0; j < cols; ++j) {
      const T* b = ws + (col + j) * w.row_stride;
      for (std::int64_t i = 0; i < M; ++i) {
        const T* a = xs + i * x.row_stride;
        V part[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
        std::int64_t k = 0;
        for (; k + 4 * V::kLanes <= K; k += 4 * V::kLanes) {
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) {
            part[u] = fma(load(a + k + u * V::kLanes), load(b + k + u * V::kLanes), part[u]);
          }
        }
        for (; k < whole; k += V::kLanes) part[0] = fma(load(a + k), load(b + k), part[0]);
        if (k < K) {
          const int n = static_cast<int>(K - k);
          part[1] = fma(load_n(a + k, n), load_n(b + k, n), part[1]);
        }
        sums[i][j] = sum((part[0] + part[1]) + (part[2] + part[3]));
      }
    }
    finish(sums[0], kWidth, 0, col, static_cast<int>(M), cols);
  });
}

template <class T>
void product(const Matrix& x, const Matrix& w, std::int64_t batch, int threads,
             const Epilogue<T>& finish) {
  // A thread is worth waking for about 50 microseconds of work.
  const std::int64_t useful = x.rows * w.rows * (x.cols + 16) / (1 << 20) + 1;
  if (useful < threads) threads = static_cast<int>(useful);
  if (x.rows <= kFewRows && x.col_stride == 1 && w.col_stride == 1) {
    few_rows_product<T>(x, w, batch, threads, finish);
  } else {
    packed_product<T>(x, w, batch, threads, finish);
  }
}

// A matrix without a batch serves the whole batch of y.
Matrix broadcast(Matrix a) {
  if (a.batch == 1) a.batch_stride = 0;
  return a;
}

void run(Matrix x, Matrix w, const Buffer& bias, const Matrix& y, const Matrix& z, bool accumulate,
         const Act* act, const Mask& mask, const Exec& exec) {
  x = broadcast(x);
  w = broadcast(w);
  with_storage(y.dtype, [&](auto storage) {
    using T = decltype(storage);
    Epilogue<T> finish{};
    finish.y_stride = y.row_stride;
    finish.z_stride = z.row_stride;
    finish.cols = y.cols;
    finish.accumulate = accumulate;
    finish.act = act;
    if (act && act->code != Activation::kIdentity) {
      finish.activation = activation_block<Compute<T>>(act->code);
    }
    finish.mask = mask.given() ? &mask : nullptr;
    const std::int64_t bias_stride = bias.given() && bias.size != y.cols ? y.cols : 0;
    for (std::int64_t b = 0; b < y.batch; ++b) {
      finish.bias = bias.given() ? static_cast<const T*>(bias.data) + b * bias_stride : nullptr;
      finish.y = static_cast<T*>(y.data) + b * y.batch_stride;
      finish.z = z.given() ? static_cast<T*>(z.data) + b * z.batch_stride : nullptr;
      finish.sample = b;
      product<T>(x, w, b, exec.threads, finish);
    }
  });
}

void linear(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y, bool accumulate,
            const Exec& exec) {
  run(x, w, bias, y, Matrix{}, accumulate, nullptr, Mask{}, exec);
}

void linear_act_dropout(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y,
                        const Matrix& z, const Act& act, const Mask& mask, const Exec& exec) {
  run(x, w, bias, y, z, false, &act, mask, exec);
}

// Sums of kSumRows rows first, then of those: the order is fixed, and rounding grows with neither
// alone.
constexpr std::int64_t kSumRows = 128, kSumCols = 512;

template <class T>
void column_sum(const Matrix& x, std::int64_t batch, T* y, int threads) {
  using A = Compute<T>;
  using V = Vec<A>;
  const T* from = static_cast<const T*>(x.data) + batch * x.batch_stride;
  const std::int64_t M = x.rows, N = x.cols;
  const std::int64_t parts = M == 0 ? 1 : up(M, kSumRows), strips = up(N, kSumCols);
  const std::int64_t pitch = strips * kSumCols;
  Aligned<A> sums(parts * pitch);
  parallel(parts * strips, useful_threads(M * N, threads), [&](std::int64_t task) {
    const std::int64_t part = task / strips, col = task % strips * kSumCols, row = part * kSumRows;
    const std::int64_t rows = M - row < kSumRows ? M - row : kSumRows;
    const std::int64_t cols = N - col < kSumCols ? N - col : kSumCols;
    A* to = sums.data + part * pitch + col;
    for (std::int64_t j = 0; j < kSumCols; ++j) to[j] = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      const T* p = from + (row + i) * x.row_stride + col * x.col_stride;
      std::int64_t j = 0;
      if (x.col_stride == 1) {
        for (; j + V::kLanes <= cols; j += V::kLanes) store(to + j, load(to + j) + load(p + j));
      }
      for (; j < cols; ++j) {
        if constexpr (std::is_same_v<T, A>)
          to[j] += p[j * x.col_stride];
        else
          to[j] += load_n(p + j * x.col_stride, 1)[0];
      }
    }
  });
  for (std::int64_t j = 0; j < N; j += V::kLanes) {
    V total(A(0));
    for (std::int64_t part = 0; part < parts; ++part) total += load(sums.data + part * pitch + j);
    if (j + V::kLanes <= N)
      store(y + j, total);
    else
      store_n(y + j, total, static_cast<int>(N - j));
  }
}

void column_sum(const Matrix& x, const Buffer& y, const Exec& exec) {
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    for (std::int64_t b = 0; b < x.batch; ++b) {
      column_sum(x, b, static_cast<T*>(y.data) + b * x.cols, exec.threads);
    }
  });
}

}  // namespace

void register_linear(Kernels& table) {
  table.linear = linear;
  table.linear_act_dropout = linear_act_dropout;
  table.column_sum = column_sum;
}

}  // namespace jops::JOPS_ISA
