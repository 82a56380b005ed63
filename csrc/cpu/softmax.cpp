// The softmax family over the middle dimension of a contiguous (outer, n, inner) buffer, inner rows
// strided.
//
// inner == 1: a row is contiguous. Three passes (maximum, sums, outputs), of which only the first
// one meets memory, as a row fits in a cache. inner > 1: strips of columns, walked row by row
// without a transposed copy: the state of every column is a lane; one online pass for maximum and
// sums (Milakov and Gimelshein, arXiv:1805.02867), one for outputs. Each column is summed in the
// same order whatever the strip, so bits depend on neither path nor thread. The formulas are in
// math/softmax.h.
#include "../softmax_table.h"
#include "vectors.h"

namespace jops::JOPS_ISA {
namespace {

constexpr int kMaxIn = 4, kMaxOut = 2;

// One call, with pointers of storage type T.
template <class T>
struct Call {
  const T* in[kMaxIn];
  T* out[kMaxOut];
  Rows rows;
  Mask mask;
  std::int64_t size;
  bool streams;

  template <class Op>
  JOPS_HD bool given(int k) const {
    return k != Op::kMayLack || in[k];
  }
  template <class Op>
  JOPS_HD void fetch(int k, std::int64_t at) const {
    if (given<Op>(k)) prefetch(in[k] + at);
  }
  // Multipliers of elements first..first+n, or ones.
  template <class A>
  void multipliers(std::int64_t first, A* m, std::int64_t n) const {
    if (mask.given()) return dropout_range(mask, size, first, m, n);
    for (std::int64_t i = 0; i < n; ++i) m[i] = 1;
  }
  // Elements from `at` on before the results' first whole vector in memory.
  std::int64_t head(std::int64_t at) const { return streams ? before_vector(out[0] + at) : 0; }
  // The first `lanes` of y to out[k][at], past the caches where that is wanted.
  JOPS_HD void write(int k, std::int64_t at, Vec<Compute<T>> y, int lanes) const {
    jops::JOPS_ISA::write(out[k] + at, y, lanes, streams);
  }
};

// The inputs of one vector of elements. Lanes past the end add nothing to a sum: logits are filled
// so that e^d = 0.
template <class Op, class T>
struct Inputs {
  using A = Compute<T>;
  using V = Vec<A>;
  V in[Op::kIn];

  JOPS_HD void read(const Call<T>& call, std::int64_t at, int count, A fill) {
#pragma GCC unroll 4
    for (int k = 0; k < Op::kIn; ++k) {
      const bool logits = Op::kLogits && k == 0;
      if (!call.template given<Op>(k)) {
        in[k] = V(A(0));
        continue;
      }
      in[k] = count == V::kLanes ? load(call.in[k] + at)
                                 : load_n(call.in[k] + at, count, logits ? fill : A(0));
    }
  }
  JOPS_HD V log_like(V scale, V top) const { return Op::kLogits ? scale * in[0] - top : in[0]; }
  // e^d; d <= 0 for logits.
  static JOPS_HD V exponential(V d) { return exp<Op::kLogits>(d); }
};

template <class Op, class T, bool kMasked>
void contiguous_row(const Call<T>& call, std::int64_t row) {
  using A = Compute<T>;
  using V = Vec<A>;
  constexpr std::int64_t kAhead = 4096 / sizeof(T), kNear = (128 << 10) / sizeof(T);
  const std::int64_t n = call.rows.n, start = row * n;
  const V scale(static_cast<A>(call.rows.scale));
  const A fill = call.rows.scale < 0 ? kInfinity<A> : -kInfinity<A>;
  V top(A(0));
  if constexpr (Op::kLogits) {
    V a(-kInfinity<A>), b = a;
    const T* x = call.in[0] + start;
    std::int64_t i = 0;
    for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
      prefetch(x + i + kAhead);
      prefetch(x + i + V::kLanes + kAhead);
      a = max(a, scale * load(x + i));
      b = max(b, scale * load(x + i + V::kLanes));
    }
    for (; i + V::kLanes <= n; i += V::kLanes) a = max(a, scale * load(x + i));
    if (i < n) b = max(b, scale * load_n(x + i, static_cast<int>(n - i), fill));
    top = V(max_lane(max(a, b)));
  }

  alignas(64) A m[kMasked ? kBlock + V::kLanes : 1];  // a head may read past the block
  // The exponentials of a row that fits are kept between the passes.
  constexpr std::int64_t kKeep = 8192;
  alignas(64) A kept[Op::kLogits ? kKeep + V::kLanes : 1];
  const bool keeps = Op::kLogits && n <= kKeep;
  // Partial sums of a block first, then their sum: the error grows with the number of blocks, not
  // of elements.
  V sum[Op::kSums];
  for (V& s : sum) s = V(A(0));
  for (std::int64_t block = 0; block < n; block += kBlock) {
    const std::int64_t count = n - block < kBlock ? n - block : kBlock;
    if constexpr (kMasked && Op::kMaskInSums) {
      call.multipliers(start + block, m, count);
      for (std::int64_t i = count; i % V::kLanes; ++i) m[i] = 0;  // the tail enters the sums
    }
    V part[2][Op::kSums];
    for (auto& p : part)
      for (V& s : p) s = V(A(0));
    Inputs<Op, T> e;
    const auto add = [&](std::int64_t i, int lanes, V* to) {
      e.read(call, start + block + i, lanes, fill);
      const V exponential = e.exponential(e.log_like(scale, top));
      if (keeps) store(kept + block + i, exponential);
      Op::add(e.in, exponential, kMasked && Op::kMaskInSums ? load(m + i) : V(A(1)), to);
    };
    std::int64_t i = 0;
    for (; i + 2 * V::kLanes <= count; i += 2 * V::kLanes) {
      if constexpr (!Op::kLogits || Op::kIn > 1) {
#pragma GCC unroll 4
        for (int k = Op::kLogits; k < Op::kIn; ++k) {
          call.template fetch<Op>(k, start + block + i + kAhead);
          call.template fetch<Op>(k, start + block + i + V::kLanes + kAhead);
        }
      }
      add(i, V::kLanes, part[0]);
      add(i + V::kLanes, V::kLanes, part[1]);
    }
    for (; i < count; i += V::kLanes) {
      const bool whole = count - i >= V::kLanes;
      add(i, whole ? V::kLanes : static_cast<int>(count - i), part[whole ? 0 : 1]);
    }
    for (int s = 0; s < Op::kSums; ++s) sum[s] += part[0][s] + part[1][s];
  }
  A finished[Op::kSums];
  for (int s = 0; s < Op::kSums; ++s) finished[s] = jops::JOPS_ISA::sum(sum[s]);
  Op::finish(finished);
  for (int s = 0; s < Op::kSums; ++s) sum[s] = V(finished[s]);

  // Read and write at once, as a copy does: the next row comes while this one goes.
  const std::int64_t ahead = n < kAhead || n > kNear ? kAhead : n;
  for (std::int64_t block = 0; block < n; block += kBlock) {
    const std::int64_t count = n - block < kBlock ? n - block : kBlock, at = start + block;
    if (kMasked && !(Op::kMaskInSums && n <= kBlock)) call.multipliers(at, m, count);
    for_vectors<V::kLanes>(count, call.head(at), [&](std::int64_t i, int lanes) {
#pragma GCC unroll 4
      for (int k = 0; k < Op::kIn; ++k) call.template fetch<Op>(k, at + i + ahead);
      Inputs<Op, T> e;
      e.read(call, at + i, lanes, fill);
      V out[Op::kOut];
      const V d = e.log_like(scale, top);
      Op::emit(e.in, d, keeps ? load(kept + block + i) : e.exponential(d),
               kMasked ? load(m + i) : V(A(1)), sum, scale, out);
#pragma GCC unroll 2
      for (int k = 0; k < Op::kOut; ++k) call.write(k, at + i, out[k], lanes);
    });
  }
}

constexpr int kStrip = 512;  // columns of a strip at most: its state stays in L1
constexpr int kDeep = 16;    // rows of a block: one rescaling of the state a block

template <class Op, class T, bool kMasked>
void strip(const Call<T>& call, std::int64_t outer, std::int64_t column, std::int64_t width) {
  using A = Compute<T>;
  using V = Vec<A>;
  const std::int64_t n = call.rows.n, inner = call.rows.inner;
  const std::int64_t start = outer * n * inner + column;
  const V scale(static_cast<A>(call.rows.scale));

  constexpr int kStripRoom = kStrip + V::kLanes;  // a head may read past the strip
  // `lost` is what rounding took from `sum` (Kahan): a column's sum is as good as a row's, which is
  // kept in lanes.
  alignas(64) A top[kStripRoom], sum[Op::kSums][kStripRoom], lost[Op::kSums][kStrip];
  for (int j = 0; j < kStrip; ++j) {
    top[j] = -kInfinity<A>;
    for (int s = 0; s < Op::kSums; ++s) sum[s][j] = lost[s][j] = 0;
  }
  alignas(64) A m[kMasked ? kDeep : 1][kMasked ? kStripRoom : 1];
  const auto draw = [&](std::int64_t row, std::int64_t rows) {
    if constexpr (kMasked) {
      for (std::int64_t r = 0; r < rows; ++r) {
        call.multipliers(start + (row + r) * inner, m[r], width);
      }
    }
  };

  for (std::int64_t row = 0; row < n; row += kDeep) {
    const std::int64_t rows = n - row < kDeep ? n - row : kDeep;
    if constexpr (Op::kMaskInSums) draw(row, rows);
    for_vectors<V::kLanes>(width, 0, [&](std::int64_t j, int lanes) {
      const std::int64_t at = start + row * inner + j;
      Inputs<Op, T> e;
      V reference(A(0)), part[Op::kSums];
      for (V& s : part) s = V(A(0));
      if constexpr (Op::kLogits) {
        const V before = load(top + j);
        V now = before;
        for (std::int64_t r = 0; r < rows; ++r) {
          prefetch(call.in[0] + at + (r + kDeep) * inner);
          now = max(now, scale * (lanes == V::kLanes ? load(call.in[0] + at + r * inner)
                                                     : load_n(call.in[0] + at + r * inner, lanes)));
        }
        store(top + j, now);
        // Nothing but -infinity yet: any finite number serves in its place.
        reference = select(now == V(-kInfinity<A>), V(A(0)), now);
        const V factor = exp(before - reference);
        for (int s = 0; s < Op::kSums; ++s) {
          store(sum[s] + j, factor * load(sum[s] + j));
          store(lost[s] + j, factor * load(lost[s] + j));
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int k = Op::kLogits; k < Op::kIn; ++k) {
          call.template fetch<Op>(k, at + (r + kDeep) * inner);
        }
        e.read(call, at + r * inner, lanes, A(0));
        Op::add(e.in, e.exponential(e.log_like(scale, reference)),
                kMasked && Op::kMaskInSums ? load(m[r] + j) : V(A(1)), part);
      }
      for (int s = 0; s < Op::kSums; ++s) {
        V total = load(sum[s] + j), rest = load(lost[s] + j);
        add_compensated(part[s], total, rest);
        store(sum[s] + j, total);
        store(lost[s] + j, rest);
      }
    });
  }
  for (std::int64_t j = 0; j < width; j += V::kLanes) {
    V s[Op::kSums];
    for (int k = 0; k < Op::kSums; ++k) s[k] = load(sum[k] + j);
    Op::finish(s);
    for (int k = 0; k < Op::kSums; ++k) store(sum[k] + j, s[k]);
  }

  for (std::int64_t row = 0; row < n; ++row) {
    const std::int64_t at = start + row * inner;
    draw(row, 1);
    for_vectors<V::kLanes>(width, call.head(at), [&](std::int64_t j, int lanes) {
      Inputs<Op, T> e;
      V s[Op::kSums], out[Op::kOut];
#pragma GCC unroll 4
      for (int k = 0; k < Op::kIn; ++k) call.template fetch<Op>(k, at + j + 4 * inner);
      e.read(call, at + j, lanes, A(0));
      for (int k = 0; k < Op::kSums; ++k) s[k] = load(sum[k] + j);
      const V d = e.log_like(scale, load(top + j));
      Op::emit(e.in, d, e.exponential(d), kMasked ? load(m[0] + j) : V(A(1)), s, scale, out);
#pragma GCC unroll 2
      for (int k = 0; k < Op::kOut; ++k) call.write(k, at + j, out[k], lanes);
    });
  }
}

template <class Op, class T, bool kMasked>
void each_row(const Call<T>& call, int threads) {
  const auto [outer, n, inner, scale] = call.rows;
  threads = useful_threads(call.size, threads);
  if (inner == 1) {
    const std::int64_t rows_per_task = n < kBlock ? kBlock / n : 1;
    const std::int64_t tasks = (outer + rows_per_task - 1) / rows_per_task;
    const std::int64_t rows = outer;
    parallel(tasks, threads, [&](std::int64_t task) {
      const std::int64_t first = task * rows_per_task, last = first + rows_per_task;
      for (std::int64_t row = first; row < last && row < rows; ++row) {
        contiguous_row<Op, T, kMasked>(call, row);
      }
      if (call.streams) stream_fence();
    });
  } else {
    // Narrower strips only where the whole ones would leave a thread without work.
    std::int64_t width = kStrip;
    while (width > 64 && outer * ((inner + width - 1) / width) < threads) width /= 2;
    const std::int64_t strips = (inner + width - 1) / width, columns = inner;
    parallel(outer * strips, threads, [&](std::int64_t task) {
      const std::int64_t column = task % strips * width;
      strip<Op, T, kMasked>(call, task / strips, column,
                            columns - column < width ? columns - column : width);
      if (call.streams) stream_fence();
    });
  }
}

struct Launch {
  template <class Op, bool kMasked = false>
  static void run(const Rows& rows, const Buffer (&in)[Op::kIn], const Buffer (&out)[Op::kOut],
                  const Exec& exec, const Mask& mask = {}) {
    with_storage(in[0].dtype, [&](auto storage) {
      using T = decltype(storage);
      Call<T> call{};
      for (int k = 0; k < Op::kIn; ++k) call.in[k] = static_cast<const T*>(in[k].data);
      for (int k = 0; k < Op::kOut; ++k) call.out[k] = static_cast<T*>(out[k].data);
      call.rows = rows;
      call.mask = mask;
      call.size = in[0].size;
      call.streams = should_stream(Op::kOut * call.size * static_cast<std::int64_t>(sizeof(T)));
      // Some way into a vector, but not into an element.
      call.streams = call.streams && reinterpret_cast<std::uintptr_t>(call.out[0]) % sizeof(T) == 0;
      for (int k = 1; k < Op::kOut; ++k) {
        const auto apart = reinterpret_cast<std::uintptr_t>(call.out[k]) -
                           reinterpret_cast<std::uintptr_t>(call.out[0]);
        call.streams = call.streams && apart % kVectorBytes == 0;
      }
      each_row<Op, T, kMasked>(call, exec.threads);
    });
  }
};

}  // namespace

void register_softmax(Kernels& table) {
  using Table = SoftmaxTable<Launch>;
  Table::softmax(table);
  Table::log_softmax(table);
  Table::softmax_dropout(table);
}

}  // namespace jops::JOPS_ISA
