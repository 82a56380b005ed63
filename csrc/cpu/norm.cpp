// Normalization of contiguous rows: three passes (means, the other sums, outputs), of which only
// the first one meets memory, as a row fits in a cache. Sums over rows: those of a task's rows
// first, in the caches, then of the tasks', in an order that follows from the shape alone. The
// formulas are in math/norm.h.
#include <cstring>

#include "../norm_table.h"
#include "columns.h"

namespace jops::JOPS_ISA {
namespace {

constexpr int kMaxIn = 4, kMaxOut = 2;

// Nothing here is absent, so that no loop asks: zeros stand for an input (step 0) and for a
// column's numbers, and ones for its weight.
template <class T>
struct Call {
  const T* in[kMaxIn];
  std::int64_t step[kMaxIn];               // from a row to the next one
  const Compute<T>* column[kNormColumns];  // up to a whole vector
  T* out[kMaxOut];
  const T* added;  // or null, and what it is added to if that is x
  const T* x;
  T* sum;
  std::int64_t n;
  Compute<T> eps;
  bool streams;
};

// One vector of elements of a row.
template <class Row, class T>
struct At {
  using A = Compute<T>;
  using V = Vec<A>;
  V in[Row::kIn], c[kNormColumns], q[Row::kQuantities > 0 ? Row::kQuantities : 1];

  JOPS_HD void read(const Call<T>& call, std::int64_t row, std::int64_t j) {
#pragma GCC unroll 4
    for (int k = 0; k < Row::kIn; ++k) in[k] = load(call.in[k] + row * call.step[k] + j);
    complete(call, j);
  }
  // The last ones of a row; `fill` stands past the end of x.
  JOPS_HD void read_last(const Call<T>& call, std::int64_t row, std::int64_t j, int count, A fill) {
#pragma GCC unroll 4
    for (int k = 0; k < Row::kIn; ++k) {
      in[k] = load_n(call.in[k] + row * call.step[k] + j, count, k == 0 ? fill : A(0));
    }
    complete(call, j);
  }

 private:
  JOPS_HD void complete(const Call<T>& call, std::int64_t j) {
#pragma GCC unroll 4
    for (int k = 0; k < kNormColumns; ++k) c[k] = load(call.column[k] + j);
    Row::quantities(in, c, q);
  }
};

// The sums over a row of kCount terms: of a block first, then of the blocks, so that the error
// grows with their number and not with that of elements. term(at, to) adds a vector's terms.
template <class Row, class T, int kCount, class Term>
JOPS_HD void add_up(const Call<T>& call, std::int64_t row, Compute<T> fill,
                    Compute<T> (&total)[kCount], const Term& term) {
  using V = Vec<Compute<T>>;
  constexpr std::int64_t kAhead = 4096 / sizeof(T);
  V sum[kCount];
  for (V& s : sum) s = V(Compute<T>(0));
  for (std::int64_t block = 0; block < call.n; block += kBlock) {
    const std::int64_t end = least<std::int64_t>(call.n, block + kBlock);
    V part[2][kCount];
    for (auto& p : part)
      for (V& s : p) s = V(Compute<T>(0));
    At<Row, T> at;
    std::int64_t j = block;
    for (; j + 2 * V::kLanes <= end; j += 2 * V::kLanes) {
#pragma GCC unroll 4
      for (int k = 0; k < Row::kIn; ++k) prefetch(call.in[k] + row * call.step[k] + j + kAhead);
      at.read(call, row, j);
      term(at, part[0]);
      at.read(call, row, j + V::kLanes);
      term(at, part[1]);
    }
    if (j + V::kLanes <= end) {
      at.read(call, row, j);
      term(at, part[0]);
      j += V::kLanes;
    }
    if (j < end) {
      at.read_last(call, row, j, static_cast<int>(end - j), fill);
      term(at, part[1]);
    }
    for (int k = 0; k < kCount; ++k) sum[k] += part[0][k] + part[1][k];
  }
  for (int k = 0; k < kCount; ++k) total[k] = jops::JOPS_ISA::sum(sum[k]);
}

// A row of x + added, which is then the row that is normalized.
template <class T>
void add_row(const Call<T>& call, std::int64_t row) {
  using V = Vec<Compute<T>>;
  constexpr std::int64_t kAhead = 4096 / sizeof(T);
  const T *x = call.x + row * call.n, *added = call.added + row * call.n;
  T* sum = call.sum + row * call.n;
  std::int64_t j = 0;
  for (; j + V::kLanes <= call.n; j += V::kLanes) {
    prefetch(x + j + kAhead);
    prefetch(added + j + kAhead);
    store(sum + j, load(x + j) + load(added + j));
  }
  if (j == call.n) return;
  const int count = static_cast<int>(call.n - j);
  store_n(sum + j, load_n(x + j, count) + load_n(added + j, count), count);
}

// One row; its terms of the sums over rows are added to sums[k * pitch + j].
template <class Row, bool kCentred, class T>
void normalize(const Call<T>& call, std::int64_t row, Compute<T>* sums, std::int64_t pitch) {
  using A = Compute<T>;
  using V = Vec<A>;
  constexpr int kQ = Row::kQuantities, kSums = 1 + kQ + Row::kCross;
  const A inverse = A(1) / static_cast<A>(call.n);
  A mean[1 + kQ] = {};
  if constexpr (kCentred) {
    add_up<Row>(call, row, A(0), mean, [](const At<Row, T>& at, V* to) {
      to[0] += at.in[0];
#pragma GCC unroll 3
      for (int k = 0; k < kQ; ++k) to[1 + k] += at.q[k];
    });
    for (A& m : mean) m *= inverse;
  }
  // Past the end x is its mean, and adds nothing.
  A of[kSums];
  add_up<Row>(call, row, mean[0], of, [&](const At<Row, T>& at, V* to) {
    const V x = at.in[0] - V(mean[0]);
    to[0] = fma(x, x, to[0]);
#pragma GCC unroll 3
    for (int k = 0; k < kQ; ++k) to[1 + k] = fma(x, at.q[k], to[1 + k]);
    if constexpr (Row::kCross) to[1 + kQ] = fma(at.q[0] - V(mean[1]), at.q[1], to[1 + kQ]);
  });
  const A r = inverse_root(fma(of[0], inverse, call.eps));
  NormAt<V, kQ> here;
  here.r = V(r);
  for (int k = 0; k < kQ; ++k) here.a[k] = V(of[1 + k] * inverse * r);
  if constexpr (Row::kCross) here.cross = V(of[1 + kQ] * inverse) - here.a[0] * here.a[1];

  const auto put = [&](const At<Row, T>& at, std::int64_t j, int count, const auto& write) {
    here.x = (at.in[0] - V(mean[0])) * here.r;
#pragma GCC unroll 3
    for (int k = 0; k < kQ; ++k) here.p[k] = at.q[k] - V(mean[1 + k]) - here.x * here.a[k];
    V out[Row::kOut], terms[Row::kColumnSums > 0 ? Row::kColumnSums : 1];
    Row::emit(at.in, at.c, here, out, terms);
    if constexpr (Row::kAdded == Added::kOutput) {
      const T* added = call.added + row * call.n + j;
      if (call.added) out[0] += count == V::kLanes ? load(added) : load_n(added, count);
    }
#pragma GCC unroll 2
    for (int k = 0; k < Row::kOut; ++k) write(call.out[k] + row * call.n + j, out[k]);
#pragma GCC unroll 4
    for (int k = 0; k < Row::kColumnSums; ++k) {
      A* to = sums + k * pitch + j;
      store(to, load(to) + terms[k]);
    }
  };
  At<Row, T> at;
  std::int64_t j = 0;
  const auto whole = [&](const auto& write) {
    for (; j + V::kLanes <= call.n; j += V::kLanes) {
      at.read(call, row, j);
      put(at, j, V::kLanes, write);
    }
  };
  if (call.streams)
    whole([](T* to, const V& v) { stream(to, v); });
  else
    whole([](T* to, const V& v) { store(to, v); });
  if (j < call.n) {
    const int count = static_cast<int>(call.n - j);
    at.read_last(call, row, j, count, A(0));
    put(at, j, count, [&](T* to, const V& v) { store_n(to, v, count); });
  }
}

struct Launch {
  template <class Row, bool kCentred>
  static void run(double eps, const Rows& rows, const Buffer (&in)[Row::kIn],
                  const Buffer (&of_column)[kNormColumns], const Buffer (&out)[Row::kOut],
                  const Buffer& sums, const Buffer& added, const Buffer& sum, const Exec& exec) {
    with_storage(in[0].dtype, [&](auto storage) {
      using T = decltype(storage);
      using A = Compute<T>;
      using V = Vec<A>;
      Call<T> call{};
      const std::int64_t pitch = up<std::int64_t>(rows.n, V::kLanes) * V::kLanes;
      const Aligned<T> zeros(pitch);
      std::memset(zeros.data, 0, pitch * sizeof(T));
      for (int k = 0; k < Row::kIn; ++k) {
        call.in[k] = in[k].given() ? static_cast<const T*>(in[k].data) : zeros.data;
        call.step[k] = in[k].given() ? rows.n : 0;
      }
      call.added = static_cast<const T*>(added.data);
      if (Row::kAdded == Added::kInput && call.added) {
        call.x = call.in[0];
        call.sum = static_cast<T*>(sum.data);
        call.in[0] = call.sum;
      }
      const Aligned<A> columns(kNormColumns * pitch);
      for (int k = 0; k < kNormColumns; ++k) {
        const T* from = static_cast<const T*>(of_column[k].data);
        for (std::int64_t j = 0; j < pitch; j += V::kLanes) {
          const int count = static_cast<int>(least<std::int64_t>(V::kLanes, rows.n - j));
          const V numbers = from ? load_n(from + j, count) : V(A(k == kWeight ? 1 : 0));
          store(columns.data + k * pitch + j, numbers);
        }
        call.column[k] = columns.data + k * pitch;
      }
      call.n = rows.n;
      call.eps = static_cast<A>(eps);
      call.streams = should_stream(Row::kOut * in[0].size * static_cast<std::int64_t>(sizeof(T))) &&
                     rows.n % V::kLanes == 0;
      for (int k = 0; k < Row::kOut; ++k) {
        call.out[k] = static_cast<T*>(out[k].data);
        call.streams = call.streams && can_stream(call.out[k]);
      }
      // Rows of a task: many enough that its sums are few beside them, but work for every thread.
      constexpr std::int64_t kElements = 1 << 17;
      const std::int64_t most_rows = least(most<std::int64_t>(kElements / rows.n, 16), kSumRows);
      const std::int64_t tasks = up(rows.outer, most_rows);
      constexpr int kKinds = Row::kColumnSums;
      const Aligned<A> parts(kKinds > 0 ? tasks * kKinds * pitch : 0);
      parallel(tasks, useful_threads(in[0].size, exec.threads), [&](std::int64_t task) {
        A* to = parts.data + task * kKinds * pitch;
        for (std::int64_t j = 0; j < kKinds * pitch; ++j) to[j] = 0;
        const std::int64_t last = least(rows.outer, (task + 1) * most_rows);
        for (std::int64_t row = task * most_rows; row < last; ++row) {
          if (Row::kAdded == Added::kInput && call.added) add_row(call, row);
          normalize<Row, kCentred>(call, row, to, pitch);
        }
        if (call.streams) stream_fence();
      });
      for (int k = 0; k < kKinds; ++k) {
        add_parts(parts.data + k * pitch, tasks, kKinds * pitch, rows.n,
                  static_cast<T*>(sums.data) + k * rows.n);
      }
    });
  }
};

}  // namespace

void register_norm(Kernels& table) { NormTable<Launch>::put(table); }

}  // namespace jops::JOPS_ISA
