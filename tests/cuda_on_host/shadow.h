// The checked build: what is known of every two bytes of shared memory, and the checks of an
// access.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace cuda_on_host {

struct Machine;
struct Object;
struct Thread;

enum class Access { kRead, kWrite };

#ifdef CUDA_ON_HOST_CHECKED

class Shadow {
 public:
  Shadow();
  ~Shadow();

  void begin_block(int warps);
  // All threads of the block, or some of a warp, are ordered with what came before.
  void order_block() { ++epoch_; }
  void order_warp(int warp, unsigned mask);
  // The current thread is another, or was ordered.
  void enter(const Thread&);
  // After a kernel that was left in the middle.
  void forget();

  // An access of the current thread to bytes of an arena's offset on.
  void access(Machine&, Access, std::size_t offset, std::size_t bytes, const Site&);
  void check(Machine&, Access, std::size_t offset, std::size_t bytes, const Site&);  // inlined
  // From here on the bytes are another's to write: an asynchronous copy's.
  void begin_copy(Machine&, std::size_t offset, std::size_t bytes, const Site&);
  void end_copy(std::size_t offset, std::size_t bytes);

 private:
  // An access packed into a word: the block's barriers so far, the thread's own clock, the thread.
  // 0: none.
  using Stamp = std::uint64_t;
  struct Cell {
    Stamp writer, readers[2];  // the last ones; two readers differ
  };
  // clock[a][b]: lane a is ordered after what lane b did until b's clock was this.
  struct Clocks {
    std::uint32_t clock[32][32];
    bool used;
  };

  void check_writer(const Machine&, Access, Stamp writer, const Object&, std::size_t offset,
                    const Site&) const;
  const char* clash(const Machine&, Stamp before) const;

  Cell* cells_ = nullptr;
  Clocks* clocks_ = nullptr;
  std::uint64_t epoch_ = 1, block_epoch_ = 1;
  Stamp now_ = 0;  // of the current thread
};

#else

// The other builds know nothing of shared memory.
struct Shadow {
  void order_block() {}
  void begin_block(int) {}
  void order_warp(int, unsigned) {}
  void enter(const Thread&) {}
  void forget() {}
  void access(Machine&, Access, std::size_t, std::size_t, const Site&) {}
  void begin_copy(Machine&, std::size_t, std::size_t, const Site&) {}
  void end_copy(std::size_t, std::size_t) {}
};

#endif

}  // namespace cuda_on_host
