// The softmax family on a device. The formulas are the rows of math/softmax.h; here is how rows
// meet threads:
//   team     a row in the registers of 8 or 32 threads of a warp, which shuffle;
//   block    a row in the registers of a block;
//   staged   a row in the shared memory of a block;
//   sweep    a row of any length, read twice by a block: sums online, then the results in reverse
//            order, so that what was read last is still in the cache;
//   columns  rows along another dimension: a thread has a column, neighbours are adjacent in
//            memory, and kLines threads share a column's sums. Staged in shared memory, or read
//            twice.
// Sums are added in an order that follows from the shape alone. Inputs and results are each read
// and written once but where it says twice.
#pragma once

#include "../math/softmax.h"
#include "multipliers.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

namespace jops::JOPS_ISA::softmax {

template <class Row, class T>
struct Call {
  using A = Compute<T>;
  const T* in[Row::kIn];
  T* out[Row::kOut];
  std::int64_t outer, n, inner;
  A scale;
  bool packs;  // every row, or line across columns, starts and ends at sixteen bytes
  Dropout<A> dropout;

  __device__ __forceinline__ bool given(int k) const { return k != Row::kMayLack || in[k]; }
  // What stands past the end of a row: a logit whose exponential is 0.
  __device__ __forceinline__ A fill() const { return scale < 0 ? kInfinity<A> : -kInfinity<A>; }
  // Numbers of a row from j on, at most a pack.
  __device__ __forceinline__ int count_at(std::int64_t row, std::int64_t j) const {
    const std::int64_t left = row < outer ? n - j : 0;
    return left < 0 ? 0 : left < kPack<T> ? static_cast<int>(left) : kPack<T>;
  }
};

// The exponent of an element of in[0], and its exponential.
template <class Row, class A>
__device__ __forceinline__ A log_like(A x, A scale, A top) {
  return Row::kLogits ? scale * x - top : x;
}
template <class Row, class A>
__device__ __forceinline__ A exponential(A d) {
  return exp<Row::kLogits>(d);
}

// A part of a row in registers: kPacks packs of a thread, from pack `thread` on and `stride` packs
// from one to the next.
template <class Row, class T, bool kMasked, int kPacks, class Place = int>
struct Held {
  using A = Compute<T>;
  static constexpr int kEach = kPack<T>, kNumbers = kPacks * kEach;
  uint4 raw[kPacks][Row::kIn];
  A e[kNumbers];
  unsigned bits = 0;  // of the mask

  __device__ __forceinline__ void load(const Call<Row, T>& call, std::int64_t row, Place thread,
                                       int stride) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::int64_t j = static_cast<std::int64_t>(p * stride + thread) * kEach;
      const std::int64_t at = row * call.n + j;
      const bool there = row < call.outer && j < call.n;
#pragma unroll
      for (int k = 0; k < Row::kIn; ++k) {
        if (!call.given(k))
          raw[p][k] = make_uint4(0, 0, 0, 0);
        else if (there && call.packs)
          raw[p][k] = dev::load16(call.in[k] + at);
        else
          raw[p][k] = load_some(call.in[k] + at, call.count_at(row, j));
      }
    }
    draw(call, row, thread, stride);
  }
  __device__ __forceinline__ void draw(const Call<Row, T>& call, std::int64_t row, Place thread,
                                       int stride) {
    if constexpr (kMasked) {
      static_assert(kNumbers <= 32);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const std::int64_t j = static_cast<std::int64_t>(p * stride + thread) * kEach;
        if (row < call.outer && j < call.n && call.dropout.seeds) {
          const unsigned of_pack = kept<kEach>(call.dropout, row * call.n + j);
          bits |= (of_pack & ((1u << kEach) - 1)) << (p * kEach);
        }
      }
      if (!call.dropout.seeds) bits = ~0u;
    }
  }

  __device__ __forceinline__ A largest(const Call<Row, T>& call, Place thread, int stride) const {
    A top = -kInfinity<A>;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      A x[kEach];
      logits(call, p, thread, stride, x);
#pragma unroll
      for (int i = 0; i < kEach; ++i) top = max(top, call.scale * x[i]);
    }
    return top;
  }

  __device__ __forceinline__ void add(const Call<Row, T>& call, A top, Place thread, int stride,
                                      A (&sum)[Row::kSums]) {
#pragma unroll
    for (int k = 0; k < Row::kSums; ++k) sum[k] = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      A in[Row::kIn][kEach];
      logits(call, p, thread, stride, in[0]);
#pragma unroll
      for (int k = 1; k < Row::kIn; ++k) unpack<T>(raw[p][k], in[k]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        A one[Row::kIn];
#pragma unroll
        for (int k = 0; k < Row::kIn; ++k) one[k] = in[k][i];
        A& kept_e = e[p * kEach + i];
        kept_e = exponential<Row>(log_like<Row>(one[0], call.scale, top));
        Row::add(one, kept_e, factor(call, p, i), sum);
      }
    }
  }

  __device__ __forceinline__ void emit(const Call<Row, T>& call, std::int64_t row, A top,
                                       Place thread, int stride, const A (&sum)[Row::kSums]) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::int64_t j = static_cast<std::int64_t>(p * stride + thread) * kEach;
      const int count = call.count_at(row, j);
      if (count == 0) break;
      A in[Row::kIn][kEach], out[Row::kOut][kEach];
#pragma unroll
      for (int k = 0; k < Row::kIn; ++k) unpack<T>(raw[p][k], in[k]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        A one[Row::kIn], result[Row::kOut];
#pragma unroll
        for (int k = 0; k < Row::kIn; ++k) one[k] = in[k][i];
        Row::emit(one, log_like<Row>(one[0], call.scale, top), e[p * kEach + i], factor(call, p, i),
                  sum, call.scale, result);
#pragma unroll
        for (int k = 0; k < Row::kOut; ++k) out[k][i] = result[k];
      }
#pragma unroll
      for (int k = 0; k < Row::kOut; ++k) {
        T* to = call.out[k] + row * call.n + j;
        if (call.packs)
          dev::store16(to, pack<T>(out[k]));
        else
          store_some(to, out[k], count);
      }
    }
  }

 private:
  // in[0] of a pack; past the end of a row of logits what does not count.
  __device__ __forceinline__ void logits(const Call<Row, T>& call, int p, Place thread, int stride,
                                         A (&x)[kEach]) const {
    unpack<T>(raw[p][0], x);
    if constexpr (Row::kLogits) {
      const std::int64_t j = static_cast<std::int64_t>(p * stride + thread) * kEach;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (j + i >= call.n) x[i] = call.fill();
      }
    }
  }
  __device__ __forceinline__ A factor(const Call<Row, T>& call, int p, int i) const {
    return kMasked ? multiplier(call.dropout, bits, p * kEach + i) : A(1);
  }
};

constexpr int kTeamThreads = 128;
template <class Row, class T, bool kMasked, int kLanes, int kPacks>
__global__ void __launch_bounds__(kTeamThreads, 1) team(Call<Row, T> call) {
  using A = Compute<T>;
  constexpr int kRows = kTeamThreads / kLanes;  // of a block
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kLanes;
  const int thread = threadIdx.x % kLanes;
  Held<Row, T, kMasked, kPacks> held;
  held.load(call, row, thread, kLanes);
  A top = 0, sum[Row::kSums];
  if constexpr (Row::kLogits) {
    top = over_lanes<Larger, kLanes>(held.largest(call, thread, kLanes));
  }
  held.add(call, top, thread, kLanes, sum);
#pragma unroll
  for (int k = 0; k < Row::kSums; ++k) sum[k] = over_lanes<Sum, kLanes>(sum[k]);
  Row::finish(sum);
  held.emit(call, row, top, thread, kLanes, sum);
}

constexpr int kBlockThreads = dev::kWarp * kMostWarps;
template <class Row, class T, bool kMasked, int kPacks>
__global__ void __launch_bounds__(kBlockThreads, 1) block(Call<Row, T> call) {
  using A = Compute<T>;
  const std::int64_t row = blockIdx.x;
  const int thread = threadIdx.x, threads = blockDim.x;
  Held<Row, T, kMasked, kPacks> held;
  held.load(call, row, thread, threads);
  A top[1] = {}, sum[Row::kSums];
  if constexpr (Row::kLogits) {
    top[0] = held.largest(call, thread, threads);
    over_block<Larger>(top);
  }
  held.add(call, top[0], thread, threads, sum);
  over_block<Sum>(sum);
  Row::finish(sum);
  held.emit(call, row, top[0], thread, threads, sum);
}

// The exponential takes the input's place between sums and results, if it has its size: one
// exponential an element.
template <class Row, class T>
constexpr bool kKeepsExp = Row::kExpReplacesInput && std::is_same_v<T, Compute<T>>;

template <class Row, class T, bool kMasked>
__global__ void __launch_bounds__(kBlockThreads, 1) staged(Call<Row, T> call) {
  using A = Compute<T>;
  using Part = Held<Row, T, kMasked, 1>;
  constexpr int kEach = kPack<T>;
  const std::int64_t row = blockIdx.x;
  const int packs = static_cast<int>((call.n + kEach - 1) / kEach);
  auto* stage = dev::dynamic_shared<uint4>();
#pragma unroll
  for (int k = 0; k < Row::kIn; ++k) {
    if (!call.given(k)) continue;
#pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += kBlockThreads) {
      const std::int64_t j = static_cast<std::int64_t>(p) * kEach;
      const T* from = call.in[k] + row * call.n + j;
      uint4* to = &stage[k * packs + p];
      if (call.packs)
        dev::cp_async16(to, from);
      else
        dev::store16_shared(to, load_some(from, call.count_at(row, j)));
    }
    dev::cp_async_commit();
  }
  // A thread reads none but the packs that it copied: no barrier.
  const auto each_pack = [&](const auto& f) {
#pragma unroll 1
    for (int p = threadIdx.x; p < packs; p += kBlockThreads) f(p);
  };

  A top[1] = {};
  if constexpr (Row::kLogits) {
    dev::cp_async_wait<Row::kIn - 1>();  // the logits; the others may be on their way
    top[0] = -kInfinity<A>;
    each_pack([&](int p) {
      Part part;
      part.raw[0][0] = stage[p];
      top[0] = max(top[0], part.largest(call, p, 0));
    });
    over_block<Larger>(top);
  }
  dev::cp_async_wait<0>();
  const auto part_at = [&](int p) {
    Part part;
#pragma unroll
    for (int k = 0; k < Row::kIn; ++k) {
      part.raw[0][k] = call.given(k) ? stage[k * packs + p] : make_uint4(0, 0, 0, 0);
    }
    return part;
  };
  LongSum<A> total[Row::kSums];
  each_pack([&](int p) {
    Part part = part_at(p);
    if constexpr (Row::kMaskInSums) part.draw(call, row, p, 0);
    A more[Row::kSums];
    part.add(call, top[0], p, 0, more);
    if constexpr (kKeepsExp<Row, T>) dev::store16_shared(&stage[p], pack<T>(part.e));
#pragma unroll
    for (int k = 0; k < Row::kSums; ++k) total[k].add(more[k]);
  });
  A sum[Row::kSums];
#pragma unroll
  for (int k = 0; k < Row::kSums; ++k) sum[k] = total[k].sum;
  over_block<Sum>(sum);
  Row::finish(sum);
  each_pack([&](int p) {
    Part part = part_at(p);
    part.draw(call, row, p, 0);
    A more[Row::kSums];
    if constexpr (kKeepsExp<Row, T>)
      unpack<T>(part.raw[0][0], part.e);
    else
      part.add(call, top[0], p, 0, more);  // for the exponentials
    part.emit(call, row, top[0], p, 0, sum);
  });
}

// Sums relative to the largest logit so far, which may grow.
template <class Row, class A>
struct Online {
  A top = Row::kLogits ? -kInfinity<A> : A(0);
  LongSum<A> sum[Row::kSums];

  // What exponents are relative to: any finite number while there is nothing but -infinity.
  __device__ __forceinline__ A reference() const {
    return Row::kLogits && top == -kInfinity<A> ? A(0) : top;
  }
  __device__ __forceinline__ void raise(A larger) {
    if constexpr (Row::kLogits) {
      const A before = top;
      top = max(top, larger);
      const A factor = exp(before - reference());
#pragma unroll
      for (LongSum<A>& s : sum) s.scale(factor);
    }
  }
  __device__ __forceinline__ void add(const A (&more)[Row::kSums]) {
#pragma unroll
    for (int k = 0; k < Row::kSums; ++k) sum[k].add(more[k]);
  }
  __device__ __forceinline__ void take(A (&sums)[Row::kSums]) const {
#pragma unroll
    for (int k = 0; k < Row::kSums; ++k) sums[k] = sum[k].sum;
  }
};

template <class Row, class T, bool kMasked>
__global__ void __launch_bounds__(kBlockThreads, 1) sweep(Call<Row, T> call) {
  using A = Compute<T>;
  using Part = Held<Row, T, kMasked, 1, std::int64_t>;
  constexpr int kTurn = kPack<T> * kBlockThreads;  // numbers that a block takes at a time
  const std::int64_t row = blockIdx.x;
  const std::int64_t packs = (call.n + kTurn - 1) / kTurn * kBlockThreads;
  Online<Row, A> online;
#pragma unroll 1
  for (std::int64_t p = threadIdx.x; p < packs; p += kBlockThreads) {
    Part part;
    part.load(call, row, p, 0);
    if constexpr (Row::kLogits) online.raise(part.largest(call, p, 0));
    A more[Row::kSums];
    part.add(call, online.reference(), p, 0, more);
    online.add(more);
  }
  if constexpr (Row::kLogits) {
    A top[1] = {online.top};
    over_block<Larger>(top);
    online.raise(top[0]);
  }
  A sum[Row::kSums];
  online.take(sum);
  over_block<Sum>(sum);
  Row::finish(sum);
#pragma unroll 1
  for (std::int64_t p = packs - kBlockThreads + threadIdx.x; p >= 0; p -= kBlockThreads) {
    Part part;
    part.load(call, row, p, 0);
    A more[Row::kSums];
    part.add(call, online.top, p, 0, more);  // for the exponentials
    part.emit(call, row, online.top, p, 0, sum);
  }
}

// The outer x inner columns of (outer, n, inner): kWidth of them side by side, kLines threads each.
constexpr int kWidth = 32, kLines = 8, kDeep = 4;  // kDeep rows at a time, a thread

template <class Row, class A>
struct OfLines {
  A top[kLines][kWidth], sum[Row::kSums][kLines][kWidth];
};

template <class Row, class T>
struct Column {
  std::int64_t start;
  bool there;

  __device__ __forceinline__ Column(const Call<Row, T>& call, int lane) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kWidth + lane;
    const std::int64_t outer = column / call.inner;
    start = outer * call.n * call.inner + column % call.inner;
    there = outer < call.outer;
  }
};

// Copies the block's strip: kWidth numbers of each row of each input.
template <class Row, class T>
__device__ __forceinline__ void stage_strip(const Call<Row, T>& call, T* strip) {
  const int across = call.packs ? kWidth / kPack<T> : kWidth;
  const int thread = threadIdx.x, lane = thread % across * (kWidth / across);
  const int n = static_cast<int>(call.n);
  const Column<Row, T> column(call, lane);
  if (column.there) {
#pragma unroll
    for (int k = 0; k < Row::kIn; ++k) {
      if (!call.given(k)) continue;
#pragma unroll 4
      for (int row = thread / across; row < n; row += kWidth * kLines / across) {
        const T* from = call.in[k] + column.start + row * call.inner;
        T* to = &strip[(k * n + row) * kWidth + lane];
        if (call.packs)
          dev::cp_async16(to, from);
        else
          *to = *from;
      }
    }
  }
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  __syncthreads();
}

template <class Row, class T, bool kMasked, bool kStaged>
__global__ void __launch_bounds__(kWidth* kLines, 1) columns(Call<Row, T> call) {
  using A = Compute<T>;
  const int lane = threadIdx.x % kWidth, line = threadIdx.x / kWidth;
  const Column<Row, T> column(call, lane);
  const std::int64_t start = column.start;
  auto* strip = dev::dynamic_shared<T>();
  if constexpr (kStaged) stage_strip(call, strip);
  const auto input = [&](int k, std::int64_t row) -> A {
    if (!call.given(k)) return A(0);
    if constexpr (kStaged) return dev::widen(strip[(k * call.n + row) * kWidth + lane]);
    return dev::widen(call.in[k][start + row * call.inner]);
  };
  const auto factor_at = [&](std::int64_t at) -> A {
    if (!kMasked || !call.dropout.seeds) return A(1);
    return multiplier(call.dropout, kept<1>(call.dropout, at), 0);
  };

  Online<Row, A> online;
  if (column.there) {
    if constexpr (kStaged && Row::kLogits) {
      A larger = -kInfinity<A>;
#pragma unroll 4
      for (std::int64_t row = line; row < call.n; row += kLines) {
        larger = max(larger, call.scale * input(0, row));
      }
      online.raise(larger);
    }
#pragma unroll 1
    for (std::int64_t first = line; first < call.n; first += kLines * kDeep) {
      A in[kDeep][Row::kIn], larger = -kInfinity<A>;
#pragma unroll
      for (int r = 0; r < kDeep; ++r) {
        const std::int64_t row = first + r * kLines;
#pragma unroll
        for (int k = 0; k < Row::kIn; ++k) {
          in[r][k] = row < call.n ? input(k, row) : Row::kLogits && k == 0 ? call.fill() : A(0);
        }
        if constexpr (Row::kLogits) larger = max(larger, call.scale * in[r][0]);
      }
      if constexpr (!kStaged) online.raise(larger);
      A more[Row::kSums] = {};
#pragma unroll
      for (int r = 0; r < kDeep; ++r) {
        const std::int64_t row = first + r * kLines;
        const A m = Row::kMaskInSums && row < call.n ? factor_at(start + row * call.inner) : A(1);
        Row::add(in[r], exponential<Row>(log_like<Row>(in[r][0], call.scale, online.reference())),
                 m, more);
      }
      online.add(more);
    }
  }

  auto& lines = dev::shared<OfLines<Row, A>>();
  lines.top[line][lane] = online.top;
#pragma unroll
  for (int k = 0; k < Row::kSums; ++k) lines.sum[k][line][lane] = online.sum[k].sum;
  __syncthreads();
  if (!column.there) return;
  A sum[Row::kSums] = {};
#pragma unroll
  for (int i = 0; i < kLines; ++i) online.raise(lines.top[i][lane]);
#pragma unroll
  for (int i = 0; i < kLines; ++i) {
    const A factor = Row::kLogits ? exp(lines.top[i][lane] - online.reference()) : A(1);
#pragma unroll
    for (int k = 0; k < Row::kSums; ++k) sum[k] = fma(factor, lines.sum[k][i][lane], sum[k]);
  }
  Row::finish(sum);
#pragma unroll 2
  for (std::int64_t row = line; row < call.n; row += kLines) {
    const std::int64_t at = start + row * call.inner;
    A in[Row::kIn], out[Row::kOut];
#pragma unroll
    for (int k = 0; k < Row::kIn; ++k) in[k] = input(k, row);
    const A d = log_like<Row>(in[0], call.scale, online.top);
    Row::emit(in, d, exponential<Row>(d), factor_at(at), sum, call.scale, out);
#pragma unroll
    for (int k = 0; k < Row::kOut; ++k) call.out[k][at] = dev::narrow<T>(out[k]);
  }
}

}  // namespace jops::JOPS_ISA::softmax
