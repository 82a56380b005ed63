#include "blocks.h"

namespace jops::JOPS_ISA {

Kernels table() {
  Kernels kernels;
  register_activation(kernels);
  register_cross_entropy(kernels);
  register_attention(kernels);
  register_dropout(kernels);
  register_group_norm(kernels);
  register_gated(kernels);
  register_norm(kernels);
  register_rotary(kernels);
  register_softmax(kernels);
  register_linear(kernels);
  register_probe(kernels);
  return kernels;
}

}  // namespace jops::JOPS_ISA
