// The device's words on the host: each CUDA thread runs as a fiber of machine.cpp. The names and
// the meaning are those of csrc/cuda/device_nvcc.h. Included by csrc/cuda/device.h alone.
#pragma once

#include <cstring>
#include <new>
#include <tuple>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::cuda_on_host::place.thread)
#define blockIdx (::cuda_on_host::place.block)
#define blockDim (::cuda_on_host::place.block_dim)
#define gridDim (::cuda_on_host::place.grid_dim)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Every call tells its line: the default arguments are evaluated where it is called.

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::barrier({file, line});
}
inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  cuda_on_host::sync_warp(mask, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return cuda_on_host::ballot(mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return cuda_on_host::ballot(mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return cuda_on_host::ballot(mask, predicate != 0, {file, line}) == mask;
}

namespace cuda_on_host {
template <class T>
T shuffle(Move move, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(move, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace cuda_on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return shuffle(cuda_on_host::Move::kIndex, mask, value, lane, width, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return shuffle(cuda_on_host::Move::kXor, mask, value, lane_mask, width, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return shuffle(cuda_on_host::Move::kDown, mask, value, static_cast<int>(delta), width,
                 {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return shuffle(cuda_on_host::Move::kUp, mask, value, static_cast<int>(delta), width,
                 {file, line});
}

namespace jops::JOPS_ISA::dev {

using stream_t = std::intptr_t;
inline stream_t stream_of(const Exec& exec) { return exec.stream; }

// The parameters as the kernel declares them, and a call with them.
template <auto Kernel, class Type = decltype(Kernel)>
struct Call;
template <auto Kernel, class... Parameters>
struct Call<Kernel, void (*)(Parameters...)> {
  using Tuple = std::tuple<Parameters...>;
  static void body(const void* parameters) {
    std::apply(Kernel, *static_cast<const Tuple*>(parameters));
  }
};

inline std::size_t most_shared() { return cuda_on_host::kSharedBytes; }

template <auto Kernel, class... Args>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, stream_t, Args... args) {
  using Tuple = typename Call<Kernel>::Tuple;
  static const std::string name = kernel_name(__PRETTY_FUNCTION__);
  const void* parameters = new (cuda_on_host::parameters(sizeof(Tuple))) Tuple(args...);
  cuda_on_host::run(name, grid, block, shared_bytes, Call<Kernel>::body, parameters);
}

template <class T>
inline char shared_key = 0;
template <class T>
T& shared() {
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 16);
  return *static_cast<T*>(
      cuda_on_host::shared_object(&shared_key<T>, sizeof(T), __PRETTY_FUNCTION__));
}
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_on_host::dynamic_shared());
}

// One access each: the fields of a struct would be read one by one, of any alignment.
typedef unsigned Words16 __attribute__((vector_size(16), may_alias));
inline uint4 load16(const void* global) {
  const Words16 v = *static_cast<const Words16*>(global);
  return {v[0], v[1], v[2], v[3]};
}
inline void store16(void* global, uint4 v) {
  *static_cast<Words16*>(global) = Words16{v.x, v.y, v.z, v.w};
}

inline void store16_shared(void* shared, uint4 v) { store16(shared, v); }

inline void opaque(std::uint32_t&) {}

template <class T>
inline Compute<T> widen(T v) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
  } else if constexpr (std::is_same_v<T, F16>) {
    cuda_on_host::Float16 half;
    std::memcpy(&half, &v, sizeof(half));
    return static_cast<float>(half);
  } else {
    return v;
  }
}

template <class T>
inline T narrow(Compute<T> v) {
  if constexpr (std::is_same_v<T, Bf16>) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    if (v != v) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, F16>) {
    const auto half = static_cast<cuda_on_host::Float16>(v);
    F16 n;
    std::memcpy(&n, &half, sizeof(n));
    return n;
  } else {
    return v;
  }
}

inline void cp_async16(void* shared_to, const void* global_from, bool valid = true,
                       const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::copy_async(shared_to, global_from, valid, {file, line});
}
inline void cp_async_commit() { cuda_on_host::commit_copies(); }
template <int kPending>
inline void cp_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::wait_for_copies(kPending, {file, line});
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row,
                        const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::load_matrices(r, shared_row, false, {file, line});
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row,
                              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::load_matrices(r, shared_row, true, {file, line});
}

template <class T>
inline void mma_16816(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, F16>);
  constexpr auto kHalf =
      std::is_same_v<T, Bf16> ? cuda_on_host::Half::kBf16 : cuda_on_host::Half::kF16;
  cuda_on_host::multiply_tiles(kHalf, c, a, b, {file, line});
}

}  // namespace jops::JOPS_ISA::dev
