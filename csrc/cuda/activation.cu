// Launches of the elementwise activations.
#include "activation.cuh"
#include "columns.h"
#include "dtypes.h"
#include "families.h"

namespace jops::JOPS_ISA {
namespace {

template <class Op, class T>
activation::Tensors<Op, T> tensors(const Buffer (&in)[Op::kIn], const Buffer (&out)[Op::kOut]) {
  activation::Tensors<Op, T> t{};
  t.size = in[0].size;
  t.packs = true;
  for (int k = 0; k < Op::kIn; ++k) {
    t.in[k] = static_cast<const T*>(in[k].data);
    t.packs = t.packs && packs_at(in[k].data);
  }
  for (int k = 0; k < Op::kOut; ++k) {
    t.out[k] = static_cast<T*>(out[k].data);
    t.packs = t.packs && packs_at(out[k].data);
  }
  return t;
}

template <class Op>
void launch(const Act& act, const Buffer (&in)[Op::kIn], const Buffer (&out)[Op::kOut],
            const Mask& mask, const Exec& exec, const Buffer* add = nullptr) {
  with_storage(in[0].dtype, [&](auto storage) {
    using T = decltype(storage);
    const std::int64_t size = in[0].size, tile = activation::kTile<Op, T>;
    auto t = tensors<Op, T>(in, out);
    for (int k = 0; add && k < Op::kOut; ++k) {
      if (!add[k].given()) continue;
      t.add[k] = static_cast<const T*>(add[k].data);
      t.packs = t.packs && packs_at(add[k].data);
    }
    dev::launch<activation::pointwise<Op, T>>(
        blocks((size + tile - 1) / tile), activation::kThreads, 0, dev::stream_of(exec),
        activation::Function<T>(act), t, Dropout<Compute<T>>(mask, size));
  });
}

void forward(const Act& act, const Buffer& x, const Buffer& residual, const Buffer& y,
             const Mask& mask, const Exec& exec) {
  launch<Value>(act, {x}, {y}, mask, exec, &residual);
}

void vjp(const Act& act, int order, const Buffer& x, const Buffer& gy, const Buffer& gx,
         const Mask& mask, const Exec& exec) {
  if (order == 1) return launch<Vjp<1>>(act, {x, gy}, {gx}, mask, exec);
  if (order == 2) return launch<Vjp<2>>(act, {x, gy}, {gx}, mask, exec);
  launch<Vjp<3>>(act, {x, gy}, {gx}, mask, exec);
}

void jvp(const Act& act, const Buffer& x, const Buffer& tx, const Buffer& residual,
         const Buffer& tresidual, const Buffer& y, const Buffer& ty, const Mask& mask,
         const Exec& exec) {
  const Buffer add[] = {residual, tresidual};
  launch<Jvp>(act, {x, tx}, {y, ty}, mask, exec, add);
}

void vjp_vjp(const Act& act, int order, const Buffer& x, const Buffer& gy, const Buffer& h,
             const Buffer& hx, const Buffer& hgy, const Mask& mask, const Exec& exec) {
  if (order == 1)
    launch<VjpVjp<1>>(act, {x, gy, h}, {hx, hgy}, mask, exec);
  else
    launch<VjpVjp<2>>(act, {x, gy, h}, {hx, hgy}, mask, exec);
}

template <int kOrder>
void vjp_jvp(const Act& act, const Buffer& x, const Buffer& gy, const Buffer& tx, const Buffer& tgy,
             const Buffer& gx, const Buffer& tgx, const Mask& mask, const Exec& exec) {
  if (!tx.given()) {  // linear in the cotangent: two products
    launch<Vjp<kOrder>>(act, {x, gy}, {gx}, mask, exec);
    launch<Vjp<kOrder>>(act, {x, tgy}, {tgx}, mask, exec);
  } else {
    launch<VjpJvp<kOrder>>(act, {x, gy, tx, tgy}, {gx, tgx}, mask, exec);
  }
}

void vjp_jvp(const Act& act, int order, const Buffer& x, const Buffer& gy, const Buffer& tx,
             const Buffer& tgy, const Buffer& gx, const Buffer& tgx, const Mask& mask,
             const Exec& exec) {
  if (order == 1)
    vjp_jvp<1>(act, x, gy, tx, tgy, gx, tgx, mask, exec);
  else
    vjp_jvp<2>(act, x, gy, tx, tgy, gx, tgx, mask, exec);
}

void vjp_sum(const Act& act, const Rows& rows, const Buffer& x, const Buffer& gy, const Buffer& gx,
             const Buffer& sum, const Mask& mask, const Exec& exec) {
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    auto t = tensors<Vjp<1>, T>({x, gy}, {gx});
    t.packs = t.packs && rows.inner % kPack<T> == 0;
    const std::int64_t width = columns::kColumns * kPack<T>;
    const std::int64_t strips = (rows.inner + width - 1) / width;
    const int parts = column_parts(rows.n);
    auto* partial = static_cast<Compute<T>*>(exec.workspace);
    dev::launch<activation::vjp_sum<T>>(
        dim3(all_blocks(strips * rows.outer), parts), columns::kThreads, 0, dev::stream_of(exec),
        activation::Function<T>(act), t, rows, parts, partial, Dropout<Compute<T>>(mask, x.size));
  });
  sum_partials(rows, sum, exec);
}

}  // namespace

void register_activation(Kernels& table) {
  table.activation = forward;
  table.activation_vjp = vjp;
  table.activation_jvp = jvp;
  table.activation_vjp_vjp = vjp_vjp;
  table.activation_vjp_jvp = vjp_jvp;
  table.activation_vjp_sum = vjp_sum;
}

}  // namespace jops::JOPS_ISA
