// y = residual + m f(x w^T + bias) on a device, its tangent and its cotangents: products and what
// is around them in one kernel, for the problems in which launches cost more than the arithmetic.
//
// A block makes a square of results. Both operands come through shared memory in steps of the inner
// dimension, of any strides: packs run along the inner dimension or along the lines, whichever is
// adjacent in memory, and are gathered number by number where neither is or memory is not aligned.
//   tiles    float and double: 16 x 16 threads with a square of sums each; the next step is on its
//            way in registers while this one is multiplied
//   tensor   16-bit types: four warps with mma tiles; the next step is copied asynchronously
// The tangent shares the operands: w and x are read once for all products. Sums then pass through
// shared memory, so that bias, activation, mask and stores work on whole packs of a row.
//
// The cotangents of x and of w are squares of one grid. gz = m f'(s) gy is made on its way into the
// product, and the blocks at the first columns of w's add up its lines: the cotangent of the bias.
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

  __device__ __forceinline__ bool inside(std::int64_t line, std::int64_t k) const {
    return line < lines && k < depth;
  }
  __device__ __forceinline__ std::int64_t at(std::int64_t batch, std::int64_t line,
                                             std::int64_t k) const {
    return batch * batch_stride + line * line_stride + k * depth_stride;
  }
  // The pack at (line, k) of this operand, or of one in `from` with its strides; zeros outside.
  __device__ __forceinline__ uint4 gather(const T* from, std::int64_t batch, std::int64_t line,
                                          std::int64_t k) const {
    const bool there = inside(line, k);
    const T* p = from + (there ? at(batch, line, k) : 0);
    if (there && packs) return dev::load16(p);
    const std::int64_t left = along_depth ? depth - k : lines - line;
    const std::int64_t step = along_depth ? depth_stride : line_stride;
    Compute<T> numbers[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      numbers[i] = there && i < left ? dev::widen(p[i * step]) : Compute<T>(0);
    }
    return pack<T>(numbers);
  }
  __device__ __forceinline__ uint4 gather(std::int64_t batch, std::int64_t line,
                                          std::int64_t k) const {
    return gather(data, batch, line, k);
  }
};

// Rows of a tensor, each of them adjacent numbers.
template <class N>
struct Lines {
  N* data = nullptr;  // null: absent
  std::int64_t batch_stride = 0, row_stride = 0, cols = 0;
  bool packs = false;  // can be read and written whole

  Lines() = default;
  explicit Lines(const Matrix& m)
      : batch_stride(m.batch_stride), row_stride(m.row_stride), cols(m.cols) {
    constexpr int kEach = kPack<std::remove_const_t<N>>;
    if (!m.given()) return;
    data = static_cast<N*>(m.data);
    packs = packs_at(data) && cols % kEach == 0 && row_stride % kEach == 0 &&
            (m.batch == 1 || batch_stride % kEach == 0);
  }

  __device__ __forceinline__ N* at(std::int64_t batch, std::int64_t row, std::int64_t col) const {
    return data + batch * batch_stride + row * row_stride + col;
  }
  __device__ __forceinline__ int count(std::int64_t col) const {
    return static_cast<int>(min_size(cols - col, kPack<std::remove_const_t<N>>));
  }
};

template <class T>
__device__ __forceinline__ void write(const Lines<T>& to, std::int64_t batch, std::int64_t row,
                                      std::int64_t col, const Compute<T> (&numbers)[kPack<T>]) {
  if (!to.data) return;
  if (to.packs)
    dev::store16(to.at(batch, row, col), pack<T>(numbers));
  else
    store_some(to.at(batch, row, col), numbers, to.count(col));
}

// Adds the numbers of a pack.
template <class T>
__device__ __forceinline__ void add(const Lines<const T>& from, std::int64_t batch,
                                    std::int64_t row, std::int64_t col,
                                    Compute<T> (&numbers)[kPack<T>]) {
  if (!from.data) return;
  const T* at = from.at(batch, row, col);
  Compute<T> more[kPack<T>];
  unpack<T>(from.packs ? dev::load16(at) : load_some(at, from.count(col)), more);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) numbers[i] += more[i];
}

template <class T>
struct Call {
  Operand<T> x, w, tx, tw;
  Lines<const T> bias, tbias;  // the same for all rows
  Lines<const T> residual, tresidual;
  Lines<T> y, ty, z;
  std::int64_t rows, cols;
  activation::Function<T> f;
  Dropout<Compute<T>> dropout;
};

// Where a block's square of results is.
template <int kSide>
struct Place {
  std::int64_t batch, row, col;

  __device__ __forceinline__ Place(std::int64_t tile, std::int64_t rows, std::int64_t cols) {
    const std::int64_t across = (cols + kSide - 1) / kSide, down = (rows + kSide - 1) / kSide;
    col = tile % across * kSide;
    row = tile / across % down * kSide;
    batch = tile / across / down;
  }
};

// How a block of one of the two kernels is made, and the place of a pack of an operand in a step.
template <class T, int kThreadsOf, int kSideOf, int kDepthOf>
struct Shape {
  static constexpr int kThreads = kThreadsOf, kSide = kSideOf, kDepth = kDepthOf;
  static constexpr int kEach = kPack<T>, kPacks = kSide * kDepth / kEach / kThreads;
  static constexpr int kSlots = kThreads / (kSide / kEach);  // threads that share lines, at most
  static_assert(kSide * kDepth % (kEach * kThreads) == 0 && kDepth / kEach <= kSlots);

  static __device__ __forceinline__ int line(bool along_depth, int p) {
    const int i = p * kThreads + threadIdx.x;
    return along_depth ? i / (kDepth / kEach) : i % (kSide / kEach) * kEach;
  }
  static __device__ __forceinline__ int k(bool along_depth, int p) {
    const int i = p * kThreads + threadIdx.x;
    return along_depth ? i % (kDepth / kEach) * kEach : i / (kSide / kEach);
  }
};

template <class A, int kSide, bool kDual>
struct Sums {
  A of[kDual ? 2 : 1][kSide][kSide + 4];
};

// The numbers of one part's pack i of a square.
template <int kEach, class A, int kSide, bool kDual>
__device__ __forceinline__ void read(const Sums<A, kSide, kDual>& sums, int part, int i,
                                     A (&numbers)[kEach]) {
  constexpr int kAcross = kSide / kEach;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    numbers[j] = sums.of[part][i / kAcross][i % kAcross * kEach + j];
  }
}

// From sums to results.
template <class T, class Of, bool kDual>
__device__ __forceinline__ void finish(const Call<T>& call, const Place<Of::kSide>& place,
                                       const Sums<Compute<T>, Of::kSide, kDual>& sums) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>, kAcross = Of::kSide / kEach;
#pragma unroll 1
  for (int i = threadIdx.x; i < Of::kSide * kAcross; i += Of::kThreads) {
    const std::int64_t row = place.row + i / kAcross, col = place.col + i % kAcross * kEach;
    if (row >= call.rows || col >= call.cols) continue;
    A z[kDual ? 2 : 1][kEach], y[kDual ? 2 : 1][kEach];
    read(sums, 0, i, z[0]);
    add(call.bias, place.batch, row, col, z[0]);
    if constexpr (kDual) {
      read(sums, 1, i, z[1]);
      add(call.tbias, place.batch, row, col, z[1]);
    }
    write(call.z, place.batch, row, col, z[0]);
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
    add(call.residual, place.batch, row, col, y[0]);
    write(call.y, place.batch, row, col, y[0]);
    if constexpr (kDual) {
      add(call.tresidual, place.batch, row, col, y[1]);
      write(call.ty, place.batch, row, col, y[1]);
    }
  }
}

// Where the numbers of the first operand of a product come from: memory, ...
template <class T, class Of>
struct Plain {
  uint4 raw[Of::kPacks];

  __device__ __forceinline__ void fetch(const Operand<T>& x, std::int64_t batch, std::int64_t line,
                                        std::int64_t k, int p) {
    raw[p] = x.gather(batch, line, k);
  }
  __device__ __forceinline__ void numbers(bool, int p, Compute<T> (&to)[kPack<T>]) {
    unpack<T>(raw[p], to);
  }
  template <class Slots>
  __device__ __forceinline__ void finish(bool, Slots&) {}
};

// What makes gz of gy.
template <class T>
struct Prologue {
  const T* s;  // null: f is the identity
  activation::Function<T> f;
  Dropout<Compute<T>> dropout;
};

// ... or gz = m f'(s) gy, made of gy and s, which are contiguous unless nothing is to be done.
template <class T, class Of>
struct Cotangent {
  using A = Compute<T>;
  static constexpr int kEach = kPack<T>;
  const Prologue<T>& prologue;
  T* sums;    // of lines; null: not wanted
  int lines;  // of them
  uint4 raw[Of::kPacks], s[Of::kPacks];
  std::int64_t place[Of::kPacks];  // of the pack in gy, or -1
  LongSum<A> sum[kEach] = {};  // of a line of each pack, or of the lines that all packs lie along

  __device__ __forceinline__ Cotangent(const Prologue<T>& prologue_of, T* sums_to,
                                       std::int64_t lines_left)
      : prologue(prologue_of),
        sums(sums_to),
        lines(static_cast<int>(min_size(lines_left, Of::kSide))) {}

  __device__ __forceinline__ void fetch(const Operand<T>& gy, std::int64_t batch, std::int64_t line,
                                        std::int64_t k, int p) {
    raw[p] = gy.gather(batch, line, k);
    if (prologue.s) s[p] = gy.gather(prologue.s, batch, line, k);
    place[p] = gy.inside(line, k) ? gy.at(batch, line, k) : -1;
  }
  __device__ __forceinline__ void numbers(bool along_depth, int p, A (&to)[kEach]) {
    A in[2][kEach], out[1][kEach];
    unpack<T>(raw[p], in[1]);
    if (prologue.s) {
      unpack<T>(s[p], in[0]);
      prologue.f.template apply<Vjp<1>>(in, out);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[i] = prologue.s ? out[0][i] : in[1][i];
    if (prologue.dropout.seeds && place[p] >= 0) {
      const unsigned bits = kept<kEach>(prologue.dropout, place[p]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) to[i] *= multiplier(prologue.dropout, bits, i);
    }
    if (!sums) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (along_depth)  // not an index that is computed: the sums are in registers
        sum[p % kEach].add(to[i]);
      else
        sum[i].add(to[i]);
    }
  }
  // Adds up what threads have of the same lines.
  __device__ __forceinline__ void finish(bool along_depth, A (&slots)[Of::kSlots][Of::kSide]) {
    if (!sums) return;
    if (along_depth) {
#pragma unroll
      for (int p = 0; p < Of::kPacks; ++p) {
        slots[Of::k(true, p) / kEach][Of::line(true, p)] = sum[p].sum;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) slots[Of::k(false, 0)][Of::line(false, 0) + i] = sum[i].sum;
    }
    __syncthreads();
    const int line = threadIdx.x;
    if (line < lines) {
      A total = 0;
      for (int i = 0; i < (along_depth ? Of::kDepth / kEach : Of::kSlots); ++i) {
        total += slots[i][line];
      }
      sums[line] = dev::narrow<T>(total);
    }
    __syncthreads();
  }
};

// Numbers of shared memory that are read at once.
template <class A>
struct alignas(16) Group {
  A of[16 / sizeof(A)];
};

template <class T>
using TileShape = Shape<T, 256, 16 * kPack<T>, 16>;

template <class T, bool kDual>
union TileMemory {
  using A = Compute<T>;
  using Of = TileShape<T>;
  // [k][line], a group more than a line of the square against bank conflicts
  Group<A> lines[kDual ? 4 : 2][Of::kDepth][16 + 1];
  A slots[Of::kSlots][Of::kSide];
  Sums<A, Of::kSide, kDual> sums;
};

// The sums of a square: x w^T, and tx w^T + x tw^T.
template <class T, bool kDual, class Source>
__device__ __forceinline__ void tile_sums(const Operand<T>* const (&operands)[kDual ? 4 : 2],
                                          const Place<TileShape<T>::kSide>& place, Source& source,
                                          TileMemory<T, kDual>& memory) {
  using A = Compute<T>;
  using Of = TileShape<T>;
  constexpr int kEach = Of::kEach, kOperands = kDual ? 4 : 2;
  static_assert(Of::kPacks == 1);
  const int across = threadIdx.x % 16, down = threadIdx.x / 16;

  uint4 next[kOperands];
  const auto fetch = [&](std::int64_t k0) {
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      const Operand<T>& a = *operands[o];
      if (!a.data) continue;
      const std::int64_t line = (o % 2 ? place.col : place.row) + Of::line(a.along_depth, 0);
      const std::int64_t k = k0 + Of::k(a.along_depth, 0);
      if (o == 0)
        source.fetch(a, place.batch, line, k, 0);
      else
        next[o] = a.gather(place.batch, line, k);
    }
  };

  A sum[kDual ? 2 : 1][kEach][kEach] = {};
  const std::int64_t depth = operands[0]->depth;
  fetch(0);
#pragma unroll 1
  for (std::int64_t k0 = 0; k0 < depth; k0 += Of::kDepth) {
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      const bool along = operands[o]->along_depth;
      if (!operands[o]->data) continue;
      A numbers[kEach];
      if (o == 0)
        source.numbers(along, 0, numbers);
      else
        unpack<T>(next[o], numbers);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int line = Of::line(along, 0) + (along ? 0 : i),
                  k = Of::k(along, 0) + (along ? i : 0);
        memory.lines[o][k][line / kEach].of[line % kEach] = numbers[i];
      }
    }
    __syncthreads();
    if (k0 + Of::kDepth < depth) fetch(k0 + Of::kDepth);
#pragma unroll
    for (int k = 0; k < Of::kDepth; ++k) {
      const Group<A> x = memory.lines[0][k][down], w = memory.lines[1][k][across];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[0][i][j] = fma(x.of[i], w.of[j], sum[0][i][j]);
      }
      if constexpr (kDual) {
        if (operands[2]->data) {
          const Group<A> tx = memory.lines[2][k][down];
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
#pragma unroll
            for (int j = 0; j < kEach; ++j) sum[1][i][j] = fma(tx.of[i], w.of[j], sum[1][i][j]);
          }
        }
        if (operands[3]->data) {
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
  source.finish(operands[0]->along_depth, memory.slots);
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
}

template <class T>
using TensorShape = Shape<T, 128, 64, 32>;

template <class T, bool kDual>
union TensorMemory {
  using Of = TensorShape<T>;
  // [stage][operand][line][k]; eight numbers more than a step, so that the rows of an 8x8 matrix
  // lie in different banks
  struct alignas(16) Line {
    T of[Of::kDepth + 8];
  } lines[2][kDual ? 4 : 2][Of::kSide];
  float slots[Of::kSlots][Of::kSide];
  Sums<float, Of::kSide, kDual> sums;
};

// The sums of a square. kAsync: nothing is to be done with the numbers of the first operand, which
// come by asynchronous copies as those of the others do.
template <class T, bool kDual, bool kAsync, class Source>
__device__ __forceinline__ void tensor_sums(const Operand<T>* const (&operands)[kDual ? 4 : 2],
                                            const Place<TensorShape<T>::kSide>& place,
                                            Source& source, TensorMemory<T, kDual>& memory) {
  using Of = TensorShape<T>;
  constexpr int kEach = Of::kEach, kOperands = kDual ? 4 : 2;
  const int lane = threadIdx.x % dev::kWarp, warp = threadIdx.x / dev::kWarp;
  const int top = warp / 2 * 32, left = warp % 2 * 32;  // of the warp's 32 x 32 results

  const auto put = [&](uint4 raw, int stage, int o, bool along_depth, int p) {
    auto& lines = memory.lines[stage][o];
    const int line = Of::line(along_depth, p), k = Of::k(along_depth, p);
    if (along_depth) return dev::store16_shared(&lines[line].of[k], raw);
    const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      lines[line + j].of[k] = T{static_cast<std::uint16_t>(words[j / 2] >> (j % 2 * 16))};
    }
  };
  const auto bring = [&](std::int64_t k0, int stage) {
#pragma unroll
    for (int o = kAsync ? 0 : 1; o < kOperands; ++o) {
      const Operand<T>& a = *operands[o];
      if (!a.data) continue;
#pragma unroll
      for (int p = 0; p < Of::kPacks; ++p) {
        const int place_line = Of::line(a.along_depth, p), place_k = Of::k(a.along_depth, p);
        const std::int64_t line = (o % 2 ? place.col : place.row) + place_line, k = k0 + place_k;
        if (a.along_depth && a.packs) {
          const bool valid = a.inside(line, k);
          const T* from = a.data + (valid ? a.at(place.batch, line, k) : 0);
          dev::cp_async16(&memory.lines[stage][o][place_line].of[place_k], from, valid);
        } else {
          put(a.gather(place.batch, line, k), stage, o, a.along_depth, p);
        }
      }
    }
    dev::cp_async_commit();
  };
  const bool along = operands[0]->along_depth;
  const auto fetch = [&](std::int64_t k0) {
#pragma unroll
    for (int p = 0; p < Of::kPacks; ++p) {
      source.fetch(*operands[0], place.batch, place.row + Of::line(along, p), k0 + Of::k(along, p),
                   p);
    }
  };
  const auto put_fetched = [&](int stage) {
#pragma unroll
    for (int p = 0; p < Of::kPacks; ++p) {
      float numbers[kEach];
      source.numbers(along, p, numbers);
      put(pack<T>(numbers), stage, 0, along, p);
    }
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
    for (int k = 0; k < Of::kDepth; k += 16) {
      std::uint32_t w[4][2], tw[4][2];
      w_fragments(stage, 1, k, w);
      if constexpr (kDual) {
        if (operands[3]->data) w_fragments(stage, 3, k, tw);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        std::uint32_t x[4];
        x_fragment(stage, 0, i, k, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) dev::mma_16816<T>(sum[0][i][j], x, w[j]);
        if constexpr (kDual) {
          if (operands[3]->data) {
#pragma unroll
            for (int j = 0; j < 4; ++j) dev::mma_16816<T>(sum[1][i][j], x, tw[j]);
          }
          if (operands[2]->data) {
            x_fragment(stage, 2, i, k, x);
#pragma unroll
            for (int j = 0; j < 4; ++j) dev::mma_16816<T>(sum[1][i][j], x, w[j]);
          }
        }
      }
    }
  };

  const std::int64_t depth = operands[0]->depth;
  int stage = 1;
  // The first turn only brings: one place in the code for what is done with the numbers.
#pragma unroll 1
  for (std::int64_t k0 = -Of::kDepth; k0 < depth; k0 += Of::kDepth) {
    const bool more = k0 + Of::kDepth < depth;
    if (more) {
      bring(k0 + Of::kDepth, 1 - stage);
      if constexpr (!kAsync) fetch(k0 + Of::kDepth);
    }
    if (k0 >= 0) {
      if (more)
        dev::cp_async_wait<1>();
      else
        dev::cp_async_wait<0>();
      __syncthreads();
      multiply(stage);
    }
    if constexpr (!kAsync) {
      if (more) put_fetched(1 - stage);
    }
    __syncthreads();
    stage = 1 - stage;
  }
  source.finish(along, memory.slots);
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
}

// The kernels: tiles for wide types, tensor for 16 bits.
template <class T, bool kDual>
__global__ void __launch_bounds__(TileShape<T>::kThreads, 1) tiles(Call<T> call) {
  using Of = TileShape<T>;
  auto& memory = dev::shared<TileMemory<T, kDual>>();
  const Place<Of::kSide> place(blockIdx.x, call.rows, call.cols);
  Plain<T, Of> source;
  if constexpr (kDual)
    tile_sums<T, true>({&call.x, &call.w, &call.tx, &call.tw}, place, source, memory);
  else
    tile_sums<T, false>({&call.x, &call.w}, place, source, memory);
  finish<T, Of>(call, place, memory.sums);
}

template <class T, bool kDual>
__global__ void __launch_bounds__(TensorShape<T>::kThreads, 1) tensor(Call<T> call) {
  using Of = TensorShape<T>;
  auto& memory = dev::shared<TensorMemory<T, kDual>>();
  const Place<Of::kSide> place(blockIdx.x, call.rows, call.cols);
  Plain<T, Of> source;
  if constexpr (kDual)
    tensor_sums<T, true, true>({&call.x, &call.w, &call.tx, &call.tw}, place, source, memory);
  else
    tensor_sums<T, false, true>({&call.x, &call.w}, place, source, memory);
  finish<T, Of>(call, place, memory.sums);
}

// One of the two products of a VJP: gz w, or gz^T x with the sums of gz over its depth.
template <class T>
struct VjpPart {
  Operand<T> gy, other;
  Lines<T> to;
  std::int64_t rows = 0, cols = 0, blocks = 0;
  T* sums = nullptr;  // (batch, rows); null: not wanted
};

template <class T>
struct VjpCall {
  VjpPart<T> x, w;  // the cotangents of
  Prologue<T> prologue;
};

template <class T, class Of, class Memory, class Multiply>
__device__ __forceinline__ void vjp_square(const VjpCall<T>& call, Memory& memory,
                                           const Multiply& multiply) {
  constexpr int kEach = kPack<T>, kAcross = Of::kSide / kEach;
  const bool to_x = blockIdx.x < call.x.blocks;
  const VjpPart<T>& part = to_x ? call.x : call.w;
  const Place<Of::kSide> place(blockIdx.x - (to_x ? 0 : call.x.blocks), part.rows, part.cols);
  T* sums = part.sums && place.col == 0 ? part.sums + place.batch * part.rows + place.row : nullptr;
  Cotangent<T, Of> source(call.prologue, sums, part.rows - place.row);
  multiply(part, place, source);
#pragma unroll 1
  for (int i = threadIdx.x; i < Of::kSide * kAcross; i += Of::kThreads) {
    const std::int64_t row = place.row + i / kAcross, col = place.col + i % kAcross * kEach;
    if (row >= part.rows || col >= part.cols) continue;
    Compute<T> numbers[kEach];
    read(memory.sums, 0, i, numbers);
    write(part.to, place.batch, row, col, numbers);
  }
}

template <class T>
__global__ void __launch_bounds__(TileShape<T>::kThreads, 1)
    tiles_vjp(const __grid_constant__ VjpCall<T> call) {
  auto& memory = dev::shared<TileMemory<T, false>>();
  vjp_square<T, TileShape<T>>(call, memory, [&](const auto& part, const auto& place, auto& source) {
    tile_sums<T, false>({&part.gy, &part.other}, place, source, memory);
  });
}

template <class T>
__global__ void __launch_bounds__(TensorShape<T>::kThreads, 1)
    tensor_vjp(const __grid_constant__ VjpCall<T> call) {
  auto& memory = dev::shared<TensorMemory<T, false>>();
  vjp_square<T, TensorShape<T>>(
      call, memory, [&](const auto& part, const auto& place, auto& source) {
        tensor_sums<T, false, false>({&part.gy, &part.other}, place, source, memory);
      });
}

}  // namespace jops::JOPS_ISA::linear
