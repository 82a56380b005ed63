// Softmax with dropout after it, and its products.
#include "softmax_launch.cuh"

namespace jops::JOPS_ISA {
namespace {

void forward(const Rows& rows, const Buffer& x, const Buffer& y, const Mask& mask,
             const Exec& exec) {
  softmax::launch<SoftmaxRow, true>(rows, {x}, {y}, exec, mask);
}
void vjp(const Rows& rows, const Buffer& x, const Buffer& gy, const Buffer& gx, const Mask& mask,
         const Exec& exec) {
  softmax::launch<SoftmaxDropoutVjpRow, true>(rows, {x, gy}, {gx}, exec, mask);
}
void jvp(const Rows& rows, const Buffer& x, const Buffer& tx, const Buffer& y, const Buffer& ty,
         const Mask& mask, const Exec& exec) {
  softmax::launch<SoftmaxJvpRow, true>(rows, {x, tx}, {y, ty}, exec, mask);
}

}  // namespace

void register_softmax_dropout(Kernels& table) {
  table.softmax_dropout = forward;
  table.softmax_dropout_vjp = vjp;
  table.softmax_dropout_jvp = jvp;
}

}  // namespace jops::JOPS_ISA
