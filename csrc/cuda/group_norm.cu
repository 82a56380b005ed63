// Launches of group_norm and batch_norm.
#include "../group_norm_table.h"
#include "columns.h"
#include "dtypes.h"
#include "families.h"
#include "group_norm.cuh"

namespace jops::JOPS_ISA {
namespace group_norm {

// The way through groups and how many blocks share one: enough blocks to occupy a GPU, with work
// for every warp, and few enough for their sums to be added up by each.
struct Plan {
  Walk walk;
  int parts;
  std::int64_t rows;  // of the sums over channels

  explicit Plan(const Groups& groups) : walk(walk_of(groups, dev::kWarp, kPiece)) {
    constexpr std::int64_t kBlocks = 512, kUnits = 2 * kWarps, kMostParts = 64;
    const std::int64_t wanted = (kBlocks + walk.groups - 1) / walk.groups;
    const std::int64_t most = min_size(kMostParts, walk.units() / kUnits);
    parts = static_cast<int>(most < 1 ? 1 : min_size(wanted, most));
    rows = groups.groups > 0 ? groups.outer * walk.pieces : parts;
  }
  std::int64_t measured(int sums) const {
    return parts > 1 ? walk.groups * parts * (1 + sums) * (walk.lanes ? dev::kWarp : 1) : 0;
  }
};

struct Launch {
  template <class Row>
  static void run(const Groups& groups, const Buffer (&in)[Row::kIn],
                  const Buffer (&of_channel)[kNormColumns], const Buffer& stats,
                  const Buffer (&out)[Row::kOut], const Buffer& sums, const Exec& exec) {
    const Plan plan(groups);
    std::int64_t measured = 0;
    with_storage(in[0].dtype, [&](auto storage) {
      using T = decltype(storage);
      using A = Compute<T>;
      Call<T> call{};
      call.walk = plan.walk;
      call.packs = !plan.walk.lanes && groups.inner % kPack<T> == 0;
      for (int k = 0; k < Row::kIn; ++k) {
        call.in[k] = static_cast<const T*>(in[k].data);
        call.packs = call.packs && packs_at(in[k].data);
      }
      for (int k = 0; k < kNormColumns; ++k) {
        call.of_channel[k] = static_cast<const T*>(of_channel[k].data);
      }
      for (int k = 0; k < Row::kOut; ++k) {
        call.out[k] = static_cast<T*>(out[k].data);
        call.packs = call.packs && packs_at(out[k].data);
      }
      call.stats = static_cast<A*>(stats.data);
      call.fixed = groups.fixed;
      call.eps = static_cast<A>(groups.eps);
      call.parts = plan.parts;
      call.rows = plan.rows;
      call.measured = static_cast<A*>(exec.workspace);
      measured = plan.measured(GroupNorm<Row, A>::kSums);
      call.partial = call.measured + measured;
      measured *= static_cast<std::int64_t>(sizeof(A));
      const unsigned grid = all_blocks(plan.walk.groups * plan.parts);
      const auto launch = [&](Phase phase) {
        call.phase = phase;
        dev::launch<normalize<Row, T>>(grid, kThreads, 0, dev::stream_of(exec), call);
      };
      if (plan.parts == 1 || groups.fixed) {
        launch(Phase::kBoth);
      } else {
        launch(Phase::kMeasure);
        launch(Phase::kPut);
      }
    });
    if constexpr (Row::kColumnSums > 0) {
      add_partials({Row::kColumnSums, plan.rows, groups.channels},
                   static_cast<const char*>(exec.workspace) + measured, sums, exec);
    }
  }
};

std::int64_t workspace(const Groups& groups, int sums) {
  if (groups.outer < 1 || groups.channels < 1 || groups.inner < 1) return 0;
  constexpr std::int64_t kWidest = 8;  // bytes of a number
  const Plan plan(groups);
  return (plan.measured(GroupNorm<NormVjpJvpRow, float>::kSums) +
          sums * plan.rows * groups.channels) *
         kWidest;
}

}  // namespace group_norm

void register_group_norm(Kernels& table) {
  GroupNormTable<group_norm::Launch>::put(table);
  table.group_norm_workspace = group_norm::workspace;
}

}  // namespace jops::JOPS_ISA
