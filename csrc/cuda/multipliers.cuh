// Dropout on a device: whether an element is kept follows from the seed and its place alone, bit
// for bit as on the CPU.
#pragma once

#include "../math/philox.h"
#include "device.h"

namespace jops::JOPS_ISA {

// A Mask as kernels take it. Multipliers are 0 and `scale`.
template <class A>
struct Dropout {
  const std::int64_t* seeds = nullptr;  // on the device; null: nothing is dropped
  std::int64_t size = 0;                // elements of all samples
  std::int64_t per_sample = 0;
  std::uint32_t limit = 0;  // words up to it are kept
  A scale = 1;

  Dropout() = default;
  Dropout(const Mask& mask, std::int64_t elements) {
    if (!mask.given()) return;
    const auto threshold = static_cast<std::uint64_t>(std::nearbyint((1 - mask.p) * 0x1p32));
    seeds = mask.seeds;
    size = elements;
    per_sample = elements / mask.batch;
    limit = static_cast<std::uint32_t>(threshold - 1);
    scale = threshold ? static_cast<A>(1 / (1 - mask.p)) : A(0);  // at 0 the limit is every word
  }
};

// The four words of counter `counter`, as bits that say which are kept.
template <class A>
__device__ __forceinline__ unsigned kept_of_four(const Dropout<A>& d, std::int64_t sample,
                                                 std::uint64_t counter) {
  const std::uint64_t counters[1] = {counter};
  Philox<std::uint64_t> r[1];
  philox(counters, static_cast<std::uint64_t>(d.seeds[sample]), r);
  const auto kept = [&](std::uint64_t word) -> unsigned {
    return static_cast<std::uint32_t>(word) <= d.limit;
  };
  return kept(r[0].w0) | kept(r[0].w1) << 1 | kept(r[0].w2) << 2 | kept(r[0].w3) << 3;
}

// Bit i says whether element first + i is kept, i < kCount. Past the end the bits are anything.
template <int kCount, class A>
__device__ __forceinline__ unsigned kept(const Dropout<A>& d, std::int64_t first) {
  static_assert(kCount <= 28);
  std::int64_t sample = 0, at = first;
  if (d.per_sample < d.size) {
    sample = first / d.per_sample;
    at = first - sample * d.per_sample;
  }
  unsigned bits = 0;
  if (at + kCount <= d.per_sample || d.per_sample == d.size) {  // all of one sample
    const int skip = static_cast<int>(at % 4);
#pragma unroll
    for (int i = 0; i < kCount + 3; i += 4) {
      if (i < skip + kCount) {
        bits |= kept_of_four(d, sample, static_cast<std::uint64_t>(at - skip + i) / 4) << i;
      }
    }
    return bits >> skip;
  }
#pragma unroll 1
  for (int i = 0; i < kCount && first + i < d.size; ++i) {
    if (at >= d.per_sample) at = 0, ++sample;
    const unsigned four = kept_of_four(d, sample, static_cast<std::uint64_t>(at) / 4);
    bits |= (four >> (at % 4) & 1u) << i;
    ++at;
  }
  return bits;
}

template <class A>
__device__ __forceinline__ A multiplier(const Dropout<A>& d, unsigned bits, int i) {
  return bits >> i & 1u ? d.scale : A(0);
}

}  // namespace jops::JOPS_ISA
