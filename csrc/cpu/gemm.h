// The register tile of y = x w^T and the panels that feed it.
//
// A tile is kRows x kCols outputs held in registers while k runs over a block of the inner
// dimension: one broadcast from the panel of x and kVectors loads from the panel of w give kRows *
// kVectors products. A panel holds `steps` groups: kRows (kCols) packed numbers of x (w) that share
// an index k; a packed number holds kStep successive k. Rows and columns past the end are zeros, so
// that every tile is whole. On AMX the tile registers hold 2 x 2 squares of a tile.
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

// The operands of a product: lines of x are rows of a tile, lines of w are its columns.
enum class Operand { kX, kW };
template <class P, Operand kOperand>
constexpr int kWidth = kOperand == Operand::kX ? P::kRows : P::kCols;

// How inner products are taken: float and double by fused multiply-add.
template <class A>
struct Fma {
  using Compute = A;
  using Packed = A;
  struct Session {};                           // held by a thread while it takes products
  static constexpr bool kWalks = true;         // packs adjacent lines in one walk along k
  static constexpr int kStep = 1;              // successive k in one packed number
  static constexpr std::int64_t kPass = 1024;  // k that a block is packed for at once
  static constexpr int kRows = kTileRows, kCols = kTileVectors * Vec<A>::kLanes;

  static JOPS_HD Vec<A> broadcast(const Packed* p) { return Vec<A>(*p); }
  static JOPS_HD Vec<A> vector(const Packed* p) { return load(p); }
  static JOPS_HD Vec<A> add_product(Vec<A> a, Vec<A> b, Vec<A> c) { return fma(a, b, c); }
  static JOPS_HD Vec<A> add_vectors(Vec<A> a, Vec<A> b, Vec<A> c) { return fma(a, b, c); }

  // A vector of successive k of one line, of which n are there and the others are zero.
  template <class T>
  static JOPS_HD Vec<A> along(const T* p, std::int64_t stride, std::int64_t n) {
    constexpr int kLanes = Vec<A>::kLanes;
    if (stride == 1) return n >= kLanes ? load(p) : load_n(p, static_cast<int>(n));
    T near[kLanes] = {};
    for (int i = 0; i < kLanes && i < n; ++i) near[i] = p[i * stride];
    return load(near);
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
      std::memcpy(to, p, n * sizeof(A));
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
  struct Session {};
  static constexpr bool kWalks = true;
  static constexpr int kStep = 2;
  static constexpr std::int64_t kPass = 1024;
  static constexpr int kRows = kTileRows, kCols = kTileVectors * Vec<float>::kLanes;

  static JOPS_HD __m512i broadcast(const Packed* p) {
    return _mm512_set1_epi32(static_cast<int>(*p));
  }
  static JOPS_HD __m512i vector(const Packed* p) { return _mm512_loadu_si512(p); }
  static JOPS_HD Vec<float> add_product(__m512i a, __m512i b, Vec<float> c) {
    return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static JOPS_HD Vec<float> add_vectors(Vec<float> a, Vec<float> b, Vec<float> c) {
    return add_product(reinterpret_cast<__m512i>(a.v), reinterpret_cast<__m512i>(b.v), c);
  }
  // Sixteen pairs, as bits of a vector of float.
  static JOPS_HD Vec<float> along(const Bf16* p, std::int64_t stride, std::int64_t n) {
    constexpr int kNumbers = 32;
    if (stride == 1) {
      const auto mask = n >= kNumbers ? ~0u : (1u << n) - 1;
      return reinterpret_cast<Vec<float>::Native>(_mm512_maskz_loadu_epi16(mask, p));
    }
    alignas(64) Bf16 near[kNumbers] = {};
    for (int i = 0; i < kNumbers && i < n; ++i) near[i] = p[i * stride];
    return reinterpret_cast<Vec<float>::Native>(_mm512_load_si512(near));
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

#if defined(__AMX_BF16__)
// GCC's intrinsics of tiles do not tell it which memory they read and write.
inline void compiler_fence() { asm volatile("" : : : "memory"); }

// bfloat16 in tile registers of 16 rows by 64 bytes: squares of 16 lines by 16 pairs. Those of x
// have a line in a row, those of w a pair of successive k.
struct Bf16Squares {
  using Compute = float;
  struct Packed {
    std::uint32_t pairs[16];
  };
  static constexpr int kStep = 32, kSquare = 16;
  static constexpr std::int64_t kPass = 4096;  // sums of a pass cost more beside faster products
  static constexpr int kRows = 2 * kSquare, kCols = 2 * kSquare;
  static constexpr bool kWalks = false;  // a square takes whole cache lines either way

  // Shapes of the tile registers, all whole squares. Others may set their own before and after.
  struct Session {
    Session() {
      struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {};
        std::uint8_t rows[16] = {};
      } shapes;
      for (int i = 0; i < 8; ++i) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = kSquare;
      }
      compiler_fence();
      _tile_loadconfig(&shapes);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // Pair number `pair` of n adjacent lines; `second` if its second k is there.
  static JOPS_HD __m512i across(const Bf16* p, std::int64_t stride, bool second, int n) {
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    if (!second) return low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + stride));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
};
#endif

template <class T>
struct ProductOf {
  using type = Fma<Compute<T>>;
};
// Where w is read in place, by few rows of x.
template <class T>
struct DotOf {
  using type = Fma<Compute<T>>;
};
#if defined(__AVX512BF16__)
template <>
struct DotOf<Bf16> {
  using type = Bf16Pairs;
};
template <>
struct ProductOf<Bf16> {
#if defined(__AMX_BF16__)
  using type = Bf16Squares;
#else
  using type = Bf16Pairs;
#endif
};
#endif

// Interleaves the low, or the high, halves of a and b.
#if defined(__clang__)
#define JOPS_SHUFFLE(V, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define JOPS_SHUFFLE(V, a, b, ...) __builtin_shuffle(a, b, typename V::Bits{__VA_ARGS__})
#endif
template <class V, int kHigh, int... kIndex>
JOPS_HD typename V::Native interleave(typename V::Native a, typename V::Native b,
                                      std::integer_sequence<int, kIndex...>) {
  constexpr int kLanes = V::kLanes;
  return JOPS_SHUFFLE(V, a, b, (kIndex / 2 + kIndex % 2 * kLanes + kHigh * kLanes / 2)...);
}
#undef JOPS_SHUFFLE

// A square of vectors becomes its transpose: every round moves the top bit of the row's number
// below those of the column's.
template <class V>
JOPS_HD void transpose(typename V::Native (&a)[V::kLanes]) {
  constexpr int kLanes = V::kLanes;
  constexpr std::make_integer_sequence<int, kLanes> kLane{};
  typename V::Native b[kLanes];
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      b[2 * i] = interleave<V, 0>(a[i], a[i + kLanes / 2], kLane);
      b[2 * i + 1] = interleave<V, 1>(a[i], a[i + kLanes / 2], kLane);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) a[i] = b[i];
  }
}

template <class V, class A>
JOPS_HD void store_n_or_all(A* to, V a, int n) {
  if (n == V::kLanes)
    store(to, a);
  else
    store_n(to, a, n);
}

// Rows of a tile in memory: where its sums come from and go to.
template <class A>
struct TileRows {
  A* data = nullptr;
  std::int64_t stride = 0;  // 0: the same row for all
  bool streams = false;     // written past the caches; data is aligned to whole vectors then
};

// to = from + panel of x times panel of w over `steps` packed numbers; without `from`, its data
// null, the product alone.
template <class P>
__attribute__((noinline)) void tile_product(const typename P::Packed* x,
                                            const typename P::Packed* w, std::int64_t steps,
                                            const TileRows<const typename P::Compute>& from,
                                            const TileRows<typename P::Compute>& to) {
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
  if (from.data) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      left[i] = (load(from.data + i * from.stride) + V(left[i])).v;
      right[i] = (load(from.data + i * from.stride + kLanes) + V(right[i])).v;
    }
  }
  if (to.streams) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      stream(to.data + i * to.stride, V(left[i]));
      stream(to.data + i * to.stride + kLanes, V(right[i]));
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      store(to.data + i * to.stride, V(left[i]));
      store(to.data + i * to.stride + kLanes, V(right[i]));
    }
  }
}

#if defined(__AMX_BF16__)
template <>
inline void tile_product<Bf16Squares>(const Bf16Squares::Packed* x, const Bf16Squares::Packed* w,
                                      std::int64_t steps, const TileRows<const float>& from,
                                      const TileRows<float>& to) {
  constexpr int kSquare = Bf16Squares::kSquare;
  compiler_fence();
  if (from.data) {
    const auto pitch = static_cast<int>(from.stride * sizeof(float));
    const float* below = from.data + kSquare * from.stride;
    _tile_loadd(0, from.data, pitch);
    _tile_loadd(1, from.data + kSquare, pitch);
    _tile_loadd(2, below, pitch);
    _tile_loadd(3, below + kSquare, pitch);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t k = 0; k < steps; ++k, x += Bf16Squares::kRows, w += Bf16Squares::kCols) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kSquare, 64);
    _tile_loadd(5, x + kSquare, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  const auto pitch = static_cast<int>(to.stride * sizeof(float));
  float* below = to.data + kSquare * to.stride;
  _tile_stored(0, to.data, pitch);
  _tile_stored(1, to.data + kSquare, pitch);
  _tile_stored(2, below, pitch);
  _tile_stored(3, below + kSquare, pitch);
  compiler_fence();
}
#endif

// Inner products of few rows with columns that are read in place, a register tile of them at a
// time.
#if defined(__AVX512F__)
constexpr int kDotRows = 8, kDotCols = 3;  // of 32 registers
#elif defined(__aarch64__)
constexpr int kDotRows = 6, kDotCols = 3;  // of 32 registers
#else
constexpr int kDotRows = 4, kDotCols = 2;  // of 16 registers
#endif
constexpr int kFewRows = 16;  // up to here w is read in place
constexpr int kPitch = 16;    // of a row of sums

// to[i][j] += <row i of a, row j of b> for kRows x kCols of them, i, j from 0 on.
template <class P, int kRows, int kCols, class T>
__attribute__((noinline)) void dot_tile(const T* a, std::int64_t a_stride, const T* b,
                                        std::int64_t b_stride, std::int64_t depth,
                                        typename P::Compute* to) {
  using V = Vec<typename P::Compute>;
  constexpr std::int64_t kNumbers = V::kLanes * P::kStep;
  typename V::Native sums[kCols][kRows];
#pragma GCC unroll 4
  for (int j = 0; j < kCols; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sums[j][i] = typename V::Native{};
  }
  const auto step = [&](std::int64_t k, std::int64_t n) __attribute__((always_inline)) {
    V right[kCols];
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) right[j] = P::along(b + j * b_stride + k, 1, n);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V left = P::along(a + i * a_stride + k, 1, n);
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) sums[j][i] = P::add_vectors(left, right[j], V(sums[j][i])).v;
    }
  };
  std::int64_t k = 0;
  for (; k + kNumbers <= depth; k += kNumbers) step(k, kNumbers);
  if (k < depth) step(k, depth - k);
#pragma GCC unroll 4
  for (int j = 0; j < kCols; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) to[i * kPitch + j] += sum(V(sums[j][i]));
  }
}

template <class P, class T>
void dot_block(const T* a, std::int64_t a_stride, int rows, const T* b, std::int64_t b_stride,
               int cols, std::int64_t depth, typename P::Compute* to) {
  int i = 0;
  if (cols == kDotCols) {
    for (; i + kDotRows <= rows; i += kDotRows) {
      dot_tile<P, kDotRows, kDotCols>(a + i * a_stride, a_stride, b, b_stride, depth,
                                      to + i * kPitch);
    }
    for (; i < rows; ++i) {
      dot_tile<P, 1, kDotCols>(a + i * a_stride, a_stride, b, b_stride, depth, to + i * kPitch);
    }
  }
  for (int j = 0; j < cols && i < rows; ++j) {
    for (int r = i; r < rows; ++r) {
      dot_tile<P, 1, 1>(a + r * a_stride, a_stride, b + j * b_stride, b_stride, depth,
                        to + r * kPitch + j);
    }
  }
}

// Panels of `count` lines that lie side by side in memory: all of them in one walk along k, as each
// step may be a page of its own.
template <Operand kOperand, class P, class T>
void pack_adjacent(P, const T* from, std::int64_t depth_stride, std::int64_t count,
                   std::int64_t depth, typename P::Packed* to) {
  constexpr int kWidth = jops::JOPS_ISA::kWidth<P, kOperand>;
  constexpr std::int64_t kAhead = 8, kLine = 64 / sizeof(T);
  const std::int64_t steps = (depth + P::kStep - 1) / P::kStep, whole = count / kWidth;
  const int rest = static_cast<int>(count - whole * kWidth);
  typename P::Packed* last = to + whole * steps * kWidth;
  if (rest) std::memset(last, 0, steps * kWidth * sizeof(typename P::Packed));
  for (std::int64_t s = 0; s < steps; ++s) {
    const T* p = from + s * P::kStep * depth_stride;
    const bool second = s * P::kStep + 1 < depth;
    for (std::int64_t i = 0; i < count; i += kLine) prefetch(p + kAhead * depth_stride + i);
    for (std::int64_t panel = 0; panel < whole; ++panel) {
      P::across(p + panel * kWidth, depth_stride, second, kWidth,
                to + (panel * steps + s) * kWidth);
    }
    if (rest) P::across(p + whole * kWidth, depth_stride, second, rest, last + s * kWidth);
  }
}

// One panel: `count` lines of an operand, `depth` numbers each, from strided storage.
template <Operand kOperand, class P, class T>
void pack_panel(P, const T* from, std::int64_t line_stride, std::int64_t depth_stride, int count,
                std::int64_t depth, typename P::Packed* to) {
  constexpr int kWidth = jops::JOPS_ISA::kWidth<P, kOperand>;
  using Packed = typename P::Packed;
  using V = Vec<typename P::Compute>;
  static_assert(sizeof(Packed) == sizeof(typename P::Compute));
  constexpr int kLanes = V::kLanes;
  const std::int64_t steps = (depth + P::kStep - 1) / P::kStep;
  // Squares of kLanes lines by kLanes steps, transposed in registers. The last lines of a panel
  // come first: what a vector of them writes past its step is written again.
  constexpr int kGroups = (kWidth + kLanes - 1) / kLanes, kAhead = 512;
  for (std::int64_t s = 0; s < steps; s += kLanes) {
    const std::int64_t k = s * P::kStep, left = depth - k;
    const int n = static_cast<int>(steps - s < kLanes ? steps - s : kLanes);
    for (int group = kGroups - 1; group >= 0; --group) {
      const int line = group * kLanes, lines = kWidth - line < kLanes ? kWidth - line : kLanes;
      typename V::Native square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        square[i] = typename V::Native{};
        if (i < lines && line + i < count) {
          const T* p = from + (line + i) * line_stride + k * depth_stride;
          if (depth_stride == 1) prefetch_far(reinterpret_cast<const char*>(p) + kAhead);
          square[i] = P::along(p, depth_stride, left).v;
        }
      }
      transpose<V>(square);
      typename P::Compute* out = reinterpret_cast<typename P::Compute*>(to + s * kWidth + line);
      if (n == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes - 1; ++i) store(out + i * kWidth, V(square[i]));
        store_n_or_all(out + (kLanes - 1) * kWidth, V(square[kLanes - 1]), lines);
      } else {
        for (int i = 0; i < n; ++i) store_n_or_all(out + i * kWidth, V(square[i]), lines);
      }
    }
  }
}

#if defined(__AMX_BF16__)
template <Operand kOperand>
void pack_panel(Bf16Squares, const Bf16* from, std::int64_t line_stride, std::int64_t depth_stride,
                int count, std::int64_t depth, Bf16Squares::Packed* to) {
  using V = Vec<float>;
  constexpr int kSquare = Bf16Squares::kSquare, kStep = Bf16Squares::kStep;
  const bool adjacent = line_stride == 1 && depth_stride != 1;
  for (std::int64_t k = 0; k < depth; k += kStep) {
    const std::int64_t left = depth - k;
    for (int line = 0; line < kWidth<Bf16Squares, kOperand>; line += kSquare, to += kSquare) {
      const int lines = count - line < kSquare ? count - line : kSquare;
      const Bf16* corner = from + line * line_stride + k * depth_stride;
      V::Native square[kSquare];
#pragma GCC unroll 16
      for (int i = 0; i < kSquare; ++i) {
        const int pair = 2 * i;
        square[i] = V::Native{};
        if (adjacent && lines > 0 && pair < left) {  // row i is pair i of the lines
          square[i] = reinterpret_cast<V::Native>(Bf16Squares::across(
              corner + pair * depth_stride, depth_stride, pair + 1 < left, lines));
        } else if (!adjacent && i < lines) {  // row i is line i
          square[i] = Bf16Pairs::along(corner + i * line_stride, depth_stride, left).v;
        }
      }
      if (adjacent == (kOperand == Operand::kX)) transpose<V>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kSquare; ++i) store(reinterpret_cast<float*>(to + i), V(square[i]));
    }
  }
}
#endif

}  // namespace jops::JOPS_ISA
