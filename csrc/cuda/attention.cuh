// Attention and its products on a device. The formulas are in math/attention.h.
//
// A block owns a tile of rows of one head: queries, or keys for the cotangents of k and v. It takes
// the others tile by tile. The scores of its rows with a tile of the others are a product over the
// width of a head, in steps through shared memory; they stay in registers, where they become
// weights; those go to shared memory and are multiplied with the others' rows into the results, in
// registers too. So heads may be of any width: a block makes as many columns of the results as a
// tile is wide, and where there are more, further blocks make them of the same scores.
//   forward   o and lse, with a running maximum; kDual: with their tangents
//   queries   the cotangent of q; kDual: and its tangent
//   keys      those of k and v, summed over the heads that share them
// The weights are made again from lse in the last two, which need delta too. The tiles' products
// are those of tensor cores for 16-bit types, whose weights are rounded to such a type, and of
// plain multiply-adds for others.
#pragma once

#include "../math/attention.h"
#include "multipliers.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

namespace jops::JOPS_ISA::attention {

// Heads as kernels take them.
template <class N>
struct Tensor {
  N* data = nullptr;  // null: absent
  std::int64_t rows = 0, width = 0;
  std::int64_t batch_stride = 0, head_stride = 0, row_stride = 0, col_stride = 0;
  bool packs = false;  // rows can be read and written in whole packs

  Tensor() = default;
  explicit Tensor(const Heads& t) {
    if (!t.given()) return;
    constexpr int kEach = kPack<std::remove_const_t<N>>;
    data = static_cast<N*>(t.data);
    rows = t.rows;
    width = t.width;
    batch_stride = t.batch == 1 ? 0 : t.batch_stride;
    head_stride = t.heads == 1 ? 0 : t.head_stride;
    row_stride = t.rows == 1 ? 0 : t.row_stride;
    col_stride = t.col_stride;
    packs = packs_at(data) && col_stride == 1 && width % kEach == 0 && row_stride % kEach == 0 &&
            head_stride % kEach == 0 && batch_stride % kEach == 0;
  }

  __device__ __forceinline__ N* at(std::int64_t batch, std::int64_t head, std::int64_t row,
                                   std::int64_t col) const {
    return data + batch * batch_stride + head * head_stride + row * row_stride + col * col_stride;
  }
};

// The pack at a column of a row; zeros where there is none.
template <class T>
__device__ __forceinline__ uint4 pack_of(const Tensor<const T>& from, const T* row,
                                         std::int64_t col) {
  if (row == nullptr || col >= from.width) return make_uint4(0, 0, 0, 0);
  if (from.packs) return dev::load16(row + col);
  Compute<T> numbers[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    numbers[i] =
        col + i < from.width ? dev::widen(row[(col + i) * from.col_stride]) : Compute<T>(0);
  }
  return pack<T>(numbers);
}

// Pairs are a tensor and its tangent.
template <class T>
struct Call {
  using A = Compute<T>;
  Tensor<const T> q[2], k[2], v[2], bias[2], go[2];
  Tensor<const std::uint8_t> keep;
  Tensor<T> o[2], gq[2], gk[2], gv[2];
  A *lse, *mu, *delta, *tdelta;  // a number for each query
  std::int64_t batch, heads, group, queries, keys;
  std::int64_t tiles, chunks;  // of a head: blocks along the rows and along the columns
  A scale;
  bool causal;
  Dropout<A> dropout;

  __device__ __forceinline__ std::int64_t number(std::int64_t b, std::int64_t head,
                                                 std::int64_t query) const {
    return (b * heads + head) * queries + query;
  }
};

// A block's rows, and the first column of its results.
struct Place {
  std::int64_t batch, head, row, col;

  template <class T>
  __device__ __forceinline__ Place(const Call<T>& call, std::int64_t heads, int side) {
    std::int64_t block = blockIdx.x;
    col = block % call.chunks * side;
    block /= call.chunks;
    row = block % call.tiles * side;
    block /= call.tiles;
    head = block % heads;
    batch = block / heads;
  }
};

// Where a tile of scores begins. The compiler takes it for new numbers each time: it would compute
// all that it can before the first tile, and need more registers for that than there are.
struct Corner {
  std::int64_t batch, head, shared_head, query, key;  // shared_head: of k and v

  __device__ __forceinline__ Corner(std::int64_t batch_of, std::int64_t head_of,
                                    std::int64_t shared_head_of, std::int64_t query_of,
                                    std::int64_t key_of)
      : batch(renewed(batch_of)),
        head(renewed(head_of)),
        shared_head(renewed(shared_head_of)),
        query(renewed(query_of)),
        key(renewed(key_of)) {}

  static __device__ __forceinline__ std::int64_t renewed(std::int64_t v) {
    auto low = static_cast<std::uint32_t>(v), high = static_cast<std::uint32_t>(v >> 32);
    dev::opaque(low);
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(high) << 32 | low);
  }
};

// A tile's rows of a tensor and of its tangent.
template <class T>
struct Strip {
  const Tensor<const T> (&of)[2];
  std::int64_t batch, head, row;

  __device__ __forceinline__ bool has(int part) const { return of[part].data != nullptr; }
  __device__ __forceinline__ const T* at(int part, int line) const {
    const Tensor<const T>& tensor = of[part];
    return row + line < tensor.rows ? tensor.at(batch, head, row + line, 0) : nullptr;
  }
};

// How the threads of a block multiply tiles: 16 x 16 threads with a square of results each.
template <class T>
struct Fma {
  static constexpr int kThreads = 256, kEach = kPack<T>, kSide = 16 * kEach, kDepth = 16;
  static constexpr int kDown = kEach, kAcross = kEach;  // results of a thread
  static constexpr int kRowLanes = 16, kRowWarps = 1;   // of a warp, and warps, that share a row

  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 16 * kEach + i; }
  static __device__ __forceinline__ int col(int j) { return threadIdx.x % 16 * kEach + j; }

  struct Tile {
    T of[kDown][kAcross] = {};
    __device__ __forceinline__ T& operator()(int i, int j) { return of[i][j]; }
  };

  // Numbers that are read at once. Operands are [depth][line], a group more than a line against
  // bank conflicts.
  struct alignas(16) Group {
    T of[kEach];
  };
  struct Lines {
    Group of[kDepth][16 + 1];
  };
  using Others = Lines;
  struct Weights {
    Group of[kSide][16 + 1];
  };

  static __device__ __forceinline__ void put_line(Lines& to, int line, int k, uint4 raw) {
    T numbers[kEach];
    unpack<T>(raw, numbers);
#pragma unroll
    for (int i = 0; i < kEach; ++i) to.of[k + i][line / kEach].of[line % kEach] = numbers[i];
  }
  static __device__ __forceinline__ void put_other(Others& to, int row, int col, uint4 raw) {
    dev::store16_shared(&to.of[row][col / kEach], raw);
  }
  static __device__ __forceinline__ void put(Weights& to, const Tile& from) {
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      Group group;
#pragma unroll
      for (int i = 0; i < kDown; ++i) group.of[i] = from.of[i][j];
      to.of[col(j)][threadIdx.x / 16] = group;
    }
  }

  // c += x y, over kDepth of both from `first` of x on
  template <class X>
  static __device__ __forceinline__ void multiply(Tile& c, const X& x, int first, const Lines& y) {
#pragma unroll 1  // what is read ahead has no registers beside eight tiles
    for (int k = 0; k < kDepth; ++k) {
      const Group a = x.of[first + k][threadIdx.x / 16], b = y.of[k][threadIdx.x % 16];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) c.of[i][j] = fma(a.of[i], b.of[j], c.of[i][j]);
      }
    }
  }
  static __device__ __forceinline__ void multiply_lines(Tile& c, const Lines& x, const Lines& y) {
    multiply(c, x, 0, y);
  }
  static __device__ __forceinline__ void multiply_others(Tile& c, const Weights& x, int first,
                                                         const Others& y) {
    multiply(c, x, first, y);
  }
};

// Of 16-bit types: eight warps, each with 16 rows and half of the columns.
template <class T>
struct Mma {
  static constexpr int kThreads = 256, kEach = kPack<T>, kSide = 64, kDepth = 32;
  static constexpr int kTiles = 4;  // of 16 x 8 results, side by side in a warp
  static constexpr int kDown = 2, kAcross = 2 * kTiles;
  static constexpr int kRowLanes = 4, kRowWarps = 2;

  static __device__ __forceinline__ int lane() { return threadIdx.x % dev::kWarp; }
  static __device__ __forceinline__ int top() { return threadIdx.x / dev::kWarp % 4 * 16; }
  static __device__ __forceinline__ int left() {
    return static_cast<int>(threadIdx.x) / dev::kWarp / 4 * kTiles * 8;
  }
  static __device__ __forceinline__ int row(int i) { return top() + i * 8 + lane() / 4; }
  static __device__ __forceinline__ int col(int j) {
    return left() + j / 2 * 8 + lane() % 4 * 2 + j % 2;
  }

  struct Tile {
    float of[kTiles][4] = {};
    __device__ __forceinline__ float& operator()(int i, int j) { return of[j / 2][i * 2 + j % 2]; }
  };

  // Eight numbers more than a line, so that the rows of an 8x8 matrix lie in different banks.
  struct alignas(16) Lines {
    T of[kSide][kDepth + 8];
  };
  struct alignas(16) Others {
    T of[kDepth][kSide + 8];
  };
  struct alignas(4) Two {
    T of[2];
  };
  struct alignas(16) Weights {
    Two of[kSide][kSide / 2 + 4];
  };

  static __device__ __forceinline__ void put_line(Lines& to, int line, int k, uint4 raw) {
    dev::store16_shared(&to.of[line][k], raw);
  }
  static __device__ __forceinline__ void put_other(Others& to, int row, int col, uint4 raw) {
    dev::store16_shared(&to.of[row][col], raw);
  }
  static __device__ __forceinline__ void put(Weights& to, const Tile& from) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        to.of[row(i)][col(2 * t) / 2] = {
            {dev::narrow<T>(from.of[t][2 * i]), dev::narrow<T>(from.of[t][2 * i + 1])}};
      }
    }
  }

  static __device__ __forceinline__ void multiply_lines(Tile& c, const Lines& x, const Lines& y) {
#pragma unroll 1  // what is read ahead has no registers beside eight tiles
    for (int k = 0; k < kDepth; k += 16) {
      std::uint32_t a[4];
      dev::ldmatrix_x4(a, &x.of[top() + lane() % 16][k + lane() / 16 * 8]);
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        std::uint32_t b[4];
        const int line = left() + t * 8 + lane() / 16 * 8 + lane() % 8;
        dev::ldmatrix_x4(b, &y.of[line][k + lane() / 8 % 2 * 8]);
        dev::mma_16816<T>(c.of[t], a, {b[0], b[1]});
        dev::mma_16816<T>(c.of[t + 1], a, {b[2], b[3]});
      }
    }
  }
  static __device__ __forceinline__ void multiply_others(Tile& c, const Weights& x, int first,
                                                         const Others& y) {
#pragma unroll 1  // what is read ahead has no registers beside eight tiles
    for (int k = 0; k < kDepth; k += 16) {
      std::uint32_t a[4];
      dev::ldmatrix_x4(a, &x.of[top() + lane() % 16][(first + k) / 2 + lane() / 16 * 4]);
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        std::uint32_t b[4];
        const int col = left() + t * 8 + lane() / 16 * 8;
        dev::ldmatrix_x4_trans(b, &y.of[k + lane() % 16][col]);
        dev::mma_16816<T>(c.of[t], a, {b[0], b[1]});
        dev::mma_16816<T>(c.of[t + 1], a, {b[2], b[3]});
      }
    }
  }
};

template <class T>
using Shape = std::conditional_t<sizeof(T) == 2, Mma<T>, Fma<T>>;

// Bits that say what dropout keeps of a tile's weights: [query][key].
template <int kSide>
struct Kept {
  std::uint16_t of[kSide][kSide / 16];
};

// A number of each row from both warps that share it.
template <class A, int kSide>
struct Halves {
  A of[2][kSide];
};

// What a block does with a tile: its products and what is between them.
template <class T, bool kDual>
struct Block {
  using A = Compute<T>;
  using Of = Shape<T>;
  using Tile = typename Of::Tile;
  static constexpr int kSide = Of::kSide, kDepth = Of::kDepth, kEach = Of::kEach;
  static constexpr int kParts = kDual ? 2 : 1;
  static constexpr int kPacks = kSide * kDepth / kEach / Of::kThreads;
  using Tiles = Tile[kParts];  // and its tangent

  union Memory {
    typename Of::Lines lines[2 * kParts];
    struct {
      typename Of::Weights weights[kParts];
      typename Of::Others others[kParts];
    };
    A results[kSide][kSide + 4];
  };

  const Call<T>& call;
  Memory& memory = dev::shared<Memory>();
  Kept<kSide>& kept_bits = dev::shared<Kept<kSide>>();

  // Where a thread's packs are is found anew for each product: a pointer for each would be kept in
  // registers otherwise.
  static __device__ __forceinline__ int thread() {
    std::uint32_t index = threadIdx.x;
    dev::opaque(index);
    return static_cast<int>(index);
  }

  // c += x y^T; its tangent: += tx y^T + x ty^T
  __device__ __forceinline__ void multiply_lines(const Strip<T>& x, const Strip<T>& y, Tiles& c) {
    uint4 next[2 * kParts][kPacks];
    const int me = thread();
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int o = 0; o < 2 * kParts; ++o) {
        if (!(o % 2 ? y : x).has(o / 2)) continue;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          const int i = p * Of::kThreads + me;
          f(o, p, i / (kDepth / kEach), i % (kDepth / kEach) * kEach);
        }
      }
    };
    const T* rows[2 * kParts][kPacks];
    each([&](int o, int p, int line, int) { rows[o][p] = (o % 2 ? y : x).at(o / 2, line); });
    const auto fetch = [&](std::int64_t k0) {
      each([&](int o, int p, int, int k) {
        next[o][p] = pack_of((o % 2 ? y : x).of[o / 2], rows[o][p], k0 + k);
      });
    };
    const std::int64_t width = x.of[0].width;
    fetch(0);
#pragma unroll 1
    for (std::int64_t k0 = 0; k0 < width; k0 += kDepth) {
      each([&](int o, int p, int line, int k) {
        Of::put_line(memory.lines[o], line, k, next[o][p]);
      });
      __syncthreads();
      if (k0 + kDepth < width) fetch(k0 + kDepth);
      Of::multiply_lines(c[0], memory.lines[0], memory.lines[1]);
      if constexpr (kDual) {
        if (x.has(1)) Of::multiply_lines(c[1], memory.lines[2], memory.lines[1]);
        if (y.has(1)) Of::multiply_lines(c[1], memory.lines[0], memory.lines[3]);
      }
      __syncthreads();
    }
  }

  // sum += weights y, of kSide columns from `col` on; its tangent: += tweights y + weights ty. y is
  // absent where its width is 0.
  __device__ __forceinline__ void multiply_others(const Tiles& weights, const Strip<T>& y,
                                                  std::int64_t col, Tiles& sum) {
    uint4 next[kParts][kPacks];
    const int me = thread();
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!y.has(part)) continue;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          const int i = p * Of::kThreads + me;
          f(part, p, i / (kSide / kEach), i % (kSide / kEach) * kEach);
        }
      }
    };
    const auto fetch = [&](int first) {
      each([&](int part, int p, int row, int c) {
        next[part][p] = pack_of(y.of[part], y.at(part, first + row), col + c);
      });
    };
#pragma unroll
    for (int part = 0; part < kParts; ++part) Of::put(memory.weights[part], weights[part]);
    const int rows = left(y.of[0].rows, y.row);
    fetch(0);
#pragma unroll 1
    for (int first = 0; first < rows; first += kDepth) {
      each([&](int part, int p, int row, int c) {
        Of::put_other(memory.others[part], row, c, next[part][p]);
      });
      __syncthreads();
      if (first + kDepth < rows) fetch(first + kDepth);
      if (y.has(0)) Of::multiply_others(sum[0], memory.weights[0], first, memory.others[0]);
      if constexpr (kDual) {
        if (y.has(0)) Of::multiply_others(sum[1], memory.weights[1], first, memory.others[0]);
        if (y.has(1)) Of::multiply_others(sum[1], memory.weights[0], first, memory.others[1]);
      }
      __syncthreads();
    }
  }

  // What is left of a tensor from `first` on, a tile at most.
  static __device__ __forceinline__ int left(std::int64_t all, std::int64_t first) {
    return static_cast<int>(min_size(all - first, kSide));
  }

  // One number from those that a row's threads have, for each of a thread's rows.
  template <class Op>
  __device__ __forceinline__ void over_row(A (&a)[Of::kDown]) {
#pragma unroll
    for (int i = 0; i < Of::kDown; ++i) a[i] = over_lanes<Op, Of::kRowLanes>(a[i]);
    if constexpr (Of::kRowWarps > 1) {
      auto& halves = dev::shared<Halves<A, kSide>>();
#pragma unroll
      for (int i = 0; i < Of::kDown; ++i) {
        if (threadIdx.x % Of::kRowLanes == 0) halves.of[Of::col(0) >= kSide / 2][Of::row(i)] = a[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Of::kDown; ++i) {
        a[i] = Op::join(halves.of[0][Of::row(i)], halves.of[1][Of::row(i)]);
      }
      __syncthreads();
    }
  }

  // Finds out what dropout keeps of a tile.
  __device__ __forceinline__ void draw(const Corner& at) {
    if (!call.dropout.seeds) return;
    const int queries = left(call.queries, at.query), keys = left(call.keys, at.key);
    const std::int64_t first = call.number(at.batch, at.head, at.query) * call.keys + at.key;
#pragma unroll 1
    for (int i = threadIdx.x; i < kSide * kSide / 16; i += Of::kThreads) {
      const int query = i / (kSide / 16), key = i % (kSide / 16) * 16;
      unsigned bits = 0;
      if (query < queries && key < keys) {
        bits = kept<16>(call.dropout, first + query * call.keys + key);
      }
      kept_bits.of[query][key / 16] = static_cast<std::uint16_t>(bits);
    }
    __syncthreads();
  }
  __device__ __forceinline__ A multiplier_at(int query, int key) const {
    if (!call.dropout.seeds) return A(1);
    return multiplier(call.dropout, kept_bits.of[query][key / 16], key % 16);
  }

  // Brings what is added to a tile's scores, [query][key]: -infinity where `keep` is false.
  __device__ __forceinline__ void bring(const Corner& at, const Tensor<const T>& bias,
                                        const Tensor<const std::uint8_t>& keep) {
    const int queries = left(call.queries, at.query), keys = left(call.keys, at.key);
#pragma unroll 1
    for (int i = threadIdx.x; i < kSide * kSide; i += Of::kThreads) {
      const int query = i / kSide, key = i % kSide;
      A added = 0;
      if (query < queries && key < keys) {
        const auto of = [&](const auto& tensor) {
          return *tensor.at(at.batch, at.head, at.query + query, at.key + key);
        };
        if (bias.data) added = dev::widen(of(bias));
        if (keep.data && of(keep) == 0) added = -kInfinity<A>;
      }
      memory.results[query][key] = added;
    }
    __syncthreads();
  }

  // From products to scores and their tangents. kQueriesDown: rows are queries and columns keys.
  template <bool kQueriesDown>
  __device__ __forceinline__ void score(const Corner& at, Tiles& c) {
    const int queries = left(call.queries, at.query), keys = left(call.keys, at.key);
    const int ahead = call.causal ? left(at.query, at.key) : kSide;  // of its query, a key at most
    const bool masked = call.bias[0].data || call.keep.data;
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int i = 0; i < Of::kDown; ++i) {
#pragma unroll
        for (int j = 0; j < Of::kAcross; ++j) {
          f(i, j, kQueriesDown ? Of::row(i) : Of::col(j), kQueriesDown ? Of::col(j) : Of::row(i));
        }
      }
    };
    if (masked) bring(at, call.bias[0], call.keep);
    each([&](int i, int j, int query, int key) {
      const A added = masked ? memory.results[query][key] : A(0);
      const bool visible = query < queries && key < keys && key - query <= ahead;
      c[0](i, j) =
          visible && added != -kInfinity<A> ? fma(call.scale, c[0](i, j), added) : -kInfinity<A>;
    });
    if (masked) __syncthreads();
    if constexpr (kDual) {
      const bool moved = call.bias[1].data != nullptr;
      if (moved) bring(at, call.bias[1], {});
      each([&](int i, int j, int query, int key) {
        const A added = moved ? memory.results[query][key] : A(0);
        c[1](i, j) = score_tangent(c[0](i, j), fma(call.scale, c[1](i, j), added));
      });
      if (moved) __syncthreads();
    }
  }

  // Writes factor * sum.
  __device__ __forceinline__ void write(const Tensor<T>& to, const Place& place, A factor,
                                        Tile& sum) {
    if (!to.data) return;
#pragma unroll
    for (int i = 0; i < Of::kDown; ++i) {
#pragma unroll
      for (int j = 0; j < Of::kAcross; ++j) {
        memory.results[Of::row(i)][Of::col(j)] = factor * sum(i, j);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kSide * kSide / kEach; i += Of::kThreads) {
      const int row = i / (kSide / kEach), col = i % (kSide / kEach) * kEach;
      const std::int64_t count = to.width - place.col - col;
      if (place.row + row >= to.rows || count <= 0) continue;
      A numbers[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) numbers[j] = memory.results[row][col + j];
      T* p = to.at(place.batch, place.head, place.row + row, place.col + col);
      if (to.packs) {
        dev::store16(p, pack<T>(numbers));
      } else {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (j < count) p[j * to.col_stride] = dev::narrow<T>(numbers[j]);
        }
      }
    }
    __syncthreads();
  }
};

template <class T, bool kDual>
__global__ void __launch_bounds__(Shape<T>::kThreads, 1)
    forward(const __grid_constant__ Call<T> call) {
  using A = Compute<T>;
  using Of = Shape<T>;
  constexpr int kSide = Of::kSide, kDown = Of::kDown, kAcross = Of::kAcross;
  Block<T, kDual> block{call};
  const Place place(call, call.heads, kSide);
  const std::int64_t shared_head = place.head / call.group;

  typename Block<T, kDual>::Tiles o;
  A most[kDown], sum[kDown], tsum[kDown];  // of a row: the maximum, sums of e^s and of e^s ts
#pragma unroll
  for (int i = 0; i < kDown; ++i) most[i] = -kInfinity<A>, sum[i] = tsum[i] = 0;

  const std::int64_t end = call.causal ? min_size(call.keys, place.row + kSide) : call.keys;
#pragma unroll 1
  for (std::int64_t key0 = 0; key0 < end; key0 += kSide) {
    typename Block<T, kDual>::Tiles weights;
    const Corner at(place.batch, place.head, shared_head, place.row, key0);
    block.draw(at);
    block.multiply_lines({call.q, at.batch, at.head, at.query},
                         {call.k, at.batch, at.shared_head, at.key}, weights);
    block.template score<true>(at, weights);
    A larger[kDown];
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      larger[i] = most[i];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) larger[i] = max(larger[i], weights[0](i, j));
    }
    block.template over_row<Larger>(larger);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const A shift = attention_shift(larger[i]), factor = attention_weight(most[i], shift);
      most[i] = larger[i];
      sum[i] *= factor;
      tsum[i] *= factor;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const A m = block.multiplier_at(Of::row(i), Of::col(j));
        const A p = attention_weight(weights[0](i, j), shift);
        sum[i] += p;
        weights[0](i, j) = m * p;
        o[0](i, j) *= factor;
        if constexpr (kDual) {
          const A tp = p * weights[1](i, j);
          tsum[i] += tp;
          weights[1](i, j) = m * tp;
          o[1](i, j) *= factor;
        }
      }
    }
    block.multiply_others(weights, {call.v, at.batch, at.shared_head, at.key}, place.col, o);
  }

  block.template over_row<Sum>(sum);
  if constexpr (kDual) block.template over_row<Sum>(tsum);
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
    const A inverse = sum[i] == A(0) ? A(0) : A(1) / sum[i], mu = tsum[i] * inverse;
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      o[0](i, j) *= inverse;
      if constexpr (kDual) o[1](i, j) = fma(-mu, o[0](i, j), o[1](i, j) * inverse);
    }
    const std::int64_t query = place.row + Of::row(i);
    if (Of::col(0) == 0 && place.col == 0 && query < call.queries) {
      const std::int64_t n = call.number(place.batch, place.head, query);
      call.lse[n] = sum[i] == A(0) ? kInfinity<A> : most[i] + log(sum[i]);
      if constexpr (kDual) call.mu[n] = mu;
    }
  }
  block.write(call.o[0], place, A(1), o[0]);
  if constexpr (kDual) block.write(call.o[1], place, A(1), o[1]);
}

// delta and, with tangents, tdelta: a warp for each query.
constexpr int kDeltaThreads = 128;
template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    delta(const __grid_constant__ Call<T> call, Tensor<const T> o, Tensor<const T> to) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>;
  const std::int64_t n = (static_cast<std::int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x) / 32;
  if (n >= call.batch * call.heads * call.queries) return;
  const std::int64_t query = n % call.queries, head = n / call.queries % call.heads;
  const std::int64_t batch = n / call.queries / call.heads;
  A sum = 0, tsum = 0;
#pragma unroll 1
  for (std::int64_t col = threadIdx.x % 32 * kEach; col < o.width; col += 32 * kEach) {
    const auto read = [&](const Tensor<const T>& from, A(&numbers)[kEach]) {
      unpack<T>(pack_of(from, from.at(batch, head, query, 0), col), numbers);
    };
    const auto add_products = [&](const A(&a)[kEach], const A(&b)[kEach], A& to_sum) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) to_sum = fma(a[i], b[i], to_sum);
    };
    A of[kEach], go[kEach], tangent[kEach];
    read(o, of);
    read(call.go[0], go);
    add_products(go, of, sum);
    if (to.data) {
      read(to, tangent);
      add_products(go, tangent, tsum);
    }
    if (call.go[1].data) {
      read(call.go[1], tangent);
      add_products(tangent, of, tsum);
    }
  }
  sum = over_lanes<Sum, 32>(sum);
  tsum = over_lanes<Sum, 32>(tsum);
  if (threadIdx.x % 32 == 0) {
    call.delta[n] = sum;
    if (call.tdelta) call.tdelta[n] = tsum;
  }
}

// What the products know of a query: lse is +inf past the last one, so that its weights are zero.
template <class A, bool kDual>
struct Query {
  A lse, delta, mu = 0, tdelta = 0;

  template <class T>
  __device__ __forceinline__ Query(const Call<T>& call, std::int64_t first, int query,
                                   int queries) {
    const bool there = query < queries;
    const std::int64_t n = first + (there ? query : 0);
    lse = there ? call.lse[n] : kInfinity<A>;
    delta = call.delta[n];
    if constexpr (kDual) mu = call.mu[n], tdelta = call.tdelta[n];
  }
};

// The weights of a tile, and the cotangents of its scores if they are wanted, each with a tangent.
template <bool kQueriesDown, class T, bool kDual>
__device__ __forceinline__ void cotangents(Block<T, kDual>& block, const Corner& at, bool wanted,
                                           typename Block<T, kDual>::Tiles& weights,
                                           typename Block<T, kDual>::Tiles& scores) {
  using A = Compute<T>;
  using Of = Shape<T>;
  const Call<T>& call = block.call;
  const auto multiply = [&](const auto& of_queries, const auto& of_keys, auto& c) {
    const Strip<T> queries{of_queries, at.batch, at.head, at.query};
    const Strip<T> keys{of_keys, at.batch, at.shared_head, at.key};
    if constexpr (kQueriesDown)
      block.multiply_lines(queries, keys, c);
    else
      block.multiply_lines(keys, queries, c);
  };
  block.draw(at);
  multiply(call.q, call.k, weights);
  block.template score<kQueriesDown>(at, weights);
  if (wanted) multiply(call.go, call.v, scores);
  const std::int64_t first = call.number(at.batch, at.head, at.query);
  const int queries = Block<T, kDual>::left(call.queries, at.query);
  constexpr int kOuter = kQueriesDown ? Of::kDown : Of::kAcross;
  constexpr int kInner = kQueriesDown ? Of::kAcross : Of::kDown;
#pragma unroll
  for (int n = 0; n < kOuter; ++n) {
    // A query at a time: those of all would not fit into registers beside the tiles.
    const Query<A, kDual> of(call, first, kQueriesDown ? Of::row(n) : Of::col(n), queries);
#pragma unroll
    for (int k = 0; k < kInner; ++k) {
      const int i = kQueriesDown ? n : k, j = kQueriesDown ? k : n;
      const A m = kQueriesDown ? block.multiplier_at(Of::row(i), Of::col(j))
                               : block.multiplier_at(Of::col(j), Of::row(i));
      const A p = attention_weight(weights[0](i, j), of.lse), dp = m * scores[0](i, j);
      weights[0](i, j) = m * p;
      scores[0](i, j) = score_cotangent(p, dp, of.delta);
      if constexpr (kDual) {
        const A tp = weight_tangent(p, weights[1](i, j), of.mu), tdp = m * scores[1](i, j);
        weights[1](i, j) = m * tp;
        scores[1](i, j) = score_cotangent_tangent(p, tp, dp, tdp, of.delta, of.tdelta);
      }
    }
  }
}

template <class T, bool kDual>
__global__ void __launch_bounds__(Shape<T>::kThreads, 1)
    queries(const __grid_constant__ Call<T> call) {
  using Of = Shape<T>;
  constexpr int kSide = Of::kSide;
  Block<T, kDual> block{call};
  const Place place(call, call.heads, kSide);
  const std::int64_t shared_head = place.head / call.group;
  typename Block<T, kDual>::Tiles gq;
  const std::int64_t end = call.causal ? min_size(call.keys, place.row + kSide) : call.keys;
#pragma unroll 1
  for (std::int64_t key0 = 0; key0 < end; key0 += kSide) {
    typename Block<T, kDual>::Tiles weights, scores;
    const Corner at(place.batch, place.head, shared_head, place.row, key0);
    cotangents<true>(block, at, true, weights, scores);
    block.multiply_others(scores, {call.k, at.batch, at.shared_head, at.key}, place.col, gq);
  }
  block.write(call.gq[0], place, call.scale, gq[0]);
  if constexpr (kDual) block.write(call.gq[1], place, call.scale, gq[1]);
}

template <class T, bool kDual>
__global__ void __launch_bounds__(Shape<T>::kThreads, 1)
    keys(const __grid_constant__ Call<T> call) {
  using Of = Shape<T>;
  constexpr int kSide = Of::kSide;
  Block<T, kDual> block{call};
  const Place place(call, call.heads / call.group, kSide);
  const auto wanted = [&](const Tensor<T>(&to)[2]) {
    return (to[0].data && place.col < to[0].width) || (to[1].data && place.col < to[1].width);
  };
  const bool to_k = wanted(call.gk), to_v = wanted(call.gv);
  typename Block<T, kDual>::Tiles gk, gv;
#pragma unroll 1
  for (std::int64_t h = 0; h < call.group; ++h) {
    const std::int64_t head = place.head * call.group + h;
#pragma unroll 1
    for (std::int64_t query0 = call.causal ? place.row : 0; query0 < call.queries;
         query0 += kSide) {
      typename Block<T, kDual>::Tiles weights, scores;
      const Corner at(place.batch, head, place.head, query0, place.row);
      cotangents<false>(block, at, to_k, weights, scores);
      if (to_v)
        block.multiply_others(weights, {call.go, at.batch, at.head, at.query}, place.col, gv);
      if (to_k) block.multiply_others(scores, {call.q, at.batch, at.head, at.query}, place.col, gk);
    }
  }
  block.write(call.gk[0], place, call.scale, gk[0]);
  block.write(call.gv[0], place, Compute<T>(1), gv[0]);
  if constexpr (kDual) {
    block.write(call.gk[1], place, call.scale, gk[1]);
    block.write(call.gv[1], place, Compute<T>(1), gv[1]);
  }
}

}  // namespace jops::JOPS_ISA::attention
