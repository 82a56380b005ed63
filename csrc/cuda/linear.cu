// Launches of linear maps.
#include "columns.h"
#include "dtypes.h"
#include "families.h"
#include "linear.cuh"

namespace jops::JOPS_ISA {
namespace {

std::int64_t squares(std::int64_t batch, std::int64_t rows, std::int64_t cols, std::int64_t side) {
  return batch * ((rows + side - 1) / side) * ((cols + side - 1) / side);
}

template <class T>
using Shape = std::conditional_t<sizeof(T) == 2, linear::TensorShape<T>, linear::TileShape<T>>;

template <class T, bool kDual>
void launch(const linear::Call<T>& call, std::int64_t batch, const Exec& exec) {
  const unsigned grid = all_blocks(squares(batch, call.rows, call.cols, Shape<T>::kSide));
  if constexpr (sizeof(T) == 2) {
    dev::launch<linear::tensor<T, kDual>>(grid, Shape<T>::kThreads, 0, dev::stream_of(exec), call);
  } else {
    dev::launch<linear::tiles<T, kDual>>(grid, Shape<T>::kThreads, 0, dev::stream_of(exec), call);
  }
}

// A bias, or one for each of the batch, as a matrix whose rows are the same.
Matrix repeated(const Buffer& bias, const Matrix& y) {
  if (!bias.given()) return {};
  return {
      bias.data, bias.size, bias.dtype, y.batch, y.rows, y.cols, bias.size == y.cols ? 0 : y.cols,
      0,         1};
}

struct Primal {
  Matrix x, w;
  Buffer bias;
  Matrix residual, y, z;
};
struct Tangent {
  Matrix x, w;
  Buffer bias;
  Matrix residual, y;
};

void run(const Primal& primal, const Tangent& tangent, const Act& act, const Mask& mask,
         const Exec& exec) {
  const Matrix& y = primal.y;
  with_storage(y.dtype, [&](auto storage) {
    using T = decltype(storage);
    using Operand = linear::Operand<T>;
    using Result = linear::Lines<T>;
    using Given = linear::Lines<const T>;
    const linear::Call<T> call{Operand(primal.x),
                               Operand(primal.w),
                               Operand(tangent.x),
                               Operand(tangent.w),
                               Given(repeated(primal.bias, y)),
                               Given(repeated(tangent.bias, y)),
                               Given(primal.residual),
                               Given(tangent.residual),
                               Result(y),
                               Result(tangent.y),
                               Result(primal.z),
                               y.rows,
                               y.cols,
                               activation::Function<T>(act),
                               Dropout<Compute<T>>(mask, y.batch * y.rows * y.cols)};
    if (tangent.y.given())
      launch<T, true>(call, y.batch, exec);
    else
      launch<T, false>(call, y.batch, exec);
  });
}

void forward(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y,
             const Exec& exec) {
  run({x, w, bias, {}, y, {}}, {}, Act{}, Mask{}, exec);
}

void act_dropout(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& residual,
                 const Matrix& y, const Matrix& z, const Act& act, const Mask& mask,
                 const Exec& exec) {
  run({x, w, bias, residual, y, z}, {}, act, mask, exec);
}

void act_dropout_jvp(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& residual,
                     const Matrix& tx, const Matrix& tw, const Buffer& tbias,
                     const Matrix& tresidual, const Matrix& y, const Matrix& ty, const Matrix& z,
                     const Act& act, const Mask& mask, const Exec& exec) {
  run({x, w, bias, residual, y, z}, {tx, tw, tbias, tresidual, ty}, act, mask, exec);
}

// to = gy other^T, and the sums of gy's lines. Those alone are a product with nothing.
template <class T>
linear::VjpPart<T> part(const Matrix& gy, const Matrix& other, const Matrix& to, const Buffer& s,
                        const Buffer& sums) {
  if (!to.given() && !sums.given()) return {};
  linear::VjpPart<T> made;
  made.gy = linear::Operand<T>(gy);
  made.gy.packs = made.gy.packs && packs_at(s.data);
  made.other = linear::Operand<T>(to.given() ? other : gy);
  if (!to.given()) made.other.lines = 0;
  made.to = linear::Lines<T>(to);
  made.rows = gy.rows;
  made.cols = to.given() ? to.cols : 1;
  made.blocks = squares(gy.batch, made.rows, made.cols, Shape<T>::kSide);
  made.sums = static_cast<T*>(sums.data);
  return made;
}

void act_dropout_vjp(const Matrix& x, const Matrix& w, const Buffer& s, const Matrix& gy,
                     const Matrix& gx, const Matrix& gw, const Buffer& gbias, const Act& act,
                     const Mask& mask, const Exec& exec) {
  with_storage(gy.dtype, [&](auto storage) {
    using T = decltype(storage);
    const linear::VjpCall<T> call{part<T>(gy, w.transposed(), gx, s, {}),
                                  part<T>(gy.transposed(), x.transposed(), gw, s, gbias),
                                  {static_cast<const T*>(s.data), activation::Function<T>(act),
                                   Dropout<Compute<T>>(mask, gy.batch * gy.rows * gy.cols)}};
    const unsigned grid = all_blocks(call.x.blocks + call.w.blocks);
    if constexpr (sizeof(T) == 2) {
      dev::launch<linear::tensor_vjp<T>>(grid, Shape<T>::kThreads, 0, dev::stream_of(exec), call);
    } else {
      dev::launch<linear::tiles_vjp<T>>(grid, Shape<T>::kThreads, 0, dev::stream_of(exec), call);
    }
  });
}

void vjp(const Matrix& x, const Matrix& w, const Matrix& gy, const Matrix& gx, const Matrix& gw,
         const Buffer& gbias, const Exec& exec) {
  // Sums alone need more blocks than one for each square of lines.
  const bool alone = gbias.given() && !gw.given();
  if (alone) column_sum(gy, gbias, exec);
  act_dropout_vjp(x, w, {}, gy, gx, gw, alone ? Buffer{} : gbias, Act{}, Mask{}, exec);
}

}  // namespace

void register_linear(Kernels& table) {
  table.linear = forward;
  table.linear_act_dropout = act_dropout;
  table.linear_act_dropout_jvp = act_dropout_jvp;
  table.linear_act_dropout_vjp = act_dropout_vjp;
  table.linear_vjp = vjp;
}

}  // namespace jops::JOPS_ISA
