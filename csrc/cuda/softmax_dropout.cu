// Softmax with dropout after it, and its products.
#include "softmax_launch.cuh"

namespace jops::JOPS_ISA {

void register_softmax_dropout(Kernels& table) { softmax::Table::softmax_dropout(table); }

}  // namespace jops::JOPS_ISA
