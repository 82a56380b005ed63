#include "checked.h"

#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "names.h"

namespace jops {
namespace {

Kernels run;  // the unchecked kernels

// One call's checks: remembers the op's name and the tensor that the others are compared with.
class Check {
 public:
  Check(const char* op, const Exec& exec) : op_(op), exec_(exec) {
    if (exec.threads < 1) fail("threads", "at least 1", std::to_string(exec.threads));
  }

  [[noreturn]] void fail(const char* argument, const std::string& allowed,
                         const std::string& got) const {
    throw std::invalid_argument(std::string(op_) + ": " + argument + ": allowed " + allowed +
                                ", got " + got);
  }

  void dtype(const char* name, Dtype d) const {
    if (static_cast<int>(d) < 0 || static_cast<int>(d) > 3) {
      fail(name, "dtype 0 to 3", std::to_string(static_cast<int>(d)));
    }
  }

  void buffer(const char* name, const Buffer& b) const {
    dtype(name, b.dtype);
    if (b.size < 0) fail(name, "a size of at least 0", "none");
    if (b.size > 0 && b.data == nullptr) fail(name, "a pointer", "null");
  }

  // The first buffer of a call, and the others, which must agree with it.
  void first(const char* name, const Buffer& b) {
    buffer(name, b);
    name_ = name;
    first_ = b;
  }
  void like_first(const char* name, const Buffer& b) const {
    buffer(name, b);
    if (b.size != first_.size) {
      fail(name, std::to_string(first_.size) + " elements as " + name_, std::to_string(b.size));
    }
    same_dtype(name, b.dtype);
  }
  void optional(const char* name, const Buffer& b) const {
    if (b.given()) like_first(name, b);
  }
  void same_dtype(const char* name, Dtype d) const {
    if (d != first_.dtype) {
      fail(name, std::string(dtype_name(first_.dtype)) + " as " + name_, dtype_name(d));
    }
  }

  void one_of(const char* name, const Buffer& a, const Buffer& b) const {
    if (!a.given() && !b.given()) fail(name, "at least one of the two", "neither");
  }

  void act(const Act& act) const {
    const int code = static_cast<int>(act.code), count = static_cast<int>(Activation::kCount);
    if (code < 0 || code >= count) {
      fail("act", "codes 0 to " + std::to_string(count - 1), std::to_string(code));
    }
  }

  void order(int order, int highest) const {
    if (order < 1 || order > highest) {
      fail("order", "1 to " + std::to_string(highest), std::to_string(order));
    }
  }

  void mask(const Mask& m, std::int64_t size) const {
    if (!m.given()) return;
    if (!(m.p >= 0 && m.p <= 1)) fail("mask", "p in [0, 1]", std::to_string(m.p));
    if (m.seeds == nullptr) fail("mask", "a pointer to seeds", "null");
    if (size % m.batch != 0) {
      fail("mask", "a batch that divides " + std::to_string(size), std::to_string(m.batch));
    }
  }

  void rows(const Rows& r) const {
    if (!std::isfinite(r.scale) || r.scale == 0) {
      fail("rows", "a finite scale other than 0", std::to_string(r.scale));
    }
    std::int64_t product = 0;
    if (r.outer < 0 || r.n < 0 || r.inner < 0 || __builtin_mul_overflow(r.outer, r.n, &product) ||
        __builtin_mul_overflow(product, r.inner, &product) || product != first_.size) {
      fail("rows", "extents whose product is " + std::to_string(first_.size),
           std::to_string(r.outer) + " x " + std::to_string(r.n) + " x " + std::to_string(r.inner));
    }
  }

  void matrix(const char* name, const Matrix& m) const {
    dtype(name, m.dtype);
    if (m.batch < 0 || m.rows < 0 || m.cols < 0) fail(name, "extents of at least 0", "less");
    // Strides of 0 make any number of elements out of one: sizes computed from these must not
    // overflow, and those of an empty matrix are used as well.
    constexpr std::int64_t kMost = std::int64_t{1} << 48;
    std::int64_t count = 1;
    for (const std::int64_t n : {m.batch, m.rows, m.cols}) {
      if (__builtin_mul_overflow(count, n > 0 ? n : 1, &count) || count > kMost) {
        fail(name, "at most 2^48 elements", "more");
      }
    }
    if (m.batch_stride < 0 || m.row_stride < 0 || m.col_stride < 0) {
      fail(name, "strides of at least 0", "less");
    }
    if (empty(m)) return;
    if (m.data == nullptr) fail(name, "a pointer", "null");
    std::int64_t last = 0;
    if (add_product(m.batch - 1, m.batch_stride, &last) ||
        add_product(m.rows - 1, m.row_stride, &last) ||
        add_product(m.cols - 1, m.col_stride, &last) || last >= m.extent) {
      fail(name, "strides within its " + std::to_string(m.extent) + " elements", "beyond");
    }
  }
  void first(const char* name, const Matrix& m) {
    matrix(name, m);
    name_ = name;
    first_ = {m.data, m.extent, m.dtype};
  }
  // An output may not be written twice.
  void output(const char* name, const Matrix& m, std::int64_t batch, std::int64_t rows,
              std::int64_t cols) const {
    matrix(name, m);
    same_dtype(name, m.dtype);
    extent(name, "batch", m.batch, batch);
    extent(name, "rows", m.rows, rows);
    extent(name, "cols", m.cols, cols);
    if (empty(m)) return;
    if ((m.batch > 1 && m.batch_stride == 0) || (m.rows > 1 && m.row_stride == 0)) {
      fail(name, "strides above 0", "0");
    }
    if (m.cols > 1 && m.col_stride != 1) {
      fail(name, "stride 1 along the columns", std::to_string(m.col_stride));
    }
  }
  void heads(const char* name, const Heads& t) const {
    if (t.batch < 0 || t.heads < 0) fail(name, "extents of at least 0", "less");
    if (t.batch_stride < 0 || t.head_stride < 0) fail(name, "strides of at least 0", "less");
    std::int64_t all = 0;
    if (__builtin_mul_overflow(t.batch, t.heads, &all) ||
        __builtin_mul_overflow(all, t.rows, &all) || all > std::int64_t{1} << 48) {
      fail(name, "at most 2^48 rows of all heads", "more");
    }
    // The matrix of the last head, of the last one in the batch.
    std::int64_t first = 0;
    if (t.batch > 0 && t.heads > 0 &&
        (add_product(t.batch - 1, t.batch_stride, &first) ||
         add_product(t.heads - 1, t.head_stride, &first))) {
      fail(name, "strides within its elements", "beyond");
    }
    const bool none = t.batch == 0 || t.heads == 0;
    matrix(name, {t.data, t.extent - first, t.dtype, none ? 0 : 1, t.rows, t.width, 0, t.row_stride,
                  t.col_stride});
  }
  void heads(const char* name, const Heads& t, std::int64_t batch, std::int64_t heads_of,
             std::int64_t rows, std::int64_t width) const {
    heads(name, t);
    extent(name, "batch", t.batch, batch);
    extent(name, "heads", t.heads, heads_of);
    extent(name, "rows", t.rows, rows);
    extent(name, "width", t.width, width);
  }
  void first(const char* name, const Heads& t) {
    heads(name, t);
    name_ = name;
    first_ = {t.data, t.extent, t.dtype};
  }
  void present(const char* name, const Heads& t, const Heads& other) const {
    heads(name, t, other.batch, other.heads, other.rows, other.width);
    same_dtype(name, t.dtype);
  }
  void like(const char* name, const Heads& t, const Heads& other) const {
    if (t.given()) present(name, t, other);
  }
  // An output may not be written twice.
  void result(const char* name, const Heads& t, const Heads& other) const {
    like(name, t, other);
    if (!t.given()) return;
    const std::int64_t sizes[] = {t.batch, t.heads, t.rows, t.width};
    const std::int64_t strides[] = {t.batch_stride, t.head_stride, t.row_stride, t.col_stride};
    for (int i = 0; i < 4; ++i) {
      if (sizes[i] > 1 && strides[i] == 0) fail(name, "strides above 0", "0");
    }
  }
  // `kinds` numbers a query, of the type that is computed in.
  void of_rows(const char* name, const Buffer& b, const Heads& q, int kinds) const {
    buffer(name, b);
    const Dtype wide = first_.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    if (b.dtype != wide) fail(name, dtype_name(wide), dtype_name(b.dtype));
    extent(name, "elements", b.size, kinds * q.batch * q.heads * q.rows);
  }
  void tangents(const Scores& scores, const Heads& q, const Heads& k, const Heads& v,
                const Heads& tq, const Heads& tk, const Heads& tv, const Heads& tbias) const {
    like("tq", tq, q);
    like("tk", tk, k);
    like("tv", tv, v);
    if (tbias.given() && !scores.bias.given()) fail("tbias", "none without a bias", "one");
    like("tbias", tbias, scores.bias);
  }
  void extent(const char* name, const char* which, std::int64_t got, std::int64_t wanted) const {
    if (got != wanted) {
      fail(name, std::string(which) + " " + std::to_string(wanted), std::to_string(got));
    }
  }

  void grid(const char* name, const Grid& g) const {
    dtype(name, g.dtype);
    constexpr std::int64_t kMost = std::int64_t{1} << 48;
    std::int64_t count = g.n > 0 ? g.n : 1, last = g.n - 1;
    bool none = g.n == 0;
    if (g.n < 0 || count > kMost) fail(name, "0 to 2^48 elements a vector", std::to_string(g.n));
    for (int k = 0; k < 3; ++k) {
      if (g.sizes[k] < 0 || g.strides[k] < 0) fail(name, "sizes and strides of at least 0", "less");
      none = none || g.sizes[k] == 0;
      if (__builtin_mul_overflow(count, g.sizes[k] > 0 ? g.sizes[k] : 1, &count) || count > kMost) {
        fail(name, "at most 2^48 elements", "more");
      }
      if (add_product(g.sizes[k] - 1, g.strides[k], &last)) {
        fail(name, "strides within its elements", "beyond");
      }
    }
    if (none) return;
    if (g.data == nullptr) fail(name, "a pointer", "null");
    if (last >= g.extent) {
      fail(name, "strides within its " + std::to_string(g.extent) + " elements", "beyond");
    }
  }

  // What belongs to the columns of rows.
  void of_column(const char* name, const Buffer& b, const Rows& r) const {
    if (!b.given()) return;
    buffer(name, b);
    same_dtype(name, b.dtype);
    extent(name, "elements", b.size, r.n);
  }

  // What belongs to rows, or to classes: float64, or float32 for the other types.
  void wide(const char* name, const Buffer& b, std::int64_t size) const {
    buffer(name, b);
    const Dtype wide = first_.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    if (b.dtype != wide) fail(name, dtype_name(wide), dtype_name(b.dtype));
    extent(name, "elements", b.size, size);
  }

  void target(const Target& t, const Rows& r) const {
    if (t.rows >= 0) {
      extent("target", "classes", t.rows, r.outer * r.inner);
      if (t.rows > 0 && t.classes == nullptr) fail("target", "a pointer to classes", "null");
      if (t.probabilities.given()) fail("target", "classes or probabilities", "both");
    } else {
      like_first("target", t.probabilities);
    }
    if (t.weight.given()) wide("weight", t.weight, r.n);
    if (!(t.smoothing >= 0 && t.smoothing <= 1)) {
      fail("target", "smoothing in [0, 1]", std::to_string(t.smoothing));
    }
    constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 1;
    if (r.n > kMost) fail("rows", "at most 2^31 - 1 classes", std::to_string(r.n));
    if (r.scale != 1) fail("rows", "scale 1", std::to_string(r.scale));
  }

  void groups(const Groups& g) const {
    std::int64_t product = 0;
    if (g.outer < 0 || g.channels < 0 || g.inner < 0 ||
        __builtin_mul_overflow(g.outer, g.channels, &product) ||
        __builtin_mul_overflow(product, g.inner, &product) || product != first_.size) {
      fail("groups", "extents whose product is " + std::to_string(first_.size),
           std::to_string(g.outer) + " x " + std::to_string(g.channels) + " x " +
               std::to_string(g.inner));
    }
    if (g.groups < 0 || (g.groups > 0 && g.channels % g.groups != 0)) {
      fail("groups", "a number that divides the channels, or 0", std::to_string(g.groups));
    }
    if (!(g.eps >= 0)) fail("groups", "eps of at least 0", std::to_string(g.eps));
    if (g.fixed && g.groups != 0) fail("groups", "0 with given statistics", "others");
  }

  void of_channel(const char* name, const Buffer& b, const Groups& g) const {
    of_column(name, b, {1, g.channels, 1});
  }

  // Mean and variance of each channel, in the type that the others are computed in.
  void statistics(const Buffer& b, const Groups& g) const {
    if (g.fixed && !b.given()) fail("stats", "those that are fixed", "none");
    if (!b.given()) return;
    buffer("stats", b);
    if (g.groups != 0) fail("stats", "none for groups of channels", "some");
    const Dtype wide = first_.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    if (b.dtype != wide) fail("stats", dtype_name(wide), dtype_name(b.dtype));
    extent("stats", "elements", b.size, 2 * g.channels);
  }

  // Sums over the elements of each channel.
  void channel_sums(const Buffer& b, std::int64_t kinds, const Groups& g) const {
    buffer("sums", b);
    same_dtype("sums", b.dtype);
    extent("sums", "elements", b.size, kinds * g.channels);
  }

  // Sums over n of (outer, n, inner) elements, and the memory that they take on the way.
  void sums(const char* name, const Buffer& b, const Rows& r) const {
    buffer(name, b);
    same_dtype(name, b.dtype);
    extent(name, "elements", b.size, r.outer * r.inner);
    if (b.size > 0) workspace(run.sum_workspace(r));
  }
  void workspace(std::int64_t bytes) const {
    if (exec_.workspace_bytes < bytes) {
      fail("workspace", "at least " + std::to_string(bytes) + " bytes",
           std::to_string(exec_.workspace_bytes));
    }
  }

  static bool empty(const Matrix& m) { return m.batch == 0 || m.rows == 0 || m.cols == 0; }

 private:
  static bool add_product(std::int64_t a, std::int64_t b, std::int64_t* sum) {
    std::int64_t product = 0;
    return __builtin_mul_overflow(a, b, &product) || __builtin_add_overflow(*sum, product, sum);
  }

  const char* op_;
  const Exec& exec_;
  const char* name_ = "";
  Buffer first_;
};

struct Named {
  const char* name;
  const Buffer& buffer;
};

// Checks that all buffers agree; true if there is nothing to do.
bool elementwise(Check& check, std::initializer_list<Named> buffers, const Mask& mask = {}) {
  bool is_first = true;
  std::int64_t size = 0;
  for (const Named& b : buffers) {
    if (is_first) {
      check.first(b.name, b.buffer);
      size = b.buffer.size;
    } else {
      check.like_first(b.name, b.buffer);
    }
    is_first = false;
  }
  check.mask(mask, size);
  return size == 0;
}

void activation(const Act& act, const Buffer& x, const Buffer& residual, const Buffer& y,
                const Mask& mask, const Exec& exec) {
  Check check("activation", exec);
  check.act(act);
  const bool empty = elementwise(check, {{"x", x}, {"y", y}}, mask);
  check.optional("residual", residual);
  if (empty) return;
  run.activation(act, x, residual, y, mask, exec);
}

void activation_vjp(const Act& act, int order, const Buffer& x, const Buffer& gy, const Buffer& gx,
                    const Mask& mask, const Exec& exec) {
  Check check("activation_vjp", exec);
  check.act(act);
  check.order(order, 3);
  if (elementwise(check, {{"x", x}, {"gy", gy}, {"gx", gx}}, mask)) return;
  run.activation_vjp(act, order, x, gy, gx, mask, exec);
}

void activation_jvp(const Act& act, const Buffer& x, const Buffer& tx, const Buffer& residual,
                    const Buffer& tresidual, const Buffer& y, const Buffer& ty, const Mask& mask,
                    const Exec& exec) {
  Check check("activation_jvp", exec);
  check.act(act);
  const bool empty = elementwise(check, {{"x", x}, {"tx", tx}, {"y", y}, {"ty", ty}}, mask);
  check.optional("residual", residual);
  check.optional("tresidual", tresidual);
  if (empty) return;
  run.activation_jvp(act, x, tx, residual, tresidual, y, ty, mask, exec);
}

void activation_vjp_vjp(const Act& act, int order, const Buffer& x, const Buffer& gy,
                        const Buffer& h, const Buffer& hx, const Buffer& hgy, const Mask& mask,
                        const Exec& exec) {
  Check check("activation_vjp_vjp", exec);
  check.act(act);
  check.order(order, 2);
  if (elementwise(check, {{"x", x}, {"gy", gy}, {"h", h}, {"hx", hx}, {"hgy", hgy}}, mask)) return;
  run.activation_vjp_vjp(act, order, x, gy, h, hx, hgy, mask, exec);
}

void activation_vjp_jvp(const Act& act, int order, const Buffer& x, const Buffer& gy,
                        const Buffer& tx, const Buffer& tgy, const Buffer& gx, const Buffer& tgx,
                        const Mask& mask, const Exec& exec) {
  Check check("activation_vjp_jvp", exec);
  check.act(act);
  check.order(order, 2);
  check.one_of("tx, tgy", tx, tgy);
  const bool empty = elementwise(check, {{"x", x}, {"gy", gy}, {"gx", gx}, {"tgx", tgx}}, mask);
  check.optional("tx", tx);
  check.optional("tgy", tgy);
  if (empty) return;
  run.activation_vjp_jvp(act, order, x, gy, tx, tgy, gx, tgx, mask, exec);
}

void activation_vjp_sum(const Act& act, const Rows& rows, const Buffer& x, const Buffer& gy,
                        const Buffer& gx, const Buffer& sum, const Mask& mask, const Exec& exec) {
  Check check("activation_vjp_sum", exec);
  check.act(act);
  elementwise(check, {{"x", x}, {"gy", gy}, {"gx", gx}}, mask);
  check.rows(rows);
  check.sums("sum", sum, rows);
  if (sum.size == 0) return;
  run.activation_vjp_sum(act, rows, x, gy, gx, sum, mask, exec);
}

// An optional matrix of the shape of another one.
void same_shape(const Check& check, const char* name, const Matrix& a, const Matrix& other) {
  if (!a.given()) return;
  check.matrix(name, a);
  check.same_dtype(name, a.dtype);
  check.extent(name, "batch", a.batch, other.batch);
  check.extent(name, "rows", a.rows, other.rows);
  check.extent(name, "cols", a.cols, other.cols);
}

// What is added to y: of its shape, rows contiguous.
void addend(const Check& check, const char* name, const Matrix& a, const Matrix& y) {
  same_shape(check, name, a, y);
  if (a.cols > 1) check.extent(name, "column stride", a.col_stride, 1);
}

struct NamedMatrix {
  const char* name;
  const Matrix& matrix;
};

// Checks matrices of the shape of the first one, whose rows are contiguous; true if there is
// nothing to do.
bool by_lines(Check& check, const Act& act, const Matrix& gate,
              std::initializer_list<NamedMatrix> required,
              std::initializer_list<NamedMatrix> optional,
              std::initializer_list<NamedMatrix> outputs) {
  switch (act.code) {
    case Activation::kGelu:
    case Activation::kGeluTanh:
    case Activation::kSilu:
      break;
    default:
      check.fail("act", "gelu, gelu_tanh or silu", std::to_string(static_cast<int>(act.code)));
  }
  check.first("gate", gate);
  check.extent("gate", "batch", gate.batch, 1);
  addend(check, "gate", gate, gate);
  for (const NamedMatrix& m : required) {
    check.matrix(m.name, m.matrix);
    if (!m.matrix.given()) check.fail(m.name, "a matrix", "none");
    addend(check, m.name, m.matrix, gate);
  }
  for (const NamedMatrix& m : optional) addend(check, m.name, m.matrix, gate);
  for (const NamedMatrix& m : outputs) {
    check.output(m.name, m.matrix, gate.batch, gate.rows, gate.cols);
  }
  return Check::empty(gate);
}

void gated(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& y,
           const Exec& exec) {
  Check check("gated", exec);
  if (by_lines(check, act, gate, {{"up", up}}, {}, {{"y", y}})) return;
  run.gated(act, gate, up, y, exec);
}

void gated_jvp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& tgate,
               const Matrix& tup, const Matrix& y, const Matrix& ty, const Exec& exec) {
  Check check("gated_jvp", exec);
  if (by_lines(check, act, gate, {{"up", up}}, {{"tgate", tgate}, {"tup", tup}},
               {{"y", y}, {"ty", ty}})) {
    return;
  }
  run.gated_jvp(act, gate, up, tgate, tup, y, ty, exec);
}

void gated_vjp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
               const Matrix& ggate, const Matrix& gup, const Exec& exec) {
  Check check("gated_vjp", exec);
  if (by_lines(check, act, gate, {{"up", up}, {"gy", gy}}, {}, {{"ggate", ggate}, {"gup", gup}})) {
    return;
  }
  run.gated_vjp(act, gate, up, gy, ggate, gup, exec);
}

void gated_vjp_vjp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
                   const Matrix& hggate, const Matrix& hgup, const Matrix& hgate, const Matrix& hup,
                   const Matrix& hgy, const Exec& exec) {
  Check check("gated_vjp_vjp", exec);
  if (by_lines(check, act, gate, {{"up", up}, {"gy", gy}}, {{"hggate", hggate}, {"hgup", hgup}},
               {{"hgate", hgate}, {"hup", hup}, {"hgy", hgy}})) {
    return;
  }
  run.gated_vjp_vjp(act, gate, up, gy, hggate, hgup, hgate, hup, hgy, exec);
}

void gated_vjp_jvp(const Act& act, const Matrix& gate, const Matrix& up, const Matrix& gy,
                   const Matrix& tgate, const Matrix& tup, const Matrix& tgy, const Matrix& ggate,
                   const Matrix& gup, const Matrix& tggate, const Matrix& tgup, const Exec& exec) {
  Check check("gated_vjp_jvp", exec);
  if (by_lines(check, act, gate, {{"up", up}, {"gy", gy}},
               {{"tgate", tgate}, {"tup", tup}, {"tgy", tgy}},
               {{"ggate", ggate}, {"gup", gup}, {"tggate", tggate}, {"tgup", tgup}})) {
    return;
  }
  run.gated_vjp_jvp(act, gate, up, gy, tgate, tup, tgy, ggate, gup, tggate, tgup, exec);
}

void rotary(const Rotation& rotation, const Grid& x, const Grid& cos, const Grid& sin,
            const Grid& y, const Exec& exec) {
  Check check("rotary", exec);
  check.grid("x", x);
  check.first("x", Buffer{x.data, x.extent, x.dtype});
  bool empty = x.n == 0;
  const auto like_x = [&](const char* name, const Grid& g, std::int64_t n) {
    check.grid(name, g);
    check.same_dtype(name, g.dtype);
    check.extent(name, "elements a vector", g.n, n);
    for (int k = 0; k < 3; ++k) {
      check.extent(name, "size", g.sizes[k], x.sizes[k]);
      empty = empty || g.sizes[k] == 0;
    }
  };
  like_x("y", y, x.n);
  like_x("cos", cos, cos.n);
  like_x("sin", sin, cos.n);
  if (cos.n > x.n / 2) {
    check.fail("cos", "at most " + std::to_string(x.n / 2) + " elements a vector",
               std::to_string(cos.n));
  }
  for (int k = 0; k < 3; ++k) {
    if (y.sizes[k] > 1 && y.strides[k] == 0) check.fail("y", "strides above 0", "0");
  }
  if (empty) return;
  run.rotary(rotation, x, cos, sin, y, exec);
}

void dropout(const Buffer& x, const Buffer& y, const Mask& mask, const Exec& exec) {
  Check check("dropout", exec);
  if (elementwise(check, {{"x", x}, {"y", y}}, mask)) return;
  run.dropout(x, y, mask, exec);
}

void dropout_add(const Buffer& x, const Buffer& residual, const Buffer& y, const Mask& mask,
                 const Exec& exec) {
  Check check("dropout_add", exec);
  if (elementwise(check, {{"x", x}, {"residual", residual}, {"y", y}}, mask)) return;
  run.dropout_add(x, residual, y, mask, exec);
}

bool by_rows(Check& check, const Rows& rows, std::initializer_list<Named> buffers,
             const Mask& mask = {}) {
  const bool empty = elementwise(check, buffers, mask);
  check.rows(rows);
  return empty;
}

void softmax(const Rows& rows, const Buffer& x, const Buffer& y, const Exec& exec) {
  Check check("softmax", exec);
  if (by_rows(check, rows, {{"x", x}, {"y", y}})) return;
  run.softmax(rows, x, y, exec);
}

void softmax_vjp(const Rows& rows, const Buffer& y, const Buffer& gy, const Buffer& gx,
                 const Exec& exec) {
  Check check("softmax_vjp", exec);
  if (by_rows(check, rows, {{"y", y}, {"gy", gy}, {"gx", gx}})) return;
  run.softmax_vjp(rows, y, gy, gx, exec);
}

void softmax_jvp(const Rows& rows, const Buffer& x, const Buffer& tx, const Buffer& y,
                 const Buffer& ty, const Exec& exec) {
  Check check("softmax_jvp", exec);
  if (by_rows(check, rows, {{"x", x}, {"tx", tx}, {"y", y}, {"ty", ty}})) return;
  run.softmax_jvp(rows, x, tx, y, ty, exec);
}

void softmax_vjp_vjp(const Rows& rows, const Buffer& y, const Buffer& gy, const Buffer& h,
                     const Buffer& hy, const Buffer& hgy, const Exec& exec) {
  Check check("softmax_vjp_vjp", exec);
  if (by_rows(check, rows, {{"y", y}, {"gy", gy}, {"h", h}, {"hy", hy}, {"hgy", hgy}})) return;
  run.softmax_vjp_vjp(rows, y, gy, h, hy, hgy, exec);
}

void softmax_vjp_jvp(const Rows& rows, const Buffer& y, const Buffer& gy, const Buffer& ty,
                     const Buffer& tgy, const Buffer& gx, const Buffer& tgx, const Exec& exec) {
  Check check("softmax_vjp_jvp", exec);
  check.one_of("ty, tgy", ty, tgy);
  const bool empty = by_rows(check, rows, {{"y", y}, {"gy", gy}, {"gx", gx}, {"tgx", tgx}});
  check.optional("ty", ty);
  check.optional("tgy", tgy);
  if (empty) return;
  run.softmax_vjp_jvp(rows, y, gy, ty, tgy, gx, tgx, exec);
}

void log_softmax(const Rows& rows, const Buffer& x, const Buffer& y, const Exec& exec) {
  Check check("log_softmax", exec);
  if (by_rows(check, rows, {{"x", x}, {"y", y}})) return;
  run.log_softmax(rows, x, y, exec);
}

void log_softmax_vjp(const Rows& rows, const Buffer& y, const Buffer& gy, const Buffer& gx,
                     const Exec& exec) {
  Check check("log_softmax_vjp", exec);
  if (by_rows(check, rows, {{"y", y}, {"gy", gy}, {"gx", gx}})) return;
  run.log_softmax_vjp(rows, y, gy, gx, exec);
}

void log_softmax_tangent(const Rows& rows, const Buffer& y, const Buffer& tx, const Buffer& ty,
                         const Exec& exec) {
  Check check("log_softmax_tangent", exec);
  if (by_rows(check, rows, {{"y", y}, {"tx", tx}, {"ty", ty}})) return;
  run.log_softmax_tangent(rows, y, tx, ty, exec);
}

void log_softmax_jvp(const Rows& rows, const Buffer& x, const Buffer& tx, const Buffer& y,
                     const Buffer& ty, const Exec& exec) {
  Check check("log_softmax_jvp", exec);
  if (by_rows(check, rows, {{"x", x}, {"tx", tx}, {"y", y}, {"ty", ty}})) return;
  run.log_softmax_jvp(rows, x, tx, y, ty, exec);
}

void log_softmax_vjp_vjp(const Rows& rows, const Buffer& y, const Buffer& gy, const Buffer& h,
                         const Buffer& hy, const Buffer& hgy, const Exec& exec) {
  Check check("log_softmax_vjp_vjp", exec);
  if (by_rows(check, rows, {{"y", y}, {"gy", gy}, {"h", h}, {"hy", hy}, {"hgy", hgy}})) return;
  run.log_softmax_vjp_vjp(rows, y, gy, h, hy, hgy, exec);
}

void log_softmax_vjp_jvp(const Rows& rows, const Buffer& y, const Buffer& gy, const Buffer& ty,
                         const Buffer& tgy, const Buffer& gx, const Buffer& tgx, const Exec& exec) {
  Check check("log_softmax_vjp_jvp", exec);
  check.one_of("ty, tgy", ty, tgy);
  const bool empty = by_rows(check, rows, {{"y", y}, {"gy", gy}, {"gx", gx}, {"tgx", tgx}});
  check.optional("ty", ty);
  check.optional("tgy", tgy);
  if (empty) return;
  run.log_softmax_vjp_jvp(rows, y, gy, ty, tgy, gx, tgx, exec);
}

void softmax_dropout(const Rows& rows, const Buffer& x, const Buffer& y, const Mask& mask,
                     const Exec& exec) {
  Check check("softmax_dropout", exec);
  if (by_rows(check, rows, {{"x", x}, {"y", y}}, mask)) return;
  run.softmax_dropout(rows, x, y, mask, exec);
}

void softmax_dropout_vjp(const Rows& rows, const Buffer& x, const Buffer& gy, const Buffer& gx,
                         const Mask& mask, const Exec& exec) {
  Check check("softmax_dropout_vjp", exec);
  if (by_rows(check, rows, {{"x", x}, {"gy", gy}, {"gx", gx}}, mask)) return;
  run.softmax_dropout_vjp(rows, x, gy, gx, mask, exec);
}

void softmax_dropout_jvp(const Rows& rows, const Buffer& x, const Buffer& tx, const Buffer& y,
                         const Buffer& ty, const Mask& mask, const Exec& exec) {
  Check check("softmax_dropout_jvp", exec);
  if (by_rows(check, rows, {{"x", x}, {"tx", tx}, {"y", y}, {"ty", ty}}, mask)) return;
  run.softmax_dropout_jvp(rows, x, tx, y, ty, mask, exec);
}

// y (B, M, N) = x (B, M, K) w (B, N, K)^T + bias (B N, or N); a batch of 1 broadcasts.
void products(Check& check, const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y) {
  check.first("x", x);
  check.matrix("w", w);
  check.same_dtype("w", w.dtype);
  check.extent("w", "cols", w.cols, x.cols);
  if (x.batch != 1) check.extent("x", "batch", x.batch, y.batch);
  if (w.batch != 1) check.extent("w", "batch", w.batch, y.batch);
  check.output("y", y, y.batch, x.rows, w.rows);
  if (!bias.given()) return;
  check.buffer("bias", bias);
  check.same_dtype("bias", bias.dtype);
  if (bias.size != w.rows && bias.size != y.batch * w.rows) {
    check.fail("bias", std::to_string(w.rows) + " elements, or as many for each of the batch",
               std::to_string(bias.size));
  }
}

void linear(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y,
            const Exec& exec) {
  Check check("linear", exec);
  products(check, x, w, bias, y);
  if (Check::empty(y)) return;
  run.linear(x, w, bias, y, exec);
}

void linear_act_dropout(const Matrix& x, const Matrix& w, const Buffer& bias,
                        const Matrix& residual, const Matrix& y, const Matrix& z, const Act& act,
                        const Mask& mask, const Exec& exec) {
  Check check("linear_act_dropout", exec);
  products(check, x, w, bias, y);
  addend(check, "residual", residual, y);
  if (z.given()) check.output("z", z, y.batch, y.rows, y.cols);
  check.act(act);
  if (mask.given()) check.extent("mask", "batch", mask.batch, y.batch);
  if (Check::empty(y)) return;
  check.mask(mask, y.batch * y.rows * y.cols);
  run.linear_act_dropout(x, w, bias, residual, y, z, act, mask, exec);
}

void linear_act_dropout_jvp(const Matrix& x, const Matrix& w, const Buffer& bias,
                            const Matrix& residual, const Matrix& tx, const Matrix& tw,
                            const Buffer& tbias, const Matrix& tresidual, const Matrix& y,
                            const Matrix& ty, const Matrix& z, const Act& act, const Mask& mask,
                            const Exec& exec) {
  Check check("linear_act_dropout_jvp", exec);
  products(check, x, w, bias, y);
  addend(check, "residual", residual, y);
  addend(check, "tresidual", tresidual, y);
  same_shape(check, "tx", tx, x);
  same_shape(check, "tw", tw, w);
  if (tbias.given()) {
    check.buffer("tbias", tbias);
    check.same_dtype("tbias", tbias.dtype);
    if (tbias.size != w.rows && tbias.size != y.batch * w.rows) {
      check.fail("tbias", std::to_string(w.rows) + " elements, or as many for each of the batch",
                 std::to_string(tbias.size));
    }
  }
  check.output("ty", ty, y.batch, y.rows, y.cols);
  if (ty.row_stride != y.row_stride) {
    check.fail("ty", "the row stride of y", std::to_string(ty.row_stride));
  }
  if (z.given()) check.output("z", z, y.batch, y.rows, y.cols);
  check.act(act);
  if (mask.given()) check.extent("mask", "batch", mask.batch, y.batch);
  if (Check::empty(y)) return;
  check.mask(mask, y.batch * y.rows * y.cols);
  run.linear_act_dropout_jvp(x, w, bias, residual, tx, tw, tbias, tresidual, y, ty, z, act, mask,
                             exec);
}

// Checks the cotangents of a linear map; those that are empty are then not wanted.
void cotangents(Check& check, const Matrix& x, const Matrix& w, const Matrix& gy, Matrix& gx,
                Matrix& gw, Buffer& gbias) {
  check.first("gy", gy);
  if (gx.given()) products(check, gy, w.transposed(), {}, gx);
  if (gw.given()) products(check, gy.transposed(), x.transposed(), {}, gw);
  if (gbias.given()) check.sums("gbias", gbias, {gy.batch, gy.rows, gy.cols});
  if (Check::empty(gx)) gx = {};
  if (Check::empty(gw)) gw = {};
  if (gbias.size == 0) gbias = {};
}

void linear_vjp(const Matrix& x, const Matrix& w, const Matrix& gy, const Matrix& gx,
                const Matrix& gw, const Buffer& gbias, const Exec& exec) {
  Check check("linear_vjp", exec);
  Matrix to_x = gx, to_w = gw;
  Buffer to_bias = gbias;
  cotangents(check, x, w, gy, to_x, to_w, to_bias);
  run.linear_vjp(x, w, gy, to_x, to_w, to_bias, exec);
}

void linear_act_dropout_vjp(const Matrix& x, const Matrix& w, const Buffer& s, const Matrix& gy,
                            const Matrix& gx, const Matrix& gw, const Buffer& gbias, const Act& act,
                            const Mask& mask, const Exec& exec) {
  Check check("linear_act_dropout_vjp", exec);
  Matrix to_x = gx, to_w = gw;
  Buffer to_bias = gbias;
  cotangents(check, x, w, gy, to_x, to_w, to_bias);
  const std::int64_t size = gy.batch * gy.rows * gy.cols;
  if (size > 0) {
    if (gy.cols > 1) check.extent("gy", "column stride", gy.col_stride, 1);
    if (gy.rows > 1) check.extent("gy", "row stride", gy.row_stride, gy.cols);
    if (gy.batch > 1) check.extent("gy", "batch stride", gy.batch_stride, gy.rows * gy.cols);
  }
  check.act(act);
  if (s.given()) {
    check.buffer("s", s);
    check.same_dtype("s", s.dtype);
    check.extent("s", "elements", s.size, size);
  } else if (act.code != Activation::kIdentity) {
    check.fail("s", "what the activation is differentiated at", "none");
  }
  if (mask.given()) check.extent("mask", "batch", mask.batch, gy.batch);
  if (size > 0) check.mask(mask, size);
  run.linear_act_dropout_vjp(x, w, s, gy, to_x, to_w, to_bias, act, size > 0 ? mask : Mask{}, exec);
}

void column_sum(const Matrix& x, const Buffer& y, const Exec& exec) {
  Check check("column_sum", exec);
  check.first("x", x);
  check.sums("y", y, {x.batch, x.rows, x.cols});
  if (y.size == 0) return;
  run.column_sum(x, y, exec);
}

bool normalized(Check& check, const Norm& norm, const Rows& rows,
                std::initializer_list<Named> buffers) {
  if (!(norm.eps >= 0)) check.fail("norm", "eps of at least 0", std::to_string(norm.eps));
  const bool empty = by_rows(check, rows, buffers);
  check.extent("rows", "inner", rows.inner, 1);
  return empty;
}

void norm(const Norm& norm, const Rows& rows, const Buffer& x, const Buffer& residual,
          const Buffer& weight, const Buffer& bias, const Buffer& y, const Buffer& sum,
          const Exec& exec) {
  Check check("norm", exec);
  const bool empty = normalized(check, norm, rows, {{"x", x}, {"y", y}});
  if (residual.given() || sum.given()) {
    check.like_first("residual", residual);
    check.like_first("sum", sum);
  }
  check.of_column("weight", weight, rows);
  check.of_column("bias", bias, rows);
  if (empty) return;
  run.norm(norm, rows, x, residual, weight, bias, y, sum, exec);
}

void norm_jvp(const Norm& norm, const Rows& rows, const Buffer& x, const Buffer& weight,
              const Buffer& bias, const Buffer& tx, const Buffer& tweight, const Buffer& tbias,
              const Buffer& y, const Buffer& ty, const Exec& exec) {
  Check check("norm_jvp", exec);
  const bool empty = normalized(check, norm, rows, {{"x", x}, {"y", y}, {"ty", ty}});
  check.optional("tx", tx);
  check.of_column("weight", weight, rows);
  check.of_column("bias", bias, rows);
  check.of_column("tweight", tweight, rows);
  check.of_column("tbias", tbias, rows);
  if (empty) return;
  run.norm_jvp(norm, rows, x, weight, bias, tx, tweight, tbias, y, ty, exec);
}

void norm_vjp(const Norm& norm, const Rows& rows, const Buffer& x, const Buffer& weight,
              const Buffer& gy, const Buffer& gsum, const Buffer& gx, const Buffer& sums,
              const Exec& exec) {
  Check check("norm_vjp", exec);
  const bool empty = normalized(check, norm, rows, {{"x", x}, {"gy", gy}, {"gx", gx}});
  check.optional("gsum", gsum);
  check.of_column("weight", weight, rows);
  check.sums("sums", sums, {2, rows.outer, rows.n});
  if (empty) return;
  run.norm_vjp(norm, rows, x, weight, gy, gsum, gx, sums, exec);
}

void norm_vjp_jvp(const Norm& norm, const Rows& rows, const Buffer& x, const Buffer& weight,
                  const Buffer& gy, const Buffer& tx, const Buffer& tweight, const Buffer& tgy,
                  const Buffer& gx, const Buffer& tgx, const Buffer& sums, const Exec& exec) {
  Check check("norm_vjp_jvp", exec);
  const bool empty =
      normalized(check, norm, rows, {{"x", x}, {"gy", gy}, {"gx", gx}, {"tgx", tgx}});
  check.optional("tx", tx);
  check.optional("tgy", tgy);
  check.of_column("weight", weight, rows);
  check.of_column("tweight", tweight, rows);
  check.sums("sums", sums, {4, rows.outer, rows.n});
  if (empty) return;
  run.norm_vjp_jvp(norm, rows, x, weight, gy, tx, tweight, tgy, gx, tgx, sums, exec);
}

void cross_entropy(const Rows& rows, const Target& target, const Buffer& x, const Buffer& loss,
                   const Exec& exec) {
  Check check("cross_entropy", exec);
  const bool empty = by_rows(check, rows, {{"x", x}});
  check.target(target, rows);
  check.wide("loss", loss, rows.outer * rows.inner);
  if (empty) return;
  run.cross_entropy(rows, target, x, loss, exec);
}

void cross_entropy_jvp(const Rows& rows, const Target& target, const Buffer& x, const Buffer& tx,
                       const Buffer& loss, const Buffer& tloss, const Exec& exec) {
  Check check("cross_entropy_jvp", exec);
  const bool empty = by_rows(check, rows, {{"x", x}, {"tx", tx}});
  check.target(target, rows);
  check.wide("loss", loss, rows.outer * rows.inner);
  check.wide("tloss", tloss, rows.outer * rows.inner);
  if (empty) return;
  run.cross_entropy_jvp(rows, target, x, tx, loss, tloss, exec);
}

void cross_entropy_vjp(const Rows& rows, const Target& target, const Buffer& x, const Buffer& g,
                       const Buffer& gx, const Exec& exec) {
  Check check("cross_entropy_vjp", exec);
  const bool empty = by_rows(check, rows, {{"x", x}, {"gx", gx}});
  check.target(target, rows);
  check.wide("g", g, rows.outer * rows.inner);
  if (empty) return;
  run.cross_entropy_vjp(rows, target, x, g, gx, exec);
}

void cross_entropy_vjp_jvp(const Rows& rows, const Target& target, const Buffer& x, const Buffer& g,
                           const Buffer& tx, const Buffer& tg, const Buffer& gx, const Buffer& tgx,
                           const Exec& exec) {
  Check check("cross_entropy_vjp_jvp", exec);
  const bool empty = by_rows(check, rows, {{"x", x}, {"tx", tx}, {"gx", gx}, {"tgx", tgx}});
  check.target(target, rows);
  check.wide("g", g, rows.outer * rows.inner);
  if (tg.given()) check.wide("tg", tg, rows.outer * rows.inner);
  if (empty) return;
  run.cross_entropy_vjp_jvp(rows, target, x, g, tx, tg, gx, tgx, exec);
}

// What the four group norms share, with so many sums over a channel; true if there is nothing to
// do.
bool grouped(Check& check, const Groups& groups, int sums, std::initializer_list<Named> buffers,
             std::initializer_list<Named> of_channel, const Buffer& stats) {
  const bool empty = elementwise(check, buffers);
  check.groups(groups);
  for (const Named& b : of_channel) check.of_channel(b.name, b.buffer, groups);
  check.statistics(stats, groups);
  if (!empty) check.workspace(run.group_norm_workspace(groups, sums));
  return empty;
}

void group_norm(const Groups& groups, const Buffer& x, const Buffer& weight, const Buffer& bias,
                const Buffer& stats, const Buffer& y, const Exec& exec) {
  Check check("group_norm", exec);
  if (grouped(check, groups, 0, {{"x", x}, {"y", y}}, {{"weight", weight}, {"bias", bias}},
              stats)) {
    return;
  }
  run.group_norm(groups, x, weight, bias, stats, y, exec);
}

void group_norm_jvp(const Groups& groups, const Buffer& x, const Buffer& weight, const Buffer& bias,
                    const Buffer& tx, const Buffer& tweight, const Buffer& tbias,
                    const Buffer& stats, const Buffer& y, const Buffer& ty, const Exec& exec) {
  Check check("group_norm_jvp", exec);
  const bool empty =
      grouped(check, groups, 0, {{"x", x}, {"y", y}, {"ty", ty}},
              {{"weight", weight}, {"bias", bias}, {"tweight", tweight}, {"tbias", tbias}}, stats);
  check.optional("tx", tx);
  if (empty) return;
  run.group_norm_jvp(groups, x, weight, bias, tx, tweight, tbias, stats, y, ty, exec);
}

void group_norm_vjp(const Groups& groups, const Buffer& x, const Buffer& weight, const Buffer& gy,
                    const Buffer& stats, const Buffer& gx, const Buffer& sums, const Exec& exec) {
  Check check("group_norm_vjp", exec);
  const bool empty =
      grouped(check, groups, 2, {{"x", x}, {"gy", gy}, {"gx", gx}}, {{"weight", weight}}, stats);
  check.channel_sums(sums, 2, groups);
  if (empty) return;
  run.group_norm_vjp(groups, x, weight, gy, stats, gx, sums, exec);
}

void group_norm_vjp_jvp(const Groups& groups, const Buffer& x, const Buffer& weight,
                        const Buffer& gy, const Buffer& tx, const Buffer& tweight,
                        const Buffer& tgy, const Buffer& stats, const Buffer& gx, const Buffer& tgx,
                        const Buffer& sums, const Exec& exec) {
  Check check("group_norm_vjp_jvp", exec);
  const bool empty = grouped(check, groups, 4, {{"x", x}, {"gy", gy}, {"gx", gx}, {"tgx", tgx}},
                             {{"weight", weight}, {"tweight", tweight}}, stats);
  check.optional("tx", tx);
  check.optional("tgy", tgy);
  check.channel_sums(sums, 4, groups);
  if (empty) return;
  run.group_norm_vjp_jvp(groups, x, weight, gy, tx, tweight, tgy, stats, gx, tgx, sums, exec);
}

// What is common to attention's products.
void attends(Check& check, const Scores& scores, const Heads& q, const Heads& k, const Heads& v,
             const Heads& o, const Buffer& lse, const Mask& mask) {
  check.first("q", q);
  if (!std::isfinite(scores.scale)) {
    check.fail("scores", "a finite scale", std::to_string(scores.scale));
  }
  if (k.heads == 0 ? q.heads != 0 : q.heads % k.heads != 0) {
    check.fail("k", "heads that divide " + std::to_string(q.heads), std::to_string(k.heads));
  }
  check.heads("k", k, q.batch, k.heads, k.rows, q.width);
  check.heads("v", v, q.batch, k.heads, k.rows, v.width);
  check.same_dtype("k", k.dtype);
  check.same_dtype("v", v.dtype);
  check.heads("o", o, q.batch, q.heads, q.rows, v.width);
  check.same_dtype("o", o.dtype);
  if (scores.keep.given()) check.heads("keep", scores.keep, q.batch, q.heads, q.rows, k.rows);
  if (scores.bias.given()) {
    check.heads("bias", scores.bias, q.batch, q.heads, q.rows, k.rows);
    check.same_dtype("bias", scores.bias.dtype);
  }
  check.of_rows("lse", lse, q, 1);
  check.mask(mask, q.batch);
}

void attention(const Scores& scores, const Heads& q, const Heads& k, const Heads& v, const Heads& o,
               const Buffer& lse, const Mask& mask, const Exec& exec) {
  Check check("attention", exec);
  attends(check, scores, q, k, v, o, lse, mask);
  check.result("o", o, o);
  if (lse.size == 0) return;
  run.attention(scores, q, k, v, o, lse, mask, exec);
}

void attention_jvp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v,
                   const Heads& tq, const Heads& tk, const Heads& tv, const Heads& tbias,
                   const Heads& o, const Heads& to, const Buffer& lse, const Buffer& mu,
                   const Mask& mask, const Exec& exec) {
  Check check("attention_jvp", exec);
  attends(check, scores, q, k, v, o, lse, mask);
  check.tangents(scores, q, k, v, tq, tk, tv, tbias);
  check.result("o", o, o);
  check.result("to", to, o);
  check.of_rows("mu", mu, q, 1);
  if (lse.size == 0) return;
  run.attention_jvp(scores, q, k, v, tq, tk, tv, tbias, o, to, lse, mu, mask, exec);
}

void attention_vjp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v,
                   const Heads& o, const Heads& go, const Buffer& lse, const Buffer& delta,
                   const Heads& gq, const Heads& gk, const Heads& gv, const Mask& mask,
                   const Exec& exec) {
  Check check("attention_vjp", exec);
  attends(check, scores, q, k, v, o, lse, mask);
  check.present("go", go, o);
  check.of_rows("delta", delta, q, 1);
  check.result("gq", gq, q);
  check.result("gk", gk, k);
  check.result("gv", gv, v);
  if (lse.size == 0) return;
  run.attention_vjp(scores, q, k, v, o, go, lse, delta, gq, gk, gv, mask, exec);
}

void attention_vjp_jvp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v,
                       const Heads& tq, const Heads& tk, const Heads& tv, const Heads& tbias,
                       const Heads& o, const Heads& to, const Heads& go, const Heads& tgo,
                       const Buffer& lse, const Buffer& mu, const Buffer& delta, const Heads& gq,
                       const Heads& gk, const Heads& gv, const Heads& tgq, const Heads& tgk,
                       const Heads& tgv, const Mask& mask, const Exec& exec) {
  Check check("attention_vjp_jvp", exec);
  attends(check, scores, q, k, v, o, lse, mask);
  check.tangents(scores, q, k, v, tq, tk, tv, tbias);
  check.present("to", to, o);
  check.present("go", go, o);
  check.like("tgo", tgo, o);
  check.of_rows("mu", mu, q, 1);
  check.of_rows("delta", delta, q, 2);
  check.result("gq", gq, q);
  check.result("gk", gk, k);
  check.result("gv", gv, v);
  check.result("tgq", tgq, q);
  check.result("tgk", tgk, k);
  check.result("tgv", tgv, v);
  if (lse.size == 0) return;
  run.attention_vjp_jvp(scores, q, k, v, tq, tk, tv, tbias, o, to, go, tgo, lse, mu, delta, gq, gk,
                        gv, tgq, tgk, tgv, mask, exec);
}

double fma_peak(Dtype dtype, const Exec& exec) {
  Check("fma_peak", exec).dtype("dtype", dtype);
  return run.fma_peak(dtype, exec);
}

double copy_bandwidth(std::int64_t bytes, bool non_temporal, const Exec& exec) {
  const Check check("copy_bandwidth", exec);
  if (bytes < 1) check.fail("bytes", "at least 1", std::to_string(bytes));
  return run.copy_bandwidth(bytes, non_temporal, exec);
}

}  // namespace

Kernels checked(const Kernels& unchecked) {
  run = unchecked;
  return {activation,
          activation_vjp,
          activation_jvp,
          activation_vjp_vjp,
          activation_vjp_jvp,
          activation_vjp_sum,
          gated,
          gated_jvp,
          gated_vjp,
          gated_vjp_vjp,
          gated_vjp_jvp,
          dropout,
          dropout_add,
          softmax,
          softmax_vjp,
          softmax_jvp,
          softmax_vjp_vjp,
          softmax_vjp_jvp,
          log_softmax,
          log_softmax_vjp,
          log_softmax_tangent,
          log_softmax_jvp,
          log_softmax_vjp_vjp,
          log_softmax_vjp_jvp,
          softmax_dropout,
          softmax_dropout_vjp,
          softmax_dropout_jvp,
          norm,
          norm_jvp,
          norm_vjp,
          norm_vjp_jvp,
          group_norm,
          group_norm_jvp,
          group_norm_vjp,
          group_norm_vjp_jvp,
          unchecked.group_norm_workspace,
          attention,
          attention_jvp,
          attention_vjp,
          attention_vjp_jvp,
          rotary,
          linear,
          linear_act_dropout,
          linear_act_dropout_jvp,
          linear_act_dropout_vjp,
          linear_vjp,
          column_sum,
          unchecked.sum_workspace,
          fma_peak,
          copy_bandwidth,
          cross_entropy,
          cross_entropy_jvp,
          cross_entropy_vjp,
          cross_entropy_vjp_jvp};
}

}  // namespace jops
