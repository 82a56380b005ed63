// linear: y = x w^T + bias, of any strides; linear_act_dropout: z = x w^T + bias, y = m f(z), plus
// a residual; their JVPs, which share the packed operands of the primal; column_sum: the bias
// gradient.
//
// Every thread computes a part of the result of its own, from operands that it packs itself: what
// another core has written comes slower than it is packed again. Of x and w the operand with fewer
// lines is packed into panels (gemm.h) ahead, the other one a block at a time that stays in L2. The
// inner dimension runs in order through pieces and passes of fixed depth, in float or double, so
// the bits depend neither on the number of threads nor on the blocks; the sums of passes are added
// with compensation, so that rounding does not grow with their number. A tile is finished while it
// is in L1: bias, activation and mask cost no pass over memory, and 16-bit results are rounded
// once.
#include "columns.h"
#include "gemm.h"

namespace jops::JOPS_ISA {
namespace {

constexpr std::int64_t kPiece = 256;  // k of one visit to a tile: a panel of w stays in L1
constexpr std::int64_t kBlockBytes = 384 << 10;  // of a packed block
constexpr std::int64_t kSumsBytes = 512 << 10;   // of sums that wait for the next pass
constexpr std::int64_t kAheadBytes = 8 << 20;    // packed ahead at once
constexpr int kGroup = 8;                        // tiles that share a piece of w in L1
constexpr std::int64_t kPackCost = 20;           // of a number, in products
constexpr std::int64_t kDotDepth = 4096;         // k of one visit where w is read in place

// The operands of one product; an absent tangent is not given().
struct Operands {
  Matrix x, w, tx, tw;
};

// Where results go, for one batch index, and what happens to a block of sums on the way.
template <class T>
struct Epilogue {
  using A = Compute<T>;
  static constexpr int kLanes = Vec<A>::kLanes;

  struct Output {
    const A* bias = nullptr;  // padded to whole tiles; sums start from it
    const T* residual = nullptr;
    std::int64_t residual_stride = 0;
    T* z = nullptr;  // before the activation
    T* y = nullptr;
  };
  Output primal, tangent;
  std::int64_t y_stride = 0, z_stride = 0, cols = 0;
  bool dual = false;
  bool streams = false;
  ActivationBlock<A> activation = nullptr;
  ActivationJvpBlock<A> activation_jvp = nullptr;
  const Act* act = nullptr;
  const Mask* mask = nullptr;
  std::int64_t sample = 0;

  // Row-major sums of `rows` x `width`, rows `pitch` apart, that belong at (row, col) of the
  // results; `tangents` only if dual.
  void operator()(A* sums, A* tangents, int pitch, std::int64_t row, std::int64_t col, int rows,
                  int width) const {
    before(primal, sums, pitch, row, col, rows, width);
    if (dual) before(tangent, tangents, pitch, row, col, rows, width);
    const std::int64_t n = static_cast<std::int64_t>(rows) * pitch;
    if (activation_jvp)
      activation_jvp(*act, sums, tangents, sums, tangents, n);
    else if (activation)
      activation(*act, sums, sums, n);
    if (mask) {
      alignas(64) A m[kMaxWidth];
      for (int i = 0; i < rows; ++i) {
        dropout_block(*mask, sample, (row + i) * cols + col, m, width);
        multiply(sums + i * pitch, m, width);
        if (dual) multiply(tangents + i * pitch, m, width);
      }
    }
    after(primal, sums, pitch, row, col, rows, width);
    if (dual) after(tangent, tangents, pitch, row, col, rows, width);
  }

  static constexpr int kMaxWidth = 128;

  // Whether sums are results as they are, so that tiles may be written straight to y.
  bool plain() const {
    return std::is_same_v<T, A> && !activation && !activation_jvp && !mask && !primal.z &&
           !primal.residual && !tangent.residual;
  }
  // Rows of a whole tile in y, which plain() allows to write to.
  TileRows<A> rows_in(const Output& out, std::int64_t row, std::int64_t col) const {
    if constexpr (std::is_same_v<T, A>) {
      T* to = out.y + row * y_stride + col;
      const bool aligned =
          reinterpret_cast<std::uintptr_t>(to) % kVectorBytes == 0 && y_stride % kLanes == 0;
      return {to, y_stride, streams && aligned};
    } else {
      return {};
    }
  }

 private:
  void before(const Output& out, A* sums, int pitch, std::int64_t row, std::int64_t col, int rows,
              int width) const {
    if (!out.z) return;
    for (int i = 0; i < rows; ++i) {
      write(out.z + (row + i) * z_stride + col, sums + i * pitch, width);
    }
  }
  void after(const Output& out, A* sums, int pitch, std::int64_t row, std::int64_t col, int rows,
             int width) const {
    for (int i = 0; i < rows; ++i) {
      A* s = sums + i * pitch;
      if (out.residual) add(s, out.residual + (row + i) * out.residual_stride + col, width);
      write(out.y + (row + i) * y_stride + col, s, width);
    }
  }

  // Whole vectors, and a part of one at the end. Blocks of sums are padded to whole vectors.
  static JOPS_HD void multiply(A* s, const A* m, int width) {
    for (int j = 0; j < width; j += kLanes) store(s + j, load(s + j) * load(m + j));
  }
  static JOPS_HD void add(A* s, const T* more, int width) {
    for (int j = 0; j < width; j += kLanes) {
      const int left = width - j;
      store(s + j, load(s + j) + (left < kLanes ? load_n(more + j, left) : load(more + j)));
    }
  }
  JOPS_HD void write(T* to, const A* from, int width) const {
    int j = 0;
    if constexpr (std::is_same_v<T, A>) {
      if (streams && reinterpret_cast<std::uintptr_t>(to) % kVectorBytes == 0) {
        for (; j + kLanes <= width; j += kLanes) stream(to + j, load(from + j));
      }
    }
    for (; j + kLanes <= width; j += kLanes) store(to + j, load(from + j));
    if (j < width) store_n(to + j, load(from + j), width - j);
  }
};

// Lines of an operand in panels, `stride` numbers from one to the next.
template <class P>
struct Panels {
  const typename P::Packed* value = nullptr;
  const typename P::Packed* tangent = nullptr;
  std::int64_t stride = 0;

  Panels from(std::int64_t panel, std::int64_t number) const {
    const std::int64_t at = panel * stride + number;
    return {value + at, tangent ? tangent + at : nullptr, stride};
  }
};

// Panels [begin, end) of a matrix whose lines are rows, for `depth` columns from `first` on.
template <class P, Operand kOperand, class T>
void pack(const Matrix& a, std::int64_t batch, std::int64_t begin, std::int64_t end,
          std::int64_t first, std::int64_t depth, typename P::Packed* to) {
  constexpr int kWidth = jops::JOPS_ISA::kWidth<P, kOperand>;
  const T* from = static_cast<const T*>(a.data) + batch * a.batch_stride + first * a.col_stride;
  const std::int64_t stride = up<std::int64_t>(depth, P::kStep) * kWidth;
  if constexpr (P::kWalks) {
    if (a.row_stride == 1 && a.col_stride != 1) {
      const std::int64_t line = begin * kWidth, last = least<std::int64_t>(end * kWidth, a.rows);
      pack_adjacent<kOperand>(P(), from + line, a.col_stride, last - line, depth, to);
      return;
    }
  }
  for (std::int64_t panel = begin; panel < end; ++panel) {
    const std::int64_t line = panel * kWidth;
    pack_panel<kOperand>(P(), from + line * a.row_stride, a.row_stride, a.col_stride,
                         static_cast<int>(least<std::int64_t>(a.rows - line, kWidth)), depth,
                         to + (panel - begin) * stride);
  }
}

// One operand, in panels.
template <class P, Operand kOperand, class T>
struct Side {
  Matrix value, tangent;
  std::int64_t batch;

  static constexpr int width = kWidth<P, kOperand>;
  std::int64_t panels() const { return up<std::int64_t>(value.rows, width); }
  int parts() const { return tangent.given() ? 2 : 1; }

  // Both parts for panels [begin, end), in a buffer that holds `room` panels of each.
  void pack_into(typename P::Packed* to, std::int64_t room, std::int64_t begin, std::int64_t end,
                 std::int64_t at, std::int64_t first, std::int64_t depth) const {
    const std::int64_t stride = up<std::int64_t>(depth, P::kStep) * width;
    pack<P, kOperand, T>(value, batch, begin, end, first, depth, to + at * stride);
    if (tangent.given()) {
      pack<P, kOperand, T>(tangent, batch, begin, end, first, depth, to + (room + at) * stride);
    }
  }
  Panels<P> view(const typename P::Packed* data, std::int64_t room, std::int64_t depth) const {
    const std::int64_t stride = up<std::int64_t>(depth, P::kStep) * width;
    return {data, tangent.given() ? data + room * stride : nullptr, stride};
  }
};

// Where the sums of a group of tiles above each other are made: in `buffer`, tile after tile, and
// at last in `results`, for the first `straight` tiles, if those are no more than sums. They start
// from `bias`, if there is one.
template <class P>
struct GroupSums {
  using A = typename P::Compute;
  static constexpr std::int64_t kTile = P::kRows * P::kCols;
  A* buffer = nullptr;
  const A* bias = nullptr;
  TileRows<A> results;
  int straight = 0;

  void add(const typename P::Packed* x, const typename P::Packed* w, std::int64_t steps, int tile,
           bool first, bool last) const {
    const TileRows<A> kept{buffer + tile * kTile, P::kCols, false};
    TileRows<A> to = kept;
    if (last && tile < straight) {
      to = results;
      to.data += tile * P::kRows * results.stride;
    }
    tile_product<P>(x, w, steps,
                    first ? TileRows<const A>{bias, 0} : TileRows<const A>{kept.data, kept.stride},
                    to);
  }
};

// Up to kGroup tiles above each other = bias + their panels of x times one panel of w.
template <class P>
void group_product(const Panels<P>& x, int tiles, const Panels<P>& w, std::int64_t steps,
                   const GroupSums<P>& primal, const GroupSums<P>* tangent) {
  constexpr std::int64_t kSteps = kPiece / P::kStep;
  std::int64_t first = 0;
  do {  // once even without any k: the sums are then the bias
    const std::int64_t n = least(steps - first, kSteps);
    const bool begins = first == 0, ends = first + n >= steps;
    const auto* b = w.value + first * P::kCols;
    for (int i = 0; i < tiles; ++i) {
      const std::int64_t at = i * x.stride + first * P::kRows;
      primal.add(x.value + at, b, n, i, begins, ends);
      if (!tangent) continue;
      if (x.tangent) {
        tangent->add(x.tangent + at, b, n, i, begins, ends && !w.tangent);
      } else if (!w.tangent) {
        tangent->add(x.value + at, b, 0, i, begins, ends);
      }
      if (w.tangent) {
        const auto* tb = w.tangent + first * P::kCols;
        tangent->add(x.value + at, tb, n, i, begins && !x.tangent, ends);
      }
    }
    first += kSteps;
  } while (first < steps);
}

template <class A>
void add_compensated(const A* more, A* total, A* lost, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += Vec<A>::kLanes) {
    Vec<A> sum = load(total + i), rest = load(lost + i);
    add_compensated(load(more + i), sum, rest);
    store(total + i, sum);
    store(lost + i, rest);
  }
}

// The results at rows `above` and columns `left` on, by one thread. kAheadX: x is the operand that
// is packed ahead.
template <class T, bool kAheadX>
void packed_product(const Operands& o, std::int64_t batch, std::int64_t above, std::int64_t left,
                    const Epilogue<T>& finish) {
  using P = typename ProductOf<T>::type;
  using Packed = typename P::Packed;
  using A = typename P::Compute;
  constexpr std::int64_t kTile = P::kRows * P::kCols;
  const Side<P, Operand::kX, T> x{o.x, o.tx, batch};
  const Side<P, Operand::kW, T> w{o.w, o.tw, batch};
  const auto& ahead = [&]() -> const auto& {
    if constexpr (kAheadX)
      return x;
    else
      return w;
  }();
  const auto& outer = [&]() -> const auto& {
    if constexpr (kAheadX)
      return w;
    else
      return x;
  }();
  const std::int64_t M = o.x.rows, N = o.w.rows, K = o.x.cols;
  const std::int64_t passes = most<std::int64_t>(up(K, P::kPass), 1);
  const std::int64_t pass = up(up(K, passes), kPiece) * kPiece;
  const std::int64_t deep = least(K, pass);  // of a packed block
  const int layers = finish.dual ? 2 : 1;

  // Ahead: as many panels as fit, for the whole depth.
  const std::int64_t number = sizeof(Packed) * ahead.parts() * up<std::int64_t>(K + 1, P::kStep);
  const std::int64_t ahead_all = ahead.panels();
  const std::int64_t fitting =
      most<std::int64_t>(1, least(ahead_all, kAheadBytes / (number * ahead.width)));
  const std::int64_t ahead_room = up(ahead_all, up(ahead_all, fitting));  // equal parts
  // A block of the other operand: what fits into L2.
  const std::int64_t outer_all = outer.panels();
  const std::int64_t block_bytes =
      sizeof(Packed) * outer.parts() * up<std::int64_t>(deep + 1, P::kStep) * outer.width;
  std::int64_t room = most<std::int64_t>(1, kBlockBytes / block_bytes);
  if (!kAheadX) room = least<std::int64_t>(room, kGroup);
  const std::int64_t blocks = up(outer_all, room);
  room = up(outer_all, blocks);
  // What is ahead is taken in parts where the sums that wait for the next pass are too many.
  const std::int64_t sum_bytes = room * kTile * layers * 2 * static_cast<std::int64_t>(sizeof(A));
  const std::int64_t part_room =
      passes == 1 ? ahead_room : most<std::int64_t>(1, least(ahead_room, kSumsBytes / sum_bytes));

  // Sums of one pass; of all passes, and what rounding took from them.
  Aligned<A> pass_data(kGroup * layers * kTile);
  Aligned<A> sums_data(passes == 1 ? 0 : 2 * layers * part_room * room * kTile);
  Aligned<Packed> outer_data(room * outer.parts() * up<std::int64_t>(deep, P::kStep) * outer.width);
  const std::int64_t ahead_steps = up<std::int64_t>(K, P::kStep);
  Aligned<Packed> ahead_data(ahead_room * ahead.parts() * ahead_steps * ahead.width);
  [[maybe_unused]] const typename P::Session session;
  for (std::int64_t begin = 0; begin < ahead_all; begin += ahead_room) {
    const std::int64_t end = least(begin + ahead_room, ahead_all);
    ahead.pack_into(ahead_data.data, ahead_room, begin, end, 0, 0, K);
    const Panels<P> ahead_panels = ahead.view(ahead_data.data, ahead_room, K);
    const std::int64_t parts = up(end - begin, part_room);
    for (std::int64_t task = 0; task < blocks * parts; ++task) {
      const std::int64_t block = task / parts, part = task % parts;
      const std::int64_t p0 = outer_all * block / blocks, p1 = outer_all * (block + 1) / blocks;
      const std::int64_t q0 = begin + part * part_room, q1 = least(q0 + part_room, end);
      const std::int64_t x0 = kAheadX ? q0 : p0, x1 = kAheadX ? q1 : p1;
      const std::int64_t w0 = kAheadX ? p0 : q0, w1 = kAheadX ? p1 : q1;
      const std::int64_t kept = passes == 1 ? 0 : (x1 - x0) * (w1 - w0) * kTile;
      std::memset(sums_data.data, 0, 2 * layers * kept * sizeof(A));
      for (std::int64_t k = 0, number = 0; number < passes; ++number, k += pass) {
        const std::int64_t depth = most<std::int64_t>(0, least(K - k, pass));
        const std::int64_t steps = up<std::int64_t>(depth, P::kStep);
        outer.pack_into(outer_data.data, p1 - p0, p0, p1, 0, k, depth);
        const Panels<P> near = outer.view(outer_data.data, p1 - p0, depth);
        const Panels<P> far = ahead_panels.from(q0 - begin, k / P::kStep * ahead.width);
        const Panels<P> xs = kAheadX ? far : near, ws = kAheadX ? near : far;
        for (std::int64_t i = x0; i < x1; i += kGroup) {
          const int tiles = static_cast<int>(least<std::int64_t>(kGroup, x1 - i));
          for (std::int64_t j = w0; j < w1; ++j) {
            A* sums = pass_data.data;
            A* tangents = finish.dual ? sums + kGroup * kTile : nullptr;
            const std::int64_t top = i * P::kRows, col = j * P::kCols;
            const bool straight = passes == 1 && finish.plain() && col + P::kCols <= N;
            const int written =
                straight ? static_cast<int>(least<std::int64_t>((M - top) / P::kRows, tiles)) : 0;
            const auto group = [&](const auto& out, A* buffer) {
              const A* bias = out.bias && number == 0 ? out.bias + left + col : nullptr;
              const TileRows<A> to =
                  written ? finish.rows_in(out, above + top, left + col) : TileRows<A>{};
              return GroupSums<P>{buffer, bias, to, written};
            };
            const GroupSums<P> primal = group(finish.primal, sums);
            const GroupSums<P> tangent = group(finish.tangent, tangents);
            group_product<P>(xs.from(i - x0, 0), tiles, ws.from(j - w0, 0), steps, primal,
                             finish.dual ? &tangent : nullptr);
            if (passes > 1) {
              A* total = sums_data.data + ((j - w0) * (x1 - x0) + (i - x0)) * kTile;
              for (int layer = 0; layer < layers; ++layer) {
                add_compensated(pass_data.data + layer * kGroup * kTile, total + layer * kept,
                                total + (layers + layer) * kept, tiles * kTile);
              }
              if (number + 1 < passes) continue;
              sums = total;
              if (tangents) tangents = total + kept;
            }
            for (int t = written; t < tiles; ++t) {
              const std::int64_t row = (i + t) * P::kRows;
              finish(sums + t * kTile, tangents ? tangents + t * kTile : nullptr, P::kCols,
                     above + row, left + col,
                     static_cast<int>(least<std::int64_t>(M - row, P::kRows)),
                     static_cast<int>(least<std::int64_t>(N - col, P::kCols)));
            }
          }
        }
      }
    }
  }
  if (finish.streams) stream_fence();
}

// Few rows, both operands contiguous along k: every number of w is used a few times only, so w is
// read in place, and once.
template <class T>
void few_rows_product(const Operands& o, std::int64_t batch, int threads,
                      const Epilogue<T>& finish) {
  using P = typename DotOf<T>::type;
  using A = typename P::Compute;
  constexpr int kWidth = 4 * kDotCols;  // columns of a task
  const std::int64_t M = o.x.rows, N = o.w.rows;
  parallel(up<std::int64_t>(N, kWidth), threads, [&](std::int64_t task) {
    const std::int64_t col = task * kWidth;
    const int cols = static_cast<int>(least<std::int64_t>(N - col, kWidth));
    alignas(64) A sums[kFewRows * kPitch] = {}, tangents[kFewRows * kPitch] = {};
    const auto start = [&](const A* bias, A* to) {
      for (int i = 0; bias && i < M; ++i)
        std::memcpy(to + i * kPitch, bias + col, cols * sizeof(A));
    };
    start(finish.primal.bias, sums);
    start(finish.tangent.bias, tangents);
    const auto add = [&](const Matrix& x, const Matrix& w, A* to) {
      const T* a = static_cast<const T*>(x.data) + batch * x.batch_stride;
      const T* b = static_cast<const T*>(w.data) + batch * w.batch_stride + col * w.row_stride;
      // A lane sums a part of the depth at most, so that rounding does not grow with all of it.
      for (std::int64_t k = 0; k < x.cols; k += kDotDepth) {
        for (int j = 0; j < cols; j += kDotCols) {
          dot_block<P>(a + k, x.row_stride, static_cast<int>(M), b + j * w.row_stride + k,
                       w.row_stride, least(cols - j, kDotCols), least(x.cols - k, kDotDepth),
                       to + j);
        }
      }
    };
    add(o.x, o.w, sums);
    if (o.tx.given()) add(o.tx, o.w, tangents);
    if (o.tw.given()) add(o.x, o.tw, tangents);
    finish(sums, tangents, kPitch, 0, col, static_cast<int>(M), cols);
  });
}

Matrix slice(Matrix a, std::int64_t begin, std::int64_t rows) {
  if (!a.given()) return a;
  a.data = static_cast<char*>(a.data) + begin * a.row_stride * size_of(a.dtype);
  a.rows = rows;
  return a;
}

// The results as a grid of parts of whole tiles, one a thread at most.
template <class T>
void product_in_parts(const Operands& o, std::int64_t batch, int threads,
                      const Epilogue<T>& finish) {
  using P = typename ProductOf<T>::type;
  const std::int64_t M = o.x.rows, N = o.w.rows;
  const std::int64_t tall = up<std::int64_t>(M, P::kRows), wide = up<std::int64_t>(N, P::kCols);
  std::int64_t down = 1, across = 1, best = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t i = 1; i <= least<std::int64_t>(threads, tall); ++i) {
    const std::int64_t j = least<std::int64_t>(threads / i, wide);
    const std::int64_t rows = up(tall, i) * P::kRows, cols = up(wide, j) * P::kCols;
    const std::int64_t cost = rows * cols + (rows + cols) * kPackCost;
    if (cost < best) best = cost, down = i, across = j;
  }
  parallel(down * across, threads, [&](std::int64_t task) {
    const std::int64_t i = task / across, j = task % across;
    const std::int64_t row = tall * i / down * P::kRows, col = wide * j / across * P::kCols;
    const std::int64_t rows = least(tall * (i + 1) / down * P::kRows, M) - row;
    const std::int64_t cols = least(wide * (j + 1) / across * P::kCols, N) - col;
    const Operands part{slice(o.x, row, rows), slice(o.w, col, cols), slice(o.tx, row, rows),
                        slice(o.tw, col, cols)};
    if (rows < cols)
      packed_product<T, true>(part, batch, row, col, finish);
    else
      packed_product<T, false>(part, batch, row, col, finish);
  });
}

// A thread is worth waking for about 50 microseconds of work.
int threads_for(const Operands& o, std::int64_t batch, int threads) {
  const std::int64_t useful =
      batch * o.x.rows * o.w.rows / (1 << 10) * (o.x.cols + 16) / (1 << 10) + 1;
  return static_cast<int>(least<std::int64_t>(useful, threads));
}

template <class T>
void product(const Operands& o, std::int64_t batch, int threads, const Epilogue<T>& finish) {
  threads = threads_for(o, 1, threads);
  const auto along = [](const Matrix& a) { return !a.given() || a.col_stride == 1; };
  if (o.x.rows <= kFewRows && along(o.x) && along(o.w) && along(o.tx) && along(o.tw)) {
    few_rows_product<T>(o, batch, threads, finish);
  } else {
    product_in_parts<T>(o, batch, threads, finish);
  }
}

// A matrix without a batch serves the whole batch of y.
Matrix broadcast(Matrix a) {
  if (a.batch == 1) a.batch_stride = 0;
  return a;
}

// Results of one kernel.
struct Results {
  Buffer bias, tbias;
  Matrix y, ty, z, residual, tresidual;
};

void run(const Operands& o, const Results& r, const Act* act, const Mask& mask, const Exec& exec) {
  const Act stored_act = stored(act ? *act : Act{}, r.y.dtype);
  const Operands operands{broadcast(o.x), broadcast(o.w), broadcast(o.tx), broadcast(o.tw)};
  with_storage(r.y.dtype, [&](auto storage) {
    using T = decltype(storage);
    using A = Compute<T>;
    Epilogue<T> common;
    common.y_stride = r.y.row_stride;
    common.z_stride = r.z.row_stride;
    common.cols = r.y.cols;
    common.dual = r.ty.given();
    common.streams = should_stream(r.y.batch * r.y.rows * r.y.cols * size_of(r.y.dtype));
    common.act = &stored_act;
    if (stored_act.code != Activation::kIdentity) {
      common.activation = activation_block<A>(stored_act.code);
      if (common.dual) common.activation_jvp = activation_jvp_block<A>(stored_act.code);
    }
    common.mask = mask.given() ? &mask : nullptr;
    using P = typename ProductOf<T>::type;
    const std::int64_t width = up<std::int64_t>(r.y.cols, P::kCols) * P::kCols;
    const auto room = [&](const Buffer& bias) { return bias.given() ? width : 0; };
    const auto line = [&](const Buffer& from, std::int64_t b, A* to) -> const A* {
      if (!from.given()) return nullptr;
      load_block(from.dtype, from.data, from.size != r.y.cols ? b * r.y.cols : 0, to, r.y.cols);
      for (std::int64_t i = r.y.cols; i < width; ++i) to[i] = 0;
      return to;
    };
    const auto matrix = [](const Matrix& m, std::int64_t b) -> T* {
      return m.given() ? static_cast<T*>(m.data) + b * m.batch_stride : nullptr;
    };
    const auto output = [&](const A* bias, const Matrix& residual, T* z, T* y, std::int64_t b) {
      return typename Epilogue<T>::Output{bias, matrix(residual, b), residual.row_stride, z, y};
    };
    const auto one = [&](std::int64_t b, int threads) {
      const Aligned<A> bias(room(r.bias)), tbias(room(r.tbias));
      Epilogue<T> finish = common;
      finish.primal =
          output(line(r.bias, b, bias.data), r.residual, matrix(r.z, b), matrix(r.y, b), b);
      finish.tangent =
          output(line(r.tbias, b, tbias.data), r.tresidual, nullptr, matrix(r.ty, b), b);
      finish.sample = b;
      product<T>(operands, b, threads, finish);
    };
    if (r.y.batch >= exec.threads) {
      const int threads = threads_for(operands, r.y.batch, exec.threads);
      parallel(r.y.batch, threads, [&](std::int64_t b) { one(b, 1); });
    } else {
      for (std::int64_t b = 0; b < r.y.batch; ++b) one(b, exec.threads);
    }
  });
}

void linear(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y,
            const Exec& exec) {
  run({x, w, {}, {}}, {bias, {}, y, {}, {}, {}, {}}, nullptr, Mask{}, exec);
}

void linear_act_dropout(const Matrix& x, const Matrix& w, const Buffer& bias,
                        const Matrix& residual, const Matrix& y, const Matrix& z, const Act& act,
                        const Mask& mask, const Exec& exec) {
  run({x, w, {}, {}}, {bias, {}, y, {}, z, residual, {}}, &act, mask, exec);
}

void linear_act_dropout_jvp(const Matrix& x, const Matrix& w, const Buffer& bias,
                            const Matrix& residual, const Matrix& tx, const Matrix& tw,
                            const Buffer& tbias, const Matrix& tresidual, const Matrix& y,
                            const Matrix& ty, const Matrix& z, const Act& act, const Mask& mask,
                            const Exec& exec) {
  run({x, w, tx, tw}, {bias, tbias, y, ty, z, residual, tresidual}, &act, mask, exec);
}

void column_sum(const Matrix& x, const Buffer& y, const Exec& exec) {
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    for (std::int64_t b = 0; b < x.batch; ++b) {
      sum_columns(x, b, static_cast<T*>(y.data) + b * x.cols, exec.threads);
    }
  });
}

void linear_vjp(const Matrix& x, const Matrix& w, const Matrix& gy, const Matrix& gx,
                const Matrix& gw, const Buffer& gbias, const Exec& exec) {
  if (gx.given()) linear(gy, w.transposed(), {}, gx, exec);
  if (gw.given()) linear(gy.transposed(), x.transposed(), {}, gw, exec);
  if (gbias.given()) column_sum(gy, gbias, exec);
}

// gz is made once, with its sums, and read by both products: that takes less than making it again
// while each of them packs.
void linear_act_dropout_vjp(const Matrix& x, const Matrix& w, const Buffer& s, const Matrix& gy,
                            const Matrix& gx, const Matrix& gw, const Buffer& gbias, const Act& act,
                            const Mask& mask, const Exec& exec) {
  const std::int64_t size = gy.batch * gy.rows * gy.cols;
  const Aligned<char> memory(size * size_of(gy.dtype));
  const Buffer given{gy.data, size, gy.dtype}, made{memory.data, size, gy.dtype};
  if (gbias.given())
    activation_vjp_sum(act, {gy.batch, gy.rows, gy.cols}, s.given() ? s : given, given, made, gbias,
                       mask, exec);
  else if (size > 0)
    activation_vjp(act, 1, s.given() ? s : given, given, made, mask, exec);
  Matrix gz = gy;
  gz.data = made.data;
  linear_vjp(x, w, gz, gx, gw, {}, exec);
}

}  // namespace

void register_linear(Kernels& table) {
  table.linear = linear;
  table.linear_act_dropout = linear_act_dropout;
  table.linear_act_dropout_jvp = linear_act_dropout_jvp;
  table.linear_act_dropout_vjp = linear_act_dropout_vjp;
  table.linear_vjp = linear_vjp;
  table.column_sum = column_sum;
  table.sum_workspace = [](const Rows&) -> std::int64_t { return 0; };
}

}  // namespace jops::JOPS_ISA
