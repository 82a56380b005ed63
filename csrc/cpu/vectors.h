// Walking along a row in vectors.
#pragma once

#include "blocks.h"

namespace jops::JOPS_ISA {

// f(i, count) for the vectors of n elements after the first `head`; count is a constant in one of
// the two bodies that are compiled.
template <int kLanes, class F>
JOPS_HD void for_vectors(std::int64_t n, std::int64_t head, const F& f) {
  std::int64_t i = 0, part = head < n ? head : n;
  while (true) {
    if (part > 0) f(i, static_cast<int>(part));
    i += part;
    for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
    part = n - i;
    if (part == 0) return;
  }
}

// Elements from p on before the first one at a whole vector in memory.
template <class T>
inline std::int64_t before_vector(const T* p) {
  constexpr std::uintptr_t kVector = Vec<Compute<T>>::kLanes * sizeof(T);
  return static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(p) % kVector / sizeof(T));
}

// The first `lanes` of y to p, past the caches where that is wanted.
template <class T>
JOPS_HD void write(T* p, Vec<Compute<T>> y, int lanes, bool streams) {
  if (lanes != Vec<Compute<T>>::kLanes)
    store_n(p, y, lanes);
  else if (streams)
    stream(p, y);
  else
    store(p, y);
}

}  // namespace jops::JOPS_ISA
