// Kernels with planted mistakes, each beside its right form: what the machine must find, and what
// it must let pass. x and y have kThreads elements; one block of kThreads threads unless a case
// says otherwise.
#include <vector>

#include "broken.h"
#include "cuda/device.h"

namespace jops::JOPS_ISA::broken {

constexpr int kThreads = 128, kWarps = kThreads / dev::kWarp;
constexpr unsigned kAll = ~0u;

struct Numbers {
  float v[kThreads];
};
struct Halves {
  alignas(16) std::uint16_t v[kThreads * 8];
};

template <bool kRight>
__global__ void missing_barrier(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  s.v[i] = x[i];
  if constexpr (kRight) __syncthreads();
  y[i] = s.v[kThreads - 1 - i];
}

template <bool kRight>
__global__ void write_after_read(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  s.v[i] = x[i];
  __syncthreads();
  const float other = s.v[(i + 1) % kThreads];
  if constexpr (kRight) __syncthreads();
  s.v[i] = 2 * other;
  y[i] = s.v[i];
}

template <bool kRight>
__global__ void missing_syncwarp(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  s.v[i] = x[i];
  if constexpr (kRight) __syncwarp();
  y[i] = s.v[i ^ 1];
}

// A shuffle exchanges registers: it orders no accesses to memory.
template <bool kRight>
__global__ void shuffle_for_syncwarp(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  s.v[i] = x[i];
  const float next = __shfl_xor_sync(kAll, x[i], 1);
  if constexpr (kRight) __syncwarp();
  y[i] = s.v[i ^ 1] + next;
}

// Each half of a warp waits for itself, and one reads what the other wrote.
template <bool kRight>
__global__ void syncwarp_of_other_lanes(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  s.v[i] = x[i];
  __syncwarp(i % 32 < 16 ? 0xffffu : 0xffff0000u);
  y[i] = s.v[i ^ (kRight ? 8 : 16)];
}

template <bool kRight>
__global__ void syncwarp_between_warps(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  s.v[i] = x[i];
  __syncwarp();
  y[i] = s.v[i ^ (kRight ? 1 : 32)];
}

// All warps write one number.
template <bool kRight>
__global__ void writers_of_one_word(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x, warp = i / dev::kWarp;
  if (i % dev::kWarp == 0) s.v[kRight ? warp : 0] = x[i];
  __syncthreads();
  y[i] = s.v[kRight ? warp : 0];
}

template <bool kRight>
__global__ void shared_off_by_one(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  s.v[kRight ? i : i + 1] = x[i];
  __syncthreads();
  y[i] = i ? s.v[i] : 0;
}

template <bool kRight>
__global__ void dynamic_off_by_one(const float* x, float* y) {
  auto* s = dev::dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  s[i] = x[i];
  __syncthreads();
  y[i] = s[kRight ? i : i + 1];
}

template <bool kRight>
__global__ void global_off_by_one(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  y[kRight ? i : i + 1] = x[i];
}

template <bool kRight>
__global__ void misaligned_vector(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  if (i < kThreads / 4 - 1) dev::store16(y + 4 * i, dev::load16(x + 4 * i + (kRight ? 0 : 1)));
}

template <bool kRight>
__global__ void signed_overflow(const float* x, float* y) {
  const int i = threadIdx.x;
  const int far = kRight ? i : i * (1 << 26);
  y[i] = x[i] + static_cast<float>(far);
}

template <bool kRight>
__global__ void divergent_barrier(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  if (kRight || i % 2) {
    y[i] = x[i];
    __syncthreads();
  } else {
    y[i] = -x[i];
    __syncthreads();
  }
}

template <bool kRight>
__global__ void barrier_of_some_warps(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  if (kRight || i / dev::kWarp != 1) __syncthreads();
  y[i] = x[i];
}

template <bool kRight>
__global__ void exit_before_barrier(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  if (!kRight && i == kThreads - 1) return;
  __syncthreads();
  y[i] = x[i];
}

template <bool kRight>
__global__ void uninitialised_read(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  if (kRight || i != 7) s.v[i] = x[i];
  __syncthreads();
  y[i] = s.v[i];
}

template <bool kRight>
__global__ void lane_outside_mask(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  y[i] = x[i];
  if (i % 32 < 16) y[i] = __shfl_sync(0xffffu, x[i], kRight ? 15 : 16);
}

template <bool kRight>
__global__ void caller_outside_mask(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  if (i % 32 < (kRight ? 16 : 17)) y[i] = __shfl_xor_sync(0xffffu, x[i], 1);
}

// Launched with half a warp beyond the last whole one.
template <bool kRight>
__global__ void absent_lanes(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  y[i] = __shfl_xor_sync(kRight && i >= 32 ? 0xffffu : kAll, x[i], 1);
}

template <bool kRight>
__global__ void exited_lanes(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  if (i % 32 >= 16) return;
  y[i] = __shfl_xor_sync(kRight ? 0xffffu : kAll, x[i], 1);
}

template <bool kRight>
__global__ void different_masks(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  const unsigned own = i % 32 < 16 ? 0xffffu : 0xffff0000u;
  y[i] = __shfl_xor_sync(kRight || i % 32 < 16 ? own : kAll, x[i], 1);
}

template <bool kRight>
__global__ void different_shuffles(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  if (kRight || i % 2) {
    y[i] = __shfl_xor_sync(kAll, x[i], 1);
  } else {
    y[i] = __shfl_xor_sync(kAll, x[i], 1) + 1;
  }
}

// A lane stays at the block's barrier, the others wait for it.
template <bool kRight>
__global__ void shuffle_against_barrier(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  float v = x[i];
  if (kRight || i != 5) v += __any_sync(kAll, v > 0);
  __syncthreads();
  y[i] = v;
}

template <bool kRight>
__global__ void missing_copy_wait(const float* x, float* y) {
  auto* s = dev::dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  if (i < kThreads / 4) dev::cp_async16(s + 4 * i, x + 4 * i);
  dev::cp_async_commit();
  if constexpr (kRight) dev::cp_async_wait<0>();
  __syncthreads();
  y[i] = s[i];
  if constexpr (!kRight) dev::cp_async_wait<0>();
}

// The wait leaves the very group that is read.
template <bool kRight>
__global__ void wait_of_one_group_too_few(const float* x, float* y) {
  auto* s = dev::dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  if (i < kThreads / 4) dev::cp_async16(s + 4 * i, x + 4 * i);
  dev::cp_async_commit();
  dev::cp_async_wait<kRight ? 0 : 1>();
  __syncthreads();
  y[i] = s[i];
  dev::cp_async_wait<0>();
}

template <bool kRight>
__global__ void copy_without_barrier(const float* x, float* y) {
  auto* s = dev::dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  if (i < kThreads / 4) dev::cp_async16(s + 4 * i, x + 4 * i);
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  if constexpr (kRight) __syncthreads();
  y[i] = s[i];
}

// The next stage is copied over what others still read.
template <bool kRight>
__global__ void copy_over_readers(const float* x, float* y) {
  auto* s = dev::dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  s[i] = x[i];
  __syncthreads();
  const float v = s[kThreads - 1 - i];
  if constexpr (kRight) __syncthreads();
  if (i < kThreads / 4) dev::cp_async16(s + 4 * i, x + 4 * i);
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  __syncthreads();
  y[i] = v + s[i];
}

template <bool kRight>
__global__ void copy_left_behind(const float* x, float* y) {
  auto* s = dev::dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  if (i < kThreads / 4) dev::cp_async16(s + 4 * i, x + 4 * i, i % 2);
  dev::cp_async_commit();
  if constexpr (kRight) dev::cp_async_wait<0>();
  y[i] = x[i];
}

template <bool kRight>
__global__ void misaligned_copy(const float* x, float* y) {
  auto* s = dev::dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  if (i < kThreads / 4 - 1) dev::cp_async16(s + 4 * i, x + 4 * i + (kRight ? 0 : 2));
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  y[i] = x[i];
}

// ldmatrix reads rows that other lanes wrote.
template <bool kRight>
__global__ void matrix_without_syncwarp(const float* x, float* y) {
  auto& s = dev::shared<Halves>();
  const unsigned i = threadIdx.x;
  for (int j = 0; j < 8; ++j) s.v[8 * i + j] = static_cast<std::uint16_t>(x[i]);
  if constexpr (kRight) __syncwarp();
  std::uint32_t r[4];
  dev::ldmatrix_x4(r, s.v + 8 * (kRight ? i : i ^ 1));
  y[i] = static_cast<float>(r[0] & 0xffff);
}

template <bool kRight>
__global__ void misaligned_matrix(const float* x, float* y) {
  auto& s = dev::shared<Halves>();
  const unsigned i = threadIdx.x;
  for (int j = 0; j < 8; ++j) s.v[8 * i + j] = static_cast<std::uint16_t>(x[i]);
  __syncthreads();
  std::uint32_t r[4];
  dev::ldmatrix_x4(r, s.v + (kRight ? 8 * i : 4 * i + 4));
  y[i] = static_cast<float>(r[0] & 0xffff);
}

template <bool kRight>
__global__ void endless_loop(const float* x, float* y) {
  auto& s = dev::shared<Numbers>();
  const unsigned i = threadIdx.x;
  volatile float* mine = &s.v[i];
  *mine = x[i];
  while (!kRight && *mine >= 0) *mine = x[i];
  y[i] = *mine;
}

template <bool kRight>
__global__ void too_much_shared_memory(const float* x, float* y) {
  struct Large {
    float v[12 << 10];
  };
  struct Small {
    float v[1];
  };
  auto& large = dev::shared<Large>();
  large.v[threadIdx.x] = x[threadIdx.x];
  if constexpr (!kRight) {
    if (threadIdx.x == 0) dev::shared<Small>().v[0] = 0;
  }
  y[threadIdx.x] = large.v[threadIdx.x];
}

template <bool kRight>
__global__ void too_many_threads(const float* x, float* y) {
  if (threadIdx.x < kThreads) y[threadIdx.x] = x[threadIdx.x];
}

// Blocks that write the same number: no error here, but which of them is last depends on the seed.
template <bool kRight>
__global__ void blocks_of_one_word(const float*, float* y) {
  y[kRight ? threadIdx.x : 0] = static_cast<float>(kRight ? threadIdx.x : blockIdx.x);
}

namespace {

template <auto Right, auto Wrong>
Case one(const char* name, const char* found_by, dim3 block = kThreads, dim3 wrong_block = 0,
         dim3 grid = 1) {
  if (wrong_block.x == 0) wrong_block = block;
  return {name, found_by, [=](bool right) {
            std::vector<float> x(kThreads), y(kThreads);
            for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i);
            const std::size_t dynamic = kThreads * sizeof(float);
            if (right) {
              dev::launch<Right>(grid, block, dynamic, 0, x.data(), y.data());
            } else {
              dev::launch<Wrong>(grid, wrong_block, dynamic, 0, x.data(), y.data());
            }
            return y;
          }};
}

}  // namespace

#define CASE(name, ...) one<name<true>, name<false>>(#name, __VA_ARGS__)

std::vector<Case> cases() {
  const char *all = "plain checked sanitize", *checked = "checked", *sanitize = "sanitize";
  return {
      CASE(missing_barrier, checked),
      CASE(write_after_read, checked),
      CASE(missing_syncwarp, checked),
      CASE(shuffle_for_syncwarp, checked),
      CASE(syncwarp_of_other_lanes, checked),
      CASE(syncwarp_between_warps, checked),
      CASE(writers_of_one_word, checked),
      CASE(shared_off_by_one, "checked sanitize"),
      CASE(dynamic_off_by_one, "checked sanitize"),
      CASE(global_off_by_one, sanitize),
      CASE(misaligned_vector, "checked sanitize"),
      CASE(signed_overflow, sanitize),
      CASE(divergent_barrier, all),
      CASE(barrier_of_some_warps, all),
      CASE(exit_before_barrier, all),
      CASE(uninitialised_read, checked),
      CASE(lane_outside_mask, all),
      CASE(caller_outside_mask, all),
      CASE(absent_lanes, all, 48),
      CASE(exited_lanes, all),
      CASE(different_masks, all),
      CASE(different_shuffles, all),
      CASE(shuffle_against_barrier, all),
      CASE(missing_copy_wait, checked),
      CASE(wait_of_one_group_too_few, checked),
      CASE(copy_without_barrier, checked),
      CASE(copy_over_readers, checked),
      CASE(copy_left_behind, all),
      CASE(misaligned_copy, all),
      CASE(matrix_without_syncwarp, checked),
      CASE(misaligned_matrix, all),
      CASE(endless_loop, checked),
      CASE(too_much_shared_memory, all, kThreads),
      CASE(too_many_threads, all, 1024, 1056),
      CASE(blocks_of_one_word, "", kThreads, kThreads, 64),
  };
}

}  // namespace jops::JOPS_ISA::broken
