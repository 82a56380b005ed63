// Launches of gated units.
#include "dtypes.h"
#include "families.h"
#include "gated.cuh"

namespace jops::JOPS_ISA {
namespace {

template <class Op>
void launch(const Act& act, const Matrix (&in)[Op::kIn], const Matrix (&out)[Op::kOut],
            const Exec& exec) {
  with_storage(in[0].dtype, [&](auto storage) {
    using T = decltype(storage);
    gated::Call<Op, T> call{};
    call.code = act.code;
    call.rows = in[0].rows;
    call.cols = in[0].cols;
    call.packs = call.cols % kPack<T> == 0;
    const auto packs = [&](const Matrix& m) {
      return packs_at(m.data) && (call.rows == 1 || m.row_stride % kPack<T> == 0);
    };
    for (int k = 0; k < Op::kIn; ++k) {
      call.in[k] = static_cast<const T*>(in[k].data);
      call.in_stride[k] = in[k].row_stride;
      call.packs = call.packs && packs(in[k]);
    }
    for (int k = 0; k < Op::kOut; ++k) {
      call.out[k] = static_cast<T*>(out[k].data);
      call.out_stride[k] = out[k].row_stride;
      call.packs = call.packs && packs(out[k]);
    }
    const std::int64_t turns = call.rows * ((call.cols + kPack<T> - 1) / kPack<T>);
    dev::launch<gated::pointwise<Op, T>>(blocks((turns + gated::kThreads - 1) / gated::kThreads),
                                         gated::kThreads, 0, dev::stream_of(exec), call);
  });
}

void forward(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& y,
             const Exec& exec) {
  launch<GatedValue>(act, {gate, up}, {y}, exec);
}

void jvp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& tgate,
         const Matrix& tup, const Matrix& y, const Matrix& ty, const Exec& exec) {
  launch<GatedJvp>(act, {gate, up, tgate, tup}, {y, ty}, exec);
}

void vjp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
         const Matrix& ggate, const Matrix& gup, const Exec& exec) {
  launch<GatedVjp>(act, {gate, up, gy}, {ggate, gup}, exec);
}

void vjp_vjp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
             const Matrix& hggate, const Matrix& hgup, const Matrix& hgate, const Matrix& hup,
             const Matrix& hgy, const Exec& exec) {
  launch<GatedVjpVjp>(act, {gate, up, gy, hggate, hgup}, {hgate, hup, hgy}, exec);
}

void vjp_jvp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
             const Matrix& tgate, const Matrix& tup, const Matrix& tgy, const Matrix& ggate,
             const Matrix& gup, const Matrix& tggate, const Matrix& tgup, const Exec& exec) {
  launch<GatedVjpJvp>(act, {gate, up, gy, tgate, tup, tgy}, {ggate, gup, tggate, tgup}, exec);
}

}  // namespace

void register_gated(Kernels& table) {
  table.gated = forward;
  table.gated_jvp = jvp;
  table.gated_vjp = vjp;
  table.gated_vjp_vjp = vjp_vjp;
  table.gated_vjp_jvp = vjp_jvp;
}

}  // namespace jops::JOPS_ISA
