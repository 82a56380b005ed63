// The kernels of this backend, behind their checks.
#include "../checked.h"
#include "families.h"

namespace jops {

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels all{};
    JOPS_ISA::register_activation(all);
    JOPS_ISA::register_attention(all);
    JOPS_ISA::register_columns(all);
    JOPS_ISA::register_cross_entropy(all);
    JOPS_ISA::register_dropout(all);
    JOPS_ISA::register_group_norm(all);
    JOPS_ISA::register_gated(all);
    JOPS_ISA::register_linear(all);
    JOPS_ISA::register_log_softmax(all);
    JOPS_ISA::register_norm(all);
    JOPS_ISA::register_rotary(all);
    JOPS_ISA::register_softmax(all);
    JOPS_ISA::register_softmax_dropout(all);
    return checked(all);
  }();
  return table;
}

}  // namespace jops
