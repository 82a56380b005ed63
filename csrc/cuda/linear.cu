// Launches of linear maps.
#include "columns.h"
#include "dtypes.h"
#include "families.h"
#include "linear.cuh"

namespace jops::JOPS_ISA {
namespace {

struct Operands {
  Matrix x, w, tx, tw;
};
struct Results {
  Matrix y, ty, z;
};

template <class T>
bool in_packs(const Matrix& m) {
  return !m.given() ||
         (packs_at(m.data) && m.cols % kPack<T> == 0 && m.row_stride % kPack<T> == 0 &&
          (m.batch == 1 || m.batch_stride % kPack<T> == 0));
}

template <class T>
linear::Result<T> result(const Matrix& m) {
  if (!m.given()) return {};
  return {static_cast<T*>(m.data), m.batch_stride, m.row_stride};
}

template <class T, bool kDual>
void launch(const linear::Call<T>& call, std::int64_t batch, const Exec& exec) {
  const auto grid = [&](std::int64_t side) {
    return all_blocks(batch * ((call.rows + side - 1) / side) * ((call.cols + side - 1) / side));
  };
  if constexpr (sizeof(T) == 2) {
    dev::launch<linear::tensor<T, kDual>>(grid(linear::kTensorSide), linear::kTensorThreads, 0,
                                          dev::stream_of(exec), call);
  } else {
    dev::launch<linear::tiles<T, kDual>>(grid(linear::TileMemory<T, kDual>::kSide),
                                         linear::kTileThreads, 0, dev::stream_of(exec), call);
  }
}

void run(const Operands& o, const Buffer& bias, const Buffer& tbias, const Results& r,
         const Act& act, const Mask& mask, const Exec& exec) {
  with_storage(r.y.dtype, [&](auto storage) {
    using T = decltype(storage);
    const auto line = [&](const Buffer& b) {
      return b.given() ? static_cast<const T*>(b.data) : nullptr;
    };
    const auto over_batch = [&](const Buffer& b) { return b.size == r.y.cols ? 0 : r.y.cols; };
    const std::int64_t size = r.y.batch * r.y.rows * r.y.cols;
    const linear::Call<T> call{linear::Operand<T>(o.x),
                               linear::Operand<T>(o.w),
                               linear::Operand<T>(o.tx),
                               linear::Operand<T>(o.tw),
                               line(bias),
                               line(tbias),
                               over_batch(bias),
                               over_batch(tbias),
                               result<T>(r.y),
                               result<T>(r.ty),
                               result<T>(r.z),
                               r.y.rows,
                               r.y.cols,
                               in_packs<T>(r.y) && in_packs<T>(r.ty) && in_packs<T>(r.z),
                               activation::Function<T>(act),
                               Dropout<Compute<T>>(mask, size)};
    if (r.ty.given())
      launch<T, true>(call, r.y.batch, exec);
    else
      launch<T, false>(call, r.y.batch, exec);
  });
}

void forward(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y,
             const Exec& exec) {
  run({x, w, {}, {}}, bias, {}, {y, {}, {}}, Act{}, Mask{}, exec);
}

void vjp(const Matrix& x, const Matrix& w, const Matrix& gy, const Matrix& gx, const Matrix& gw,
         const Buffer& gbias, const Exec& exec) {
  if (gx.given()) forward(gy, w.transposed(), {}, gx, exec);
  if (gw.given()) forward(gy.transposed(), x.transposed(), {}, gw, exec);
  if (gbias.given()) column_sum(gy, gbias, exec);
}

void act_dropout(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y,
                 const Matrix& z, const Act& act, const Mask& mask, const Exec& exec) {
  run({x, w, {}, {}}, bias, {}, {y, {}, z}, act, mask, exec);
}

void act_dropout_jvp(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& tx,
                     const Matrix& tw, const Buffer& tbias, const Matrix& y, const Matrix& ty,
                     const Matrix& z, const Act& act, const Mask& mask, const Exec& exec) {
  run({x, w, tx, tw}, bias, tbias, {y, ty, z}, act, mask, exec);
}

}  // namespace

void register_linear(Kernels& table) {
  table.linear = forward;
  table.linear_act_dropout = act_dropout;
  table.linear_act_dropout_jvp = act_dropout_jvp;
  table.linear_vjp = vjp;
}

}  // namespace jops::JOPS_ISA
