// What all launches share.
#pragma once

#include <stdexcept>

#include "device.h"

namespace jops::JOPS_ISA {

// Calls f(T()) with the storage type of a dtype.
template <class F>
void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kBfloat16:
      return f(Bf16());
    case Dtype::kFloat16:
      return f(F16());
  }
}

constexpr std::int64_t kMostBlocks = (std::int64_t{1} << 31) - 1;  // of CUDA, along x

// A grid for `turns` turns of blocks that go on with the next one after a whole grid.
inline unsigned blocks(std::int64_t turns) {
  return static_cast<unsigned>(turns < kMostBlocks ? turns : kMostBlocks);
}

// A grid of blocks with one turn each.
inline unsigned all_blocks(std::int64_t turns) {
  if (turns > kMostBlocks) {
    throw std::invalid_argument("the tensor needs " + std::to_string(turns) +
                                " blocks of threads; allowed: " + std::to_string(kMostBlocks));
  }
  return static_cast<unsigned>(turns);
}

}  // namespace jops::JOPS_ISA
