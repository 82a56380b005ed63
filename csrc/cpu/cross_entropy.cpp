// Cross-entropy over the middle dimension of contiguous (outer, n, inner) logits, read once where
// they leave the caches: maximum and sums are taken online, every lane of a vector with a maximum
// of its own (Milakov and Gimelshein, arXiv:1805.02867).
//
// inner == 1: a row is contiguous; blocks of it are read twice within L1, the whole row a second
// time for a map. inner > 1: strips of columns, walked row by row; a lane is a column. The formulas
// are in math/cross_entropy.h.
#include "../math/cross_entropy.h"

#include <stdexcept>
#include <string>

#include "../cross_entropy_table.h"
#include "columns.h"
#include "vectors.h"

namespace jops::JOPS_ISA {
namespace {

template <class T>
struct Call {
  using A = Compute<T>;
  const T *x, *tx, *p;  // p may be null, and what a product has no use for
  const std::int64_t* classes;
  const A *weight, *g, *tg;  // weight is never null where q is spread over the row
  A *loss, *tloss;
  T* out[2];
  std::int64_t n, inner, ignore_index;
  A keep, base;
  bool streams;

  // What of the spread part belongs to a row's class, not to its probabilities.
  A base_of(std::int64_t row) const { return ignores(row) ? A(0) : base; }
  bool ignores(std::int64_t row) const { return classes && classes[row] == ignore_index; }
  // `row` counts rows of logits, which begin at x[start] and go on every `inner` numbers.
  Hot<A> hot(std::int64_t row, std::int64_t start) const {
    if (!classes || ignores(row)) return {};
    const std::int64_t j = classes[row];
    const auto read = [&](const T* from) {
      return from ? load_n(from + start + j * inner, 1)[0] : A(0);
    };
    return {keep * (weight ? weight[j] : A(1)), read(x), read(tx)};
  }
  void finish(std::int64_t row, const A* sum, A top, const Hot<A>& hot, bool tangent) const {
    loss[row] = entropy_loss(sum, top, hot);
    if (tangent) tloss[row] = entropy_tangent(sum, hot);
  }
  EntropyMap<A> map(std::int64_t row, const A* sum, const Hot<A>& hot) const {
    return entropy_map(sum, hot, g[row], tg ? tg[row] : A(0));
  }
};

template <class V>
JOPS_HD V finite(V top) {  // any number serves while there is nothing but -infinity
  return select(top == V(-kInfinity<Scalar<V>>), V(0), top);
}

// One vector of logits, from `at` on.
template <class Row, bool kSpreads, class T>
struct Logits {
  using A = Compute<T>;
  using V = Vec<A>;
  V x, tx, r;

  // The spread part of q is weight * (keep p + base).
  JOPS_HD void read(const Call<T>& call, std::int64_t at, int count, V weight, V base) {
    const auto from = [&](const T* p, A fill) {
      return count == V::kLanes ? load(p + at) : load_n(p + at, count, fill);
    };
    x = from(call.x, -kInfinity<A>);
    tx = Row::kTangent ? from(call.tx, A(0)) : V(A(0));
    r = V(A(0));
    if constexpr (kSpreads) {
      r = weight * (call.p ? fma(V(call.keep), from(call.p, A(0)), base) : base);
    }
  }
};

template <class Row, bool kSpreads, class T>
void contiguous_row(const Call<T>& call, std::int64_t row) {
  using A = Compute<T>;
  using V = Vec<A>;
  constexpr std::int64_t kAhead = 4096 / sizeof(T);
  const std::int64_t n = call.n, start = row * n;
  const Hot<A> hot = call.hot(row, start);
  const V base(call.base_of(row));
  Logits<Row, kSpreads, T> at;
  const auto read = [&](std::int64_t j, int count) {
    V weight(A(0));  // zeros past the end of a row
    if constexpr (kSpreads) weight = load(call.weight + j);
    at.read(call, start + j, count, weight, base);
  };

  V top(-kInfinity<A>), sum[kEntropySums];
  for (V& s : sum) s = V(A(0));
  const std::int64_t seen = call.ignores(row) ? 0 : n;
  for (std::int64_t block = 0; block < seen; block += kBlock) {
    const std::int64_t count = least<std::int64_t>(n - block, kBlock);
    const T* x = call.x + start + block;
    V now[2] = {top, top};
    std::int64_t j = 0;
    for (; j + 2 * V::kLanes <= count; j += 2 * V::kLanes) {
      prefetch(x + j + kAhead);
      prefetch(x + j + V::kLanes + kAhead);
      now[0] = max(now[0], load(x + j));
      now[1] = max(now[1], load(x + j + V::kLanes));
    }
    for_vectors<V::kLanes>(count - j, 0, [&](std::int64_t i, int lanes) {
      now[0] = max(now[0],
                   lanes == V::kLanes ? load(x + j + i) : load_n(x + j + i, lanes, -kInfinity<A>));
    });
    now[0] = max(now[0], now[1]);
    const V reference = finite(now[0]);
    Row::raise(finite(top), reference, exp(top - reference), sum);
    top = now[0];

    // Sums of a block first, then of the blocks: the error grows with their number.
    V part[2][kEntropySums];
    for (auto& p : part)
      for (V& s : p) s = V(A(0));
    const auto add = [&](std::int64_t j, int lanes, V* to) {
      read(block + j, lanes);
      if constexpr (Row::kTangent) prefetch(call.tx + start + block + j + kAhead);
      if constexpr (kSpreads) {
        if (call.p) prefetch(call.p + start + block + j + kAhead);
      }
      Row::template add<kSpreads>(at.x - reference, at.tx, at.r, to);
    };
    for (j = 0; j + 2 * V::kLanes <= count; j += 2 * V::kLanes) {
      add(j, V::kLanes, part[0]);
      add(j + V::kLanes, V::kLanes, part[1]);
    }
    for_vectors<V::kLanes>(count - j, 0,
                           [&](std::int64_t i, int lanes) { add(j + i, lanes, part[0]); });
    for (int k = 0; k < kEntropySums; ++k) sum[k] += part[0][k] + part[1][k];
  }
  const A highest = finite(max_lane(top));
  Row::raise(finite(top), V(highest), exp(top - V(highest)), sum);
  A total[kEntropySums];
  for (int k = 0; k < kEntropySums; ++k) total[k] = jops::JOPS_ISA::sum(sum[k]);

  if constexpr (!Row::kMaps) {
    call.finish(row, total, highest, hot, Row::kTangent);
  } else {
    const EntropyMap<A> of = call.map(row, total, hot);
    const EntropyMap<V> map = {V(of.scale), V(of.mean), V(of.g), V(of.tg)};
    const std::int64_t head = call.streams ? before_vector(call.out[0] + start) : 0;
    for_vectors<V::kLanes>(n, head, [&](std::int64_t j, int lanes) {
      read(j, lanes);
      V out[2];
      entropy_emit<Row>(map, at.x - V(highest), at.tx, at.r, out);
#pragma GCC unroll 2
      for (int k = 0; k < Row::kOut; ++k) {
        write(call.out[k] + start + j, out[k], lanes, call.streams);
      }
    });
    if (hot.weight != 0) {
      const std::int64_t j = call.classes[row];
      const A spread = kSpreads ? call.weight[j] * call.base : A(0);
      A out[2];
      entropy_emit<Row>(of, hot.x - highest, hot.tx, spread + hot.weight, out);
      for (int k = 0; k < Row::kOut; ++k) store_n(call.out[k] + start + j, V(out[k]), 1);
    }
  }
}

constexpr int kStrip = 256;  // columns of a strip at most: its state stays in L1
constexpr int kDeep = 8;     // rows at a time

template <class Row, bool kSpreads, class T>
void strip(const Call<T>& call, std::int64_t outer, std::int64_t column, std::int64_t width) {
  using A = Compute<T>;
  using V = Vec<A>;
  using Bits = typename V::Bits;
  const std::int64_t n = call.n, inner = call.inner;
  const std::int64_t start = outer * n * inner + column, first = outer * inner + column;

  // `lost` is what rounding took from `sum` (Kahan).
  constexpr int kRoom = kStrip + V::kLanes;  // a head may read past the strip
  alignas(64) A top[kRoom], sum[kEntropySums][kRoom], lost[kEntropySums][kStrip], base[kRoom];
  alignas(64) A hot_weight[kRoom], scale[kRoom], mean[kRoom], g[kRoom], tg[kRoom];
  alignas(64) IntOf<A> hot_row[kRoom];
  for (int j = 0; j < kStrip; ++j) {
    top[j] = -kInfinity<A>;
    base[j] = j < width ? call.base_of(first + j) : A(0);
    for (int k = 0; k < kEntropySums; ++k) sum[k][j] = lost[k][j] = 0;
  }
  Logits<Row, kSpreads, T> at;
  const auto read = [&](std::int64_t row, std::int64_t j, int lanes) {
    at.read(call, start + row * inner + j, lanes, V(kSpreads ? call.weight[row] : A(0)),
            load(base + j));
  };

  for (std::int64_t row = 0; row < n; row += kDeep) {
    const std::int64_t rows = least<std::int64_t>(n - row, kDeep);
    for_vectors<V::kLanes>(width, 0, [&](std::int64_t j, int lanes) {
      const T* x = call.x + start + row * inner + j;
      const V before = load(top + j);
      V now = before;
      for (std::int64_t r = 0; r < rows; ++r) {
        prefetch(x + (r + kDeep) * inner);
        now = max(now, lanes == V::kLanes ? load(x + r * inner) : load_n(x + r * inner, lanes));
      }
      store(top + j, now);
      const V reference = finite(now), factor = exp(before - reference);
      V total[kEntropySums], rest[kEntropySums], part[kEntropySums];
      for (int k = 0; k < kEntropySums; ++k) {
        total[k] = load(sum[k] + j);
        rest[k] = load(lost[k] + j);
        part[k] = V(A(0));
      }
      Row::raise(finite(before), reference, factor, total);
      Row::raise(finite(before), reference, factor, rest);
      for (std::int64_t r = 0; r < rows; ++r) {
        read(row + r, j, lanes);
        Row::template add<kSpreads>(at.x - reference, at.tx, at.r, part);
      }
      for (int k = 0; k < kEntropySums; ++k) {
        add_compensated(part[k], total[k], rest[k]);
        store(sum[k] + j, total[k]);
        store(lost[k] + j, rest[k]);
      }
    });
  }

  for (std::int64_t j = 0; j < width; ++j) {
    const Hot<A> hot = call.hot(first + j, start + j);
    A of_column[kEntropySums];
    for (int k = 0; k < kEntropySums; ++k) of_column[k] = sum[k][j];
    top[j] = finite(top[j]);
    if constexpr (!Row::kMaps) {
      call.finish(first + j, of_column, top[j], hot, Row::kTangent);
    } else {
      const EntropyMap<A> of = call.map(first + j, of_column, hot);
      scale[j] = of.scale;
      mean[j] = of.mean;
      g[j] = of.g;
      tg[j] = of.tg;
      hot_weight[j] = hot.weight;
      hot_row[j] = hot.weight == 0 ? -1 : static_cast<IntOf<A>>(call.classes[first + j]);
    }
  }
  if constexpr (Row::kMaps) {
    for (std::int64_t row = 0; row < n; ++row) {
      const std::int64_t from = start + row * inner;
      const std::int64_t head = call.streams ? before_vector(call.out[0] + from) : 0;
      for_vectors<V::kLanes>(width, head, [&](std::int64_t j, int lanes) {
        read(row, j, lanes);
        Bits classes;
        std::memcpy(&classes, hot_row + j, sizeof(classes));
        const Bool<A> here = {classes == static_cast<IntOf<A>>(row)};
        const V q = at.r + select(here, load(hot_weight + j), V(A(0)));
        const EntropyMap<V> of = {load(scale + j), load(mean + j), load(g + j), load(tg + j)};
        V out[2];
        entropy_emit<Row>(of, at.x - load(top + j), at.tx, q, out);
#pragma GCC unroll 2
        for (int k = 0; k < Row::kOut; ++k) {
          write(call.out[k] + from + j, out[k], lanes, call.streams);
        }
      });
    }
  }
}

template <class Row, bool kSpreads, class T>
void each_row(const Call<T>& call, std::int64_t outer, int threads) {
  const std::int64_t n = call.n, inner = call.inner;
  threads = useful_threads(outer * n * inner, threads);
  if (inner == 1) {
    const std::int64_t rows_per_task = n < kBlock ? kBlock / n : 1;
    parallel(up(outer, rows_per_task), threads, [&](std::int64_t task) {
      const std::int64_t first = task * rows_per_task;
      for (std::int64_t row = first; row < least(first + rows_per_task, outer); ++row) {
        contiguous_row<Row, kSpreads>(call, row);
      }
      if (call.streams) stream_fence();
    });
  } else {
    // Narrower strips only where the whole ones would leave a thread without work.
    std::int64_t width = kStrip;
    while (width > 64 && outer * up(inner, width) < threads) width /= 2;
    const std::int64_t strips = up(inner, width);
    parallel(outer * strips, threads, [&](std::int64_t task) {
      const std::int64_t column = task % strips * width;
      strip<Row, kSpreads>(call, task / strips, column, least(call.inner - column, width));
      if (call.streams) stream_fence();
    });
  }
}

void check_classes(const Rows& rows, const Target& target) {
  for (std::int64_t i = 0; i < target.rows; ++i) {
    const std::int64_t j = target.classes[i];
    if ((j < 0 || j >= rows.n) && j != target.ignore_index) {
      throw std::out_of_range("cross_entropy: target is " + std::to_string(j) + "; allowed: 0 to " +
                              std::to_string(rows.n - 1) + ", the classes of input, and " +
                              std::to_string(target.ignore_index) + ", ignore_index (Target " +
                              std::to_string(j) + " is out of bounds.)");
    }
  }
}

struct Launch {
  template <class Row>
  static void run(const Rows& rows, const Target& target, const EntropyCall& given,
                  const Exec& exec) {
    check_classes(rows, target);
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
      call.n = rows.n;
      call.inner = rows.inner;
      call.ignore_index = target.ignore_index;
      call.keep = static_cast<A>(1 - target.smoothing);
      call.base = static_cast<A>(target.smoothing / static_cast<double>(rows.n));
      // What lies in the caches, as x does when it is overwritten, is better written there.
      const auto to = reinterpret_cast<std::uintptr_t>(call.out[0]);
      const auto apart = reinterpret_cast<std::uintptr_t>(call.out[1]) - to;
      call.streams =
          should_stream(Row::kOut * given.x.size * static_cast<std::int64_t>(sizeof(T))) &&
          to % sizeof(T) == 0 && (Row::kOut < 2 || apart % kVectorBytes == 0) &&
          call.out[0] != call.x;
      if (!call.p && target.smoothing == 0) {
        return each_row<Row, false>(call, rows.outer, exec.threads);
      }
      const std::int64_t pitch = up<std::int64_t>(rows.n, Vec<A>::kLanes) * Vec<A>::kLanes;
      const Aligned<A> weight(pitch + Vec<A>::kLanes);  // a head may read past the end
      for (std::int64_t j = 0; j < pitch + Vec<A>::kLanes; ++j) {
        weight.data[j] = j >= rows.n ? A(0) : call.weight ? call.weight[j] : A(1);
      }
      call.weight = weight.data;
      each_row<Row, true>(call, rows.outer, exec.threads);
    });
  }
};

}  // namespace

void register_cross_entropy(Kernels& table) { EntropyTable<Launch>::put(table); }

}  // namespace jops::JOPS_ISA
