// Softmax and its products.
#include "softmax_launch.cuh"

namespace jops::JOPS_ISA {

void register_softmax(Kernels& table) {
  using namespace softmax;
  table.softmax = one_to_one<SoftmaxRow>;
  table.softmax_vjp = two_to_one<SoftmaxVjpRow>;
  table.softmax_jvp = two_to_two<SoftmaxJvpRow>;
  table.softmax_vjp_vjp = three_to_two<SoftmaxVjpVjpRow>;
  table.softmax_vjp_jvp = vjp_jvp<SoftmaxVjpJvpRow>;
}

}  // namespace jops::JOPS_ISA
