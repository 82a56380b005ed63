// y = m f(x w^T + bias) on a device, and its tangent: product and epilogue in one kernel, for the
// problems in which launches cost more than the arithmetic.
//
// A block makes a square of results. Both operands come through shared memory in steps of the inner
// dimension, of any strides: packs run along the inner dimension or along the lines, whichever is
// adjacent in memory, and are gathered number by number where neither is or memory is not aligned.
//   tiles    float and double: 16 x 16 threads with a square of sums each; the next step is on its
//            way in registers while this one is multiplied
//   tensor   16-bit types: four warps with mma tiles; the next step is copied asynchronously
// The tangent shares the operands: w and x are read once for all products. Sums then pass through
// shared memory, so that bias, activation, mask and stores work on whole packs of a row.
#pragma once

#include "activation.cuh"

namespace jops::JOPS_ISA::linear {

template <class T>
struct Operand {
  const T* data = nullptr;  // null: absent
  std::int64_t lines = 0, depth = 0;
  std::int64_t batch_stride = 0, line_stride = 0, depth_stride = 0;
  bool along_depth = true;  // packs lie along the depth, else along lines
  bool packs = false;       // and can be read whole

  Operand() = default;
  explicit Operand(const Matrix& m)
      : data(static_cast<const T*>(m.data)),
        lines(m.rows),
        depth(m.cols),
        batch_stride(m.batch == 1 ? 0 : m.batch_stride),
        line_stride(m.row_stride),
        depth_stride(m.col_stride),
        along_depth(m.col_stride == 1 || m.row_stride != 1) {
    const std::int64_t along = along_depth ? depth : lines;
    const std::int64_t other = along_depth ? line_stride : depth_stride;
    packs = (along_depth ? depth_stride : line_stride) == 1 && packs_at(data) &&
            along % kPack<T> == 0 && other % kPack<T> == 0 && batch_stride % kPack<T> == 0;
    if (!m.given()) data = nullptr;
  }

  // The pack at (line, k), zeros where it is outside; `valid`: it can be read whole.
  __device__ __forceinline__ const T* at(std::int64_t batch, std::int64_t line, std::int64_t k,
                                         bool* valid) const {
    const bool inside = line < lines && k < depth;
    *valid = inside && packs;
    return inside ? data + batch * batch_stride + line * line_stride + k * depth_stride : data;
  }
  __device__ __forceinline__ uint4 gather(std::int64_t batch, std::int64_t line,
                                          std::int64_t k) const {
    bool valid;
    const T* from = at(batch, line, k, &valid);
    if (valid) return dev::load16(from);
    const std::int64_t left = along_depth ? depth - k : lines - line;
    const std::int64_t step = along_depth ? depth_stride : line_stride;
    const bool inside = line < lines && k < depth;
    Compute<T> numbers[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      numbers[i] = inside && i < left ? dev::widen(from[i * step]) : Compute<T>(0);
    }
    return pack<T>(numbers);
  }
};

template <class T>
struct Result {
  T* data = nullptr;  // null: not wanted
  std::int64_t batch_stride = 0, row_stride = 0;
};

template <class T>
struct Call {
  Operand<T> x, w, tx, tw;
  const T *bias = nullptr, *tbias = nullptr;
  std::int64_t bias_stride = 0, tbias_stride = 0;  // over the batch
  Result<T> y, ty, z;
  std::int64_t rows, cols;
  bool packs;  // results can be written in packs
  activation::Function<T> f;
  Dropout<Compute<T>> dropout;
};

// Where a block's square of results is.
template <int kSide>
struct Place {
  std::int64_t batch, row, col;

  __device__ __forceinline__ Place(std::int64_t rows, std::int64_t cols) {
    const std::int64_t across = (cols + kSide - 1) / kSide, down = (rows + kSide - 1) / kSide;
    const std::int64_t tile = blockIdx.x;
    col = tile % across * kSide;
    row = tile / across % down * kSide;
    batch = tile / across / down;
  }
};

template <class A, int kSide, bool kDual>
struct Sums {
  A of[kDual ? 2 : 1][kSide][kSide + 4];
};

// The numbers of a bias for one pack.
template <class T>
__device__ __forceinline__ void add_line(const T* bias, std::int64_t col, std::int64_t cols,
                                         Compute<T> (&z)[kPack<T>]) {
  if (!bias) return;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if (col + i < cols) z[i] += dev::widen(bias[col + i]);
  }
}

template <class T>
__device__ __forceinline__ void write(const Call<T>& call, const Result<T>& to, std::int64_t batch,
                                      std::int64_t row, std::int64_t col,
                                      const Compute<T> (&numbers)[kPack<T>]) {
  if (!to.data) return;
  T* at = to.data + batch * to.batch_stride + row * to.row_stride + col;
  if (call.packs)
    dev::store16(at, pack<T>(numbers));
  else
    store_some(at, numbers, static_cast<int>(min_size(call.cols - col, kPack<T>)));
}

// From sums to results.
template <class T, int kSide, int kThreads, bool kDual>
__device__ __forceinline__ void finish(const Call<T>& call, const Place<kSide>& place,
                                       const Sums<Compute<T>, kSide, kDual>& sums) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>, kAcross = kSide / kEach;
  const T* bias = call.bias ? call.bias + place.batch * call.bias_stride : nullptr;
  const T* tbias = call.tbias ? call.tbias + place.batch * call.tbias_stride : nullptr;
#pragma unroll 1
  for (int i = threadIdx.x; i < kSide * kAcross; i += kThreads) {
    const std::int64_t row = place.row + i / kAcross, col = place.col + i % kAcross * kEach;
    if (row >= call.rows || col >= call.cols) continue;
    A z[kDual ? 2 : 1][kEach], y[kDual ? 2 : 1][kEach];
#pragma unroll
    for (int part = 0; part < (kDual ? 2 : 1); ++part) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        z[part][j] = sums.of[part][i / kAcross][i % kAcross * kEach + j];
      }
    }
    add_line(bias, col, call.cols, z[0]);
    if constexpr (kDual) add_line(tbias, col, call.cols, z[1]);
    write(call, call.z, place.batch, row, col, z[0]);
    call.f.template apply<std::conditional_t<kDual, Jvp, Value>>(z, y);
    if (call.dropout.seeds) {
      const std::int64_t first = (place.batch * call.rows + row) * call.cols + col;
      const unsigned bits = kept<kEach>(call.dropout, first);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        y[0][j] *= multiplier(call.dropout, bits, j);
        if constexpr (kDual) y[1][j] *= multiplier(call.dropout, bits, j);
      }
    }
    write(call, call.y, place.batch, row, col, y[0]);
    if constexpr (kDual) write(call, call.ty, place.batch, row, col, y[1]);
  }
}

// Numbers of shared memory that are read at once.
template <class A>
struct alignas(16) Group {
  A of[16 / sizeof(A)];
};

constexpr int kTileThreads = 256, kTileDepth = 16;

template <class A, bool kDual>
union TileMemory {
  static constexpr int kEach = 16 / sizeof(A), kSide = 16 * kEach;
  // [k][line], a group more than a line of the square against bank conflicts
  Group<A> lines[kDual ? 4 : 2][kTileDepth][16 + 1];
  Sums<A, kSide, kDual> sums;
};

template <class T, bool kDual>
__global__ void __launch_bounds__(kTileThreads, 1) tiles(Call<T> call) {
  using A = Compute<T>;
  using Memory = TileMemory<A, kDual>;
  constexpr int kEach = Memory::kEach, kSide = Memory::kSide, kOperands = kDual ? 4 : 2;
  static_assert(kPack<T> == kEach && kSide * kTileDepth / kEach == kTileThreads);
  auto& memory = dev::shared<Memory>();
  const Place<kSide> place(call.rows, call.cols);
  const int thread = threadIdx.x, across = thread % 16, down = thread / 16;
  const Operand<T>* const operands[4] = {&call.x, &call.w, &call.tx, &call.tw};

  // The pack of an operand that this thread brings: its line and k within a step.
  const auto line_of = [&](bool along_depth) {
    return along_depth ? thread / (kTileDepth / kEach) : thread % (kSide / kEach) * kEach;
  };
  const auto k_of = [&](bool along_depth) {
    return along_depth ? thread % (kTileDepth / kEach) * kEach : thread / (kSide / kEach);
  };
  uint4 next[kOperands];
  const auto fetch = [&](std::int64_t k0) {
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      const Operand<T>& a = *operands[o];
      if (!a.data) continue;
      const std::int64_t first = o % 2 ? place.col : place.row;
      next[o] = a.gather(place.batch, first + line_of(a.along_depth), k0 + k_of(a.along_depth));
    }
  };

  A sum[kDual ? 2 : 1][kEach][kEach] = {};
  fetch(0);
#pragma unroll 1
  for (std::int64_t k0 = 0; k0 < call.x.depth; k0 += kTileDepth) {
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      const bool along = operands[o]->along_depth;
      if (!operands[o]->data) continue;
      A numbers[kEach];
      unpack<T>(next[o], numbers);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int line = line_of(along) + (along ? 0 : i), k = k_of(along) + (along ? i : 0);
        memory.lines[o][k][line / kEach].of[line % kEach] = numbers[i];
      }
    }
    __syncthreads();
    if (k0 + kTileDepth < call.x.depth) fetch(k0 + kTileDepth);
#pragma unroll
    for (int k = 0; k < kTileDepth; ++k) {
      const Group<A> x = memory.lines[0][k][down], w = memory.lines[1][k][across];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[0][i][j] = fma(x.of[i], w.of[j], sum[0][i][j]);
      }
      if constexpr (kDual) {
        if (call.tx.data) {
          const Group<A> tx = memory.lines[2][k][down];
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
#pragma unroll
            for (int j = 0; j < kEach; ++j) sum[1][i][j] = fma(tx.of[i], w.of[j], sum[1][i][j]);
          }
        }
        if (call.tw.data) {
          const Group<A> tw = memory.lines[3][k][across];
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
#pragma unroll
            for (int j = 0; j < kEach; ++j) sum[1][i][j] = fma(x.of[i], tw.of[j], sum[1][i][j]);
          }
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int part = 0; part < (kDual ? 2 : 1); ++part) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        memory.sums.of[part][down * kEach + i][across * kEach + j] = sum[part][i][j];
      }
    }
  }
  __syncthreads();
  finish<T, kSide, kTileThreads, kDual>(call, place, memory.sums);
}

constexpr int kTensorThreads = 128, kTensorSide = 64, kTensorDepth = 32;

template <class T, bool kDual>
union TensorMemory {
  // [stage][operand][line][k]; eight numbers more than a step, so that the rows of an 8x8 matrix
  // lie in different banks
  struct alignas(16) Line {
    T of[kTensorDepth + 8];
  } lines[2][kDual ? 4 : 2][kTensorSide];
  Sums<float, kTensorSide, kDual> sums;
};

template <class T, bool kDual>
__global__ void __launch_bounds__(kTensorThreads, 1) tensor(Call<T> call) {
  using Memory = TensorMemory<T, kDual>;
  constexpr int kEach = kPack<T>, kOperands = kDual ? 4 : 2;
  constexpr int kPacks = kTensorSide * kTensorDepth / kEach / kTensorThreads;
  auto& memory = dev::shared<Memory>();
  const Place<kTensorSide> place(call.rows, call.cols);
  const int thread = threadIdx.x, lane = thread % dev::kWarp, warp = thread / dev::kWarp;
  const int top = warp / 2 * 32, left = warp % 2 * 32;  // of the warp's 32 x 32 results
  const Operand<T>* const operands[4] = {&call.x, &call.w, &call.tx, &call.tw};

  const auto bring = [&](std::int64_t k0, int stage) {
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      const Operand<T>& a = *operands[o];
      if (!a.data) continue;
      const std::int64_t first = o % 2 ? place.col : place.row;
      auto& lines = memory.lines[stage][o];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int i = p * kTensorThreads + thread;
        if (a.along_depth) {
          const int line = i / (kTensorDepth / kEach), k = i % (kTensorDepth / kEach) * kEach;
          if (a.packs) {
            bool valid;
            const T* from = a.at(place.batch, first + line, k0 + k, &valid);
            dev::cp_async16(&lines[line].of[k], from, valid);
          } else {
            dev::store16_shared(&lines[line].of[k], a.gather(place.batch, first + line, k0 + k));
          }
        } else {
          const int line = i % (kTensorSide / kEach) * kEach, k = i / (kTensorSide / kEach);
          const uint4 raw = a.gather(place.batch, first + line, k0 + k);
          const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
          for (int j = 0; j < kEach; ++j) {
            lines[line + j].of[k] = T{static_cast<std::uint16_t>(words[j / 2] >> (j % 2 * 16))};
          }
        }
      }
    }
    dev::cp_async_commit();
  };

  float sum[kDual ? 2 : 1][2][4][4] = {};  // 2 x 4 mma tiles
  // Fragments of 16 lines of x, and of 32 lines of w, for 16 k.
  const auto x_fragment = [&](int stage, int o, int tile, int k, std::uint32_t (&a)[4]) {
    const int line = top + tile * 16 + lane / 8 % 2 * 8 + lane % 8;
    dev::ldmatrix_x4(a, &memory.lines[stage][o][line].of[k + lane / 16 * 8]);
  };
  const auto w_fragments = [&](int stage, int o, int k, std::uint32_t (&b)[4][2]) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      std::uint32_t r[4];
      const int line = left + pair * 16 + lane / 16 * 8 + lane % 8;
      dev::ldmatrix_x4(r, &memory.lines[stage][o][line].of[k + lane / 8 % 2 * 8]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        b[pair * 2 + half][0] = r[half * 2];
        b[pair * 2 + half][1] = r[half * 2 + 1];
      }
    }
  };
  const auto multiply = [&](int stage) {
#pragma unroll
    for (int k = 0; k < kTensorDepth; k += 16) {
      std::uint32_t w[4][2], tw[4][2];
      w_fragments(stage, 1, k, w);
      if constexpr (kDual) {
        if (call.tw.data) w_fragments(stage, 3, k, tw);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        std::uint32_t x[4];
        x_fragment(stage, 0, i, k, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) dev::mma_16816<T>(sum[0][i][j], x, w[j]);
        if constexpr (kDual) {
          if (call.tw.data) {
#pragma unroll
            for (int j = 0; j < 4; ++j) dev::mma_16816<T>(sum[1][i][j], x, tw[j]);
          }
          if (call.tx.data) {
            x_fragment(stage, 2, i, k, x);
#pragma unroll
            for (int j = 0; j < 4; ++j) dev::mma_16816<T>(sum[1][i][j], x, w[j]);
          }
        }
      }
    }
  };

  const std::int64_t depth = call.x.depth;
  int stage = 0;
  if (depth > 0) bring(0, stage);
#pragma unroll 1
  for (std::int64_t k0 = 0; k0 < depth; k0 += kTensorDepth) {
    if (k0 + kTensorDepth < depth) {
      bring(k0 + kTensorDepth, 1 - stage);
      dev::cp_async_wait<1>();
    } else {
      dev::cp_async_wait<0>();
    }
    __syncthreads();
    multiply(stage);
    __syncthreads();
    stage = 1 - stage;
  }
#pragma unroll
  for (int part = 0; part < (kDual ? 2 : 1); ++part) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = top + i * 16 + c / 2 * 8 + lane / 4;
          memory.sums.of[part][row][left + j * 8 + lane % 4 * 2 + c % 2] = sum[part][i][j][c];
        }
      }
    }
  }
  __syncthreads();
  finish<T, kTensorSide, kTensorThreads, kDual>(call, place, memory.sums);
}

}  // namespace jops::JOPS_ISA::linear
