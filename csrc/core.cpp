#include "core.h"

#include <dlfcn.h>
#include <omp.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "checked.h"
#include "isas.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif

namespace jops {

#define JOPS_DECLARE(name) \
  namespace name {         \
  Kernels table();         \
  }
JOPS_FOR_EACH_ISA(JOPS_DECLARE)
#undef JOPS_DECLARE

namespace {

// AMX in bfloat16: the processor has it, and the system lets this process use its registers.
bool grants_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;  // of EDX
  constexpr long kRequest = 0x1023, kTileData = 18;       // ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBf16) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512")) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(name, "avx512bf16")) return bf16;
  if (!std::strcmp(name, "amx")) return bf16 && grants_amx();
#endif
  (void)name;
  return true;
}

struct Isa {
  std::string name;
  Kernels (*table)();
};

std::vector<Isa> runnable() {
  std::vector<Isa> isas;
#define JOPS_ADD(name) \
  if (runs(#name)) isas.push_back({#name, name::table});
  JOPS_FOR_EACH_ISA(JOPS_ADD)
#undef JOPS_ADD
  return isas;
}

Isa choose() {
  const std::vector<Isa> isas = runnable();
  const char* wanted = std::getenv("JACOBIAN_OPS_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.back();
  std::string names;
  for (const Isa& isa : isas) {
    if (isa.name == wanted) return isa;
    names += (names.empty() ? "" : ", ") + isa.name;
  }
  throw std::runtime_error("JACOBIAN_OPS_ISA: this build and machine run " + names + ", got " +
                           wanted);
}

const Isa& chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = checked(chosen().table());
  return table;
}

const std::string& isa() { return chosen().name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : runnable()) names.push_back(isa.name);
  return names;
}

OpenMp openmp() {
  Dl_info info{};
  const int found = dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info);
  return {found && info.dli_fname ? info.dli_fname : "", _OPENMP, omp_get_max_threads()};
}

const char* processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "other";
}

std::string compiler() {
#if defined(__clang__)
  return std::string("Clang ") + __clang_version__;
#else
  return std::string("GCC ") + __VERSION__;
#endif
}

std::int64_t stream_threshold() {
  // The last-level cache of a large socket is shared with others (most of a cloud's machines): what
  // one program keeps there is less, and beyond 32 MiB plain stores were never seen to be faster.
  constexpr std::int64_t kUnknown = 16 << 20, kMost = 32 << 20;
  static const std::int64_t bytes = [] {
    long cache = -1;
#ifdef _SC_LEVEL3_CACHE_SIZE
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    if (cache <= 0) return kUnknown;
    return cache / 2 < kMost ? cache / 2 : kMost;
  }();
  return bytes;
}

}  // namespace jops
