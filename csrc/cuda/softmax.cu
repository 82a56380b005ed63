// Softmax and its products.
#include "softmax_launch.cuh"

namespace jops::JOPS_ISA {

void register_softmax(Kernels& table) { softmax::Table::softmax(table); }

}  // namespace jops::JOPS_ISA
