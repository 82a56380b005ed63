// The register tile of y = x w^T and the panels that feed it.
//
// A tile is kRows x kCols outputs held in registers while k runs over a block of the inner
// dimension: one broadcast from the panel of x and kVectors loads from the panel of w give kRows *
// kVectors products. A panel holds `steps` groups: kRows (kCols) numbers of x (w) that share an
// index k; a group of bfloat16 pairs holds two successive k. Rows and columns past the end are
// zeros, so that every tile is whole.
#pragma once

#include "blocks.h"

namespace jops::JOPS_ISA {

// Rows and vectors of a tile: accumulators, one broadcast and the vectors of w fill the register
// file.
#if defined(__AVX512F__)
constexpr int kTileRows = 14, kTileVectors = 2;  // of 32 registers
#elif defined(__aarch64__)
constexpr int kTileRows = 12, kTileVectors = 2;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;  // of 16 registers
#else
constexpr int kTileRows = 4, kTileVectors = 2;  // of 16 registers, no fused multiply-add
#endif

// How inner products are taken: float and double by fused multiply-add.
template <class A>
struct Fma {
  using Compute = A;
  using Packed = A;
  static constexpr int kStep = 1;  // successive k in one packed number
  static constexpr int kRows = kTileRows, kCols = kTileVectors * Vec<A>::kLanes;

  static JOPS_HD Vec<A> broadcast(const Packed* p) { return Vec<A>(*p); }
  static JOPS_HD Vec<A> vector(const Packed* p) { return load(p); }
  static JOPS_HD Vec<A> add_product(Vec<A> a, Vec<A> b, Vec<A> c) { return fma(a, b, c); }

  // n successive k of one line.
  template <class T>
  static JOPS_HD void along(const T* p, std::int64_t stride, std::int64_t n, Packed* to) {
    if (stride == 1) return convert(p, n, to);
    for (std::int64_t i = 0; i < n; ++i) convert(p + i * stride, 1, to + i);
  }
  // The same k of n adjacent lines.
  template <class T>
  static JOPS_HD void across(const T* p, std::int64_t, bool, std::int64_t n, Packed* to) {
    convert(p, n, to);
  }

 private:
  template <class T>
  static JOPS_HD void convert(const T* p, std::int64_t n, A* to) {
    if constexpr (std::is_same_v<T, A>) {
      for (std::int64_t i = 0; i < n; ++i) to[i] = p[i];
    } else {
      constexpr int kLanes = Vec<A>::kLanes;
      std::int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(to + i, load(p + i));
      if (i < n) store_n(to + i, load_n(p + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    }
  }
};

#if defined(__AVX512BF16__)
// bfloat16 in pairs: exact products, sums in float.
struct Bf16Pairs {
  using Compute = float;
  using Packed = std::uint32_t;
  static constexpr int kStep = 2;
  static constexpr int kRows = kTileRows, kCols = kTileVectors * Vec<float>::kLanes;

  static JOPS_HD __m512i broadcast(const Packed* p) {
    return _mm512_set1_epi32(static_cast<int>(*p));
  }
  static JOPS_HD __m512i vector(const Packed* p) { return _mm512_loadu_si512(p); }
  static JOPS_HD Vec<float> add_product(__m512i a, __m512i b, Vec<float> c) {
    return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static JOPS_HD void along(const Bf16* p, std::int64_t stride, std::int64_t n, Packed* to) {
    if (stride == 1) {
      std::memcpy(to, p, n / 2 * sizeof(Packed));
    } else {
      for (std::int64_t i = 0; i < n / 2; ++i) {
        to[i] = pair(p[2 * i * stride], p[(2 * i + 1) * stride]);
      }
    }
    if (n % 2) to[n / 2] = pair(p[(n - 1) * stride], Bf16{0});
  }
  static JOPS_HD void across(const Bf16* p, std::int64_t stride, bool second, std::int64_t n,
                             Packed* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = pair(p[i], second ? p[stride + i] : Bf16{0});
  }

 private:
  static JOPS_HD Packed pair(Bf16 low, Bf16 high) {
    return low.bits | static_cast<Packed>(high.bits) << 16;
  }
};
#endif

template <class T>
struct ProductOf {
  using type = Fma<Compute<T>>;
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<Bf16> {
  using type = Bf16Pairs;
};
#endif

// tile (+)= panel of x times panel of w over `steps` packed numbers. `tile` is row-major.
template <class P>
__attribute__((noinline)) void tile_product(const typename P::Packed* x,
                                            const typename P::Packed* w, std::int64_t steps,
                                            bool accumulate, typename P::Compute* tile) {
  using V = Vec<typename P::Compute>;
  constexpr int kLanes = V::kLanes, kRows = P::kRows;
  static_assert(kTileVectors == 2 && P::kCols == 2 * kLanes);
  // One array a column of vectors, of the compiler's own type: GCC 12 spills an array of both.
  typename V::Native left[kRows], right[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) left[i] = right[i] = typename V::Native{};
  for (std::int64_t k = 0; k < steps; ++k, x += kRows, w += P::kCols) {
    const auto b0 = P::vector(w), b1 = P::vector(w + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto a = P::broadcast(x + i);
      left[i] = P::add_product(a, b0, V(left[i])).v;
      right[i] = P::add_product(a, b1, V(right[i])).v;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    typename P::Compute* to = tile + i * P::kCols;
    store(to, accumulate ? load(to) + V(left[i]) : V(left[i]));
    store(to + kLanes, accumulate ? load(to + kLanes) + V(right[i]) : V(right[i]));
  }
}

// One panel: `count` of kWidth lines (rows of x or of w), `depth` numbers each, from strided
// storage.
template <class P, int kWidth, class T>
void pack_panel(const T* from, std::int64_t line_stride, std::int64_t depth_stride, int count,
                std::int64_t depth, typename P::Packed* to) {
  using Packed = typename P::Packed;
  const std::int64_t steps = (depth + P::kStep - 1) / P::kStep;
  if (count < kWidth) std::memset(to, 0, steps * kWidth * sizeof(Packed));
  if (line_stride == 1) {
    for (std::int64_t s = 0; s < steps; ++s) {
      const std::int64_t k = s * P::kStep;
      const bool second = k + 1 < depth;
      if (count == kWidth) {  // a constant trip count
        P::across(from + k * depth_stride, depth_stride, second, kWidth, to + s * kWidth);
      } else {
        P::across(from + k * depth_stride, depth_stride, second, count, to + s * kWidth);
      }
    }
    return;
  }
  // Short runs along the depth: the part of the panel that they are spread over stays in L1.
  constexpr std::int64_t kRun = 16;
  for (std::int64_t first = 0; first < steps; first += kRun) {
    const std::int64_t k = first * P::kStep, left = depth - k, whole = kRun * P::kStep;
    const std::int64_t n = left < whole ? left : whole, numbers = (n + P::kStep - 1) / P::kStep;
    for (int line = 0; line < count; ++line) {
      Packed run[kRun];
      P::along(from + line * line_stride + k * depth_stride, depth_stride, n, run);
      for (std::int64_t s = 0; s < numbers; ++s) to[(first + s) * kWidth + line] = run[s];
    }
  }
}

}  // namespace jops::JOPS_ISA
