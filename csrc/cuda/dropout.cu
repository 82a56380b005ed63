// Launches of dropout.
#include "dropout.cuh"
#include "dtypes.h"
#include "families.h"

namespace jops::JOPS_ISA {
namespace {

template <bool kAdd>
void launch(const Buffer& x, const Buffer& residual, const Buffer& y, const Mask& mask,
            const Exec& exec) {
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    const dropout::Tensors<T> t{static_cast<const T*>(x.data), static_cast<const T*>(residual.data),
                                static_cast<T*>(y.data), x.size,
                                packs_at(x.data) && packs_at(residual.data) && packs_at(y.data)};
    const std::int64_t tile = dropout::kTile<T>;
    dev::launch<dropout::multiply<T, kAdd>>(blocks((x.size + tile - 1) / tile), dropout::kThreads,
                                            0, dev::stream_of(exec), t,
                                            Dropout<Compute<T>>(mask, x.size));
  });
}

}  // namespace

void register_dropout(Kernels& table) {
  table.dropout = [](const Buffer& x, const Buffer& y, const Mask& mask, const Exec& exec) {
    launch<false>(x, x, y, mask, exec);
  };
  table.dropout_add = [](const Buffer& x, const Buffer& residual, const Buffer& y, const Mask& mask,
                         const Exec& exec) { launch<true>(x, residual, y, mask, exec); };
}

}  // namespace jops::JOPS_ISA
