// Rotary position embedding on a device: a thread has a pack of pairs, or of the elements after
// them. The formula is in math/rotary.h.
#pragma once

#include "../math/rotary.h"
#include "vectors.cuh"

namespace jops::JOPS_ISA::rotary {

constexpr int kThreads = 256;

struct Strides {
  std::int64_t of[3];

  __device__ __forceinline__ std::int64_t at(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return i * of[0] + j * of[1] + k * of[2];
  }
};

template <class T>
struct Call {
  const T *x, *cos, *sin;
  T* y;
  Strides x_strides, cos_strides, sin_strides, y_strides;
  std::int64_t sizes[3], n, half;
  bool interleaved, inverse;
  bool packs;  // every vector of theirs, and its parts, start and end at sixteen bytes

  __device__ __forceinline__ uint4 load(const T* from, int count) const {
    return packs ? dev::load16(from) : load_some(from, count);
  }
  __device__ __forceinline__ void store(T* to, const Compute<T> (&from)[kPack<T>],
                                        int count) const {
    if (packs)
      dev::store16(to, pack<T>(from));
    else
      store_some(to, from, count);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) rotate_all(Call<T> call) {
  using A = Compute<T>;
  constexpr int kEach = kPack<T>;
  const std::int64_t pairs = (call.half + kEach - 1) / kEach;
  const std::int64_t rest = call.n - 2 * call.half;
  const std::int64_t width = pairs + (rest + kEach - 1) / kEach;
  const std::int64_t turns = call.sizes[0] * call.sizes[1] * call.sizes[2] * width;
  std::int64_t turn = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; turn < turns; turn += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t point = turn / width, piece = turn - point * width;
    const std::int64_t line = point / call.sizes[2], k = point - line * call.sizes[2];
    const std::int64_t i = line / call.sizes[1], j = line - i * call.sizes[1];
    const T* x = call.x + call.x_strides.at(i, j, k);
    T* y = call.y + call.y_strides.at(i, j, k);
    if (piece >= pairs) {
      const std::int64_t at = (piece - pairs) * kEach;
      const int count = static_cast<int>(min_size(rest - at, kEach));
      A same[kEach];
      unpack<T>(call.load(x + 2 * call.half + at, count), same);
      call.store(y + 2 * call.half + at, same, count);
      continue;
    }
    const std::int64_t at = piece * kEach;
    const int count = static_cast<int>(min_size(call.half - at, kEach));
    // Elements [at, at + count) of both halves, or 2 count elements in a row.
    const int second = 2 * count - kEach;
    const std::int64_t to[2] = {call.interleaved ? 2 * at : at,
                                call.interleaved ? 2 * at + kEach : call.half + at};
    const int counts[2] = {call.interleaved && second < 0 ? 2 * count
                           : call.interleaved             ? kEach
                                                          : count,
                           call.interleaved ? (second < 0 ? 0 : second) : count};
    A in[2][kEach], out[2][kEach], c[kEach], s[kEach];
#pragma unroll
    for (int h = 0; h < 2; ++h) unpack<T>(call.load(x + to[h], counts[h]), in[h]);
    unpack<T>(call.load(call.cos + call.cos_strides.at(i, j, k) + at, count), c);
    unpack<T>(call.load(call.sin + call.sin_strides.at(i, j, k) + at, count), s);
    const A sign = call.inverse ? A(-1) : A(1);
    if (call.interleaved) {
#pragma unroll
      for (int q = 0; q < kEach; ++q) {
        constexpr int kHalf = kEach / 2;
        const int h = q / kHalf, e = 2 * (q % kHalf);
        const auto r = rotate<A>({in[h][e], in[h][e + 1]}, c[q], sign * s[q]);
        out[h][e] = r.a;
        out[h][e + 1] = r.b;
      }
    } else {
#pragma unroll
      for (int q = 0; q < kEach; ++q) {
        const auto r = rotate<A>({in[0][q], in[1][q]}, c[q], sign * s[q]);
        out[0][q] = r.a;
        out[1][q] = r.b;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) call.store(y + to[h], out[h], counts[h]);
  }
}

}  // namespace jops::JOPS_ISA::rotary
