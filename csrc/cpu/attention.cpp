// Attention without its matrix of scores: a tile of keys by queries at a time, which stays in a
// cache. A lane of a vector is a query, so that maxima and sums over keys need no exchange between
// lanes, and the rows of k and v are read in place, a number at a time. The formulas are in
// math/attention.h.
#include "../math/attention.h"

#include "columns.h"
#include "multipliers.h"

namespace jops::JOPS_ISA {
namespace {

// A tile's queries and keys. Accumulators of a product, vectors of its right factor and a number of
// its left one fill the register file.
constexpr int kQueries = 96, kKeys = 64;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kVectors = 3;  // of 32 registers
#else
constexpr int kRows = 4, kVectors = 3;  // of 16 registers
#endif
// Widths of copies are multiples of it: of every vector and of kRows.
constexpr int kUnit = 16;

std::int64_t padded(std::int64_t width) { return up<std::int64_t>(width, kUnit) * kUnit; }

// ------------------------------------------------------------------------------- products

// The left factor of a product, in memory of any strides.
template <class A>
struct Left {
  const A* data;
  std::int64_t row, step;
};
// The right factor or the result: rows of vectors.
template <class A>
struct Wide {
  A* data;
  std::int64_t row;
};

template <class A, int kCount>
__attribute__((noinline, noclone)) void tile(Left<A> a, Wide<const A> b, std::int64_t steps,
                                             Wide<A> c, bool add) {
  using V = Vec<A>;
  using Native = typename V::Native;
  // One array a column of vectors: GCC 12 spills an array of all.
  Native x[kRows], y[kRows], z[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const A* from = c.data + i * c.row;
    x[i] = add ? load(from).v : Native{};
    if constexpr (kCount > 1) y[i] = add ? load(from + V::kLanes).v : Native{};
    if constexpr (kCount > 2) z[i] = add ? load(from + 2 * V::kLanes).v : Native{};
  }
  const std::int64_t three = 3 * a.row;
  const A *p = a.data, *q = p + 4 * a.row;
  for (std::int64_t k = 0; k < steps; ++k, p += a.step, q += a.step, b.data += b.row) {
    const V b0 = load(b.data);
    V b1, b2;
    if constexpr (kCount > 1) b1 = load(b.data + V::kLanes);
    if constexpr (kCount > 2) b2 = load(b.data + 2 * V::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V number((i < 4 ? p : q)[i % 4 == 3 ? three : i % 4 * a.row]);
      x[i] = fma(number, b0, V(x[i])).v;
      if constexpr (kCount > 1) y[i] = fma(number, b1, V(y[i])).v;
      if constexpr (kCount > 2) z[i] = fma(number, b2, V(z[i])).v;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    A* to = c.data + i * c.row;
    store(to, V(x[i]));
    if constexpr (kCount > 1) store(to + V::kLanes, V(y[i]));
    if constexpr (kCount > 2) store(to + 2 * V::kLanes, V(z[i]));
  }
}

// c = a b, or c += a b: `rows` (to a multiple of kRows) by `cols` (to whole vectors) numbers.
template <class A>
void multiply(Left<A> a, Wide<const A> b, std::int64_t rows, std::int64_t cols, std::int64_t steps,
              Wide<A> c, bool add) {
  constexpr int kLanes = Vec<A>::kLanes;
  for (std::int64_t j = 0; j < cols; j += kVectors * kLanes) {
    const std::int64_t vectors = up<std::int64_t>(cols - j, kLanes);
    const auto run = vectors >= 3 ? tile<A, 3> : vectors == 2 ? tile<A, 2> : tile<A, 1>;
    for (std::int64_t i = 0; i < rows; i += kRows) {
      run({a.data + i * a.row, a.row, a.step}, {b.data + j, b.row}, steps,
          {c.data + i * c.row + j, c.row}, add);
    }
  }
}

// ---------------------------------------------------------------------------------- rows

template <class T>
struct Head {
  T* data = nullptr;
  std::int64_t row = 0, col = 0, width = 0;
  bool given() const { return data != nullptr; }
};
template <class T>
Head<T> head(const Heads& t, std::int64_t batch, std::int64_t h) {
  if (!t.given()) return {};
  return {static_cast<T*>(t.data) + batch * t.batch_stride + h * t.head_stride, t.row_stride,
          t.col_stride, t.width};
}

// Copies of `count` rows, times a factor, zeros up to the padded width.
template <class T, class A = Compute<T>>
void read_rows(const Head<T>& from, std::int64_t first, int count, A factor, A* to) {
  using V = Vec<A>;
  const std::int64_t pitch = padded(from.width);
  for (int i = 0; i < count; ++i, to += pitch) {
    const T* p = from.data + (first + i) * from.row;
    for (std::int64_t j = 0; j < pitch; j += V::kLanes) {
      const int n = static_cast<int>(least<std::int64_t>(from.width - j, V::kLanes));
      V x(A(0));
      if (n == V::kLanes && from.col == 1)
        x = load(p + j);
      else if (n > 0)
        x = strided(p + j * from.col, from.col, n);
      store(to + j, V(factor) * x);
    }
  }
}

// Rows of k or v: in place where that serves, else a copy in `scratch`, with zeros up to a multiple
// of kRows.
template <class T, class A = Compute<T>>
Wide<const A> panel(const Head<T>& from, std::int64_t first, int count, A* scratch) {
  if constexpr (std::is_same_v<T, A>) {
    if (from.col == 1 && count % kRows == 0 && from.width % kUnit == 0) {
      return {from.data + first * from.row, from.row};
    }
  }
  const std::int64_t pitch = padded(from.width);
  read_rows(from, first, count, A(1), scratch);
  for (std::int64_t i = count * pitch; i < up<std::int64_t>(count, kRows) * kRows * pitch; ++i) {
    scratch[i] = 0;
  }
  return {scratch, pitch};
}

template <class A>
Left<A> by_rows(Wide<const A> w) {
  return {w.data, w.row, 1};
}
template <class A>
Left<A> by_columns(Wide<const A> w) {
  return {w.data, 1, w.row};
}

// Rows of queries, or of cotangents: as they are, and transposed, so that a lane is a row.
template <class A>
struct Block {
  A *rows, *columns;
  std::int64_t pitch;

  Wide<const A> wide() const { return {rows, pitch}; }
  Wide<const A> lanes() const { return {columns, kQueries}; }

  template <class T>
  void read(const Head<T>& from, std::int64_t first, int count, A factor) {
    read_rows(from, first, count, factor, rows);
    for (std::int64_t j = 0; j < from.width; ++j) {
      A* to = columns + j * kQueries;
      for (int i = 0; i < count; ++i) to[i] = rows[i * pitch + j];
      for (int i = count; i < kQueries; ++i) to[i] = 0;
    }
  }
};

// The columns of a transposed block, times a factor, become rows.
template <class T, class A = Compute<T>>
void write_columns(const A* from, A factor, const Head<T>& to, std::int64_t first, int count) {
  using V = Vec<A>;
  for (int i = 0; i < count; ++i) {
    T* p = to.data + (first + i) * to.row;
    for (std::int64_t j = 0; j < to.width; j += V::kLanes) {
      const int n = static_cast<int>(least<std::int64_t>(to.width - j, V::kLanes));
      A near[V::kLanes] = {};
      for (int l = 0; l < n; ++l) near[l] = factor * from[(j + l) * kQueries + i];
      if (to.col == 1) {
        store_n(p + j, load(near), n);
      } else {
        T apart[V::kLanes];
        store(apart, load(near));
        for (int l = 0; l < n; ++l) p[(j + l) * to.col] = apart[l];
      }
    }
  }
}

// Memory of a task, handed out piece by piece.
template <class A>
class Arena {
 public:
  explicit Arena(std::int64_t n) : memory_(n + kUnit), next_(memory_.data) {}
  A* take(std::int64_t n) {
    A* piece = next_;
    next_ += padded(n);
    return piece;
  }
  Block<A> block(std::int64_t width) {
    const std::int64_t n = kQueries * padded(width);
    return {take(n), take(n), padded(width)};
  }
  static std::int64_t of_block(std::int64_t width) { return 2 * kQueries * padded(width); }

 private:
  const Aligned<A> memory_;
  A* next_;
};

// --------------------------------------------------------------------------------- scores

template <class T>
struct Call {
  using A = Compute<T>;
  Scores scores;
  Heads q, k, v, tq, tk, tv, tbias, o, to, go, tgo, gq, gk, gv, tgq, tgk, tgv;
  A *lse, *mu, *delta;
  Mask mask;

  std::int64_t blocks() const { return up<std::int64_t>(q.rows, kQueries); }
  std::int64_t group() const { return q.heads / k.heads; }
};

// A head's block of queries, and what hides keys from it.
template <class T>
struct Place {
  using A = Compute<T>;
  using V = Vec<A>;
  const Call<T>& call;
  std::int64_t batch, h, first;
  int count;
  Head<const std::uint8_t> keep;
  Head<const T> bias, tbias;

  Place(const Call<T>& c, std::int64_t batch_at, std::int64_t head_at, std::int64_t block)
      : call(c),
        batch(batch_at),
        h(head_at),
        first(block * kQueries),
        count(static_cast<int>(least<std::int64_t>(c.q.rows - first, kQueries))),
        keep(head<const std::uint8_t>(c.scores.keep, batch, h)),
        bias(head<const T>(c.scores.bias, batch, h)),
        tbias(head<const T>(c.tbias, batch, h)) {}

  std::int64_t kv() const { return h / call.group(); }
  // Of the numbers that belong to a query.
  std::int64_t row() const { return (batch * call.q.heads + h) * call.q.rows + first; }
  int lanes() const { return up<int>(count, V::kLanes) * V::kLanes; }
  std::int64_t visible() const {
    return call.scores.causal ? least(call.k.rows, first + count) : call.k.rows;
  }

  // -infinity for what is hidden, and for rows past the keys; the bias for what is not.
  void hide(std::int64_t key, int keys, A* s) const {
    const V never(-kInfinity<A>);
    const bool causal = call.scores.causal && key + keys - 1 > first;
    if (keys % kRows == 0 && !causal && !bias.given() && !keep.given()) return;
    for (int i = 0; i < lanes(); i += V::kLanes) {
      V index;
      for (int l = 0; l < V::kLanes; ++l) index.v[l] = static_cast<A>(i + l);
      for (int j = 0; j < up<int>(keys, kRows) * kRows; ++j) {
        A* to = s + j * kQueries + i;
        if (j >= keys) {
          store(to, never);
          continue;
        }
        if (bias.given()) {
          const V added = of_lanes(bias, key + j, i);
          store(to, select(added == never, never, load(to) + added));
        }
        if (keep.given()) {
          A kept[V::kLanes] = {};
          const std::uint8_t* p = keep.data + (first + i) * keep.row + (key + j) * keep.col;
          for (int l = 0; l < V::kLanes && i + l < count; ++l) kept[l] = p[l * keep.row] ? 1 : 0;
          store(to, select(load(kept) == V(A(0)), never, load(to)));
        }
        if (causal) {
          const V earliest(static_cast<A>(key + j - first));
          store(to, select(index < earliest, never, load(to)));
        }
      }
    }
  }
  // The tangents of scores s, which hide() has dealt with.
  void hide_tangents(std::int64_t key, int keys, const A* s, A* ts) const {
    for (int j = 0; j < up<int>(keys, kRows) * kRows; ++j) {
      for (int i = 0; i < lanes(); i += V::kLanes) {
        A* to = ts + j * kQueries + i;
        V t = load(to);
        if (tbias.given() && j < keys) t += of_lanes(tbias, key + j, i);
        store(to, score_tangent(load(s + j * kQueries + i), t));
      }
    }
  }
  // Dropout's multipliers, a row of keys after the other.
  void draw(std::int64_t key, int keys, A* m) const {
    const std::int64_t per_sample =
        call.q.batch / call.mask.batch * call.q.heads * call.q.rows * call.k.rows;
    for (int i = 0; i < count; ++i) {
      const std::int64_t at = (row() + i) * call.k.rows + key;
      for_multipliers<A>(call.mask, at / per_sample, at % per_sample, keys,
                         [&](std::int64_t j, const A* from, int n) {
                           std::memcpy(m + i * kKeys + j, from, n * sizeof(A));
                         });
    }
  }
  // Those of key j for the lanes from i on.
  JOPS_HD V drawn(const A* m, int j, int i) const {
    return strided(m + i * kKeys + j, kKeys, least<int>(V::kLanes, count - i));
  }

 private:
  V of_lanes(const Head<const T>& t, std::int64_t key, int i) const {
    return strided(t.data + (first + i) * t.row + key * t.col, t.row,
                   least<int>(V::kLanes, count - i));
  }
};

template <class A>
void fill(A* to, std::int64_t n, A value) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = value;
}

// A sum of products into a tile; without any it is zero.
template <class A>
class Sum {
 public:
  Sum(Wide<A> to, std::int64_t rows, std::int64_t cols) : to_(to), rows_(rows), cols_(cols) {}
  void add(Left<A> a, Wide<const A> b, std::int64_t steps) {
    multiply(a, b, rows_, cols_, steps, to_, any_);
    any_ = true;
  }
  ~Sum() {
    if (any_) return;
    for (std::int64_t i = 0; i < rows_; ++i) fill(to_.data + i * to_.row, cols_, A(0));
  }

 private:
  const Wide<A> to_;
  const std::int64_t rows_, cols_;
  bool any_ = false;
};

// -------------------------------------------------------------------------------- forward

// The state of an online softmax, a number a query.
template <class A>
struct Online {
  alignas(64) A maximum[kQueries], total[kQueries], tangent[kQueries], factor[kQueries];
};

// Takes in a tile of scores, which become weights, and of tangents, which become weighted.
template <bool kDual, class T, class A>
void take_in(const Place<T>& place, int keys, A* s, A* ts, const A* drawn, Online<A>& state) {
  using V = Vec<A>;
  const int rows = up<int>(keys, kRows) * kRows;
  for (int i = 0; i < place.lanes(); i += V::kLanes) {
    const V before = load(state.maximum + i);
    V maximum = before;
    for (int j = 0; j < rows; ++j) maximum = max(load(s + j * kQueries + i), maximum);
    const V shift = attention_shift(maximum);
    const V factor = exp<true>(before - shift);
    V total(A(0)), tangent(A(0));
    for (int j = 0; j < rows; ++j) {
      A* at = s + j * kQueries + i;
      V p = exp<true>(load(at) - shift);
      total += p;
      V t;
      if constexpr (kDual) {
        t = load(ts + j * kQueries + i);
        tangent = fma(p, t, tangent);
      }
      if (drawn && j < keys) p *= place.drawn(drawn, j, i);
      store(at, p);
      if constexpr (kDual) store(ts + j * kQueries + i, p * t);
    }
    store(state.maximum + i, maximum);
    store(state.total + i, fma(load(state.total + i), factor, total));
    store(state.tangent + i, fma(load(state.tangent + i), factor, tangent));
    store(state.factor + i, factor);
  }
}

template <class A>
void scale_lanes(A* to, std::int64_t rows, int lanes, const A* factor) {
  using V = Vec<A>;
  for (std::int64_t j = 0; j < rows; ++j) {
    for (int i = 0; i < lanes; i += V::kLanes) {
      A* at = to + j * kQueries + i;
      store(at, load(at) * load(factor + i));
    }
  }
}

template <class T, bool kDual>
void of_block(const Call<T>& call, const Place<T>& place) {
  using A = Compute<T>;
  using V = Vec<A>;
  const std::int64_t d = padded(call.q.width), dv = padded(call.v.width);
  constexpr std::int64_t kTile = kKeys * kQueries;
  Arena<A> arena((kDual ? 2 : 1) * (Arena<A>::of_block(d) + kTile + (kQueries + kKeys) * dv) +
                 2 * kKeys * d + kTile);
  Block<A> q = arena.block(d), tq{};
  A *s = arena.take(kTile), *ts = nullptr, *out = arena.take(dv * kQueries), *tout = nullptr;
  A *of_k = arena.take(kKeys * d), *of_v = arena.take(kKeys * dv), *of_tk = nullptr,
    *of_tv = nullptr;
  A* drawn = call.mask.given() ? arena.take(kTile) : nullptr;
  const std::int64_t kv = place.kv();
  const auto k = head<const T>(call.k, place.batch, kv), v = head<const T>(call.v, place.batch, kv);
  const auto tk = head<const T>(call.tk, place.batch, kv);
  const auto tv = head<const T>(call.tv, place.batch, kv);
  const A scale = static_cast<A>(call.scores.scale);
  q.read(head<const T>(call.q, place.batch, place.h), place.first, place.count, scale);
  fill(out, dv * kQueries, A(0));
  if constexpr (kDual) {
    tq = arena.block(d);
    ts = arena.take(kTile);
    tout = arena.take(dv * kQueries);
    of_tk = arena.take(kKeys * d);
    of_tv = arena.take(kKeys * dv);
    if (call.tq.given()) {
      tq.read(head<const T>(call.tq, place.batch, place.h), place.first, place.count, scale);
    }
    fill(tout, dv * kQueries, A(0));
  }
  Online<A> state;
  fill(state.maximum, kQueries, -kInfinity<A>);
  fill(state.total, kQueries, A(0));
  fill(state.tangent, kQueries, A(0));
  const int lanes = place.lanes();
  const std::int64_t width = call.q.width, values = up<std::int64_t>(call.v.width, kRows) * kRows;
  for (std::int64_t key = 0; key < place.visible(); key += kKeys) {
    const int keys = static_cast<int>(least<std::int64_t>(place.visible() - key, kKeys));
    const int rows = up<int>(keys, kRows) * kRows;
    const Wide<const A> ks = panel(k, key, keys, of_k);
    Sum<A>({s, kQueries}, rows, lanes).add(by_rows(ks), q.lanes(), width);
    place.hide(key, keys, s);
    if constexpr (kDual) {
      {
        Sum<A> sum({ts, kQueries}, rows, lanes);
        if (call.tq.given()) sum.add(by_rows(ks), tq.lanes(), width);
        if (tk.given()) sum.add(by_rows(panel(tk, key, keys, of_tk)), q.lanes(), width);
      }
      place.hide_tangents(key, keys, s, ts);
    }
    if (drawn) place.draw(key, keys, drawn);
    take_in<kDual>(place, keys, s, ts, drawn, state);
    scale_lanes(out, values, lanes, state.factor);
    const Left<A> vs = by_columns(panel(v, key, keys, of_v));
    multiply<A>(vs, {s, kQueries}, values, lanes, keys, {out, kQueries}, true);
    if constexpr (kDual) {
      scale_lanes(tout, values, lanes, state.factor);
      multiply<A>(vs, {ts, kQueries}, values, lanes, keys, {tout, kQueries}, true);
      if (tv.given()) {
        multiply<A>(by_columns(panel(tv, key, keys, of_tv)), {s, kQueries}, values, lanes, keys,
                    {tout, kQueries}, true);
      }
    }
  }
  for (int i = 0; i < lanes; i += V::kLanes) {
    const int n = least<int>(V::kLanes, place.count - i);
    const V total = load(state.total + i);
    const auto none = total == V(A(0));
    const V inverse = select(none, V(A(0)), V(A(1)) / total);
    const V lse = attention_shift(load(state.maximum + i)) + log(total);
    store_n(call.lse + place.row() + i, select(none, V(kInfinity<A>), lse), n);
    const V mu = load(state.tangent + i) * inverse;
    if constexpr (kDual) store_n(call.mu + place.row() + i, mu, n);
    for (std::int64_t j = 0; j < call.v.width; ++j) {
      A* o = out + j * kQueries + i;
      const V value = load(o) * inverse;
      store(o, value);
      if constexpr (kDual) {
        A* to = tout + j * kQueries + i;
        store(to, load(to) * inverse - mu * value);
      }
    }
  }
  write_columns(out, A(1), head<T>(call.o, place.batch, place.h), place.first, place.count);
  if constexpr (kDual) {
    write_columns(tout, A(1), head<T>(call.to, place.batch, place.h), place.first, place.count);
  }
}

template <bool kDual, class T>
void forward(const Call<T>& call, int threads) {
  const std::int64_t blocks = call.blocks(), heads = call.q.batch * call.q.heads;
  const std::int64_t pairs = heads * call.q.rows * call.k.rows;
  parallel(heads * blocks, useful_threads(pairs, threads), [&](std::int64_t task) {
    const std::int64_t at = task / blocks, turn = task % blocks;
    // The first and the last in turn: causal blocks grow, and threads take successive ones.
    const std::int64_t block = turn % 2 ? blocks - 1 - turn / 2 : turn / 2;
    of_block<T, kDual>(call, {call, at / call.q.heads, at % call.q.heads, block});
  });
}

// ------------------------------------------------------------------------------------ vjp

// Gradients of a head of k and v, summed over some of its blocks of queries.
template <class A>
struct KeySums {
  A *k, *v, *tk, *tv;
  std::int64_t d, dv;  // padded widths
};

template <class T, bool kDual>
class Backward {
  using A = Compute<T>;
  using V = Vec<A>;

 public:
  Backward(const Call<T>& call, std::int64_t batch, std::int64_t kv, const KeySums<A>& sums)
      : call_(call),
        batch_(batch),
        d_(padded(call.q.width)),
        dv_(padded(call.v.width)),
        arena_((kDual ? 2 : 1) * (Arena<A>::of_block(d_) + Arena<A>::of_block(dv_) + 2 * kTile +
                                  kQueries * d_ + kKeys * (d_ + dv_)) +
               kTile + kQueries * dv_),
        sums_(sums),
        k_(head<const T>(call.k, batch, kv)),
        v_(head<const T>(call.v, batch, kv)),
        tk_(head<const T>(call.tk, batch, kv)),
        tv_(head<const T>(call.tv, batch, kv)),
        main_(arena_, d_, dv_),
        drawn_(call.mask.given() ? arena_.take(kTile) : nullptr),
        o_(arena_.take(kQueries * dv_)) {
    if constexpr (kDual) tangent_ = Side(arena_, d_, dv_);
  }

  void add(std::int64_t h, std::int64_t block) {
    const Place<T> place(call_, batch_, h, block);
    read(place);
    fill(main_.gq, d_ * kQueries, A(0));
    if constexpr (kDual) fill(tangent_.gq, d_ * kQueries, A(0));
    for (std::int64_t key = 0; key < place.visible(); key += kKeys) {
      add_keys(place, key, static_cast<int>(least<std::int64_t>(place.visible() - key, kKeys)));
    }
    const A scale = static_cast<A>(call_.scores.scale);
    if (call_.gq.given()) {
      write_columns(main_.gq, scale, head<T>(call_.gq, batch_, h), place.first, place.count);
    }
    if constexpr (kDual) {
      if (call_.tgq.given()) {
        write_columns(tangent_.gq, scale, head<T>(call_.tgq, batch_, h), place.first, place.count);
      }
    }
  }

 private:
  static constexpr std::int64_t kTile = kKeys * kQueries;

  // What there is once for the primal and once for its tangent.
  struct Side {
    Block<A> q, go;
    A *s, *gs, *gq, *of_k, *of_v;
    Side() = default;
    Side(Arena<A>& arena, std::int64_t d, std::int64_t dv)
        : q(arena.block(d)),
          go(arena.block(dv)),
          s(arena.take(kTile)),
          gs(arena.take(kTile)),
          gq(arena.take(kQueries * d)),
          of_k(arena.take(kKeys * d)),
          of_v(arena.take(kKeys * dv)) {}
  };

  void read(const Place<T>& place) {
    const auto of = [&](const Heads& t) { return head<const T>(t, batch_, place.h); };
    const A scale = static_cast<A>(call_.scores.scale);
    main_.q.read(of(call_.q), place.first, place.count, scale);
    main_.go.read(of(call_.go), place.first, place.count, A(1));
    fill(lse_, kQueries, kInfinity<A>);
    std::memcpy(lse_, call_.lse + place.row(), place.count * sizeof(A));
    fill(delta_, kQueries, A(0));
    read_rows(of(call_.o), place.first, place.count, A(1), o_);
    add_dots(main_.go, place.count, delta_);
    std::memcpy(call_.delta + place.row(), delta_, place.count * sizeof(A));
    if constexpr (kDual) {
      const std::int64_t all = call_.q.batch * call_.q.heads * call_.q.rows;
      if (call_.tq.given()) tangent_.q.read(of(call_.tq), place.first, place.count, scale);
      fill(mu_, kQueries, A(0));
      std::memcpy(mu_, call_.mu + place.row(), place.count * sizeof(A));
      fill(tdelta_, kQueries, A(0));
      if (call_.tgo.given()) {
        tangent_.go.read(of(call_.tgo), place.first, place.count, A(1));
        add_dots(tangent_.go, place.count, tdelta_);
      }
      read_rows(of(call_.to), place.first, place.count, A(1), o_);
      add_dots(main_.go, place.count, tdelta_);
      std::memcpy(call_.delta + all + place.row(), tdelta_, place.count * sizeof(A));
    }
  }

  // to[i] += <row i of a block, row i of o_>
  void add_dots(const Block<A>& block, int count, A* to) const {
    for (int i = 0; i < count; ++i) {
      V total(A(0));
      for (std::int64_t j = 0; j < dv_; j += V::kLanes) {
        total = fma(load(block.rows + i * dv_ + j), load(o_ + i * dv_ + j), total);
      }
      to[i] += jops::JOPS_ISA::sum(total);
    }
  }

  void add_keys(const Place<T>& place, std::int64_t key, int keys) {
    const int lanes = place.lanes(), rows = up<int>(keys, kRows) * kRows;
    const std::int64_t width = call_.q.width, values = call_.v.width;
    const Wide<const A> k = panel(k_, key, keys, main_.of_k), v = panel(v_, key, keys, main_.of_v);
    Sum<A>({main_.s, kQueries}, rows, lanes).add(by_rows(k), main_.q.lanes(), width);
    Sum<A>({main_.gs, kQueries}, rows, lanes).add(by_rows(v), main_.go.lanes(), values);
    place.hide(key, keys, main_.s);
    Wide<const A> tk{}, tv{};
    if constexpr (kDual) {
      {
        Sum<A> s({tangent_.s, kQueries}, rows, lanes), gs({tangent_.gs, kQueries}, rows, lanes);
        if (call_.tq.given()) s.add(by_rows(k), tangent_.q.lanes(), width);
        if (tk_.given()) {
          tk = panel(tk_, key, keys, tangent_.of_k);
          s.add(by_rows(tk), main_.q.lanes(), width);
        }
        if (call_.tgo.given()) gs.add(by_rows(v), tangent_.go.lanes(), values);
        if (tv_.given()) {
          tv = panel(tv_, key, keys, tangent_.of_v);
          gs.add(by_rows(tv), main_.go.lanes(), values);
        }
      }
      place.hide_tangents(key, keys, main_.s, tangent_.s);
    }
    if (drawn_) place.draw(key, keys, drawn_);
    differentiate(place, keys);

    const std::int64_t wide = up<std::int64_t>(width, kRows) * kRows;
    const auto tile_rows = [&](const A* t) { return Left<A>{t, kQueries, 1}; };
    const auto to_keys = [&](const A* t, const Block<A>& right, std::int64_t pitch, A* to) {
      multiply<A>(tile_rows(t), right.wide(), rows, pitch, place.count, {to + key * pitch, pitch},
                  true);
    };
    const auto to_queries = [&](Wide<const A> left, const A* t, A* to) {
      multiply<A>(by_columns(left), {t, kQueries}, wide, lanes, keys, {to, kQueries}, true);
    };
    if (sums_.v) to_keys(main_.s, main_.go, dv_, sums_.v);
    if (sums_.k) to_keys(main_.gs, main_.q, d_, sums_.k);
    if (call_.gq.given()) to_queries(k, main_.gs, main_.gq);
    if constexpr (kDual) {
      if (sums_.tv) {
        to_keys(tangent_.s, main_.go, dv_, sums_.tv);
        if (call_.tgo.given()) to_keys(main_.s, tangent_.go, dv_, sums_.tv);
      }
      if (sums_.tk) {
        to_keys(tangent_.gs, main_.q, d_, sums_.tk);
        if (call_.tq.given()) to_keys(main_.gs, tangent_.q, d_, sums_.tk);
      }
      if (call_.tgq.given()) {
        to_queries(k, tangent_.gs, tangent_.gq);
        if (tk_.given()) to_queries(tk, main_.gs, tangent_.gq);
      }
    }
  }

  // s becomes the weights that v has, gs the cotangent of s.
  void differentiate(const Place<T>& place, int keys) {
    const int rows = up<int>(keys, kRows) * kRows;
    for (int i = 0; i < place.lanes(); i += V::kLanes) {
      const V lse = load(lse_ + i), delta = load(delta_ + i);
      V mu, tdelta;
      if constexpr (kDual) mu = load(mu_ + i), tdelta = load(tdelta_ + i);
      for (int j = 0; j < rows; ++j) {
        const std::int64_t at = j * kQueries + i;
        const V p = attention_weight(load(main_.s + at), lse);
        V gp = load(main_.gs + at), m(A(1));
        if (drawn_ && j < keys) {
          m = place.drawn(drawn_, j, i);
          gp *= m;
        }
        store(main_.s + at, p * m);
        store(main_.gs + at, score_cotangent(p, gp, delta));
        if constexpr (kDual) {
          const V tp = weight_tangent(p, load(tangent_.s + at), mu);
          const V tgp = load(tangent_.gs + at) * m;
          store(tangent_.s + at, tp * m);
          store(tangent_.gs + at, score_cotangent_tangent(p, tp, gp, tgp, delta, tdelta));
        }
      }
    }
  }

  const Call<T>& call_;
  const std::int64_t batch_, d_, dv_;
  Arena<A> arena_;
  const KeySums<A> sums_;
  const Head<const T> k_, v_, tk_, tv_;
  Side main_, tangent_;
  A *drawn_, *o_;
  alignas(64) A lse_[kQueries], mu_[kQueries], delta_[kQueries], tdelta_[kQueries];
};

// The sums of several parts, in their order.
template <class T, class A = Compute<T>>
void write_sums(A* const* parts, std::int64_t count, std::int64_t pitch, const Head<T>& to,
                std::int64_t rows) {
  using V = Vec<A>;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < to.width; j += V::kLanes) {
      V total(A(0));
      for (std::int64_t part = 0; part < count; ++part) {
        total += load(parts[part] + i * pitch + j);
      }
      const int n = static_cast<int>(least<std::int64_t>(to.width - j, V::kLanes));
      T near[V::kLanes];
      store(near, total);
      for (int l = 0; l < n; ++l) to.data[i * to.row + (j + l) * to.col] = near[l];
    }
  }
}

template <bool kDual, class T>
void backward(const Call<T>& call, int threads) {
  using A = Compute<T>;
  constexpr std::int64_t kTasks = 8;
  const std::int64_t heads = call.k.batch * call.k.heads, units = call.group() * call.blocks();
  // So that few heads still serve several threads. Follows from the shape alone, as do sums.
  const std::int64_t parts = least(units, up(kTasks, most<std::int64_t>(heads, 1)));
  const std::int64_t rows = up<std::int64_t>(call.k.rows, kKeys) * kKeys;
  const std::int64_t d = padded(call.q.width), dv = padded(call.v.width);
  const Heads* const to[] = {&call.gk, &call.gv, &call.tgk, &call.tgv};
  std::int64_t start[5] = {};
  for (int i = 0; i < 4; ++i) {
    start[i + 1] = start[i] + (to[i]->given() ? rows * (i % 2 ? dv : d) : 0);
  }
  const auto finish = [&](std::int64_t at, A* const* memory) {
    for (int i = 0; i < 4; ++i) {
      if (!to[i]->given()) continue;
      A* pieces[kTasks];
      for (std::int64_t part = 0; part < parts; ++part) pieces[part] = memory[part] + start[i];
      write_sums(pieces, parts, i % 2 ? dv : d,
                 head<T>(*to[i], at / call.k.heads, at % call.k.heads), call.k.rows);
    }
  };
  const auto run = [&](std::int64_t at, std::int64_t part, A* memory) {
    fill(memory, start[4], A(0));
    const auto sum = [&](int i) { return to[i]->given() ? memory + start[i] : nullptr; };
    const std::int64_t batch = at / call.k.heads, kv = at % call.k.heads;
    Backward<T, kDual> pass(call, batch, kv, {sum(0), sum(1), sum(2), sum(3), d, dv});
    // Every parts-th one: causal blocks grow.
    for (std::int64_t unit = part; unit < units; unit += parts) {
      pass.add(kv * call.group() + unit / call.blocks(), unit % call.blocks());
    }
  };
  const std::int64_t pairs = call.q.batch * call.q.heads * call.q.rows * call.k.rows;
  const int useful = useful_threads(pairs, threads);
  if (parts == 1) {
    parallel(heads, useful, [&](std::int64_t at) {
      const Aligned<A> memory(start[4]);
      run(at, 0, memory.data);
      finish(at, &memory.data);
    });
    return;
  }
  const Aligned<A> memory(heads * parts * start[4]);
  const auto piece = [&](std::int64_t task) { return memory.data + task * start[4]; };
  parallel(heads * parts, useful,
           [&](std::int64_t task) { run(task / parts, task % parts, piece(task)); });
  parallel(heads, useful, [&](std::int64_t at) {
    A* pieces[kTasks];
    for (std::int64_t part = 0; part < parts; ++part) pieces[part] = piece(at * parts + part);
    finish(at, pieces);
  });
}

// ------------------------------------------------------------------------------- the table

template <class F>
void with_call(const Scores& scores, const Heads& q, const Heads& k, const Heads& v, const Heads& o,
               const Buffer& lse, const Mask& mask, const F& f) {
  with_storage(q.dtype, [&](auto storage) {
    using T = decltype(storage);
    Call<T> call{};
    call.scores = scores;
    call.q = q;
    call.k = k;
    call.v = v;
    call.o = o;
    call.lse = static_cast<Compute<T>*>(lse.data);
    call.mask = mask;
    f(call);
  });
}

template <class T>
Compute<T>* numbers(const Call<T>&, const Buffer& b) {
  return static_cast<Compute<T>*>(b.data);
}

void attention(const Scores& scores, const Heads& q, const Heads& k, const Heads& v, const Heads& o,
               const Buffer& lse, const Mask& mask, const Exec& exec) {
  with_call(scores, q, k, v, o, lse, mask, [&](auto& call) { forward<false>(call, exec.threads); });
}

void attention_jvp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v,
                   const Heads& tq, const Heads& tk, const Heads& tv, const Heads& tbias,
                   const Heads& o, const Heads& to, const Buffer& lse, const Buffer& mu,
                   const Mask& mask, const Exec& exec) {
  with_call(scores, q, k, v, o, lse, mask, [&](auto& call) {
    call.tq = tq;
    call.tk = tk;
    call.tv = tv;
    call.tbias = tbias;
    call.to = to;
    call.mu = numbers(call, mu);
    forward<true>(call, exec.threads);
  });
}

void attention_vjp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v,
                   const Heads& o, const Heads& go, const Buffer& lse, const Buffer& delta,
                   const Heads& gq, const Heads& gk, const Heads& gv, const Mask& mask,
                   const Exec& exec) {
  with_call(scores, q, k, v, o, lse, mask, [&](auto& call) {
    call.go = go;
    call.delta = numbers(call, delta);
    call.gq = gq;
    call.gk = gk;
    call.gv = gv;
    backward<false>(call, exec.threads);
  });
}

void attention_vjp_jvp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v,
                       const Heads& tq, const Heads& tk, const Heads& tv, const Heads& tbias,
                       const Heads& o, const Heads& to, const Heads& go, const Heads& tgo,
                       const Buffer& lse, const Buffer& mu, const Buffer& delta, const Heads& gq,
                       const Heads& gk, const Heads& gv, const Heads& tgq, const Heads& tgk,
                       const Heads& tgv, const Mask& mask, const Exec& exec) {
  with_call(scores, q, k, v, o, lse, mask, [&](auto& call) {
    call.tq = tq;
    call.tk = tk;
    call.tv = tv;
    call.tbias = tbias;
    call.to = to;
    call.go = go;
    call.tgo = tgo;
    call.mu = numbers(call, mu);
    call.delta = numbers(call, delta);
    call.gq = gq;
    call.gk = gk;
    call.gv = gv;
    call.tgq = tgq;
    call.tgk = tgk;
    call.tgv = tgv;
    backward<true>(call, exec.threads);
  });
}

}  // namespace

void register_attention(Kernels& table) {
  table.attention = attention;
  table.attention_jvp = attention_jvp;
  table.attention_vjp = attention_vjp;
  table.attention_vjp_jvp = attention_vjp_jvp;
}

}  // namespace jops::JOPS_ISA
