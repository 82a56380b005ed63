// Gated units, f(gate) up: rows of any stride, so that gate and up may be the halves of one tensor.
// The formulas are in math/activations.h and math/products.h.
#include <cstring>

#include "columns.h"
#include "pointwise.h"

namespace jops::JOPS_ISA {
namespace {

constexpr std::int64_t kTask = 16 * kBlock, kPiece = 4 * kBlock;

// Runs the product over whole matrices in tasks of fixed size; what is absent is zeros.
template <class Op>
void launch(const Act& act, const Matrix (&in)[Op::kIn], const Matrix (&out)[Op::kOut],
            const Exec& exec) {
  with_storage(in[0].dtype, [&](auto storage) {
    using T = decltype(storage);
    const auto kernel = with_gate<Kernel<T>>(
        act.code, [](auto f) -> Kernel<T> { return steps<decltype(f), Op, T>; });
    const Aligned<T> zeros(kPiece);
    std::memset(zeros.data, 0, kPiece * sizeof(T));
    const std::int64_t cols = in[0].cols, size = in[0].rows * cols;
    const bool large = should_stream(Op::kOut * size * static_cast<std::int64_t>(sizeof(T)));
    parallel(up(size, kTask), useful_threads(size, exec.threads), [&](std::int64_t task) {
      const std::int64_t end = least(size, (task + 1) * kTask);
      std::int64_t at = task * kTask, row = at / cols, col = at % cols;
      while (at < end) {
        const std::int64_t n = least(kPiece, least(end - at, cols - col));
        const T* x[Op::kIn];
        for (int k = 0; k < Op::kIn; ++k) {
          const std::int64_t begin = row * in[k].row_stride + col;
          x[k] = in[k].given() ? static_cast<const T*>(in[k].data) + begin : zeros.data;
        }
        T* y[Op::kOut];
        bool streams = large;
        for (int k = 0; k < Op::kOut; ++k) {
          y[k] = static_cast<T*>(out[k].data) + row * out[k].row_stride + col;
          streams = streams && can_stream(y[k]);
        }
        run<Op::kIn, Op::kOut, T>(kernel, act, x, y, nullptr, nullptr, n, streams);
        at += n;
        col += n;
        if (col == cols) {
          col = 0;
          ++row;
        }
      }
      if (large) stream_fence();
    });
  });
}

void gated(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& y,
           const Exec& exec) {
  launch<GatedValue>(act, {gate, up}, {y}, exec);
}

void gated_jvp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& tgate,
               const Matrix& tup, const Matrix& y, const Matrix& ty, const Exec& exec) {
  launch<GatedJvp>(act, {gate, up, tgate, tup}, {y, ty}, exec);
}

void gated_vjp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
               const Matrix& ggate, const Matrix& gup, const Exec& exec) {
  launch<GatedVjp>(act, {gate, up, gy}, {ggate, gup}, exec);
}

void gated_vjp_vjp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
                   const Matrix& hggate, const Matrix& hgup, const Matrix& hgate, const Matrix& hup,
                   const Matrix& hgy, const Exec& exec) {
  launch<GatedVjpVjp>(act, {gate, up, gy, hggate, hgup}, {hgate, hup, hgy}, exec);
}

void gated_vjp_jvp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
                   const Matrix& tgate, const Matrix& tup, const Matrix& tgy, const Matrix& ggate,
                   const Matrix& gup, const Matrix& tggate, const Matrix& tgup, const Exec& exec) {
  launch<GatedVjpJvp>(act, {gate, up, gy, tgate, tup, tgy}, {ggate, gup, tggate, tgup}, exec);
}

}  // namespace

void register_gated(Kernels& table) {
  table.gated = gated;
  table.gated_jvp = gated_jvp;
  table.gated_vjp = gated_vjp;
  table.gated_vjp_vjp = gated_vjp_vjp;
  table.gated_vjp_jvp = gated_vjp_jvp;
}

}  // namespace jops::JOPS_ISA
