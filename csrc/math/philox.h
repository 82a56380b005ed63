// Philox4x32-10 (Salmon et al., SC 2011): a counter-based generator. Generic over the word W: an
// unsigned 64-bit scalar, or a vector of them; a word's value is in the low 32 bits, the upper ones
// hold anything.
#pragma once

#include "common.h"

namespace jops::JOPS_ISA {

// The 64-bit product of the low 32 bits.
JOPS_HD std::uint64_t multiply_low32(std::uint64_t a, std::uint32_t b) {
  return (a & 0xffffffffu) * b;
}
JOPS_HD std::uint64_t high32(std::uint64_t a) { return a >> 32; }

template <class W>
struct Philox {
  W w0, w1, w2, w3;
};

// Several counters side by side: a round of one alone is a chain that leaves most of a processor
// idle. The counter is (counter, 0) and the key `key`, both of 64 bits, low words first.
template <class W, int kCounters>
JOPS_HD void philox(const W (&counter)[kCounters], std::uint64_t key, Philox<W> (&r)[kCounters]) {
#pragma GCC unroll 4
  for (int i = 0; i < kCounters; ++i) {
    const W c = counter[i];
    r[i] = {c, high32(c), c ^ c, c ^ c};
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kCounters; ++i) {
      const W p0 = multiply_low32(r[i].w0, 0xD2511F53u);
      const W p1 = multiply_low32(r[i].w2, 0xCD9E8D57u);
      r[i] = {high32(p1) ^ r[i].w1 ^ std::uint64_t{k0}, p1,
              high32(p0) ^ r[i].w3 ^ std::uint64_t{k1}, p0};
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace jops::JOPS_ISA
