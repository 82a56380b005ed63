// Softmax and its VJP from C++, without Python: for each row y = softmax(x) and
// gx = y * (gy - <y, gy>).
#include <cstdio>
#include <vector>

#include "core.h"

int main() {
  const jops::Rows rows{/*outer=*/2, /*n=*/3, /*inner=*/1};
  std::vector<float> x{1, 2, 3, -1, 0, 100}, gy{1, 0, 0, 0, 0, 1}, y(6), gx(6);
  const auto buffer = [](std::vector<float>& v) {
    return jops::Buffer{v.data(), static_cast<std::int64_t>(v.size()), jops::Dtype::kFloat32};
  };
  const jops::Kernels& kernels = jops::kernels();
  const jops::Exec exec{/*threads=*/1};
  kernels.softmax(rows, buffer(x), buffer(y), exec);
  kernels.softmax_vjp(rows, buffer(y), buffer(gy), buffer(gx), exec);

  std::printf("instruction set: %s\n", jops::isa().c_str());
  for (int row = 0; row < 2; ++row) {
    double sum = 0;  // the VJP of a softmax sums to 0: adding a constant to a row changes nothing
    for (int i = 3 * row; i < 3 * row + 3; ++i) {
      std::printf("x %7.2f   y %.6f   gx % .6f\n", x[i], y[i], gx[i]);
      sum += gx[i];
    }
    if (sum > 1e-6 || sum < -1e-6) return 1;
  }
  return 0;
}
