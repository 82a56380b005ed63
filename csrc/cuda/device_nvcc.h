// The device's words under nvcc. Included by device.h alone.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>

namespace jops::JOPS_ISA::dev {

using stream_t = cudaStream_t;
inline stream_t stream_of(const Exec& exec) { return reinterpret_cast<stream_t>(exec.stream); }

inline void check(cudaError_t error, const char* signature) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the runtime would report it again to the next call
  throw std::runtime_error(kernel_name(signature) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// Shared memory that a block may have on the current device, static and dynamic together.
inline std::size_t most_shared() {
  static std::atomic<int> known[64];  // by device; 0: not asked yet
  int device = 0;
  check(cudaGetDevice(&device), __PRETTY_FUNCTION__);
  int bytes = device < 64 ? known[device].load() : 0;
  if (bytes == 0) {
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          __PRETTY_FUNCTION__);
    if (device < 64) known[device] = bytes;
  }
  return static_cast<std::size_t>(bytes);
}

// Runs a kernel on `stream`, with `shared_bytes` of dynamic shared memory. An empty grid is no
// launch.
template <auto Kernel, class... Args>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, stream_t stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 0) {
    constexpr std::size_t kWithoutAsking = 48 << 10;  // static and dynamic together
    cudaFuncAttributes has;
    check(cudaFuncGetAttributes(&has, Kernel), __PRETTY_FUNCTION__);
    // All there is: another thread may be about to launch the kernel with more.
    const int most = static_cast<int>(most_shared() - has.sharedSizeBytes);
    if (has.sharedSizeBytes + shared_bytes > kWithoutAsking &&
        has.maxDynamicSharedSizeBytes < most) {
      check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
            __PRETTY_FUNCTION__);
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, Kernel, args...), __PRETTY_FUNCTION__);
}

// Shared memory: calls with one T give one object, so each purpose has a struct of its own.
template <class T>
__device__ __forceinline__ T& shared() {
  __shared__ __align__(16) T object;
  return object;
}
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char jops_dynamic_shared[];
  return reinterpret_cast<T*>(jops_dynamic_shared);
}

// Sixteen bytes of global memory as one access: the compiler would take an assignment apart where
// it joins it with stores of single numbers in another branch.
__device__ __forceinline__ uint4 load16(const void* global) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(global)));
  return v;
}
__device__ __forceinline__ void store16(void* global, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store16_shared(void* shared, uint4 v) {
  *static_cast<uint4*>(shared) = v;
}

// Keeps the compiler from computing with v before this point, and thus from holding both v and what
// it is converted to in registers.
__device__ __forceinline__ void opaque(std::uint32_t& v) { asm volatile("" : "+r"(v)); }

template <class T>
__device__ __forceinline__ Compute<T> widen(T v) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return __uint_as_float(static_cast<std::uint32_t>(v.bits) << 16);
  } else if constexpr (std::is_same_v<T, F16>) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
    return wide;
  } else {
    return v;
  }
}

// Rounds to the nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(Compute<T> v) {
  if constexpr (std::is_same_v<T, Bf16>) {
#if __CUDA_ARCH__ >= 800
    Bf16 n;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(n.bits) : "f"(v));
    return n;
#else
    const std::uint32_t bits = __float_as_uint(v);
    if (v != v) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
  } else if constexpr (std::is_same_v<T, F16>) {
    F16 n;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(n.bits) : "f"(v));
    return n;
  } else {
    return v;
  }
}

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// An asynchronous copy of 16 bytes, or of zeros. It is there after a wait of the thread that asked
// for it, and for others after a barrier too.
__device__ __forceinline__ void cp_async16(void* shared_to, const void* global_from,
                                           bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared_to)),
               "l"(__cvta_generic_to_global(global_from)), "r"(valid ? 16 : 0)
               : "memory");
#else
  store16_shared(shared_to, valid ? load16(global_from) : uint4{});
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all committed groups but the last kPending.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 of matrix l / 8, and
// gets of each matrix the numbers 2 (l % 4) and the next of row l / 4; transposed: of that column.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// c += a b for tiles of 16x16 and 16x8 numbers, summed in fp32. With g = lane / 4, q = 2 (lane %
// 4): a holds rows g, g + 8, g, g + 8 at columns q, q, q + 8, q + 8; b rows q and q + 8 of column
// g; c columns q, q + 1 of row g, then of row g + 8. A register's two numbers are neighbours in a's
// column or b's row, the first one low.
template <class T>
__device__ __forceinline__ void mma_16816(float (&c)[4], const std::uint32_t (&a)[4],
                                          const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, F16>);
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  if constexpr (std::is_same_v<T, F16>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
  } else {
    // Turing has no tensor cores for bfloat16: gather the rows and columns from their lanes.
    const int lane = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp;
    const int row = lane / 4 * 4, column = lane % 4 * 8;
    const auto low = [](std::uint32_t v) { return __uint_as_float(v << 16); };
    const auto high = [](std::uint32_t v) { return __uint_as_float(v & 0xffff0000u); };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const std::uint32_t a0 = __shfl_sync(~0u, a[2 * half], row + j);
        const std::uint32_t a1 = __shfl_sync(~0u, a[2 * half + 1], row + j);
        const std::uint32_t b0 = __shfl_sync(~0u, b[half], column + j);
        const std::uint32_t b1 = __shfl_sync(~0u, b[half], column + 4 + j);
        c[0] = ::fmaf(high(a0), high(b0), ::fmaf(low(a0), low(b0), c[0]));
        c[1] = ::fmaf(high(a0), high(b1), ::fmaf(low(a0), low(b1), c[1]));
        c[2] = ::fmaf(high(a1), high(b0), ::fmaf(low(a1), low(b0), c[2]));
        c[3] = ::fmaf(high(a1), high(b1), ::fmaf(low(a1), low(b1), c[3]));
      }
    }
  }
#endif
}

}  // namespace jops::JOPS_ISA::dev
