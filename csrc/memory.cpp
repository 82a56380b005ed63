#include "memory.h"

#include <cstdlib>

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <malloc.h>
#endif

namespace jops {

#if defined(__GLIBC__)
namespace {

// Another allocator may stand before glibc's (jemalloc, tcmalloc, a sanitizer's): mallopt would
// then succeed and do nothing.
bool glibc_allocates() {
  Dl_info allocator{}, library{};
  return dladdr(reinterpret_cast<void*>(&std::malloc), &allocator) != 0 &&
         dladdr(reinterpret_cast<void*>(&mallopt), &library) != 0 &&
         allocator.dli_fbase == library.dli_fbase;
}

struct Setting {
  const char* name;
  int parameter;
  int value;
};

template <std::size_t kCount>
HostMemorySettings apply(const Setting (&settings)[kCount]) {
  HostMemorySettings changed;
  if (!glibc_allocates()) return changed;
  for (const Setting& s : settings) {
    if (mallopt(s.parameter, s.value) == 1) changed.emplace_back(s.name, s.value);
  }
  return changed;
}

constexpr int kMiB = 1 << 20;

}  // namespace

HostMemorySettings retain_host_memory() {
  // No block is a mapping of its own, the heap's end is never given back (-1), and it grows in
  // large steps.
  return apply({{"M_MMAP_MAX", M_MMAP_MAX, 0},
                {"M_TRIM_THRESHOLD", M_TRIM_THRESHOLD, -1},
                {"M_TOP_PAD", M_TOP_PAD, 64 * kMiB}});
}

HostMemorySettings release_host_memory() {
  // Setting a threshold ends glibc's adaptation of it: these are where it ends up by itself in a
  // process with large blocks.
  HostMemorySettings changed = apply({{"M_MMAP_MAX", M_MMAP_MAX, 65536},
                                      {"M_MMAP_THRESHOLD", M_MMAP_THRESHOLD, 32 * kMiB},
                                      {"M_TRIM_THRESHOLD", M_TRIM_THRESHOLD, 64 * kMiB},
                                      {"M_TOP_PAD", M_TOP_PAD, kMiB / 8}});
  if (!changed.empty()) malloc_trim(0);
  return changed;
}
#else
HostMemorySettings retain_host_memory() { return {}; }
HostMemorySettings release_host_memory() { return {}; }
#endif

}  // namespace jops
