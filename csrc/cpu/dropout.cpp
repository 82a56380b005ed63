// Dropout y = m x, and y = residual + m x. The mask m is computed again from the seed wherever it
// is needed and never stored; the VJP and the JVP are the same kernel.
#include "blocks.h"

namespace jops::JOPS_ISA {
namespace {

// T: storage type, A: the type it is computed in.
template <class T, bool kAdd>
void run(const Buffer& x, const Buffer& residual, const Buffer& y, const Mask& mask,
         const Exec& exec) {
  using A = Compute<T>;
  constexpr int kLanes = Vec<A>::kLanes;
  constexpr std::int64_t kTask = 16 * kBlock, kAhead = 4096 / sizeof(T);
  const std::int64_t size = x.size;
  const bool streams =
      should_stream(size * static_cast<std::int64_t>(sizeof(T))) && can_stream(y.data);

  parallel((size + kTask - 1) / kTask, useful_threads(size, exec.threads), [&](std::int64_t task) {
    const std::int64_t begin = task * kTask, end = begin + kTask < size ? begin + kTask : size;
    alignas(64) A m[kBlock];
    for (int i = 0; i < kBlock; ++i) m[i] = 1;
    for (std::int64_t first = begin; first < end; first += kBlock) {
      const std::int64_t n = end - first < kBlock ? end - first : kBlock;
      const T* in = static_cast<const T*>(x.data) + first;
      const T* add = kAdd ? static_cast<const T*>(residual.data) + first : nullptr;
      T* out = static_cast<T*>(y.data) + first;
      if (mask.given()) dropout_range(mask, size, first, m, n);
      std::int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        prefetch(in + i + kAhead);
        Vec<A> r = load(m + i) * load(in + i);
        if constexpr (kAdd) {
          prefetch(add + i + kAhead);
          r += load(add + i);
        }
        if (streams)
          stream(out + i, r);
        else
          store(out + i, r);
      }
      if (i < n) {
        const int rest = static_cast<int>(n - i);
        Vec<A> r = load(m + i) * load_n(in + i, rest);
        if constexpr (kAdd) r += load_n(add + i, rest);
        store_n(out + i, r, rest);
      }
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
