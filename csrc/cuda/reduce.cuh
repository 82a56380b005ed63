// Reductions over the threads of a warp or a block, in an order that does not depend on time.
#pragma once

#include "device.h"

namespace jops::JOPS_ISA {

struct Larger {
  template <class A>
  static __device__ __forceinline__ A join(A a, A b) {
    return a > b ? a : b;
  }
};
struct Sum {
  template <class A>
  static __device__ __forceinline__ A join(A a, A b) {
    return a + b;
  }
};

// One number from those of kLanes neighbouring threads of a warp, the same for all of them.
template <class Op, int kLanes, class A>
__device__ __forceinline__ A over_lanes(A a) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    a = Op::join(a, __shfl_xor_sync(~0u, a, apart));
  }
  return a;
}

// The same of all threads of a block. Calls follow each other only after a barrier.
constexpr int kMostWarps = 16;
template <class A, int kCount>
struct OfWarps {
  A of[kCount][kMostWarps];
};
template <class Op, class A, int kCount>
__device__ __forceinline__ void over_block(A (&a)[kCount]) {
  auto& warps = dev::shared<OfWarps<A, kCount>>();
  const int warp = threadIdx.x / dev::kWarp, count = blockDim.x / dev::kWarp;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    a[k] = over_lanes<Op, dev::kWarp>(a[k]);
    if (threadIdx.x % dev::kWarp == 0) warps.of[k][warp] = a[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    a[k] = warps.of[k][0];
    for (int i = 1; i < count; ++i) a[k] = Op::join(a[k], warps.of[k][i]);
  }
  __syncthreads();
}

}  // namespace jops::JOPS_ISA
