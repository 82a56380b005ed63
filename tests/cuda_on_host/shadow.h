// The checked build: what is known of every two bytes of shared memory, and the checks of an
// access.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

#ifndef CUDA_ON_HOST_CHECKED
#define CUDA_ON_HOST_CHECKED 0
#endif

namespace cuda_on_host {

constexpr bool kChecked = CUDA_ON_HOST_CHECKED;

struct Machine;

enum class Access { kRead, kWrite };

class Shadow {
 public:
  Shadow();
  ~Shadow();

  // All threads of the block are ordered with what came before.
  void order_block() { ++epoch_; }
  void begin_block(int warps);
  void order_warp(int warp, unsigned mask);
  // After a kernel that was left in the middle.
  void forget();

  // An access of the current thread to bytes of an arena's offset on.
  void access(Machine&, Access, std::size_t offset, std::size_t bytes, Site);
  // From here on the bytes are another's to write: an asynchronous copy's.
  void begin_copy(Machine&, std::size_t offset, std::size_t bytes, Site);
  void end_copy(Machine&, std::size_t offset, std::size_t bytes);

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

  Stamp now(const Machine&) const;
  const char* clash(const Machine&, Stamp before, Stamp now) const;

  Cell* cells_ = nullptr;
  Clocks* clocks_ = nullptr;
  std::uint64_t epoch_ = 1, block_epoch_ = 1;
};

}  // namespace cuda_on_host
