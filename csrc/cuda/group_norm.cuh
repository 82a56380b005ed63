// group_norm and batch_norm on a device: the statistics from one visit (math/group_norm.h), which a
// glimpse at the mean precedes, and the outputs from another. A block takes a group, or 32 of them
// where they stand side by side, and its warps take pieces in turn. Where there are few groups,
// several blocks share one: a launch that measures leaves the sums of every part of a group in
// memory, and a second one adds them up.
#pragma once

#include "../groups.h"
#include "../math/group_norm.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace jops::JOPS_ISA::group_norm {

constexpr int kMaxIn = 4, kMaxOut = 2, kThreads = 256, kWarps = kThreads / dev::kWarp;
constexpr std::int64_t kPiece = 1024;

enum class Phase { kBoth, kMeasure, kPut };

template <class T>
struct Call {
  using A = Compute<T>;
  Walk walk;
  const T* in[kMaxIn];
  const T* of_channel[kNormColumns];
  T* out[kMaxOut];
  A* stats;     // of every channel: mean, then variance; null where nobody asks
  A* measured;  // sums of the parts of groups, and s: [group][part][1 + kSums][lanes]
  A* partial;   // sums over channels: [kind][rows][channel]
  std::int64_t rows;
  int parts;
  A eps;
  Phase phase;
  bool fixed, packs;  // packs: every run starts and ends at sixteen bytes
};

template <class A>
struct OfLanes {
  A of[kWarps][dev::kWarp];
};

template <class Row, class T>
struct Block {
  using A = Compute<T>;
  using Norm = GroupNorm<Row, A>;
  static constexpr int kEach = kPack<T>, kSums = Norm::kSums;
  static constexpr int kKinds = Row::kColumnSums > 0 ? Row::kColumnSums : 1;

  const Call<T>& call;
  const std::int64_t group;
  const int part, lane, warp;
  Norm norm;

  __device__ __forceinline__ explicit Block(const Call<T>& call)
      : call(call),
        group(static_cast<std::int64_t>(blockIdx.x) / call.parts),
        part(static_cast<int>(blockIdx.x) % call.parts),
        lane(threadIdx.x % dev::kWarp),
        warp(threadIdx.x / dev::kWarp) {}

  // Where lanes are groups of their own, a thread has one element of a piece.
  __device__ __forceinline__ bool lanes() const { return call.walk.lanes; }
  __device__ __forceinline__ std::int64_t channel_of(const Piece& piece) const {
    return lanes() ? piece.channel + (lane < piece.length ? lane : 0) : piece.channel;
  }

  // visit(j, count, in) for this thread's elements j to j + count of a piece.
  template <class Visit>
  __device__ __forceinline__ void packs(const Piece& piece, const Visit& visit) const {
    const int each = lanes() ? 1 : kEach;
#pragma unroll 1
    for (std::int64_t j = lane * each; j < piece.length; j += dev::kWarp * each) {
      const std::int64_t left = piece.length - j;
      const int count = left < each ? static_cast<int>(left) : each;
      uint4 raw[Row::kIn];
#pragma unroll
      for (int k = 0; k < Row::kIn; ++k) {
        const T* from = call.in[k];
        raw[k] = from == nullptr ? make_uint4(0, 0, 0, 0)
                 : call.packs    ? dev::load16(from + piece.at + j)
                                 : load_some(from + piece.at + j, count);
      }
      A in[Row::kIn][kEach];
#pragma unroll
      for (int k = 0; k < Row::kIn; ++k) unpack<T>(raw[k], in[k]);
      visit(j, count, in);
    }
  }
  // f(i, in, q) for the elements of a pack.
  template <class F>
  static __device__ __forceinline__ void elements(const A (&in)[Row::kIn][kEach], const A* c,
                                                  int count, const F& f) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i >= count) continue;
      A one[Row::kIn], q[Row::kQuantities > 0 ? Row::kQuantities : 1];
#pragma unroll
      for (int k = 0; k < Row::kIn; ++k) one[k] = in[k][i];
      Row::quantities(one, c, q);
      f(i, one, q);
    }
  }
  __device__ __forceinline__ void numbers_of(std::int64_t channel, A (&c)[kNormColumns]) const {
#pragma unroll
    for (int k = 0; k < kNormColumns; ++k) {
      const T* from = call.of_channel[k];
      c[k] = from != nullptr ? dev::widen(from[channel]) : A(k == kWeight ? 1 : 0);
    }
  }

  // Of all threads that have elements of the group.
  template <int kCount>
  __device__ __forceinline__ void over_group(A (&a)[kCount]) const {
    if (!lanes()) return over_block<Sum>(a);
    auto& warps = dev::shared<OfLanes<A>>();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      warps.of[warp][lane] = a[k];
      __syncthreads();
      a[k] = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) a[k] += warps.of[w][lane];
      __syncthreads();
    }
  }
  // Whether this thread writes what over_group has left.
  __device__ __forceinline__ bool writes(const Piece& piece) const {
    return lanes() ? warp == 0 && lane < piece.length : threadIdx.x == 0;
  }

  __device__ __forceinline__ A pilot() const {
    A sum[2] = {};
#pragma unroll 1
    for (int index = warp; index < call.walk.glimpses(); index += kWarps) {
      packs(call.walk.glimpse(group, index),
            [&](std::int64_t, int count, const A(&in)[Row::kIn][kEach]) {
#pragma unroll
              for (int i = 0; i < kEach; ++i) sum[0] += i < count ? in[0][i] : A(0);
              sum[1] += static_cast<A>(count);
            });
    }
    over_group(sum);
    return sum[1] > 0 ? sum[0] / sum[1] : A(0);
  }

  __device__ __forceinline__ void add_up(std::int64_t first, std::int64_t last, A s,
                                         A (&sums)[kSums]) const {
    LongSum<A> total[kSums];
#pragma unroll 1
    for (std::int64_t unit = first + warp; unit < last; unit += kWarps) {
      const Piece piece = call.walk(group, unit);
      A c[kNormColumns], some[kSums] = {};
      numbers_of(channel_of(piece), c);
      packs(piece, [&](std::int64_t, int count, const A(&in)[Row::kIn][kEach]) {
        elements(in, c, count,
                 [&](int, const A* one, const A* q) { Norm::add(one[0] - s, q, some); });
      });
#pragma unroll
      for (int k = 0; k < kSums; ++k) total[k].add(some[k]);
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = total[k].sum;
    over_group(sums);
  }

  __device__ __forceinline__ A& measured(int part, int k) const {
    const int width = lanes() ? dev::kWarp : 1, at = lanes() ? lane : 0;
    return call.measured[((group * call.parts + part) * (1 + kSums) + k) * width + at];
  }

  __device__ __forceinline__ void run() {
    const std::int64_t units = call.walk.units();
    const std::int64_t first = units * part / call.parts, last = units * (part + 1) / call.parts;
    const Piece piece = call.walk(group, 0);
    const std::int64_t channel = channel_of(piece);
    if (call.fixed) {
      norm.take(call.stats[channel], call.stats[call.walk.channels + channel], call.eps);
    } else {
      A s = 0, sums[kSums] = {};
      if (call.phase == Phase::kPut) {
        s = measured(0, kSums);
#pragma unroll 1
        for (int p = 0; p < call.parts; ++p) {
#pragma unroll
          for (int k = 0; k < kSums; ++k) sums[k] += measured(p, k);
        }
      } else {
        s = pilot();
        add_up(first, last, s, sums);
      }
      if (call.phase == Phase::kMeasure) {
        if (lanes() ? warp > 0 : threadIdx.x > 0) return;
#pragma unroll
        for (int k = 0; k < kSums; ++k) measured(part, k) = sums[k];
        measured(part, kSums) = s;
        return;
      }
      const A count = static_cast<A>(call.walk.count());
      norm.measure(sums, s, count, call.eps);
      if (std::is_same_v<Row, NormRow> && call.stats != nullptr && part == 0 && writes(piece)) {
        call.stats[channel] = norm.mean[0];
        call.stats[call.walk.channels + channel] =
            norm.variance * (count / (count > 1 ? count - 1 : 1));
      }
    }
    put(first, last);
  }

  __device__ __forceinline__ void put(std::int64_t first, std::int64_t last) {
    LongSum<A> total[kKinds];
    const bool by_piece = call.walk.run_channel != 0;
#pragma unroll 1
    for (std::int64_t unit = first + warp; unit < last; unit += kWarps) {
      const Piece piece = call.walk(group, unit);
      A c[kNormColumns], some[kKinds] = {};
      numbers_of(channel_of(piece), c);
      packs(piece, [&](std::int64_t j, int count, const A(&in)[Row::kIn][kEach]) {
        A out[Row::kOut][kEach];
        elements(in, c, count, [&](int i, const A* one, const A* q) {
          norm.go_to(one[0], q);
          A result[Row::kOut], terms[kKinds];
          Row::emit(one, c, norm.at, result, terms);
#pragma unroll
          for (int k = 0; k < Row::kOut; ++k) out[k][i] = result[k];
#pragma unroll
          for (int k = 0; k < Row::kColumnSums; ++k) some[k] += terms[k];
        });
#pragma unroll
        for (int k = 0; k < Row::kOut; ++k) {
          T* to = call.out[k] + piece.at + j;
          if (call.packs)
            dev::store16(to, pack<T>(out[k]));
          else
            store_some(to, out[k], count);
        }
      });
      if constexpr (Row::kColumnSums > 0) {
#pragma unroll
        for (int k = 0; k < Row::kColumnSums; ++k) {
          if (by_piece) {
            some[k] = over_lanes<Sum, dev::kWarp>(some[k]);
            const std::int64_t row =
                call.walk.sample(group) * call.walk.pieces + unit % call.walk.pieces;
            if (lane == 0)
              call.partial[(k * call.rows + row) * call.walk.channels + piece.channel] = some[k];
          } else {
            total[k].add(some[k]);
          }
        }
      }
    }
    if (Row::kColumnSums > 0 && !by_piece) {
      A sums[kKinds];
#pragma unroll
      for (int k = 0; k < kKinds; ++k) sums[k] = total[k].sum;
      over_group(sums);
      const Piece piece = call.walk(group, 0);
      if (!writes(piece)) return;
#pragma unroll
      for (int k = 0; k < kKinds; ++k) {
        call.partial[(k * call.rows + part) * call.walk.channels + channel_of(piece)] = sums[k];
      }
    }
  }
};

template <class Row, class T>
__global__ void __launch_bounds__(kThreads, 2) normalize(Call<T> call) {
  Block<Row, T>(call).run();
}

}  // namespace jops::JOPS_ISA::group_norm
