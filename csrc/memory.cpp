#include "memory.h"

#include <cstdlib>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace jops {

#if defined(__GLIBC__)
namespace {

// Bytes that glibc's allocator has handed out.
std::size_t handed_out() {
#if __GLIBC_PREREQ(2, 33)
  const struct mallinfo2 info = mallinfo2();
  return info.uordblks + info.hblkhd;
#else
  const struct mallinfo info = mallinfo();  // of ints that wrap around
  return static_cast<unsigned>(info.uordblks) + static_cast<unsigned>(info.hblkhd);
#endif
}

// Another allocator may stand before glibc's (jemalloc, tcmalloc, a sanitizer's): mallopt would
// then succeed and do nothing. The address of malloc does not tell: in a program that is linked at
// fixed addresses, as some distributions' Python is, it is that of a stub in the program. So a
// block is asked for, again where another thread may have freed one meanwhile.
bool glibc_allocates() {
  constexpr std::size_t kBlock = 1 << 20;
  for (int i = 0; i < 3; ++i) {
    const std::size_t before = handed_out();
    void* volatile block = std::malloc(kBlock);  // volatile: else the pair may be left out
    const unsigned more = static_cast<unsigned>(handed_out() - before);
    std::free(block);
    if (more >= kBlock && more < 2 * kBlock) return true;
  }
  return false;
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
