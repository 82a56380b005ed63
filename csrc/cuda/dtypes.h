// What all launches share.
#pragma once

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

// A grid for `turns` turns of blocks that go on with the next one after a whole grid.
inline unsigned blocks(std::int64_t turns) {
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 1;
  return static_cast<unsigned>(turns < kMost ? turns : kMost);
}

}  // namespace jops::JOPS_ISA
