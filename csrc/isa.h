// The instruction sets that this architecture is built for, worst first: CMakeLists.txt compiles
// csrc/cpu once for each, in the namespace jops::<name>.
#pragma once

#if defined(__x86_64__)
#define JOPS_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512bf16) X(amx)
#elif defined(__aarch64__)
#define JOPS_FOR_EACH_ISA(X) X(neon)
#else
#define JOPS_FOR_EACH_ISA(X) X(baseline)
#endif
