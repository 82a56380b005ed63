// Sixteen bytes of a tensor: one load or store of a thread.
#pragma once

#include "device.h"

namespace jops::JOPS_ISA {

template <class T>
constexpr int kPack = 16 / sizeof(T);  // numbers of sixteen bytes

// The pack is an array in registers: only ever indexed by constants.
template <class T>
__device__ __forceinline__ void unpack(uint4 words, Compute<T> (&to)[kPack<T>]) {
  const std::uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if constexpr (sizeof(T) == 2) {
      to[i] = dev::widen(T{static_cast<std::uint16_t>(w[i / 2] >> (i % 2 * 16))});
    } else if constexpr (sizeof(T) == 4) {
      std::memcpy(&to[i], &w[i], sizeof(T));
    } else {
      const std::uint64_t bits = w[2 * i] | static_cast<std::uint64_t>(w[2 * i + 1]) << 32;
      std::memcpy(&to[i], &bits, sizeof(T));
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const Compute<T> (&from)[kPack<T>]) {
  std::uint32_t w[4] = {};
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if constexpr (sizeof(T) == 2) {
      w[i / 2] |= static_cast<std::uint32_t>(dev::narrow<T>(from[i]).bits) << (i % 2 * 16);
    } else if constexpr (sizeof(T) == 4) {
      std::memcpy(&w[i], &from[i], sizeof(T));
    } else {
      std::uint64_t bits = 0;
      std::memcpy(&bits, &from[i], sizeof(T));
      w[2 * i] = static_cast<std::uint32_t>(bits);
      w[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
    }
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

JOPS_HD std::int64_t min_size(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// A pack's numbers as they come from memory that is not aligned, or ends within it: `count` of
// them.
template <class T>
__device__ __forceinline__ uint4 load_some(const T* from, int count) {
  Compute<T> numbers[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) numbers[i] = i < count ? dev::widen(from[i]) : Compute<T>(0);
  return pack<T>(numbers);
}
template <class T>
__device__ __forceinline__ void store_some(T* to, const Compute<T> (&from)[kPack<T>], int count) {
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if (i < count) to[i] = dev::narrow<T>(from[i]);
  }
}

// A sum of many numbers that keeps what rounding takes from it (Kahan).
template <class A>
struct LongSum {
  A sum = 0, lost = 0;

  __device__ __forceinline__ void add(A a) {
    const A rest = a + lost, larger = sum + rest;
    lost = rest - (larger - sum);
    if (lost != lost) lost = 0;  // an infinite sum stays infinite
    sum = larger;
  }
  __device__ __forceinline__ void scale(A factor) {
    sum *= factor;
    lost *= factor;
  }
};

// Whether packs can be read from, or written to, p.
inline bool packs_at(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace jops::JOPS_ISA
