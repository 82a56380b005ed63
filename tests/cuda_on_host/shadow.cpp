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
  if constexpr (!kChecked) return;
  cells_ = static_cast<Cell*>(zeroed(kCells * sizeof(Cell)));
  clocks_ = static_cast<Clocks*>(zeroed(kMaxWarps * sizeof(Clocks)));
  for (int warp = 0; warp < kMaxWarps; ++warp) clocks_[warp].used = true;
}

Shadow::~Shadow() {
  if constexpr (!kChecked) return;
  munmap(cells_, kCells * sizeof(Cell));
  munmap(clocks_, kMaxWarps * sizeof(Clocks));
}

void Shadow::forget() {
  if constexpr (!kChecked) return;
  madvise(cells_, kCells * sizeof(Cell), MADV_DONTNEED);  // zeros again
}

// Stamps of earlier blocks are older than this one's first epoch: nothing has to be cleared.
void Shadow::begin_block(int warps) {
  if constexpr (!kChecked) return;
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
  if constexpr (!kChecked) return;
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

Shadow::Stamp Shadow::now(const Machine& m) const {
  const Thread& t = *m.current;
  const std::uint64_t clock = clocks_[t.warp].clock[t.lane][t.lane] & ((1u << kClockBits) - 1);
  return epoch_ << kEpochShift | clock << kThreadBits | t.id;
}

// Whether two accesses of different threads have nothing that orders them; and which thing lacks.
const char* Shadow::clash(const Machine& m, Stamp before, Stamp now) const {
  if (epoch_of(before) != epoch_of(now)) return nullptr;
  const int other = thread_of(before), warp = other / kLanes;
  const Thread& t = *m.current;
  if (other == t.id) return nullptr;
  if (warp != t.warp) return "__syncthreads()";
  if (clock_of(before) <= clocks_[warp].clock[t.lane][other % kLanes]) return nullptr;
  return "__syncwarp() or __syncthreads()";
}

void Shadow::access(Machine& m, Access kind, std::size_t offset, std::size_t bytes, Site site) {
  if constexpr (!kChecked) return;
  const char* verb = kind == Access::kRead ? "reads" : "writes";
  const Object* object = object_at(m, offset, bytes);
  if (!object) {
    const Object* near = nullptr;
    for (int i = 0; i < m.object_count; ++i) {
      if (m.objects[i].begin <= offset + kGap / 2) near = &m.objects[i];
    }
    if (!near) fail(site, "%s shared memory that belongs to nothing", verb);
    fail(site, "%s bytes %td to %td of shared %s, which has %zu", verb,
         static_cast<std::ptrdiff_t>(offset - near->begin),
         static_cast<std::ptrdiff_t>(offset - near->begin + bytes), name(*near), near->bytes);
  }
  const Stamp stamp = now(m);
  for (std::size_t i = offset / kGrain; i * kGrain < offset + bytes; ++i) {
    Cell& cell = cells_[i];
    const std::size_t byte = i * kGrain - object->begin;
    if (cell.writer == kInFlight) {
      fail(site, "%s byte %zu of shared %s before the wait for the copy to it", verb, byte,
           name(*object));
    }
    if (const char* lacks = clash(m, cell.writer, stamp)) {
      fail(site, "%s byte %zu of shared %s, which %s wrote: a race, no %s between", verb, byte,
           name(*object), thread_name(thread_of(cell.writer)), lacks);
    }
    if (kind == Access::kRead) {
      if (epoch_of(cell.writer) < block_epoch_) {
        fail(site, "reads byte %zu of shared %s, which nothing wrote", byte, name(*object));
      }
      if (thread_of(cell.readers[0]) != thread_of(stamp)) cell.readers[1] = cell.readers[0];
      cell.readers[0] = stamp;
    } else {
      for (const Stamp reader : cell.readers) {
        if (const char* lacks = clash(m, reader, stamp)) {
          fail(site, "writes byte %zu of shared %s, which %s read: a race, no %s between", byte,
               name(*object), thread_name(thread_of(reader)), lacks);
        }
      }
      cell.writer = stamp;
    }
  }
}

void Shadow::begin_copy(Machine& m, std::size_t offset, std::size_t bytes, Site site) {
  if constexpr (!kChecked) return;
  access(m, Access::kWrite, offset, bytes, site);
  for (std::size_t i = 0; i < bytes / kGrain; ++i) cells_[offset / kGrain + i].writer = kInFlight;
}

void Shadow::end_copy(Machine& m, std::size_t offset, std::size_t bytes) {
  if constexpr (!kChecked) return;
  const Stamp stamp = now(m);
  for (std::size_t i = 0; i < bytes / kGrain; ++i) cells_[offset / kGrain + i].writer = stamp;
}

}  // namespace cuda_on_host
