// Stacks, and the switch from one to another: what a thread of CUDA is made of here.
#pragma once

#include <cstddef>

namespace cuda_on_host {

// Leaves this stack, storing where at *from, and goes on where `to` was left. Only registers that a
// call preserves are kept: a dozen instructions.
extern "C" void cuda_on_host_switch(void** from, void* to);

// Stacks of kStackBytes, each above a page that faults. Memory is taken when it is touched.
class Stacks {
 public:
  static constexpr std::size_t kStackBytes = 256 << 10;
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;

  // Makes the stack begin with a call of entry(), which never returns; gives what to switch to.
  void* prepare(int stack, void (*entry)());
  // After frames were left for good: AddressSanitizer still holds them for alive.
  void forget(int stack);

  void* bottom(int stack) const { return memory_ + stack * kPitch + kGuardBytes; }
  bool contains(const void* p) const {
    return static_cast<std::size_t>(static_cast<const char*>(p) - memory_) < bytes_;
  }

 private:
  static constexpr std::size_t kGuardBytes = 64 << 10;  // a page, whatever its size is
  static constexpr std::size_t kPitch = kStackBytes + kGuardBytes;
  char* memory_;
  std::size_t bytes_;
  int guarded_ = 0;  // stacks below this one have their guard
};

}  // namespace cuda_on_host
