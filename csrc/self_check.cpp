// Compares every kernel family with naive loops in double, for all dtypes, with one thread and with
// several: the check that runs where Python does not (ctest, sanitizers, an emulated machine).
// Usage: self_check [name]: exits with 77 (skipped) if this machine does not run the instruction
// set of that name.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core.h"
#include "names.h"

using jops::Act;
using jops::Activation;
using jops::Buffer;
using jops::Dtype;
using jops::Exec;
using jops::Mask;
using jops::Matrix;
using jops::Rows;
using Doubles = std::vector<double>;

namespace {

int failures = 0;
std::mt19937_64 generator(7);

double epsilon(Dtype d) {
  switch (d) {
    case Dtype::kFloat64:
      return 0x1p-52;
    case Dtype::kFloat32:
      return 0x1p-23;
    case Dtype::kFloat16:
      return 0x1p-10;
    case Dtype::kBfloat16:
      return 0x1p-7;
  }
  return 0;
}

// The naive conversions of 16-bit types, by arithmetic.
double decode(std::uint16_t bits, int mantissa, int bias) {
  const int exponent = (bits & 0x7fff) >> mantissa, special = (1 << (15 - mantissa)) - 1;
  const double fraction = bits & ((1 << mantissa) - 1), sign = bits >> 15 ? -1 : 1;
  if (exponent == special) return fraction != 0 ? NAN : sign * INFINITY;
  const double significand = exponent ? fraction + (1 << mantissa) : fraction;
  return sign * std::ldexp(significand, (exponent ? exponent : 1) - bias - mantissa);
}
std::uint16_t encode(double v, int mantissa, int bias) {
  const std::uint16_t sign = std::signbit(v) ? 0x8000 : 0, special = 0x7fff >> mantissa << mantissa;
  if (std::isnan(v)) return sign | special | 1 << (mantissa - 1);
  int exponent = 0;
  std::frexp(v, &exponent);
  exponent = std::max(exponent - 1, 1 - bias);  // of the leading bit; the least one for denormals
  const double units = std::nearbyint(std::ldexp(std::fabs(v), mantissa - exponent));
  // Units of the last place count on through the exponents.
  const double bits = units + std::ldexp(exponent + bias - 1, mantissa);
  return sign | static_cast<std::uint16_t>(v == 0 ? 0 : std::min<double>(bits, special));
}

// A tensor of some dtype beside its exact values in double.
struct Tensor {
  Dtype dtype;
  std::vector<unsigned char> bytes;
  std::int64_t size;

  Tensor(Dtype d, std::int64_t n) : dtype(d), bytes(n * jops::size_of(d), 0xff), size(n) {}
  static Tensor random(Dtype d, std::int64_t n, double scale = 1) {
    Tensor t(d, n);
    std::normal_distribution<double> normal(0, scale);
    for (std::int64_t i = 0; i < n; ++i) t.set(i, normal(generator));
    return t;
  }
  double get(std::int64_t i) const {
    float f = 0;
    double v = 0;
    std::uint16_t h = 0;
    switch (dtype) {
      case Dtype::kFloat64:
        std::memcpy(&v, &bytes[8 * i], 8);
        return v;
      case Dtype::kFloat32:
        std::memcpy(&f, &bytes[4 * i], 4);
        return f;
      default:
        std::memcpy(&h, &bytes[2 * i], 2);
    }
    return dtype == Dtype::kFloat16 ? decode(h, 10, 15) : decode(h, 7, 127);
  }
  void set(std::int64_t i, double v) {
    const float f = static_cast<float>(v);
    const std::uint16_t h = dtype == Dtype::kFloat16 ? encode(v, 10, 15) : encode(v, 7, 127);
    switch (dtype) {
      case Dtype::kFloat64:
        std::memcpy(&bytes[8 * i], &v, 8);
        break;
      case Dtype::kFloat32:
        std::memcpy(&bytes[4 * i], &f, 4);
        break;
      default:
        std::memcpy(&bytes[2 * i], &h, 2);
    }
  }
  Doubles values() const {
    Doubles v(size);
    for (std::int64_t i = 0; i < size; ++i) v[i] = get(i);
    return v;
  }
  operator Buffer() { return {bytes.data(), size, dtype}; }
};

void expect(const std::string& what, const Tensor& got, const Doubles& wanted, double allowed) {
  double largest = 1e-30, worst = 0;
  for (std::int64_t i = 0; i < got.size; ++i) {
    largest = std::max(largest, std::fabs(wanted[i]));
    const double error = std::fabs(got.get(i) - wanted[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  const double bound = allowed * epsilon(got.dtype) * std::max(largest, 1.0);
  if (worst <= bound) return;
  std::printf("FAILED %s dtype %d: error %g, allowed %g\n", what.c_str(),
              static_cast<int>(got.dtype), worst, bound);
  ++failures;
}

void expect(const std::string& what, bool holds) {
  if (holds) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// Values of the activations, straight from their definitions.
double value(const Act& act, double x) {
  switch (act.code) {
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kLeakyRelu:
      return x > 0 ? x : act.a * x;
    case Activation::kElu:
      return x > 0 ? act.b * x : act.b * act.a * std::expm1(act.c * x);
    case Activation::kHardtanh:
      return std::min(std::max(x, act.a), act.b);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kGelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kSoftplus:
      return act.a * x > act.b ? x : softplus(act.a * x) / act.a;
    case Activation::kMish:
      return x * std::tanh(softplus(x));
    case Activation::kHardswish:
      return x * std::min(std::max(x + 3, 0.0), 6.0) / 6;
    case Activation::kHardsigmoid:
      return std::min(std::max(x + 3, 0.0), 6.0) / 6;
    case Activation::kLogsigmoid:
      return -softplus(-x);
    default:
      return x;
  }
}

// Four-point central differences; exact enough for 1e-9 relative to the function's scale.
double slope(const std::function<double(double)>& f, double x) {
  const double h = 1e-3;
  return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h);
}

void check_activations(const jops::Kernels& k, const Exec& exec) {
  for (int code = 0; code < static_cast<int>(Activation::kSigmoidY); ++code) {
    Act act{static_cast<Activation>(code)};
    const std::string name = jops::activation_name(act.code);
    if (act.code == Activation::kLeakyRelu) act.a = 0.1;
    if (act.code == Activation::kElu) act = {act.code, 1.7, 1.1, 0.8};
    if (act.code == Activation::kHardtanh) act = {act.code, -1, 2};
    if (act.code == Activation::kSoftplus) act = {act.code, 1.5, 20};

    // One derivative of the double kernel against differences of the one below it.
    const std::int64_t points = 101;
    const auto at = [&](int order, double x) {
      Tensor in(Dtype::kFloat64, 1), one(Dtype::kFloat64, 1), out(Dtype::kFloat64, 1);
      in.set(0, x);
      one.set(0, 1);
      if (order == 0)
        k.activation(act, in, {}, out, {}, exec);
      else
        k.activation_vjp(act, order, in, one, out, {}, exec);
      return out.get(0);
    };
    double worst = 0;
    for (std::int64_t i = 0; i < points; ++i) {
      const double x = -7 + 0.14321 * i;  // no point near a kink
      for (int order = 1; order <= 3; ++order) {
        const double wanted = slope([&](double v) { return at(order - 1, v); }, x);
        worst = std::max(worst, std::fabs(at(order, x) - wanted));
      }
    }
    expect(name + ": derivatives against differences", worst < 1e-7);

    for (Dtype d : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}) {
      for (std::int64_t n : {1, 7, 67, 20011}) {
        Tensor x = Tensor::random(d, n, 3), gy = Tensor::random(d, n), h = Tensor::random(d, n),
               t = Tensor::random(d, n), a(d, n), b(d, n);
        Doubles f(n), product(n), second(n), tangent(n);
        Tensor x64(Dtype::kFloat64, n), one(Dtype::kFloat64, n), d1(Dtype::kFloat64, n),
            d2(Dtype::kFloat64, n);
        for (std::int64_t i = 0; i < n; ++i) x64.set(i, x.get(i)), one.set(i, 1);
        k.activation_vjp(act, 1, x64, one, d1, {}, exec);
        k.activation_vjp(act, 2, x64, one, d2, {}, exec);
        for (std::int64_t i = 0; i < n; ++i) {
          f[i] = value(act, x.get(i));
          product[i] = d1.get(i) * gy.get(i);
          second[i] = d2.get(i) * gy.get(i) * h.get(i);
          tangent[i] = second[i] + d1.get(i) * t.get(i);
        }
        k.activation(act, x, {}, a, {}, exec);
        expect(name, a, f, 4);
        k.activation_vjp(act, 1, x, gy, a, {}, exec);
        expect(name + " vjp", a, product, 4);
        k.activation_jvp(act, x, gy, {}, {}, a, b, {}, exec);
        expect(name + " jvp", a, f, 4);
        expect(name + " jvp", b, product, 4);
        k.activation_vjp_vjp(act, 1, x, gy, h, a, b, {}, exec);
        expect(name + " vjp_vjp", a, second, 8);
        k.activation_vjp_jvp(act, 1, x, gy, h, t, a, b, {}, exec);
        expect(name + " vjp_jvp", a, product, 4);
        expect(name + " vjp_jvp", b, tangent, 8);
      }
    }
  }
}

// Philox4x32-10, a second time and in the plainest words.
std::uint32_t philox_word(std::uint64_t index, std::uint64_t key) {
  std::uint32_t c[4] = {static_cast<std::uint32_t>(index / 4),
                        static_cast<std::uint32_t>(index / 4 >> 32), 0, 0};
  std::uint32_t k[2] = {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p = std::uint64_t{0xD2511F53} * c[0], q = std::uint64_t{0xCD9E8D57} * c[2];
    const std::uint32_t next[4] = {
        static_cast<std::uint32_t>(q >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(q),
        static_cast<std::uint32_t>(p >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(p)};
    std::memcpy(c, next, sizeof(c));
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c[index % 4];
}
Doubles multipliers(const Mask& mask, std::int64_t size) {
  Doubles m(size);
  const std::int64_t per_sample = size / mask.batch;
  const auto threshold = static_cast<std::uint64_t>(std::nearbyint((1 - mask.p) * 0x1p32));
  for (std::int64_t i = 0; i < size; ++i) {
    const auto key = static_cast<std::uint64_t>(mask.seeds[i / per_sample]);
    const bool keep = philox_word(static_cast<std::uint64_t>(i % per_sample), key) < threshold;
    m[i] = keep ? 1 / (1 - mask.p) : 0;
  }
  return m;
}

void check_dropout(const jops::Kernels& k, const Exec& exec) {
  // Random123's known answer for counter 0 and key 0.
  expect("philox", philox_word(0, 0) == 0x6627e8d5 && philox_word(3, 0) == 0x9b00dbd8);
  const std::int64_t seeds[3] = {0, -5, 0x123456789abcdef};
  for (double p : {0.0, 0.3, 1.0}) {
    for (std::int64_t per_sample : {1, 5, 1030, 20011}) {
      const Mask mask{p, seeds, 3};
      const std::int64_t n = 3 * per_sample;
      const Doubles m = multipliers(mask, n);
      for (Dtype d : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}) {
        Tensor x = Tensor::random(d, n), r = Tensor::random(d, n), y(d, n);
        Doubles dropped(n), added(n), relu(n);
        for (std::int64_t i = 0; i < n; ++i) {
          dropped[i] = m[i] * x.get(i);
          added[i] = dropped[i] + r.get(i);
          relu[i] = m[i] * std::max(x.get(i), 0.0);
        }
        k.dropout(x, y, mask, exec);
        expect("dropout", y, dropped, 1);
        k.dropout_add(x, r, y, mask, exec);
        expect("dropout_add", y, added, 2);
        k.activation({Activation::kRelu}, x, {}, y, mask, exec);
        expect("relu with dropout", y, relu, 1);
      }
    }
  }
}

// Calls f(base) with the first index of each row of (outer, n, inner); its elements are `inner`
// apart.
template <class F>
void each_row(const Rows& r, const F& f) {
  for (std::int64_t o = 0; o < r.outer; ++o) {
    for (std::int64_t i = 0; i < r.inner; ++i) f(o * r.n * r.inner + i);
  }
}
double dot(const Rows& r, std::int64_t base, const Doubles& a, const Doubles& b) {
  long double s = 0;
  for (std::int64_t j = 0; j < r.n; ++j) s += a[base + j * r.inner] * b[base + j * r.inner];
  return static_cast<double>(s);
}

void check_softmax(const jops::Kernels& k, const Exec& exec) {
  const std::int64_t seed = 11;
  for (const Rows& r : {Rows{3, 1, 1}, Rows{40, 10, 1}, Rows{2, 3001, 1}, Rows{1, 50, 1030},
                        Rows{2, 37, 5, -1}, Rows{5, 130, 1, -1}}) {
    const std::int64_t n = r.outer * r.n * r.inner;
    const Mask mask{0.4, &seed, 1};
    const Doubles m = multipliers(mask, n), ones(n, 1.0);
    for (Dtype d : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}) {
      Tensor x = Tensor::random(d, n, 2), g = Tensor::random(d, n), h = Tensor::random(d, n),
             t = Tensor::random(d, n), a(d, n), b(d, n), saved(d, n), log_saved(d, n);
      const Doubles X = x.values(), G = g.values(), H = h.values(), T = t.values();
      Doubles y(n), logs(n), p(n), q(n), u(n), v(n), w(n);
      const double s = r.scale;
      each_row(r, [&](std::int64_t base) {
        double top = -INFINITY, sum = 0;
        for (std::int64_t j = 0; j < r.n; ++j) top = std::max(top, s * X[base + j * r.inner]);
        for (std::int64_t j = 0; j < r.n; ++j) sum += std::exp(s * X[base + j * r.inner] - top);
        for (std::int64_t j = 0; j < r.n; ++j) {
          const std::int64_t i = base + j * r.inner;
          logs[i] = s * X[i] - top - std::log(sum);
          y[i] = std::exp(logs[i]);
          saved.set(i, y[i]);
          log_saved.set(i, logs[i]);
        }
      });
      k.softmax(r, x, a, exec);
      expect("softmax", a, y, 4);
      k.log_softmax(r, x, a, exec);
      expect("log_softmax", a, logs, 4);

      // Products of x: JVPs, and those of softmax_dropout.
      each_row(r, [&](std::int64_t base) {
        const double c = dot(r, base, y, T);
        double e = 0;
        for (std::int64_t j = 0; j < r.n; ++j) {
          const std::int64_t i = base + j * r.inner;
          e += y[i] * m[i] * G[i];
        }
        for (std::int64_t j = 0; j < r.n; ++j) {
          const std::int64_t i = base + j * r.inner;
          p[i] = s * y[i] * (T[i] - c);
          q[i] = s * (T[i] - c);
          u[i] = m[i] * y[i];
          v[i] = m[i] * p[i];
          w[i] = s * y[i] * (m[i] * G[i] - e);
        }
      });
      k.softmax_jvp(r, x, t, a, b, exec);
      expect("softmax_jvp y", a, y, 4);
      expect("softmax_jvp", b, p, 8);
      k.log_softmax_jvp(r, x, t, a, b, exec);
      expect("log_softmax_jvp y", a, logs, 4);
      expect("log_softmax_jvp", b, q, 8);
      k.softmax_dropout(r, x, a, mask, exec);
      expect("softmax_dropout", a, u, 4);
      k.softmax_dropout_jvp(r, x, t, a, b, mask, exec);
      expect("softmax_dropout_jvp y", a, u, 4);
      expect("softmax_dropout_jvp", b, v, 8);
      k.softmax_dropout_vjp(r, x, g, a, mask, exec);
      expect("softmax_dropout_vjp", a, w, 8);

      // Products of the saved output, softmax.
      const Doubles Y = saved.values(), L = log_saved.values();
      each_row(r, [&](std::int64_t base) {
        const double yg = dot(r, base, Y, G), yh = dot(r, base, Y, H), yt = dot(r, base, Y, T);
        const double hg = dot(r, base, H, G);
        for (std::int64_t j = 0; j < r.n; ++j) {
          const std::int64_t i = base + j * r.inner;
          p[i] = s * Y[i] * (G[i] - yg);
          q[i] = s * (H[i] * (G[i] - yg) - G[i] * yh);
          u[i] = s * Y[i] * (H[i] - yh);
          v[i] = s * (Y[i] * (T[i] - yt - hg) + H[i] * (G[i] - yg));  // tangents h of y, t of gy
        }
      });
      k.softmax_vjp(r, saved, g, a, exec);
      expect("softmax_vjp", a, p, 8);
      k.softmax_vjp_vjp(r, saved, g, h, a, b, exec);
      expect("softmax_vjp_vjp hy", a, q, 8);
      expect("softmax_vjp_vjp hgy", b, u, 8);
      k.softmax_vjp_jvp(r, saved, g, h, t, a, b, exec);
      expect("softmax_vjp_jvp gx", a, p, 8);
      expect("softmax_vjp_jvp tgx", b, v, 8);

      // The same for log_softmax.
      each_row(r, [&](std::int64_t base) {
        const double g1 = dot(r, base, G, ones), t1 = dot(r, base, T, ones);
        double sh = 0, st = 0;
        for (std::int64_t j = 0; j < r.n; ++j) {
          const std::int64_t i = base + j * r.inner;
          sh += std::exp(L[i]) * H[i];
          st += std::exp(L[i]) * T[i];
        }
        for (std::int64_t j = 0; j < r.n; ++j) {
          const std::int64_t i = base + j * r.inner;
          const double e = std::exp(L[i]);
          p[i] = s * (G[i] - e * g1);
          q[i] = -s * e * H[i] * g1;
          u[i] = s * (H[i] - sh);
          v[i] = s * (T[i] - e * t1 - e * H[i] * g1);
          w[i] = s * (T[i] - st);
        }
      });
      k.log_softmax_vjp(r, log_saved, g, a, exec);
      expect("log_softmax_vjp", a, p, 8);
      k.log_softmax_tangent(r, log_saved, t, a, exec);
      expect("log_softmax_tangent", a, w, 8);
      k.log_softmax_vjp_vjp(r, log_saved, g, h, a, b, exec);
      expect("log_softmax_vjp_vjp hy", a, q, 16);
      expect("log_softmax_vjp_vjp hgy", b, u, 8);
      k.log_softmax_vjp_jvp(r, log_saved, g, h, t, a, b, exec);
      expect("log_softmax_vjp_jvp gx", a, p, 8);
      expect("log_softmax_vjp_jvp tgx", b, v, 16);
    }
  }
}

Matrix matrix(Tensor& t, std::int64_t batch, std::int64_t rows, std::int64_t cols,
              bool transposed = false) {
  return {
      t.bytes.data(),       t.size, t.dtype, batch, rows, cols, rows * cols, transposed ? 1 : cols,
      transposed ? rows : 1};
}

void check_linear(const jops::Kernels& k, const Exec& exec) {
  struct Shape {
    std::int64_t batch, m, n, k;
  };
  const std::int64_t seeds[2] = {3, 4};
  for (const Shape& c : {Shape{1, 1, 1, 1}, Shape{2, 5, 33, 17}, Shape{1, 70, 65, 300},
                         Shape{2, 3, 2, 0}, Shape{1, 200, 130, 70}}) {
    for (bool transposed : {false, true}) {
      for (Dtype d : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}) {
        Tensor x = Tensor::random(d, c.batch * c.m * c.k), w = Tensor::random(d, c.n * c.k),
               bias = Tensor::random(d, c.n), y = Tensor::random(d, c.batch * c.m * c.n),
               r = Tensor::random(d, y.size), z(d, y.size), sums(d, c.batch * c.n);
        const Matrix mx = matrix(x, c.batch, c.m, c.k, transposed);
        const Matrix mw = matrix(w, 1, c.n, c.k, transposed);
        const Matrix my = matrix(y, c.batch, c.m, c.n), mz = matrix(z, c.batch, c.m, c.n);
        Doubles plain(y.size), dropped(y.size), columns(c.batch * c.n, 0.0);
        const Mask mask{0.3, seeds, c.batch};
        const Doubles m = multipliers(mask, y.size);
        for (std::int64_t b = 0, at = 0; b < c.batch; ++b) {
          for (std::int64_t i = 0; i < c.m; ++i) {
            for (std::int64_t j = 0; j < c.n; ++j, ++at) {
              double s = bias.get(j);
              for (std::int64_t l = 0; l < c.k; ++l) {
                s += x.get(b * mx.batch_stride + i * mx.row_stride + l * mx.col_stride) *
                     w.get(j * mw.row_stride + l * mw.col_stride);
              }
              plain[at] = s;
              dropped[at] = m[at] * value({Activation::kGelu}, s) + r.get(at);
            }
          }
        }
        k.linear(mx, mw, bias, my, exec);
        expect("linear", y, plain, 16);
        const Doubles Y = y.values();
        for (std::int64_t i = 0; i < y.size; ++i) columns[i / (c.m * c.n) * c.n + i % c.n] += Y[i];
        k.column_sum(my, sums, exec);
        expect("column_sum", sums, columns, 4);
        k.linear_act_dropout(mx, mw, bias, matrix(r, c.batch, c.m, c.n), my, mz,
                             {Activation::kGelu}, mask, exec);
        expect("linear_act_dropout z", z, plain, 16);
        expect("linear_act_dropout", y, dropped, 16);

        const Act gelu{Activation::kGelu};
        Tensor gz(d, y.size), gx(d, x.size), gx_apart(d, x.size), sums_apart(d, sums.size);
        const Matrix to_x = matrix(gx, c.batch, c.m, c.k);
        const Matrix to_x_apart = matrix(gx_apart, c.batch, c.m, c.k);
        k.linear_act_dropout_vjp({}, mw, z, my, to_x, {}, sums, gelu, mask, exec);
        k.activation_vjp_sum(gelu, {c.batch, c.m, c.n}, z, y, gz, sums_apart, mask, exec);
        k.linear_vjp({}, mw, matrix(gz, c.batch, c.m, c.n), to_x_apart, {}, {}, exec);
        expect("linear_act_dropout_vjp", gx, gx_apart.values(), 0);
        expect("linear_act_dropout_vjp sums", sums, sums_apart.values(), 0);
      }
    }
  }
}

void check_errors(const jops::Kernels& k, const Exec& exec) {
  Tensor x(Dtype::kFloat32, 6), y(Dtype::kFloat32, 5);
  const auto raises = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  expect("sizes", raises([&] { k.dropout(x, y, {}, exec); }));
  expect("null", raises([&] { k.dropout(x, Buffer{nullptr, 6}, {}, exec); }));
  expect("rows", raises([&] { k.softmax({2, 2, 1}, x, x, exec); }));
  expect("strides", raises([&] {
           Matrix m = matrix(x, 1, 2, 3);
           m.row_stride = 4;
           k.column_sum(m, x, exec);
         }));
}

}  // namespace

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // what failed is seen even if a later check crashes
  try {
    jops::kernels();
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 77;
  }
  if (count > 1 && jops::isa() != arguments[1]) return 77;
  for (int threads : {1, 3}) {
    const Exec exec{threads};
    check_activations(jops::kernels(), exec);
    check_dropout(jops::kernels(), exec);
    check_softmax(jops::kernels(), exec);
    check_linear(jops::kernels(), exec);
    check_errors(jops::kernels(), exec);
  }
  std::printf("%s: %s\n", jops::isa().c_str(), failures ? "failed" : "all checks passed");
  return failures != 0;
}
