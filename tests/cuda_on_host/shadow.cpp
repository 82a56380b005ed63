#include "shadow.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "state.h"

namespace cuda_on_host {
namespace {

constexpr std::size_t kGrain = 2;  // bytes a cell
constexpr int kThreadBits = 10, kClockBits = 20, kEpochShift = kThreadBits + kClockBits;
constexpr std::uint64_t kInFlight = ~std::uint64_t{0};
constexpr std::size_t kCells = kArenaBytes / kGrain;

std::uint64_t epoch_of(std::uint64_t stamp) { return stamp >> kEpochShift; }
int thread_of(std::uint64_t stamp) { return stamp & ((1 << kThreadBits) - 1); }
std::uint32_t clock_of(std::uint64_t stamp) {
  return stamp >> kThreadBits & ((1u << kClockBits) - 1);
}

// "Tile" of "T& shared() [with T = Tile]", in a buffer that lasts until the next call.
const char* name(const Object& object) {
  static __thread char text[128];
  const char* begin = std::strstr(object.signature, "T = ");
  begin = begin ? begin + 4 : object.signature;
  constexpr char kOuter[] = "jops::cuda::";
  if (!std::strncmp(begin, kOuter, sizeof(kOuter) - 1)) begin += sizeof(kOuter) - 1;
  std::snprintf(text, sizeof(text), "%.*s", static_cast<int>(std::strcspn(begin, ";]")), begin);
  return text;
}

void* zeroed(std::size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

}  // namespace

Shadow::Shadow() {
  cells_ = static_cast<Cell*>(zeroed(kCells * sizeof(Cell)));
  clocks_ = static_cast<Clocks*>(zeroed(kMaxWarps * sizeof(Clocks)));
  for (int warp = 0; warp < kMaxWarps; ++warp) clocks_[warp].used = true;
}

Shadow::~Shadow() {
  munmap(cells_, kCells * sizeof(Cell));
  munmap(clocks_, kMaxWarps * sizeof(Clocks));
}

void Shadow::forget() {
  madvise(cells_, kCells * sizeof(Cell), MADV_DONTNEED);  // zeros again
}

// Stamps of earlier blocks are older than this one's first epoch: nothing has to be cleared.
void Shadow::begin_block(int warps) {
  block_epoch_ = ++epoch_;
  for (int warp = 0; warp < warps; ++warp) {
    Clocks& clocks = clocks_[warp];
    if (!clocks.used) continue;
    clocks.used = false;
    for (int a = 0; a < kLanes; ++a) {
      for (int b = 0; b < kLanes; ++b) clocks.clock[a][b] = a == b;
    }
  }
}

void Shadow::order_warp(int warp, unsigned mask) {
  Clocks& clocks = clocks_[warp];
  clocks.used = true;
  std::uint32_t latest[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int b = 0; b < kLanes; ++b) {
      const std::uint32_t c = clocks.clock[lane][b];
      latest[b] = c > latest[b] ? c : latest[b];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int b = 0; b < kLanes; ++b) clocks.clock[lane][b] = latest[b];
    ++clocks.clock[lane][lane];
  }
}

// Two readers of different warps clash with any writer before the next barrier: no other has to be
// known. Of one warp the last two are kept.
inline void note_reader(std::uint64_t (&readers)[2], std::uint64_t stamp) {
  const std::uint64_t last = readers[0], other = readers[1];
  if (last == stamp) return;
  const auto differ = [](std::uint64_t a, std::uint64_t b) {
    return thread_of(a) / kLanes != thread_of(b) / kLanes;
  };
  const bool both_now = epoch_of(last) == epoch_of(stamp) && epoch_of(other) == epoch_of(stamp);
  if (both_now && differ(last, other)) return;
  const bool keeps_other = both_now && differ(stamp, other);
  if (thread_of(last) != thread_of(stamp) && !keeps_other) readers[1] = last;
  readers[0] = stamp;
}

void Shadow::enter(const Thread& t) {
  const std::uint64_t clock = clocks_[t.warp].clock[t.lane][t.lane] & ((1u << kClockBits) - 1);
  now_ = epoch_ << kEpochShift | clock << kThreadBits | t.id;
}

// What is lacking if nothing orders an earlier access with what the current thread does now.
inline const char* Shadow::clash(const Machine& m, Stamp before) const {
  if (epoch_of(before) != epoch_) return nullptr;
  const int other = thread_of(before), warp = other / kLanes;
  const Thread& t = *m.current;
  if (other == t.id) return nullptr;
  if (warp != t.warp) return "__syncthreads()";
  if (clock_of(before) <= clocks_[warp].clock[t.lane][other % kLanes]) return nullptr;
  return "__syncwarp() or __syncthreads()";
}

namespace {

const char* verb(Access kind) { return kind == Access::kRead ? "reads" : "writes"; }

[[noreturn]] __attribute__((cold)) void fail_outside(Machine& m, Access kind, std::size_t offset,
                                                     std::size_t bytes, const Site& site) {
  const Object* near = nullptr;
  for (int i = 0; i < m.object_count; ++i) {
    if (m.objects[i].begin <= offset + kGap / 2) near = &m.objects[i];
  }
  if (!near) fail(site, "%s shared memory that belongs to nothing", verb(kind));
  fail(site, "%s bytes %td to %td of shared %s, which has %zu", verb(kind),
       static_cast<std::ptrdiff_t>(offset - near->begin),
       static_cast<std::ptrdiff_t>(offset - near->begin + bytes), name(*near), near->bytes);
}

}  // namespace

void Shadow::check_writer(const Machine& m, Access kind, Stamp writer, const Object& object,
                          std::size_t offset, const Site& site) const {
  const std::size_t byte = offset - object.begin;
  if (writer == kInFlight) {
    fail(site, "%s byte %zu of shared %s before the wait for the copy to it", verb(kind), byte,
         name(object));
  }
  if (const char* lacks = clash(m, writer)) {
    fail(site, "%s byte %zu of shared %s, which %s wrote: a race, no %s between", verb(kind), byte,
         name(object), thread_name(thread_of(writer)), lacks);
  }
  if (kind == Access::kRead && epoch_of(writer) < block_epoch_) {
    fail(site, "reads byte %zu of shared %s, which nothing wrote", byte, name(object));
  }
}

inline __attribute__((always_inline)) void Shadow::check(Machine& m, Access kind,
                                                         std::size_t offset, std::size_t bytes,
                                                         const Site& site) {
  const Object* object = object_at(m, offset, bytes);
  if (!object) fail_outside(m, kind, offset, bytes, site);
  for (std::size_t i = offset / kGrain; i * kGrain < offset + bytes; ++i) {
    Cell& cell = cells_[i];
    // Mostly it was written in this block, before the last barrier. (An unsigned difference: what
    // is in flight or of earlier blocks is far above.)
    const bool settled = epoch_of(cell.writer) - block_epoch_ < epoch_ - block_epoch_;
    if (!settled) check_writer(m, kind, cell.writer, *object, i * kGrain, site);
    if (kind == Access::kRead) {
      note_reader(cell.readers, now_);
    } else {
      for (const Stamp reader : cell.readers) {
        if (const char* lacks = clash(m, reader)) {
          fail(site, "writes byte %zu of shared %s, which %s read: a race, no %s between",
               i * kGrain - object->begin, name(*object), thread_name(thread_of(reader)), lacks);
        }
      }
      cell.writer = now_;
    }
  }
}

void Shadow::access(Machine& m, Access kind, std::size_t offset, std::size_t bytes,
                    const Site& site) {
  check(m, kind, offset, bytes, site);
}

void Shadow::begin_copy(Machine& m, std::size_t offset, std::size_t bytes, const Site& site) {
  access(m, Access::kWrite, offset, bytes, site);
  for (std::size_t i = 0; i < bytes / kGrain; ++i) cells_[offset / kGrain + i].writer = kInFlight;
}

void Shadow::end_copy(std::size_t offset, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes / kGrain; ++i) cells_[offset / kGrain + i].writer = now_;
}

}  // namespace cuda_on_host

// The calls that -fsanitize=thread puts at every access to memory of a kernel. There is no
// ThreadSanitizer behind them.
namespace cuda_on_host {
namespace {

template <Access kind>
inline __attribute__((always_inline)) void accessed(const void* p, std::size_t bytes, bool aligned,
                                                    const void* address) {
  Machine* m = running;
  if (m == nullptr) return;  // the code around a launch
  const char* byte = static_cast<const char*>(p);
  const auto offset = static_cast<std::size_t>(byte - m->arena);
  if (m->stacks.contains(p)) return;
  if (static_cast<std::size_t>(byte - reinterpret_cast<const char*>(&place)) < sizeof(place)) {
    return;
  }
  const Site site{nullptr, 0, address};
  step(*m, site);
  if (aligned && reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
    fail(site, "%s %zu bytes at an address that is no multiple of it",
         kind == Access::kRead ? "reads" : "writes", bytes);
  }
  if (offset < kArenaBytes) {
    m->shadow.check(*m, kind, offset, bytes, site);
  } else {
    m->bytes[static_cast<int>(kind)] += bytes;
  }
}

}  // namespace
}  // namespace cuda_on_host

using cuda_on_host::Access;
using cuda_on_host::accessed;

#define HOOKS(bytes)                                                        \
  extern "C" void __tsan_read##bytes(void* p) {                             \
    accessed<Access::kRead>(p, bytes, true, __builtin_return_address(0));   \
  }                                                                         \
  extern "C" void __tsan_write##bytes(void* p) {                            \
    accessed<Access::kWrite>(p, bytes, true, __builtin_return_address(0));  \
  }                                                                         \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {                   \
    accessed<Access::kRead>(p, bytes, false, __builtin_return_address(0));  \
  }                                                                         \
  extern "C" void __tsan_unaligned_write##bytes(void* p) {                  \
    accessed<Access::kWrite>(p, bytes, false, __builtin_return_address(0)); \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" void __tsan_read_range(void* p, std::size_t bytes) {
  accessed<Access::kRead>(p, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, std::size_t bytes) {
  accessed<Access::kWrite>(p, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}

// The code around launches has atomics: guards of static variables, counts of references.
#define ATOMICS(bits, Type)                                                        \
  extern "C" Type __tsan_atomic##bits##_load(const volatile Type* p, int) {        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                   \
  }                                                                                \
  extern "C" void __tsan_atomic##bits##_store(volatile Type* p, Type v, int) {     \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                \
  extern "C" Type __tsan_atomic##bits##_fetch_add(volatile Type* p, Type v, int) { \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                             \
  }
ATOMICS(8, std::uint8_t)
ATOMICS(32, std::uint32_t)
ATOMICS(64, std::uint64_t)
