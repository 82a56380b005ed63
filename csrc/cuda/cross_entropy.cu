// Launches of cross-entropy.
#include "../cross_entropy_table.h"
#include "cross_entropy.cuh"
#include "dtypes.h"
#include "families.h"

namespace jops::JOPS_ISA {
namespace entropy {

struct Launch {
  template <class Row>
  static void run(const Rows& shape, const Target& target, const EntropyCall& given,
                  const Exec& exec) {
    with_storage(given.x.dtype, [&](auto storage) {
      using T = decltype(storage);
      using A = Compute<T>;
      Call<T> call{};
      call.x = static_cast<const T*>(given.x.data);
      call.tx = static_cast<const T*>(given.tx.data);
      call.p = static_cast<const T*>(target.probabilities.data);
      call.classes = target.rows >= 0 ? target.classes : nullptr;
      call.weight = static_cast<const A*>(target.weight.data);
      call.g = static_cast<const A*>(given.g.data);
      call.tg = static_cast<const A*>(given.tg.data);
      call.loss = static_cast<A*>(given.loss.data);
      call.tloss = static_cast<A*>(given.tloss.data);
      call.out[0] = static_cast<T*>(given.gx.data);
      call.out[1] = static_cast<T*>(given.tgx.data);
      call.outer = shape.outer;
      call.n = shape.n;
      call.inner = shape.inner;
      call.ignore_index = target.ignore_index;
      call.keep = static_cast<A>(1 - target.smoothing);
      call.base = static_cast<A>(target.smoothing / static_cast<double>(shape.n));
      call.spreads = call.p != nullptr || target.smoothing != 0;
      call.packs = shape.n % kPack<T> == 0 && packs_at(call.x) && packs_at(call.tx) &&
                   packs_at(call.p) && packs_at(call.out[0]) && packs_at(call.out[1]);
      if (shape.inner > 1) {
        const auto blocks = all_blocks((shape.outer * shape.inner + kWidth - 1) / kWidth);
        return dev::launch<columns<Row, T>>(blocks, kWidth * kLines, 0, dev::stream_of(exec), call);
      }
      constexpr int kOfWarp = dev::kWarp * 2 * kPack<T>;  // two packs a thread
      const auto warps = static_cast<unsigned>(
          min_size((shape.n + kOfWarp - 1) / kOfWarp, static_cast<std::int64_t>(kMostWarps)));
      dev::launch<rows<Row, T>>(all_blocks(shape.outer), warps * dev::kWarp, 0,
                                dev::stream_of(exec), call);
    });
  }
};

}  // namespace entropy

void register_cross_entropy(Kernels& table) { EntropyTable<entropy::Launch>::put(table); }

}  // namespace jops::JOPS_ISA
