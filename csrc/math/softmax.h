// Softmax and log_softmax of rows: the formulas, as sums over a row followed by a map over it.
//
// Each struct says what a product needs: kIn inputs and kOut outputs; whether in[0] are logits, so
// that a maximum comes first, or the saved output; the sums (`add` one element, `finish` them once
// a row); and the outputs (`emit`); whether both take e, and `emit` takes in[0] for nothing else,
// so that a kernel may keep e in its place (kExpReplacesInput); kMayLack: an input that may be
// null, for zeros. Everywhere d is log-like: scale * x
// - max of a logit, y itself for a saved log_softmax; e = e^d; m is the dropout multiplier (1
// without; kMaskInSums: the sums take it too). Generic over scalars and vectors. scale:
// softmax(scale * x), -1 is softmin.
#pragma once

#include "functions.h"

namespace jops::JOPS_ISA {

struct SoftmaxRow {  // x -> y
  static constexpr int kIn = 1, kOut = 1, kSums = 1, kMayLack = -1;
  static constexpr bool kLogits = true, kMaskInSums = false;
  static constexpr bool kExpReplacesInput = true;
  template <class V>
  static JOPS_HD void add(const V*, V e, V, V* sum) {
    sum[0] += e;
  }
  template <class V>
  static JOPS_HD void finish(V* sum) {
    sum[0] = V(1) / sum[0];
  }
  template <class V>
  static JOPS_HD void emit(const V*, V, V e, V m, const V* sum, V, V* out) {
    out[0] = m * (e * sum[0]);
  }
};

struct SoftmaxJvpRow {  // x, tx -> y, ty = scale y (tx - <y, tx>), both times m
  static constexpr int kIn = 2, kOut = 2, kSums = 2, kMayLack = -1;
  static constexpr bool kLogits = true, kMaskInSums = false;
  static constexpr bool kExpReplacesInput = true;
  template <class V>
  static JOPS_HD void add(const V* in, V e, V, V* sum) {
    sum[0] += e;
    sum[1] = fma(e, in[1], sum[1]);
  }
  template <class V>
  static JOPS_HD void finish(V* sum) {
    sum[0] = V(1) / sum[0];
    sum[1] *= sum[0];
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V e, V m, const V* sum, V scale, V* out) {
    out[0] = m * (e * sum[0]);
    out[1] = scale * out[0] * (in[1] - sum[1]);
  }
};

struct SoftmaxDropoutVjpRow {  // x, gy -> gx = scale y (m gy - <y, m gy>), y recomputed from x
  static constexpr int kIn = 2, kOut = 1, kSums = 2, kMayLack = -1;
  static constexpr bool kLogits = true, kMaskInSums = true;
  static constexpr bool kExpReplacesInput = true;
  template <class V>
  static JOPS_HD void add(const V* in, V e, V m, V* sum) {
    sum[0] += e;
    sum[1] = fma(e, m * in[1], sum[1]);
  }
  template <class V>
  static JOPS_HD void finish(V* sum) {
    SoftmaxJvpRow::finish(sum);
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V e, V m, const V* sum, V scale, V* out) {
    out[0] = scale * (e * sum[0]) * (m * in[1] - sum[1]);
  }
};

// Products of a saved output: nothing to do between the sums and the map.
struct FromOutput {
  static constexpr bool kLogits = false, kMaskInSums = false, kExpReplacesInput = false;
  static constexpr int kMayLack = -1;
  template <class V>
  static JOPS_HD void finish(V*) {}
};

struct SoftmaxVjpRow : FromOutput {  // y, gy -> gx = scale y (gy - <y, gy>)
  static constexpr int kIn = 2, kOut = 1, kSums = 1;
  template <class V>
  static JOPS_HD void add(const V* in, V, V, V* sum) {
    sum[0] = fma(in[0], in[1], sum[0]);
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V, V, const V* sum, V scale, V* out) {
    out[0] = scale * in[0] * (in[1] - sum[0]);
  }
};

// y, gy, h -> hy = scale (h (gy - <y, gy>) - gy <y, h>), hgy = scale y (h - <y, h>)
struct SoftmaxVjpVjpRow : FromOutput {
  static constexpr int kIn = 3, kOut = 2, kSums = 2;
  template <class V>
  static JOPS_HD void add(const V* in, V, V, V* sum) {
    sum[0] = fma(in[0], in[1], sum[0]);
    sum[1] = fma(in[0], in[2], sum[1]);
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V, V, const V* sum, V scale, V* out) {
    out[0] = scale * (in[2] * (in[1] - sum[0]) - in[1] * sum[1]);
    out[1] = scale * in[0] * (in[2] - sum[1]);
  }
};

// y, gy, ty, tgy -> gx as the VJP, tgx = scale (y (tgy - b) + ty (gy - <y, gy>)), b = <y, tgy>
// + <ty, gy>
struct SoftmaxVjpJvpRow : FromOutput {
  static constexpr int kIn = 4, kOut = 2, kSums = 2, kMayLack = 3;
  template <class V>
  static JOPS_HD void add(const V* in, V, V, V* sum) {
    sum[0] = fma(in[0], in[1], sum[0]);
    sum[1] = fma(in[0], in[3], sum[1]);
    sum[1] = fma(in[2], in[1], sum[1]);
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V, V, const V* sum, V scale, V* out) {
    const V centred = in[1] - sum[0];
    out[0] = scale * in[0] * centred;
    out[1] = scale * fma(in[2], centred, in[0] * (in[3] - sum[1]));
  }
};

struct LogSoftmaxRow {  // x -> y = x - logsumexp(x)
  static constexpr int kIn = 1, kOut = 1, kSums = 1, kMayLack = -1;
  static constexpr bool kLogits = true, kMaskInSums = false;
  static constexpr bool kExpReplacesInput = false;
  template <class V>
  static JOPS_HD void add(const V*, V e, V, V* sum) {
    sum[0] += e;
  }
  template <class V>
  static JOPS_HD void finish(V* sum) {
    sum[0] = log(sum[0]);
  }
  template <class V>
  static JOPS_HD void emit(const V*, V d, V, V, const V* sum, V, V* out) {
    out[0] = d - sum[0];
  }
};

struct LogSoftmaxJvpRow {  // x, tx -> y, ty = scale (tx - <softmax, tx>)
  static constexpr int kIn = 2, kOut = 2, kSums = 2, kMayLack = -1;
  static constexpr bool kLogits = true, kMaskInSums = false;
  static constexpr bool kExpReplacesInput = false;
  template <class V>
  static JOPS_HD void add(const V* in, V e, V m, V* sum) {
    SoftmaxJvpRow::add(in, e, m, sum);
  }
  template <class V>
  static JOPS_HD void finish(V* sum) {
    sum[1] = sum[1] / sum[0];
    sum[0] = log(sum[0]);
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V d, V, V, const V* sum, V scale, V* out) {
    out[0] = d - sum[0];
    out[1] = scale * (in[1] - sum[1]);
  }
};

// With s = e^y:

struct LogSoftmaxVjpRow : FromOutput {  // y, gy -> gx = scale (gy - s sum(gy))
  static constexpr int kIn = 2, kOut = 1, kSums = 1;
  template <class V>
  static JOPS_HD void add(const V* in, V, V, V* sum) {
    sum[0] += in[1];
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V e, V, const V* sum, V scale, V* out) {
    out[0] = scale * (in[1] - e * sum[0]);
  }
};

struct LogSoftmaxTangentRow : FromOutput {  // y, tx -> ty = scale (tx - <s, tx>)
  static constexpr int kIn = 2, kOut = 1, kSums = 1;
  template <class V>
  static JOPS_HD void add(const V* in, V e, V, V* sum) {
    sum[0] = fma(e, in[1], sum[0]);
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V, V, const V* sum, V scale, V* out) {
    out[0] = scale * (in[1] - sum[0]);
  }
};

// y, gy, h -> hy = -scale s h sum(gy), hgy = scale (h - <s, h>)
struct LogSoftmaxVjpVjpRow : FromOutput {
  static constexpr int kIn = 3, kOut = 2, kSums = 2;
  static constexpr bool kExpReplacesInput = true;
  template <class V>
  static JOPS_HD void add(const V* in, V e, V, V* sum) {
    sum[0] += in[1];
    sum[1] = fma(e, in[2], sum[1]);
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V e, V, const V* sum, V scale, V* out) {
    out[0] = -scale * e * in[2] * sum[0];
    out[1] = scale * (in[2] - sum[1]);
  }
};

// y, gy, ty, tgy -> gx as the VJP, tgx = scale (tgy - s (sum(tgy) + ty sum(gy)))
struct LogSoftmaxVjpJvpRow : FromOutput {
  static constexpr int kIn = 4, kOut = 2, kSums = 2, kMayLack = 3;
  template <class V>
  static JOPS_HD void add(const V* in, V, V, V* sum) {
    sum[0] += in[1];
    sum[1] += in[3];
  }
  template <class V>
  static JOPS_HD void emit(const V* in, V, V e, V, const V* sum, V scale, V* out) {
    out[0] = scale * (in[1] - e * sum[0]);
    out[1] = scale * (in[3] - e * sum[1] - e * in[2] * sum[0]);
  }
};

}  // namespace jops::JOPS_ISA
