// group_norm and batch_norm: a task takes a group, or a vector of them where they stand side by
// side. The statistics come from one visit, for which it first has a glimpse at the mean, and the
// outputs from a second one, for which caches may still have the group. Sums are those of pieces
// first, then of these, compensated. The formulas are in math/norm.h and math/group_norm.h.
#include "../math/group_norm.h"

#include <type_traits>

#include "../group_norm_table.h"
#include "../groups.h"
#include "columns.h"

namespace jops::JOPS_ISA {

template <class A>
JOPS_HD Vec<A> inverse_root(Vec<A> a) {
  for (int i = 0; i < Vec<A>::kLanes; ++i) a.v[i] = inverse_root(a.v[i]);
  return a;
}

namespace {

constexpr int kMaxIn = 4, kMaxOut = 2;

// Nothing here is absent, so that no loop asks: zeros stand for an input (step 0) and for a
// channel's numbers, and ones for its weight.
template <class T>
struct Call {
  Walk walk;
  const T* in[kMaxIn];
  std::int64_t step[kMaxIn];                // 0 or 1
  const Compute<T>* channel[kNormColumns];  // up to a whole vector
  T* out[kMaxOut];
  Compute<T>* stats;  // of every channel: mean, then variance; null where nobody asks
  Compute<T>* sums;   // over the elements of a channel and sample: [sample][kind][pitch]
  std::int64_t pitch;
  Compute<T> eps;
  bool fixed, streams;
};

// A vector of elements of a group.
template <class Row, class T>
struct At {
  using V = Vec<Compute<T>>;
  V in[Row::kIn], c[kNormColumns], q[Row::kQuantities > 0 ? Row::kQuantities : 1];
};

template <class Row, class T>
struct Task {
  using A = Compute<T>;
  using V = Vec<A>;
  static constexpr int kSums = GroupNorm<Row, V>::kSums;
  static constexpr int kKinds = Row::kColumnSums > 0 ? Row::kColumnSums : 1;

  const Call<T>& call;
  const std::int64_t group;
  GroupNorm<Row, V> norm;

  // visit(at, j, count) for every vector of a piece; x is `fill` past the end, the others 0. The
  // next piece is fetched meanwhile.
  template <class Visit>
  JOPS_HD void vectors(const Piece& piece, const Piece& next, A fill, const Visit& visit) const {
    At<Row, T> at;
#pragma GCC unroll 4
    for (int k = 0; k < kNormColumns; ++k) {
      const A* of = call.channel[k] + piece.channel;
      at.c[k] = call.walk.lanes ? load(of) : V(*of);
    }
    std::int64_t j = 0;
    for (; j + V::kLanes <= piece.length; j += V::kLanes) {
#pragma GCC unroll 4
      for (int k = 0; k < Row::kIn; ++k) {
        prefetch(call.in[k] + next.at * call.step[k] + j);
        at.in[k] = load(call.in[k] + piece.at * call.step[k] + j);
      }
      Row::quantities(at.in, at.c, at.q);
      visit(at, j, V::kLanes);
    }
    if (j < piece.length) {
      const int count = static_cast<int>(piece.length - j);
#pragma GCC unroll 4
      for (int k = 0; k < Row::kIn; ++k) {
        at.in[k] = load_n(call.in[k] + piece.at * call.step[k] + j, count, k == 0 ? fill : A(0));
      }
      Row::quantities(at.in, at.c, at.q);
      visit(at, j, count);
    }
  }

  JOPS_HD Piece piece_of(std::int64_t unit) const {
    return call.walk(group, unit < call.walk.units() ? unit : unit - 1);
  }

  // Of the lanes together, unless they are groups of their own.
  JOPS_HD V whole(V lanes) const { return call.walk.lanes ? lanes : V(sum(lanes)); }

  V pilot() const {
    V total(A(0));
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < call.walk.glimpses(); ++i) {
      const Piece piece = call.walk.glimpse(group, i);
      vectors(piece, piece, A(0),
              [&](const At<Row, T>& at, std::int64_t, int) { total += at.in[0]; });
      count += call.walk.lanes ? 1 : piece.length;
    }
    return whole(total) / V(static_cast<A>(count));
  }

  void measure() {
    const V shift = pilot();
    V total[kSums], lost[kSums];
    for (int k = 0; k < kSums; ++k) total[k] = lost[k] = V(A(0));
    for (std::int64_t unit = 0; unit < call.walk.units(); ++unit) {
      V part[kSums];
      for (V& p : part) p = V(A(0));
      vectors(
          piece_of(unit), piece_of(unit + 1), shift[0],
          [&](const At<Row, T>& at, std::int64_t, int) { norm.add(at.in[0] - shift, at.q, part); });
      for (int k = 0; k < kSums; ++k) add_compensated(part[k], total[k], lost[k]);
    }
    const V count(static_cast<A>(call.walk.count()));
    for (V& t : total) t = whole(t);
    norm.measure(total, shift, count, V(call.eps));
    if (std::is_same_v<Row, NormRow> && call.stats) {
      put_channels(call.stats, norm.mean[0]);
      const V others = max(V(A(1)), count - V(A(1)));
      put_channels(call.stats + call.walk.channels, norm.variance * (count / others));
    }
  }

  // The channel's number, or those of the lanes' channels.
  void put_channels(A* to, V numbers) const {
    const Piece first = piece_of(0);
    store_n(to + first.channel, numbers, call.walk.lanes ? static_cast<int>(first.length) : 1);
  }
  V get_channels(const A* from) const {
    const Piece first = piece_of(0);
    from += first.channel;
    return call.walk.lanes ? load_n(from, static_cast<int>(first.length)) : V(*from);
  }

  template <class Write>
  void put(const Write& write) {
    V total[kKinds], lost[kKinds];
    const auto reset = [&] {
      for (int k = 0; k < kKinds; ++k) total[k] = lost[k] = V(A(0));
    };
    const auto put_sums = [&](std::int64_t channel) {
      A* to = call.sums + call.walk.sample(group) * Row::kColumnSums * call.pitch + channel;
      for (int k = 0; k < Row::kColumnSums; ++k) {
        if (call.walk.lanes)
          store(to + k * call.pitch, total[k]);
        else
          to[k * call.pitch] = sum(total[k]);
      }
    };
    reset();
    const std::int64_t units = call.walk.units();
    std::int64_t channel = piece_of(0).channel;
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const Piece piece = piece_of(unit);
      if (Row::kColumnSums > 0 && piece.channel != channel) {
        put_sums(channel);
        reset();
        channel = piece.channel;
      }
      V part[kKinds];
      for (V& p : part) p = V(A(0));
      // Past the end x^ is 0, and so are the cotangents and the terms.
      vectors(piece, piece_of(unit + 1), norm.mean[0].v[0],
              [&](const At<Row, T>& at, std::int64_t j, int count) {
                norm.go_to(at.in[0], at.q);
                V out[Row::kOut], terms[kKinds];
                Row::emit(at.in, at.c, norm.at, out, terms);
#pragma GCC unroll 2
                for (int k = 0; k < Row::kOut; ++k)
                  write(call.out[k] + piece.at + j, out[k], count);
#pragma GCC unroll 4
                for (int k = 0; k < Row::kColumnSums; ++k) part[k] += terms[k];
              });
      for (int k = 0; k < Row::kColumnSums; ++k) add_compensated(part[k], total[k], lost[k]);
    }
    if (Row::kColumnSums > 0) put_sums(channel);
  }

  void run() {
    if (call.fixed) {
      const A* variance = call.stats + call.walk.channels;
      norm.take(get_channels(call.stats), get_channels(variance), V(call.eps));
    } else {
      measure();
    }
    if (call.streams) {
      put([](T* to, const V& v, int) { stream(to, v); });
      stream_fence();
    } else {
      put([](T* to, const V& v, int count) {
        if (count == V::kLanes)
          store(to, v);
        else
          store_n(to, v, count);
      });
    }
  }
};

struct Launch {
  template <class Row>
  static void run(const Groups& groups, const Buffer (&in)[Row::kIn],
                  const Buffer (&of_channel)[kNormColumns], const Buffer& stats,
                  const Buffer (&out)[Row::kOut], const Buffer& sums, const Exec& exec) {
    with_storage(in[0].dtype, [&](auto storage) {
      using T = decltype(storage);
      using A = Compute<T>;
      using V = Vec<A>;
      Call<T> call{};
      call.walk = walk_of(groups, V::kLanes, kBlock);
      const T zeros[kBlock + 64] = {};  // as long as a piece
      for (int k = 0; k < Row::kIn; ++k) {
        call.in[k] = in[k].given() ? static_cast<const T*>(in[k].data) : zeros;
        call.step[k] = in[k].given();
      }
      const std::int64_t channels = groups.channels;
      call.pitch = up<std::int64_t>(channels, V::kLanes) * V::kLanes;
      const Aligned<A> numbers(kNormColumns * call.pitch);
      for (int k = 0; k < kNormColumns; ++k) {
        const T* from = static_cast<const T*>(of_channel[k].data);
        A* to = numbers.data + k * call.pitch;
        for (std::int64_t j = 0; j < call.pitch; j += V::kLanes) {
          const int count = static_cast<int>(least<std::int64_t>(V::kLanes, channels - j));
          store(to + j, from ? load_n(from + j, count) : V(A(k == kWeight ? 1 : 0)));
        }
        call.channel[k] = to;
      }
      call.stats = static_cast<A*>(stats.data);
      call.fixed = groups.fixed;
      call.eps = static_cast<A>(groups.eps);
      call.streams = should_stream(Row::kOut * in[0].size * static_cast<std::int64_t>(sizeof(T))) &&
                     groups.inner % V::kLanes == 0;
      for (int k = 0; k < Row::kOut; ++k) {
        call.out[k] = static_cast<T*>(out[k].data);
        call.streams = call.streams && can_stream(call.out[k]);
      }
      constexpr int kKinds = Row::kColumnSums;
      const std::int64_t samples = groups.groups > 0 ? groups.outer : 1;
      const Aligned<A> parts(samples * kKinds * call.pitch);
      call.sums = parts.data;
      parallel(call.walk.groups, useful_threads(in[0].size, exec.threads),
               [&](std::int64_t group) { Task<Row, T>{call, group, {}}.run(); });
      for (int k = 0; k < kKinds; ++k) {
        add_parts(parts.data + k * call.pitch, samples, kKinds * call.pitch, channels,
                  static_cast<T*>(sums.data) + k * channels);
      }
    });
  }
};

}  // namespace

void register_group_norm(Kernels& table) {
  GroupNormTable<Launch>::put(table);
  table.group_norm_workspace = [](const Groups&, int) -> std::int64_t { return 0; };
}

}  // namespace jops::JOPS_ISA
