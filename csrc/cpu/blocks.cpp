// Conversions and dropout multipliers of blocks that stay in L1.
#include "blocks.h"

#include "../math/philox.h"

namespace jops::JOPS_ISA {
namespace {

constexpr int kGroup = 4 * kWords;  // elements that one vector of counters serves

// The multipliers of one sample.
template <class A>
class Dropout {
 public:
  Dropout(const Mask& mask, std::int64_t sample)
      : key_(static_cast<std::uint64_t>(mask.seeds[sample])),
        threshold_(static_cast<std::uint64_t>(__builtin_nearbyint((1 - mask.p) * 0x1p32))),
        scale_(threshold_ ? static_cast<A>(1 / (1 - mask.p)) : A(0)) {
    for (int i = 0; i < kWords; ++i) lane_[i] = static_cast<std::uint64_t>(i);
  }

  // Those of elements first..first+kGroup, first a multiple of kGroup.
  JOPS_HD void group(std::int64_t first, A* m) const {
    const Philox<U64> r = philox(lane_ + static_cast<std::uint64_t>(first / 4), key_);
    // Pairs of words (w0, w1) and (w2, w3) of each counter, interleaved: the order of the elements.
    const U64 a = (r.w0 & 0xffffffffu) | (r.w1 << 32);
    const U64 b = (r.w2 & 0xffffffffu) | (r.w3 << 32);
    const U64 words[2] = {interleave_low(a, b), interleave_high(a, b)};
    // Keep when word < threshold, which may be 2^32: word <= threshold - 1 in 32 bits. At 0 the
    // scale is 0.
    const auto limit = static_cast<std::uint32_t>(threshold_ - 1);
    if constexpr (sizeof(A) == 4) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const auto keep = reinterpret_cast<detail::U32>(words[half]) <= limit;
        store(m + half * Vec<A>::kLanes, select(Bool<A>{keep}, Vec<A>(scale_), Vec<A>(A(0))));
      }
    } else {
      std::uint32_t w[kGroup];
      std::memcpy(w, words, sizeof(w));
      for (int i = 0; i < kGroup; ++i) m[i] = w[i] <= limit ? scale_ : A(0);
    }
  }

 private:
  std::uint64_t key_, threshold_;
  A scale_;
  U64 lane_;
};

}  // namespace

template <class A>
void dropout_block(const Mask& mask, std::int64_t sample, std::int64_t first, A* m,
                   std::int64_t n) {
  const Dropout<A> dropout(mask, sample);
  A group[kGroup];
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t skip = (first + i) % kGroup;
    if (skip == 0 && n - i >= kGroup) {
      dropout.group(first + i, m + i);
      i += kGroup;
      continue;
    }
    dropout.group(first + i - skip, group);
    for (std::int64_t j = skip; j < kGroup && i < n; ++j, ++i) m[i] = group[j];
  }
}

template <class A>
void dropout_range(const Mask& mask, std::int64_t size, std::int64_t first, A* m, std::int64_t n) {
  const std::int64_t per_sample = size / mask.batch;
  while (n > 0) {
    const std::int64_t sample = first / per_sample, start = first % per_sample;
    const std::int64_t count = n < per_sample - start ? n : per_sample - start;
    dropout_block(mask, sample, start, m, count);
    m += count;
    first += count;
    n -= count;
  }
}

template <class A>
void load_block(Dtype dtype, const void* data, std::int64_t first, A* block, std::int64_t n) {
  with_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    if constexpr (std::is_same_v<Compute<T>, A>) {
      constexpr int kLanes = Vec<A>::kLanes;
      const T* p = static_cast<const T*>(data) + first;
      std::int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(block + i, load(p + i));
      if (i < n)
        store_n(block + i, load_n(p + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    }
  });
}

template <class A>
void store_block(Dtype dtype, void* data, std::int64_t first, const A* block, std::int64_t n) {
  with_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    if constexpr (std::is_same_v<Compute<T>, A>) {
      constexpr int kLanes = Vec<A>::kLanes;
      T* p = static_cast<T*>(data) + first;
      std::int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(p + i, load(block + i));
      if (i < n)
        store_n(p + i, load_n(block + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    }
  });
}

#define JOPS_INSTANTIATE(A)                                                               \
  template void dropout_block(const Mask&, std::int64_t, std::int64_t, A*, std::int64_t); \
  template void dropout_range(const Mask&, std::int64_t, std::int64_t, A*, std::int64_t); \
  template void load_block(Dtype, const void*, std::int64_t, A*, std::int64_t);           \
  template void store_block(Dtype, void*, std::int64_t, const A*, std::int64_t);
JOPS_INSTANTIATE(float)
JOPS_INSTANTIATE(double)
#undef JOPS_INSTANTIATE

}  // namespace jops::JOPS_ISA
