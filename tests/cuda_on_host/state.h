// The machine's state: one block of a kernel, run by one thread of the operating system. No
// templates of the library in here: a copy that was compiled into a kernel file could be linked in.
#pragma once

#include <cstdarg>
#include <cstdint>

#include "fiber.h"
#include "machine.h"
#include "shadow.h"

namespace cuda_on_host {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr std::size_t kStaticBytes = 48 << 10;  // of shared memory, as every GPU has
// Objects of shared memory lie apart, so that what runs over an end hits no other.
constexpr std::size_t kGap = 1 << 10, kMargin = 64 << 10;
constexpr std::size_t kArenaBytes = kMargin + (128 << 10) + kMargin;
constexpr int kMaxObjects = 16, kMaxCopies = 64;           // copies: of one thread
constexpr std::int64_t kMaxSteps = std::int64_t{1} << 28;  // of a block

// An asynchronous copy of 16 bytes that was asked for.
struct Copy {
  char* to;
  const void* from;  // null: zeros
  int group;
};

struct Thread {
  void* stack_pointer;
  void* fake_stack;  // AddressSanitizer's
  int stack;
  std::uint16_t id;
  std::uint8_t warp, lane;
  bool started;
  Site site;  // where it waits
  int groups, copy_count;
};

// The lanes of a mask that meet in an operation of their warp. The last one to come does the work
// for all.
struct Group {
  void (*finish)(unsigned mask, void* const* data);
  unsigned mask, arrived;
  Site site;
  void* data[kLanes];
};

struct Warp {
  unsigned alive, ready;  // ready: could go on, or start
  int groups;
  Group group[kLanes];
};

// A shared object: its place in the arena.
struct Object {
  const void* key;
  const char* signature;
  std::size_t begin, bytes;
};

struct Machine {
  Machine();
  ~Machine();

  Stacks stacks{kMaxThreads + 1};  // the last one holds the parameters
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  int free_stacks[kMaxThreads], free_count;
  char* arena;
  Shadow shadow;

  // The launch.
  void (*body)(const void*);
  const void* parameters;
  int thread_count;
  std::uint64_t seed, random, bytes[2];  // of global memory, read and written
  Object objects[kMaxObjects];
  int object_count;
  std::size_t arena_used;

  // The block.
  Thread* current = nullptr;
  unsigned ready_warps;
  int finished, at_barrier;
  Site barrier_site;
  int barrier_first;  // the thread that came first
  std::int64_t steps;
  Copy copies[kMaxThreads][kMaxCopies];

  void* main_stack_pointer;
  void* main_fake_stack;
  const void* main_bottom;
  std::size_t main_bytes;

  char error[512];  // empty: none
  Site error_site;
};

// Of this thread of the operating system; null while no kernel runs.
extern __thread Machine* running __attribute__((tls_model("initial-exec")));

// Ends the kernel with an error of the current thread. Must run on a fiber.
[[noreturn]] void fail(const Site&, const char* format, ...) __attribute__((format(printf, 2, 3)));

// "thread (3, 0, 0)", in a buffer that lasts for a few calls.
const char* thread_name(int id);

// The object that all of the bytes lie in, or null.
inline const Object* object_at(const Machine& m, std::size_t offset, std::size_t bytes) {
  for (int i = 0; i < m.object_count; ++i) {
    const Object& o = m.objects[i];
    if (offset >= o.begin && offset + bytes <= o.begin + o.bytes) return &o;
  }
  return nullptr;
}

// Counts a step of the block, and fails where there are so many that it hangs.
inline void step(Machine& m, const Site& site) {
  if (__builtin_expect(++m.steps > kMaxSteps, false)) {
    fail(site, "still runs after %ld steps of its block", static_cast<long>(kMaxSteps));
  }
}

}  // namespace cuda_on_host
