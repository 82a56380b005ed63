// Dropout multipliers, drawn in groups that stay in registers or L1.
#pragma once

#include "blocks.h"
// After the vectors that it is generic over.
#include "../math/philox.h"

namespace jops::JOPS_ISA {

constexpr int kCounters = 2;       // vectors of them at a time
constexpr int kEach = 4 * kWords;  // elements that one vector of counters serves
constexpr int kGroup = kCounters * kEach;

// The multipliers of one sample.
template <class A>
class Multipliers {
 public:
  Multipliers(const Mask& mask, std::int64_t sample)
      : key_(static_cast<std::uint64_t>(mask.seeds[sample])),
        threshold_(static_cast<std::uint64_t>(__builtin_nearbyint((1 - mask.p) * 0x1p32))),
        scale_(threshold_ ? static_cast<A>(1 / (1 - mask.p)) : A(0)) {
    for (int i = 0; i < kWords; ++i) lane_[i] = static_cast<std::uint64_t>(i);
  }

  // Those of elements first..first+kGroup, first a multiple of kGroup.
  JOPS_HD void group(std::int64_t first, A* m) const {
    U64 counter[kCounters];
    Philox<U64> r[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      counter[i] = lane_ + static_cast<std::uint64_t>(first / 4 + i * kWords);
    }
    philox(counter, key_, r);
    for (int i = 0; i < kCounters; ++i) compare(r[i], m + i * kEach);
  }

 private:
  JOPS_HD void compare(const Philox<U64>& r, A* m) const {
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
      std::uint32_t w[kEach];
      std::memcpy(w, words, sizeof(w));
      for (int i = 0; i < kEach; ++i) m[i] = w[i] <= limit ? scale_ : A(0);
    }
  }

  std::uint64_t key_, threshold_;
  A scale_;
  U64 lane_;
};

// f(i, m, count) for the elements first..first+n of one sample, a group or less at a time: m holds
// the multipliers of elements first + i on.
template <class A, class F>
JOPS_HD void for_multipliers(const Mask& mask, std::int64_t sample, std::int64_t first,
                             std::int64_t n, const F& f) {
  const Multipliers<A> draw(mask, sample);
  alignas(64) A m[kGroup];
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t skip = (first + i) % kGroup;
    draw.group(first + i - skip, m);
    const std::int64_t left = n - i, count = kGroup - skip < left ? kGroup - skip : left;
    f(i, m + skip, static_cast<int>(count));
    i += count;
  }
}

// f(sample, start, done, count) for the parts of elements first..first+n of a buffer of `size`
// that belong to one sample each: count elements from `start` of the sample on, after `done` of n.
template <class F>
JOPS_HD void for_samples(const Mask& mask, std::int64_t size, std::int64_t first, std::int64_t n,
                         const F& f) {
  const std::int64_t per_sample = size / mask.batch;
  for (std::int64_t done = 0; done < n;) {
    const std::int64_t sample = (first + done) / per_sample, start = (first + done) % per_sample;
    const std::int64_t left = n - done;
    const std::int64_t count = left < per_sample - start ? left : per_sample - start;
    f(sample, start, done, count);
    done += count;
  }
}

}  // namespace jops::JOPS_ISA
