// Dropout y = m x, and y = residual + m x. The mask m is computed again from the seed wherever it
// is needed and never stored; the VJP and the JVP are the same kernel.
#include "multipliers.h"

namespace jops::JOPS_ISA {
namespace {

// T: storage type, A: the type it is computed in.
template <class T, bool kAdd>
void run(const Buffer& x, const Buffer& residual, const Buffer& y, const Mask& mask,
         const Exec& exec) {
  using A = Compute<T>;
  using V = Vec<A>;
  constexpr int kLanes = V::kLanes;
  constexpr std::int64_t kTask = 16 * kBlock, kAhead = 4096 / sizeof(T);
  const std::int64_t size = x.size;
  const bool streams = should_stream(size * static_cast<std::int64_t>(sizeof(T)));

  parallel((size + kTask - 1) / kTask, useful_threads(size, exec.threads), [&](std::int64_t task) {
    const std::int64_t begin = task * kTask, end = begin + kTask < size ? begin + kTask : size;
    const T* in = static_cast<const T*>(x.data) + begin;
    const T* add = static_cast<const T*>(residual.data) + begin;
    T* out = static_cast<T*>(y.data) + begin;
    // y of the elements from `at` on, with multipliers m.
    const auto apply = [&](std::int64_t at, const A* m, int count) {
      int i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        const std::int64_t k = at + i;
        prefetch(in + k + kAhead);
        V r = load(m + i) * load(in + k);
        if constexpr (kAdd) {
          prefetch(add + k + kAhead);
          r += load(add + k);
        }
        if (streams && can_stream(out + k))
          stream(out + k, r);
        else
          store(out + k, r);
      }
      if (i < count) {
        const int rest = count - i;
        V r = load_n(m + i, rest) * load_n(in + at + i, rest);
        if constexpr (kAdd) r += load_n(add + at + i, rest);
        store_n(out + at + i, r, rest);
      }
    };
    if (!mask.given()) {
      alignas(64) A ones[kGroup];
      for (A& m : ones) m = 1;
      for (std::int64_t at = 0; at < end - begin; at += kGroup) {
        const std::int64_t left = end - begin - at;
        apply(at, ones, static_cast<int>(left < kGroup ? left : kGroup));
      }
    } else {
      for_samples(mask, size, begin, end - begin,
                  [&](std::int64_t sample, std::int64_t start, std::int64_t done, std::int64_t n) {
                    for_multipliers<A>(
                        mask, sample, start, n,
                        [&](std::int64_t i, const A* m, int count) { apply(done + i, m, count); });
                  });
    }
    if (streams) stream_fence();
  });
}

void dropout(const Buffer& x, const Buffer& y, const Mask& mask, const Exec& exec) {
  with_storage(x.dtype, [&](auto t) { run<decltype(t), false>(x, x, y, mask, exec); });
}

void dropout_add(const Buffer& x, const Buffer& residual, const Buffer& y, const Mask& mask,
                 const Exec& exec) {
  with_storage(x.dtype, [&](auto t) { run<decltype(t), true>(x, residual, y, mask, exec); });
}

}  // namespace

void register_dropout(Kernels& table) {
  table.dropout = dropout;
  table.dropout_add = dropout_add;
}

}  // namespace jops::JOPS_ISA
