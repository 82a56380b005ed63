// Log-softmax and its products.
#include "softmax_launch.cuh"

namespace jops::JOPS_ISA {

void register_log_softmax(Kernels& table) { softmax::Table::log_softmax(table); }

}  // namespace jops::JOPS_ISA
