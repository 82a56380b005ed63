// Elementwise activations: value, derivatives of three orders, JVP, and what double backward needs.
//
// The formulas are in math/activations.h; one kernel for each of them, product and storage type.
#include "columns.h"
#include "multipliers.h"
#include "pointwise.h"

namespace jops::JOPS_ISA {
namespace {

template <class Op, class T>
Kernel<T> pick(Activation code) {
  return with_activation<Kernel<T>>(code,
                                    [](auto f) -> Kernel<T> { return steps<decltype(f), Op, T>; });
}

// A product of whole buffers, to be run a range of elements at a time.
template <class Op, class T>
struct Ranges {
  const Act& act;
  const Buffer (&in)[Op::kIn];
  const Buffer (&out)[Op::kOut];
  const Mask& mask;
  bool large;                   // the outputs are to be written past the caches
  const Buffer* add = nullptr;  // kOut of them, or none
  Kernel<T> kernel = pick<Op, T>(act.code);

  void run(std::int64_t first, std::int64_t n) const {
    if (!mask.given()) return run(first, nullptr, n);
    for_samples(mask, in[0].size, first, n,
                [&](std::int64_t sample, std::int64_t start, std::int64_t done, std::int64_t part) {
                  for_multipliers<Compute<T>>(mask, sample, start, part,
                                              [&](std::int64_t i, const Compute<T>* m, int count) {
                                                run(first + done + i, m, count);
                                              });
                });
  }

 private:
  void run(std::int64_t first, const Compute<T>* m, std::int64_t n) const {
    const T* x[Op::kIn];
    T* y[Op::kOut];
    for (int k = 0; k < Op::kIn; ++k) {
      x[k] = in[k].given() ? static_cast<const T*>(in[k].data) + first : nullptr;
    }
    bool streams = large;
    for (int k = 0; k < Op::kOut; ++k) {
      y[k] = static_cast<T*>(out[k].data) + first;
      streams = streams && can_stream(y[k]);
    }
    const T* residual[Op::kOut] = {};
    for (int k = 0; add && k < Op::kOut; ++k) {
      if (add[k].given()) residual[k] = static_cast<const T*>(add[k].data) + first;
    }
    jops::JOPS_ISA::run<Op::kIn, Op::kOut, T>(kernel, act, x, y, m, add ? residual : nullptr, n,
                                              streams);
  }
};

// Runs the product over whole buffers in tasks of fixed size.
template <class Op, class T>
void launch(const Act& act, const Buffer (&in)[Op::kIn], const Buffer (&out)[Op::kOut],
            const Mask& mask, const Exec& exec, const Buffer* add) {
  constexpr std::int64_t kTask = 16 * kBlock;
  const std::int64_t size = in[0].size;
  const bool large = should_stream(Op::kOut * size * static_cast<std::int64_t>(sizeof(T)));
  const Ranges<Op, T> ranges{act, in, out, mask, large, add};
  parallel((size + kTask - 1) / kTask, useful_threads(size, exec.threads), [&](std::int64_t task) {
    const std::int64_t begin = task * kTask;
    ranges.run(begin, least(kTask, size - begin));
    if (large) stream_fence();
  });
}

template <class Op>
void launch(const Act& given, const Buffer (&in)[Op::kIn], const Buffer (&out)[Op::kOut],
            const Mask& mask, const Exec& exec, const Buffer* add = nullptr) {
  const Act act = stored(given, in[0].dtype);
  with_storage(in[0].dtype,
               [&](auto t) { launch<Op, decltype(t)>(act, in, out, mask, exec, add); });
}

void activation(const Act& act, const Buffer& x, const Buffer& residual, const Buffer& y,
                const Mask& mask, const Exec& exec) {
  launch<Value>(act, {x}, {y}, mask, exec, residual.given() ? &residual : nullptr);
}

}  // namespace

void activation_vjp(const Act& act, int order, const Buffer& x, const Buffer& gy, const Buffer& gx,
                    const Mask& mask, const Exec& exec) {
  if (order == 1) return launch<Vjp<1>>(act, {x, gy}, {gx}, mask, exec);
  if (order == 2) return launch<Vjp<2>>(act, {x, gy}, {gx}, mask, exec);
  launch<Vjp<3>>(act, {x, gy}, {gx}, mask, exec);
}

namespace {

void activation_jvp(const Act& act, const Buffer& x, const Buffer& tx, const Buffer& residual,
                    const Buffer& tresidual, const Buffer& y, const Buffer& ty, const Mask& mask,
                    const Exec& exec) {
  const Buffer add[] = {residual, tresidual};
  const bool adds = residual.given() || tresidual.given();
  launch<Jvp>(act, {x, tx}, {y, ty}, mask, exec, adds ? add : nullptr);
}

void activation_vjp_vjp(const Act& act, int order, const Buffer& x, const Buffer& gy,
                        const Buffer& h, const Buffer& hx, const Buffer& hgy, const Mask& mask,
                        const Exec& exec) {
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

void activation_vjp_jvp(const Act& act, int order, const Buffer& x, const Buffer& gy,
                        const Buffer& tx, const Buffer& tgy, const Buffer& gx, const Buffer& tgx,
                        const Mask& mask, const Exec& exec) {
  if (order == 1)
    vjp_jvp<1>(act, x, gy, tx, tgy, gx, tgx, mask, exec);
  else
    vjp_jvp<2>(act, x, gy, tx, tgy, gx, tgx, mask, exec);
}

}  // namespace

void activation_vjp_sum(const Act& given, const Rows& rows, const Buffer& x, const Buffer& gy,
                        const Buffer& gx, const Buffer& sum, const Mask& mask, const Exec& exec) {
  const Act act = stored(given, x.dtype);
  const std::int64_t cols = rows.inner, plane = rows.n * cols;
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    const Buffer in[] = {x, gy}, out[] = {gx};
    const Ranges<Vjp<1>, T> ranges{act, in, out, mask, false};
    for (std::int64_t b = 0; b < rows.outer; ++b) {
      const Matrix made{
          static_cast<T*>(gx.data) + b * plane, plane, x.dtype, 1, rows.n, cols, plane, cols, 1};
      sum_columns<true>(made, 0, static_cast<T*>(sum.data) + b * cols, exec.threads,
                        [&](std::int64_t row, std::int64_t count) {
                          ranges.run(b * plane + row * cols, count * cols);
                        });
    }
  });
}

namespace {

template <class F, class A>
void value(const Act& act, const A* x, A* y, std::int64_t n) {
  run<1, 1, A>(steps<F, Value, A>, act, &x, &y, nullptr, nullptr, n, false);
}

template <class F, class A>
void value_and_tangent(const Act& act, const A* x, const A* tx, A* y, A* ty, std::int64_t n) {
  const A* in[] = {x, tx};
  A* out[] = {y, ty};
  run<2, 2, A>(steps<F, Jvp, A>, act, in, out, nullptr, nullptr, n, false);
}

}  // namespace

template <class A>
ActivationBlock<A> activation_block(Activation code) {
  return with_activation<ActivationBlock<A>>(
      code, [](auto f) -> ActivationBlock<A> { return value<decltype(f), A>; });
}
template ActivationBlock<float> activation_block(Activation);
template ActivationBlock<double> activation_block(Activation);

template <class A>
ActivationJvpBlock<A> activation_jvp_block(Activation code) {
  return with_activation<ActivationJvpBlock<A>>(
      code, [](auto f) -> ActivationJvpBlock<A> { return value_and_tangent<decltype(f), A>; });
}
template ActivationJvpBlock<float> activation_jvp_block(Activation);
template ActivationJvpBlock<double> activation_jvp_block(Activation);

void register_activation(Kernels& table) {
  table.activation = activation;
  table.activation_vjp = activation_vjp;
  table.activation_jvp = activation_jvp;
  table.activation_vjp_vjp = activation_vjp_vjp;
  table.activation_vjp_jvp = activation_vjp_jvp;
  table.activation_vjp_sum = activation_vjp_sum;
}

}  // namespace jops::JOPS_ISA
