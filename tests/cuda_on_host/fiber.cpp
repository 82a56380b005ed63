#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__x86_64__)
asm(R"(
.text
.globl cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch, %function
cuda_on_host_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");
#else
#error "cuda_on_host: no switch of stacks for this processor"
#endif

namespace cuda_on_host {

Stacks::Stacks(int count) : bytes_(count * kPitch) {
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(p);
}

Stacks::~Stacks() {
  for (int stack = 0; stack < guarded_; ++stack) forget(stack);
  munmap(memory_, bytes_);
}

void Stacks::forget([[maybe_unused]] int stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom(stack), kStackBytes);
#endif
}

void* Stacks::prepare(int stack, void (*entry)()) {
  for (; guarded_ <= stack; ++guarded_) mprotect(memory_ + guarded_ * kPitch, kGuardBytes, 0);
  // Tops at equal offsets would all fall into the same sets of the cache.
  const std::size_t shift = stack % 64 * 192;
  void** top = reinterpret_cast<void**>(static_cast<char*>(bottom(stack)) + kStackBytes - shift);
#if defined(__x86_64__)
  constexpr int kRegisters = 6;
  *--top = nullptr;  // where entry() would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kRegisters; ++i) *--top = nullptr;
#else
  constexpr int kSaved = 20, kReturn = 11;  // of 8 bytes; x30
  top -= kSaved;
  for (int i = 0; i < kSaved; ++i) top[i] = nullptr;
  top[kReturn] = reinterpret_cast<void*>(entry);
#endif
  return top;
}

}  // namespace cuda_on_host
