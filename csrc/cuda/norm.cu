// Launches of norms.
#include "../norm_table.h"
#include "columns.h"
#include "dtypes.h"
#include "families.h"
#include "norm.cuh"

namespace jops::JOPS_ISA {
namespace norm {

struct Launch {
  template <class Row, bool kCentred>
  static void run(double eps, const Rows& rows, const Buffer (&in)[Row::kIn],
                  const Buffer (&of_column)[kNormColumns], const Buffer (&out)[Row::kOut],
                  const Buffer& sums, const Buffer& added, const Buffer& sum, const Exec& exec) {
    with_storage(in[0].dtype, [&](auto storage) {
      using T = decltype(storage);
      Call<T> call{};
      call.packs = rows.n % kPack<T> == 0;
      for (int k = 0; k < Row::kIn; ++k) {
        call.in[k] = static_cast<const T*>(in[k].data);
        call.packs = call.packs && packs_at(in[k].data);
      }
      for (int k = 0; k < kNormColumns; ++k) {
        call.of_column[k] = static_cast<const T*>(of_column[k].data);
        call.packs = call.packs && packs_at(of_column[k].data);
      }
      for (int k = 0; k < Row::kOut; ++k) {
        call.out[k] = static_cast<T*>(out[k].data);
        call.packs = call.packs && packs_at(out[k].data);
      }
      call.added = static_cast<const T*>(added.data);
      call.sum = static_cast<T*>(sum.data);
      call.packs = call.packs && packs_at(added.data) && packs_at(sum.data);
      call.partial = static_cast<Compute<T>*>(exec.workspace);
      call.rows = rows.outer;
      call.n = rows.n;
      call.eps = static_cast<Compute<T>>(eps);
      const unsigned grid =
          Row::kColumnSums > 0 ? column_parts(rows.outer) : all_blocks(rows.outer);
      const std::int64_t packs = (rows.n + kPack<T> - 1) / kPack<T>;
      constexpr int kOfWarp = dev::kWarp * kHeldPacks<Row>;
      if (packs <= kMostThreads<Row> * kHeldPacks<Row>) {
        const auto warps = static_cast<unsigned>((packs + kOfWarp - 1) / kOfWarp);
        dev::launch<held<Row, kCentred, T>>(grid, warps * dev::kWarp, 0, dev::stream_of(exec),
                                            call);
      } else {
        dev::launch<sweep<Row, kCentred, T>>(grid, kMostThreads<Row>, 0, dev::stream_of(exec),
                                             call);
      }
    });
    if constexpr (Row::kColumnSums > 0) {
      sum_partials({Row::kColumnSums, rows.outer, rows.n}, sums, exec);
    }
  }
};

}  // namespace norm

void register_norm(Kernels& table) { NormTable<norm::Launch>::put(table); }

}  // namespace jops::JOPS_ISA
