// Rotary position embedding, one vector after another. The formula is in math/rotary.h.
#include <cstring>

#include "columns.h"
// After the vectors that it is generic over.
#include "../math/rotary.h"

namespace jops::JOPS_ISA {
namespace {

// Lane i of a shuffle of two vectors (a, b) of n lanes is lane at(i, n) of the two in a row.
template <int kFirst>
struct EverySecond {
  static constexpr int at(int i, int) { return 2 * i + kFirst; }
};
template <bool kHigh>
struct Interleaved {
  static constexpr int at(int i, int n) { return (kHigh ? n / 2 : 0) + i / 2 + i % 2 * n; }
};
template <class Lane, class A, int... I>
JOPS_HD Vec<A> shuffle(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
#if defined(__clang__)
  return __builtin_shufflevector(a.v, b.v, Lane::at(I, n)...);
#else
  const typename Vec<A>::Bits index = {Lane::at(I, n)...};
  return __builtin_shuffle(a.v, b.v, index);
#endif
}
template <class Lane, class A>
JOPS_HD Vec<A> shuffle(Vec<A> a, Vec<A> b) {
  return shuffle<Lane>(a, b, std::make_integer_sequence<int, Vec<A>::kLanes>());
}

// A vector of n elements, of which 2 half are rotated.
template <class T>
struct Vectors {
  using V = Vec<Compute<T>>;
  std::int64_t half, n;
  Compute<T> sign;  // of the sine
  bool streams;

  JOPS_HD void put(T* to, const V& v) const {
    if (streams)
      stream(to, v);
    else
      store(to, v);
  }

  template <bool kInterleaved>
  void rotate_one(const T* x, const T* cos, const T* sin, T* y) const {
    constexpr int kLanes = V::kLanes;
    const V turned(sign);
    std::int64_t j = 0;
    for (; j + kLanes <= half; j += kLanes) {
      const V c = load(cos + j), s = load(sin + j) * turned;
      if constexpr (kInterleaved) {
        const V low = load(x + 2 * j), high = load(x + 2 * j + kLanes);
        const auto r = rotate<V>(
            {shuffle<EverySecond<0>>(low, high), shuffle<EverySecond<1>>(low, high)}, c, s);
        put(y + 2 * j, shuffle<Interleaved<false>>(r.a, r.b));
        put(y + 2 * j + kLanes, shuffle<Interleaved<true>>(r.a, r.b));
      } else {
        const auto r = rotate<V>({load(x + j), load(x + half + j)}, c, s);
        put(y + j, r.a);
        put(y + half + j, r.b);
      }
    }
    if (j < half) {
      const int count = static_cast<int>(half - j);
      const V c = load_n(cos + j, count), s = load_n(sin + j, count) * turned;
      if constexpr (kInterleaved) {
        const int first = least(2 * count, kLanes), second = 2 * count - first;
        const V low = load_n(x + 2 * j, first);
        const V high = second > 0 ? load_n(x + 2 * j + first, second) : V(0);
        const auto r = rotate<V>(
            {shuffle<EverySecond<0>>(low, high), shuffle<EverySecond<1>>(low, high)}, c, s);
        store_n(y + 2 * j, shuffle<Interleaved<false>>(r.a, r.b), first);
        if (second > 0) store_n(y + 2 * j + first, shuffle<Interleaved<true>>(r.a, r.b), second);
      } else {
        const auto r = rotate<V>({load_n(x + j, count), load_n(x + half + j, count)}, c, s);
        store_n(y + j, r.a, count);
        store_n(y + half + j, r.b, count);
      }
    }
    if (2 * half < n) std::memcpy(y + 2 * half, x + 2 * half, (n - 2 * half) * sizeof(T));
  }
};

void rotary(const Rotation& rotation, const Grid& x, const Grid& cos, const Grid& sin,
            const Grid& y, const Exec& exec) {
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    constexpr std::int64_t kTask = 16 * kBlock, kLanes = Vec<Compute<T>>::kLanes;
    const std::int64_t points = x.sizes[0] * x.sizes[1] * x.sizes[2], size = points * x.n;
    bool streams = should_stream(size * static_cast<std::int64_t>(sizeof(T))) &&
                   can_stream(static_cast<const T*>(y.data)) && cos.n % kLanes == 0;
    for (const std::int64_t stride : y.strides) streams = streams && stride % kLanes == 0;
    const Vectors<T> vectors{cos.n, x.n, static_cast<Compute<T>>(rotation.inverse ? -1 : 1),
                             streams};
    const std::int64_t together = most<std::int64_t>(kTask / x.n, 1);
    parallel(up(points, together), useful_threads(size, exec.threads), [&](std::int64_t task) {
      const std::int64_t end = least(points, (task + 1) * together);
      std::int64_t point = task * together, k = point % x.sizes[2], line = point / x.sizes[2];
      while (point < end) {  // the vectors of a line, which are most often many
        const std::int64_t i = line / x.sizes[1], j = line % x.sizes[1];
        const auto at = [&](const Grid& g) {
          return static_cast<T*>(g.data) + i * g.strides[0] + j * g.strides[1];
        };
        const T *from = at(x), *c = at(cos), *s = at(sin);
        T* to = at(y);
        const std::int64_t last = least(x.sizes[2], k + end - point);
        point += last - k;
        for (; k < last; ++k) {
          const T *v = from + k * x.strides[2], *vc = c + k * cos.strides[2];
          const T* vs = s + k * sin.strides[2];
          if (rotation.interleaved)
            vectors.template rotate_one<true>(v, vc, vs, to + k * y.strides[2]);
          else
            vectors.template rotate_one<false>(v, vc, vs, to + k * y.strides[2]);
        }
        k = 0;
        ++line;
      }
      if (streams) stream_fence();
    });
  });
}

}  // namespace

void register_rotary(Kernels& table) { table.rotary = rotary; }

}  // namespace jops::JOPS_ISA
