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

template <class W>
struct Philox {
  W w0, w1, w2, w3;
};

// The counter is (counter, 0) and the key `key`, both of 64 bits, low words first.
template <class W>
JOPS_HD Philox<W> philox(W counter, std::uint64_t key) {
  W c0 = counter, c1 = counter >> 32, c2 = counter ^ counter, c3 = c2;
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const W p0 = multiply_low32(c0, 0xD2511F53u);
    const W p1 = multiply_low32(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ std::uint64_t{k0};
    c2 = (p0 >> 32) ^ c3 ^ std::uint64_t{k1};
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace jops::JOPS_ISA
