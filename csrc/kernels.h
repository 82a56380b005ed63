// The interface of the core: plain structs and one table of functions. No framework is known here.
// Every kernel writes into memory that the caller allocated; all tensors of a call share a dtype.
// Where there is nothing to read, nothing is written, not even a sum over nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jops {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };

constexpr std::int64_t size_of(Dtype d) {
  return d == Dtype::kFloat64 ? 8 : d == Dtype::kFloat32 ? 4 : 2;
}

// Contiguous elements. An absent optional argument has size -1.
struct Buffer {
  void* data = nullptr;
  std::int64_t size = -1;
  Dtype dtype = Dtype::kFloat32;
  bool given() const { return size >= 0; }
};

// batch x rows x cols, strides in elements and not negative; `extent` elements are reachable from
// data.
struct Matrix {
  void* data = nullptr;
  std::int64_t extent = -1;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t batch = 0, rows = 0, cols = 0;
  std::int64_t batch_stride = 0, row_stride = 0, col_stride = 0;
  bool given() const { return extent >= 0; }
  Matrix transposed() const {
    return {data, extent, dtype, batch, cols, rows, batch_stride, col_stride, row_stride};
  }
};

// Names: activation_name(). Parameters a, b, c: math/activations.h.
enum class Activation : int {
  kIdentity,
  kRelu,
  kLeakyRelu,
  kElu,
  kHardtanh,
  kSigmoid,
  kTanh,
  kGelu,
  kGeluTanh,
  kSilu,
  kSoftplus,
  kMish,
  kHardswish,
  kHardsigmoid,
  kLogsigmoid,
  kSigmoidY,
  kTanhY,
  kCount
};
struct Act {
  Activation code = Activation::kIdentity;
  double a = 0, b = 0, c = 0;
};

// Dropout multipliers m in {0, 1/(1-p)}: sample s of `batch` has the Philox key seeds[s], and its
// elements are numbered row-major from 0. Without seeds (p == 0, or None) there is no dropout.
struct Mask {
  double p = 0;
  const std::int64_t* seeds = nullptr;
  std::int64_t batch = 0;
  bool given() const { return batch > 0; }
};

// A contiguous (outer, n, inner) buffer; softmax over n of scale * x.
struct Rows {
  std::int64_t outer = 0, n = 0, inner = 0;
  double scale = 1;
};

// layer_norm (centred) or rms_norm of contiguous rows.
struct Norm {
  double eps = 0;
  bool centred = true;
};

// What cross_entropy wants of rows of n logits: a class of each row, in [0, n), or probabilities of
// the shape of the logits. A row whose class is ignore_index counts for nothing; on a device, where
// no one looks before the kernel does, any other class outside the range makes NaN of its row.
// weight (n) and what belongs to a row (losses, cotangents) are float64, or float32 for the others.
struct Target {
  const std::int64_t* classes = nullptr;
  std::int64_t rows = -1;  // as many as classes; -1 without
  Buffer probabilities;
  Buffer weight;  // of classes, or absent
  std::int64_t ignore_index = -100;
  double smoothing = 0;
};

// A contiguous (outer, channels, inner) buffer in groups that are normalized each by itself:
// `groups` of adjacent channels in each sample (group_norm), or with 0 a channel of all samples
// (batch_norm).
struct Groups {
  std::int64_t outer = 0, channels = 0, inner = 0, groups = 0;
  double eps = 0;
  bool fixed = false;  // by statistics that are given
};

// (batch, heads, rows, width), strides in elements and not negative; `extent` elements are
// reachable from data. What masks scores is (batch, heads, queries, keys).
struct Heads {
  void* data = nullptr;
  std::int64_t extent = -1;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t batch = 0, heads = 0, rows = 0, width = 0;
  std::int64_t batch_stride = 0, head_stride = 0, row_stride = 0, col_stride = 0;
  bool given() const { return extent >= 0; }
};

// Attention's scores: scale q k^T + bias, and -inf where `keep` is false or, if causal, where the
// key comes after the query. `keep` holds bytes; both may be absent.
struct Scores {
  double scale = 1;
  bool causal = false;
  Heads keep, bias;
};

// Vectors of n contiguous elements at the points of a grid, strides in elements and not negative (0
// broadcasts); `extent` elements are reachable from data.
struct Grid {
  void* data = nullptr;
  std::int64_t extent = -1;
  Dtype dtype = Dtype::kFloat32;
  std::int64_t n = 0;
  std::int64_t sizes[3] = {}, strides[3] = {};
};

// Which elements of a vector are a pair: neighbours, or those at equal places of its halves; and
// whether angles are negated.
struct Rotation {
  bool interleaved = false, inverse = false;
};

// How to run: the number of threads of the CPU; on a device its stream and, for sums over rows,
// memory of at least sum_workspace() bytes to put partial sums into.
struct Exec {
  int threads = 1;
  std::intptr_t stream = 0;
  void* workspace = nullptr;
  std::int64_t workspace_bytes = 0;
};

// The kernels of a device or of an instruction set. The formulas are in math/.
struct Kernels {
  // y = residual + m f(x), the residual and its tangent may be absent.
  void (*activation)(const Act&, const Buffer& x, const Buffer& residual, const Buffer& y,
                     const Mask&, const Exec&);
  void (*activation_vjp)(const Act&, int order, const Buffer& x, const Buffer& gy, const Buffer& gx,
                         const Mask&, const Exec&);
  void (*activation_jvp)(const Act&, const Buffer& x, const Buffer& tx, const Buffer& residual,
                         const Buffer& tresidual, const Buffer& y, const Buffer& ty, const Mask&,
                         const Exec&);
  void (*activation_vjp_vjp)(const Act&, int order, const Buffer& x, const Buffer& gy,
                             const Buffer& h, const Buffer& hx, const Buffer& hgy, const Mask&,
                             const Exec&);
  void (*activation_vjp_jvp)(const Act&, int order, const Buffer& x, const Buffer& gy,
                             const Buffer& tx, const Buffer& tgy, const Buffer& gx,
                             const Buffer& tgx, const Mask&, const Exec&);

  // activation_vjp of a contiguous (outer, n, inner) buffer, and the sums of gx over n: the bias
  // gradient of a linear layer beneath it.
  void (*activation_vjp_sum)(const Act&, const Rows&, const Buffer& x, const Buffer& gy,
                             const Buffer& gx, const Buffer& sum, const Mask&, const Exec&);

  // y = f(gate) up for the f of a gate (math/products.h), all of one shape with contiguous rows.
  // What a product is taken along (tangents, and cotangents in second derivatives) may be absent.
  void (*gated)(const Act&, const Matrix& gate, const Matrix& up, const Matrix& y, const Exec&);
  void (*gated_jvp)(const Act&, const Matrix& gate, const Matrix& up, const Matrix& tgate,
                    const Matrix& tup, const Matrix& y, const Matrix& ty, const Exec&);
  void (*gated_vjp)(const Act&, const Matrix& gate, const Matrix& up, const Matrix& gy,
                    const Matrix& ggate, const Matrix& gup, const Exec&);
  void (*gated_vjp_vjp)(const Act&, const Matrix& gate, const Matrix& up, const Matrix& gy,
                        const Matrix& hggate, const Matrix& hgup, const Matrix& hgate,
                        const Matrix& hup, const Matrix& hgy, const Exec&);
  void (*gated_vjp_jvp)(const Act&, const Matrix& gate, const Matrix& up, const Matrix& gy,
                        const Matrix& tgate, const Matrix& tup, const Matrix& tgy,
                        const Matrix& ggate, const Matrix& gup, const Matrix& tggate,
                        const Matrix& tgup, const Exec&);

  void (*dropout)(const Buffer& x, const Buffer& y, const Mask&, const Exec&);
  void (*dropout_add)(const Buffer& x, const Buffer& residual, const Buffer& y, const Mask&,
                      const Exec&);

  void (*softmax)(const Rows&, const Buffer& x, const Buffer& y, const Exec&);
  void (*softmax_vjp)(const Rows&, const Buffer& y, const Buffer& gy, const Buffer& gx,
                      const Exec&);
  void (*softmax_jvp)(const Rows&, const Buffer& x, const Buffer& tx, const Buffer& y,
                      const Buffer& ty, const Exec&);
  void (*softmax_vjp_vjp)(const Rows&, const Buffer& y, const Buffer& gy, const Buffer& h,
                          const Buffer& hy, const Buffer& hgy, const Exec&);
  void (*softmax_vjp_jvp)(const Rows&, const Buffer& y, const Buffer& gy, const Buffer& ty,
                          const Buffer& tgy, const Buffer& gx, const Buffer& tgx, const Exec&);
  void (*log_softmax)(const Rows&, const Buffer& x, const Buffer& y, const Exec&);
  void (*log_softmax_vjp)(const Rows&, const Buffer& y, const Buffer& gy, const Buffer& gx,
                          const Exec&);
  void (*log_softmax_tangent)(const Rows&, const Buffer& y, const Buffer& tx, const Buffer& ty,
                              const Exec&);
  void (*log_softmax_jvp)(const Rows&, const Buffer& x, const Buffer& tx, const Buffer& y,
                          const Buffer& ty, const Exec&);
  void (*log_softmax_vjp_vjp)(const Rows&, const Buffer& y, const Buffer& gy, const Buffer& h,
                              const Buffer& hy, const Buffer& hgy, const Exec&);
  void (*log_softmax_vjp_jvp)(const Rows&, const Buffer& y, const Buffer& gy, const Buffer& ty,
                              const Buffer& tgy, const Buffer& gx, const Buffer& tgx, const Exec&);
  void (*softmax_dropout)(const Rows&, const Buffer& x, const Buffer& y, const Mask&, const Exec&);
  void (*softmax_dropout_vjp)(const Rows&, const Buffer& x, const Buffer& gy, const Buffer& gx,
                              const Mask&, const Exec&);
  void (*softmax_dropout_jvp)(const Rows&, const Buffer& x, const Buffer& tx, const Buffer& y,
                              const Buffer& ty, const Mask&, const Exec&);

  // With Rows of inner 1. weight, bias and their tangents are (n); any of them may be absent, and
  // tx or tgy. sums: (2, n) the gradients of weight and bias; (4, n) also their tangents.
  // With a residual, sum = x + residual is normalized; gsum is added to gx.
  void (*norm)(const Norm&, const Rows&, const Buffer& x, const Buffer& residual,
               const Buffer& weight, const Buffer& bias, const Buffer& y, const Buffer& sum,
               const Exec&);
  void (*norm_jvp)(const Norm&, const Rows&, const Buffer& x, const Buffer& weight,
                   const Buffer& bias, const Buffer& tx, const Buffer& tweight, const Buffer& tbias,
                   const Buffer& y, const Buffer& ty, const Exec&);
  void (*norm_vjp)(const Norm&, const Rows&, const Buffer& x, const Buffer& weight,
                   const Buffer& gy, const Buffer& gsum, const Buffer& gx, const Buffer& sums,
                   const Exec&);
  void (*norm_vjp_jvp)(const Norm&, const Rows&, const Buffer& x, const Buffer& weight,
                       const Buffer& gy, const Buffer& tx, const Buffer& tweight, const Buffer& tgy,
                       const Buffer& gx, const Buffer& tgx, const Buffer& sums, const Exec&);

  // weight, bias and their tangents belong to channels; any of them may be absent, and tx or tgy.
  // sums: (2, channels) the gradients of weight and bias; (4, channels) also their tangents. stats,
  // of batch_norm only and of the type that its numbers are computed in: (2, channels) mean and
  // variance, which are given where they are fixed; else group_norm puts them there, the variance
  // unbiased, unless stats is absent.
  void (*group_norm)(const Groups&, const Buffer& x, const Buffer& weight, const Buffer& bias,
                     const Buffer& stats, const Buffer& y, const Exec&);
  void (*group_norm_jvp)(const Groups&, const Buffer& x, const Buffer& weight, const Buffer& bias,
                         const Buffer& tx, const Buffer& tweight, const Buffer& tbias,
                         const Buffer& stats, const Buffer& y, const Buffer& ty, const Exec&);
  void (*group_norm_vjp)(const Groups&, const Buffer& x, const Buffer& weight, const Buffer& gy,
                         const Buffer& stats, const Buffer& gx, const Buffer& sums, const Exec&);
  void (*group_norm_vjp_jvp)(const Groups&, const Buffer& x, const Buffer& weight, const Buffer& gy,
                             const Buffer& tx, const Buffer& tweight, const Buffer& tgy,
                             const Buffer& stats, const Buffer& gx, const Buffer& tgx,
                             const Buffer& sums, const Exec&);
  // Bytes of workspace that they need on a device, with so many sums over each channel: none, 2 of
  // the VJP or 4 of its JVP.
  std::int64_t (*group_norm_workspace)(const Groups&, int sums);

  // o = dropout(softmax(scores)) v; a row whose scores are all -inf gives 0. Each head of k and v
  // serves heads(q) / heads(k) adjacent ones of q. lse, mu, delta: numbers of the type that is
  // computed in, (batch, heads, queries). lse is the logarithm of the sum of a row's exponentials,
  // +inf where there are none, and mu its tangent; delta is scratch, (2, ...) with tangents. Any
  // tangent and any gradient may be absent; those of k and v are summed over a group's heads.
  void (*attention)(const Scores&, const Heads& q, const Heads& k, const Heads& v, const Heads& o,
                    const Buffer& lse, const Mask&, const Exec&);
  void (*attention_jvp)(const Scores&, const Heads& q, const Heads& k, const Heads& v,
                        const Heads& tq, const Heads& tk, const Heads& tv, const Heads& tbias,
                        const Heads& o, const Heads& to, const Buffer& lse, const Buffer& mu,
                        const Mask&, const Exec&);
  void (*attention_vjp)(const Scores&, const Heads& q, const Heads& k, const Heads& v,
                        const Heads& o, const Heads& go, const Buffer& lse, const Buffer& delta,
                        const Heads& gq, const Heads& gk, const Heads& gv, const Mask&,
                        const Exec&);
  // The same and its tangent.
  void (*attention_vjp_jvp)(const Scores&, const Heads& q, const Heads& k, const Heads& v,
                            const Heads& tq, const Heads& tk, const Heads& tv, const Heads& tbias,
                            const Heads& o, const Heads& to, const Heads& go, const Heads& tgo,
                            const Buffer& lse, const Buffer& mu, const Buffer& delta,
                            const Heads& gq, const Heads& gk, const Heads& gv, const Heads& tgq,
                            const Heads& tgk, const Heads& tgv, const Mask&, const Exec&);

  // y = x with its first 2 cos.n elements rotated in pairs (math/rotary.h); all of x's sizes.
  void (*rotary)(const Rotation&, const Grid& x, const Grid& cos, const Grid& sin, const Grid& y,
                 const Exec&);

  void (*linear)(const Matrix& x, const Matrix& w, const Buffer& bias, const Matrix& y,
                 const Exec&);
  void (*linear_act_dropout)(const Matrix& x, const Matrix& w, const Buffer& bias,
                             const Matrix& residual, const Matrix& y, const Matrix& z, const Act&,
                             const Mask&, const Exec&);
  // With the tangents of x, w, bias and residual, any of which may be absent.
  void (*linear_act_dropout_jvp)(const Matrix& x, const Matrix& w, const Buffer& bias,
                                 const Matrix& residual, const Matrix& tx, const Matrix& tw,
                                 const Buffer& tbias, const Matrix& tresidual, const Matrix& y,
                                 const Matrix& ty, const Matrix& z, const Act&, const Mask&,
                                 const Exec&);
  // linear_vjp of gz = m f'(s) gy, for s and gy contiguous. Without s, f must be the identity.
  void (*linear_act_dropout_vjp)(const Matrix& x, const Matrix& w, const Buffer& s,
                                 const Matrix& gy, const Matrix& gx, const Matrix& gw,
                                 const Buffer& gbias, const Act&, const Mask&, const Exec&);
  // gx = gy w, gw = gy^T x, gbias = the column sum of gy: any may be absent, and what it needs too.
  void (*linear_vjp)(const Matrix& x, const Matrix& w, const Matrix& gy, const Matrix& gx,
                     const Matrix& gw, const Buffer& gbias, const Exec&);
  void (*column_sum)(const Matrix& x, const Buffer& y, const Exec&);
  // Bytes of workspace that activation_vjp_sum, column_sum, linear_vjp with a gbias, and norms with
  // sums (outer is their first extent) need for sums over n of (outer, n, inner) elements.
  std::int64_t (*sum_workspace)(const Rows&);

  // The processor's limits, that a bench compares with: flop/s of multiply-adds in registers, and
  // bytes/s, read and written, of a copy of `bytes` bytes with plain or with non-temporal stores.
  double (*fma_peak)(Dtype, const Exec&);
  double (*copy_bandwidth)(std::int64_t bytes, bool non_temporal, const Exec&);

  // Rows of outer x inner columns of n logits, scale 1. gx may be x.
  void (*cross_entropy)(const Rows&, const Target&, const Buffer& x, const Buffer& loss,
                        const Exec&);
  void (*cross_entropy_jvp)(const Rows&, const Target&, const Buffer& x, const Buffer& tx,
                            const Buffer& loss, const Buffer& tloss, const Exec&);
  void (*cross_entropy_vjp)(const Rows&, const Target&, const Buffer& x, const Buffer& g,
                            const Buffer& gx, const Exec&);
  // tg may be absent; gx may be x, and tgx tx.
  void (*cross_entropy_vjp_jvp)(const Rows&, const Target&, const Buffer& x, const Buffer& g,
                                const Buffer& tx, const Buffer& tg, const Buffer& gx,
                                const Buffer& tgx, const Exec&);
};

}  // namespace jops
