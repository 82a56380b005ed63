// Log-softmax and its products.
#include "softmax_launch.cuh"

namespace jops::JOPS_ISA {

void register_log_softmax(Kernels& table) {
  using namespace softmax;
  table.log_softmax = one_to_one<LogSoftmaxRow>;
  table.log_softmax_vjp = two_to_one<LogSoftmaxVjpRow>;
  table.log_softmax_tangent = two_to_one<LogSoftmaxTangentRow>;
  table.log_softmax_jvp = two_to_two<LogSoftmaxJvpRow>;
  table.log_softmax_vjp_vjp = three_to_two<LogSoftmaxVjpVjpRow>;
  table.log_softmax_vjp_jvp = vjp_jvp<LogSoftmaxVjpJvpRow>;
}

}  // namespace jops::JOPS_ISA
