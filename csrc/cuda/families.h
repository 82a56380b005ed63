// The kernel families of the CUDA backend: each puts its launches into the table.
#pragma once

#include "../kernels.h"

namespace jops::JOPS_ISA {

void register_activation(Kernels& table);
void register_attention(Kernels& table);
void register_columns(Kernels& table);
void register_cross_entropy(Kernels& table);
void register_dropout(Kernels& table);
void register_group_norm(Kernels& table);
void register_gated(Kernels& table);
void register_linear(Kernels& table);
void register_log_softmax(Kernels& table);
void register_norm(Kernels& table);
void register_rotary(Kernels& table);
void register_softmax(Kernels& table);
void register_softmax_dropout(Kernels& table);

}  // namespace jops::JOPS_ISA
