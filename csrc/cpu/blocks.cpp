// Conversions and dropout multipliers of blocks that stay in L1.
#include "blocks.h"

#include "multipliers.h"

namespace jops::JOPS_ISA {

template <class A>
void dropout_block(const Mask& mask, std::int64_t sample, std::int64_t first, A* m,
                   std::int64_t n) {
  for_multipliers<A>(mask, sample, first, n, [&](std::int64_t i, const A* group, int count) {
    std::memcpy(m + i, group, static_cast<std::size_t>(count) * sizeof(A));
  });
}

template <class A>
void dropout_range(const Mask& mask, std::int64_t size, std::int64_t first, A* m, std::int64_t n) {
  for_samples(mask, size, first, n,
              [&](std::int64_t sample, std::int64_t start, std::int64_t done, std::int64_t count) {
                dropout_block(mask, sample, start, m + done, count);
              });
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
