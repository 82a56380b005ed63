// Launches of words.cu.
#pragma once

namespace jops::JOPS_ISA::words {

void run_product(bool bf16, bool transposed, const void* a, const void* b, float* c);
void run_shuffles(int operand, int width, const int* x, int* y);
void run_conversions(bool bf16, const float* x, float* y, int n);
void run_sparse_copy(const float* x, float* y);
void run_places(int* y);
void run_nothing(int* y);

}  // namespace jops::JOPS_ISA::words
