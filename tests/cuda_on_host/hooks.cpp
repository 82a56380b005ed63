// The calls that -fsanitize=thread puts at every access to memory of a kernel. There is no
// ThreadSanitizer behind them: they check shared memory, and count the bytes of global memory.
#include "state.h"

namespace cuda_on_host {
namespace {

template <Access kind>
inline void accessed(const void* p, std::size_t bytes, bool aligned, const void* address) {
  Machine* m = running;
  if (m == nullptr) return;  // the code around a launch
  const char* byte = static_cast<const char*>(p);
  const auto offset = static_cast<std::size_t>(byte - m->arena);
  if (m->stacks.contains(p)) return;
  if (static_cast<std::size_t>(byte - reinterpret_cast<const char*>(&place)) < sizeof(place)) {
    return;
  }
  step(*m, {nullptr, 0, address});
  if (aligned && reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
    fail({nullptr, 0, address}, "%s %zu bytes at an address that is no multiple of it",
         kind == Access::kRead ? "reads" : "writes", bytes);
  }
  if (offset < kArenaBytes) {
    m->shadow.access(*m, kind, offset, bytes, {nullptr, 0, address});
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
