// Kernels that use the device's words one by one, for test_words.py to compare with what CUDA's
// documentation says of them.
#include "cuda/device.h"
#include "words.h"

namespace jops::JOPS_ISA::words {

struct Operands {
  alignas(16) std::uint16_t a[16][16], b[16][16];
};

// c = a b for 16x16 numbers, by one warp. kTransposed: b is stored by columns.
template <class T, bool kTransposed>
__global__ void product(const T* a, const T* b, float* c) {
  auto& s = dev::shared<Operands>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 32; i += dev::kWarp) {
    dev::cp_async16(&s.a[i / 2][i % 2 * 8], a + 8 * i);
    dev::cp_async16(&s.b[i / 2][i % 2 * 8], b + 8 * i);
  }
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  __syncwarp();
  std::uint32_t left[4], right[4];
  dev::ldmatrix_x4(left, &s.a[lane % 16][lane / 16 * 8]);
  if constexpr (kTransposed) {
    dev::ldmatrix_x4(right, &s.b[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  } else {
    dev::ldmatrix_x4_trans(right, &s.b[lane % 16][lane / 16 * 8]);
  }
  const int row = lane / 4, column = lane % 4 * 2;
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t part[2] = {right[2 * half], right[2 * half + 1]};
    float sums[4] = {};
    dev::mma_16816<T>(sums, left, part);
    float* to = c + 16 * row + 8 * half + column;
    to[0] = sums[0];
    to[1] = sums[1];
    to[16 * 8] = sums[2];
    to[16 * 8 + 1] = sums[3];
  }
}

__global__ void shuffles(int operand, int width, const int* x, int* y) {
  const int lane = threadIdx.x;
  const int v = x[lane];
  y[lane] = __shfl_sync(~0u, v, operand, width);
  y[32 + lane] = __shfl_xor_sync(~0u, v, operand, width);
  y[64 + lane] = __shfl_down_sync(~0u, v, operand, width);
  y[96 + lane] = __shfl_up_sync(~0u, v, operand, width);
  y[128 + lane] = static_cast<int>(__shfl_xor_sync(~0u, static_cast<double>(v), operand, width));
  y[160 + lane] = static_cast<int>(__ballot_sync(~0u, v % 3 == 0));
}

template <class T>
__global__ void conversions(const float* x, float* y, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    y[i] = dev::widen(dev::narrow<T>(x[i]));
  }
}

// Copies every other pack of four, and zeros the others.
__global__ void sparse_copy(const float* x, float* y) {
  auto* s = dev::dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  dev::cp_async16(s + 4 * i, x + 4 * i, i % 2 == 0);
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  for (int j = 0; j < 4; ++j) y[4 * i + j] = s[4 * i + j];
}

// Where each thread is: of every block and thread its number.
__global__ void places(int* y) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  y[i] += static_cast<int>(i) + 1;
}

template <class T>
void run_product(bool transposed, const void* a, const void* b, float* c) {
  const auto* left = static_cast<const T*>(a);
  const auto* right = static_cast<const T*>(b);
  if (transposed) {
    dev::launch<product<T, true>>(1, 32, 0, 0, left, right, c);
  } else {
    dev::launch<product<T, false>>(1, 32, 0, 0, left, right, c);
  }
}

void run_product(bool bf16, bool transposed, const void* a, const void* b, float* c) {
  bf16 ? run_product<Bf16>(transposed, a, b, c) : run_product<F16>(transposed, a, b, c);
}
void run_shuffles(int operand, int width, const int* x, int* y) {
  dev::launch<shuffles>(1, 32, 0, 0, operand, width, x, y);
}
void run_conversions(bool bf16, const float* x, float* y, int n) {
  if (bf16) {
    dev::launch<conversions<Bf16>>(8, 256, 0, 0, x, y, n);
  } else {
    dev::launch<conversions<F16>>(8, 256, 0, 0, x, y, n);
  }
}
void run_sparse_copy(const float* x, float* y) {
  dev::launch<sparse_copy>(1, 32, 32 * 16, 0, x, y);
}
void run_places(int* y) { dev::launch<places>(dim3(3, 2, 2), dim3(5, 3, 4), 0, 0, y); }
void run_nothing(int* y) { dev::launch<places>(dim3(3, 0), dim3(5, 3, 4), 0, 0, y); }

}  // namespace jops::JOPS_ISA::words
