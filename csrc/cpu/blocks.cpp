// Conversions, dropout multipliers and streaming copies of blocks that stay in L1.
#include "blocks.h"

#include "../math/philox.h"

namespace jops::JOPS_ISA {
namespace {

constexpr int kGroup = 4 * kWords;  // words that one vector of counters gives

// Writes them in the order of the elements: four words of the first counter, of the second, ...
JOPS_HD void store_interleaved(std::uint32_t* to, const Philox<U64>& r) {
  // As pairs of words: a = (w0, w1) and b = (w2, w3) of each counter.
  const U64 a = (r.w0 & 0xffffffffu) | (r.w1 << 32);
  const U64 b = (r.w2 & 0xffffffffu) | (r.w3 << 32);
  U64 low, high;
#pragma GCC unroll 8
  for (int i = 0; i < kWords / 2; ++i) {
    low[2 * i] = a[i];
    low[2 * i + 1] = b[i];
    high[2 * i] = a[kWords / 2 + i];
    high[2 * i + 1] = b[kWords / 2 + i];
  }
  std::memcpy(to, &low, kVectorBytes);
  std::memcpy(to + kGroup / 2, &high, kVectorBytes);
}

}  // namespace

template <class A>
void dropout_block(const Mask& mask, std::int64_t sample, std::int64_t first, A* m,
                   std::int64_t n) {
  const double threshold = __builtin_nearbyint((1 - mask.p) * 0x1p32);
  if (threshold <= 0) {
    for (std::int64_t i = 0; i < n; ++i) m[i] = 0;
    return;
  }
  // keep when word < threshold, which may be 2^32: word <= limit in 32 bits
  const std::uint32_t limit = static_cast<std::uint32_t>(threshold - 1);
  const A scale = static_cast<A>(1 / (1 - mask.p));
  const std::uint64_t key = static_cast<std::uint64_t>(mask.seeds[sample]);
  U64 lane;
  for (int i = 0; i < kWords; ++i) lane[i] = static_cast<std::uint64_t>(i);

  constexpr std::int64_t kChunk = 512;
  static_assert(kChunk % kGroup == 0, "whole groups");
  alignas(64) std::uint32_t words[kChunk + kGroup];
  while (n > 0) {
    const std::int64_t skip = first % kGroup;
    const std::int64_t count = n < kChunk ? n : kChunk;
    const U64 counter = lane + static_cast<std::uint64_t>((first - skip) / 4);
    for (std::int64_t i = 0; i < skip + count; i += kGroup) {
      store_interleaved(words + i, philox(counter + static_cast<std::uint64_t>(i / 4), key));
    }
    for (std::int64_t i = 0; i < count; ++i) m[i] = words[skip + i] <= limit ? scale : A(0);
    m += count;
    first += count;
    n -= count;
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
      if (i < n) store_n(block + i, load_n(p + i, static_cast<int>(n - i)), static_cast<int>(n - i));
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
      if (i < n) store_n(p + i, load_n(block + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    }
  });
}

void stream_copy(void* to, const void* from, std::int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  std::int64_t head = -reinterpret_cast<std::intptr_t>(out) & (kVectorBytes - 1);
  if (head > bytes) head = bytes;
  std::memcpy(out, in, static_cast<std::size_t>(head));
  std::int64_t i = head;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes) {
    stream(reinterpret_cast<float*>(out + i), load(reinterpret_cast<const float*>(in + i)));
  }
  std::memcpy(out + i, in + i, static_cast<std::size_t>(bytes - i));
}

#define JOPS_INSTANTIATE(A)                                                                       \
  template void dropout_block(const Mask&, std::int64_t, std::int64_t, A*, std::int64_t);         \
  template void dropout_range(const Mask&, std::int64_t, std::int64_t, A*, std::int64_t);         \
  template void load_block(Dtype, const void*, std::int64_t, A*, std::int64_t);                   \
  template void store_block(Dtype, void*, std::int64_t, const A*, std::int64_t);
JOPS_INSTANTIATE(float)
JOPS_INSTANTIATE(double)
#undef JOPS_INSTANTIATE

}  // namespace jops::JOPS_ISA
