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

template <class Row, class T, bool kMasked, bool kStaged>
void launch_columns(const Call<Row, T>& call, std::size_t strip, const Exec& exec) {
  dev::launch<columns<Row, T, kMasked, kStaged>>(
      all_blocks((call.outer * call.inner + kWidth - 1) / kWidth), kWidth * kLines,
      kStaged ? strip : 0, dev::stream_of(exec), call);
}

template <class Row, class T, bool kMasked>
void launch(const Call<Row, T>& call, const Exec& exec) {
  using A = Compute<T>;
  const auto n = static_cast<std::size_t>(call.n);
  if (call.inner > 1) {
    // Two blocks of a multiprocessor, so that one copies while the other computes; each takes 1 KiB
    // besides its own.
    const std::size_t strip = Row::kIn * n * kWidth * sizeof(T);
    if (strip + sizeof(OfLines<Row, A>) <= (dev::most_shared() - 1024) / 2) {
      return launch_columns<Row, T, kMasked, true>(call, strip, exec);
    }
    return launch_columns<Row, T, kMasked, false>(call, strip, exec);
  }
  const std::size_t packs = (n + kPack<T> - 1) / kPack<T>;
  if (packs <= 8 * 2) return launch_team<Row, T, kMasked, 8, 2>(call, exec);
  constexpr int kHeldByWarp = dev::kWarp * kHeld<Row, kMasked>;
  if (packs <= kHeldByWarp) {
    return launch_team<Row, T, kMasked, dev::kWarp, kHeld<Row, kMasked>>(call, exec);
  }
  const unsigned rows = all_blocks(call.outer);
  if (packs <= kMostWarps * kHeldByWarp) {
    const auto warps = static_cast<unsigned>((packs + kHeldByWarp - 1) / kHeldByWarp);
    return dev::launch<block<Row, T, kMasked, kHeld<Row, kMasked>>>(rows, warps * dev::kWarp, 0,
                                                                    dev::stream_of(exec), call);
  }
  const std::size_t stage = Row::kIn * packs * sizeof(uint4);
  if (stage + sizeof(OfWarps<A, 1>) + sizeof(OfWarps<A, Row::kSums>) <= dev::most_shared()) {
    return dev::launch<staged<Row, T, kMasked>>(rows, kBlockThreads, stage, dev::stream_of(exec),
                                                call);
  }
  dev::launch<sweep<Row, T, kMasked>>(rows, kBlockThreads, 0, dev::stream_of(exec), call);
}

struct Launch {
  template <class Row, bool kMasked = false>
  static void run(const Rows& rows, const Buffer (&in)[Row::kIn], const Buffer (&out)[Row::kOut],
                  const Exec& exec, const Mask& mask = {}) {
    with_storage(in[0].dtype, [&](auto storage) {
      using T = decltype(storage);
      Call<Row, T> call{};
      call.packs = (rows.inner > 1 ? rows.inner : rows.n) % kPack<T> == 0;
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
