// Launches of the softmax family: which geometry serves a row is decided here, from its length.
#pragma once

#include "../softmax_table.h"
#include "dtypes.h"
#include "families.h"
#include "softmax.cuh"

namespace jops::JOPS_ISA::softmax {

// Packs that a thread holds of each input: 16 numbers of float32, 32 of 16 bits; half of them where
// four inputs, or two and a mask, would not fit into 128 registers.
template <class Row, bool kMasked>
constexpr int kHeld = Row::kIn + (kMasked ? 2 : 0) < 4 ? 4 : 2;

template <class Row, class T, bool kMasked, int kLanes, int kPacks>
void launch_team(const Call<Row, T>& call, const Exec& exec) {
  constexpr int kRows = kTeamThreads / kLanes;
  dev::launch<team<Row, T, kMasked, kLanes, kPacks>>(all_blocks((call.outer + kRows - 1) / kRows),
                                                     kTeamThreads, 0, dev::stream_of(exec), call);
}

template <class Row, class T, bool kMasked>
void launch(const Call<Row, T>& call, const Exec& exec) {
  if (call.inner > 1) {
    const std::int64_t strips = (call.outer * call.inner + kWidth - 1) / kWidth;
    dev::launch<columns<Row, T, kMasked>>(all_blocks(strips), kWidth * kLines, 0,
                                          dev::stream_of(exec), call);
    return;
  }
  const std::int64_t packs = (call.n + kPack<T> - 1) / kPack<T>;
  if (packs <= 8 * 2) return launch_team<Row, T, kMasked, 8, 2>(call, exec);
  if (packs <= dev::kWarp * kHeld<Row, kMasked>) {
    return launch_team<Row, T, kMasked, dev::kWarp, kHeld<Row, kMasked>>(call, exec);
  }
  if (packs <= kBlockThreads * kHeld<Row, kMasked>) {
    const auto warps = static_cast<unsigned>((packs + dev::kWarp * kHeld<Row, kMasked> - 1) /
                                             (dev::kWarp * kHeld<Row, kMasked>));
    dev::launch<block<Row, T, kMasked, kHeld<Row, kMasked>>>(
        all_blocks(call.outer), warps * dev::kWarp, 0, dev::stream_of(exec), call);
    return;
  }
  dev::launch<sweep<Row, T, kMasked>>(all_blocks(call.outer), kBlockThreads, 0,
                                      dev::stream_of(exec), call);
}

struct Launch {
  template <class Row, bool kMasked = false>
  static void run(const Rows& rows, const Buffer (&in)[Row::kIn], const Buffer (&out)[Row::kOut],
                  const Exec& exec, const Mask& mask = {}) {
    with_storage(in[0].dtype, [&](auto storage) {
      using T = decltype(storage);
      Call<Row, T> call{};
      call.packs = rows.n % kPack<T> == 0;
      for (int k = 0; k < Row::kIn; ++k) {
        call.in[k] = static_cast<const T*>(in[k].data);
        call.packs = call.packs && packs_at(in[k].data);
      }
      for (int k = 0; k < Row::kOut; ++k) {
        call.out[k] = static_cast<T*>(out[k].data);
        call.packs = call.packs && packs_at(out[k].data);
      }
      call.outer = rows.outer;
      call.n = rows.n;
      call.inner = rows.inner;
      call.scale = static_cast<Compute<T>>(rows.scale);
      call.dropout = Dropout<Compute<T>>(mask, in[0].size);
      launch<Row, T, kMasked>(call, exec);
    });
  }
};

using Table = SoftmaxTable<Launch>;

}  // namespace jops::JOPS_ISA::softmax
