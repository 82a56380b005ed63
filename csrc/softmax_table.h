// The softmax family's entries of the kernel table, the same for every backend. What differs is how
// a backend runs one of the rows of math/softmax.h:
//   struct Launch {
//     template <class Row, bool kMasked = false>
//     static void run(const Rows&, const Buffer (&in)[Row::kIn], const Buffer (&out)[Row::kOut],
//                     const Exec&, const Mask& = {});
//   };
#pragma once

#include "kernels.h"
#include "math/softmax.h"

namespace jops::JOPS_ISA {

template <class Launch>
struct SoftmaxTable {
  static void softmax(Kernels& table) {
    table.softmax = one_to_one<SoftmaxRow>;
    table.softmax_vjp = two_to_one<SoftmaxVjpRow>;
    table.softmax_jvp = two_to_two<SoftmaxJvpRow>;
    table.softmax_vjp_vjp = three_to_two<SoftmaxVjpVjpRow>;
    table.softmax_vjp_jvp = vjp_jvp<SoftmaxVjpRow, SoftmaxVjpJvpRow>;
  }
  static void log_softmax(Kernels& table) {
    table.log_softmax = one_to_one<LogSoftmaxRow>;
    table.log_softmax_vjp = two_to_one<LogSoftmaxVjpRow>;
    table.log_softmax_tangent = two_to_one<LogSoftmaxTangentRow>;
    table.log_softmax_jvp = two_to_two<LogSoftmaxJvpRow>;
    table.log_softmax_vjp_vjp = three_to_two<LogSoftmaxVjpVjpRow>;
    table.log_softmax_vjp_jvp = vjp_jvp<LogSoftmaxVjpRow, LogSoftmaxVjpJvpRow>;
  }
  static void softmax_dropout(Kernels& table) {
    table.softmax_dropout = masked_one_to_one<SoftmaxRow>;
    table.softmax_dropout_vjp = masked_two_to_one<SoftmaxDropoutVjpRow>;
    table.softmax_dropout_jvp = masked_two_to_two<SoftmaxJvpRow>;
  }

 private:
  // By the numbers of inputs and outputs.
  template <class Row>
  static void one_to_one(const Rows& rows, const Buffer& a, const Buffer& y, const Exec& exec) {
    Launch::template run<Row>(rows, {a}, {y}, exec);
  }
  template <class Row>
  static void two_to_one(const Rows& rows, const Buffer& a, const Buffer& b, const Buffer& y,
                         const Exec& exec) {
    Launch::template run<Row>(rows, {a, b}, {y}, exec);
  }
  template <class Row>
  static void two_to_two(const Rows& rows, const Buffer& a, const Buffer& b, const Buffer& y,
                         const Buffer& z, const Exec& exec) {
    Launch::template run<Row>(rows, {a, b}, {y, z}, exec);
  }
  template <class Row>
  static void three_to_two(const Rows& rows, const Buffer& a, const Buffer& b, const Buffer& c,
                           const Buffer& y, const Buffer& z, const Exec& exec) {
    Launch::template run<Row>(rows, {a, b, c}, {y, z}, exec);
  }
  template <class Row>
  static void masked_one_to_one(const Rows& rows, const Buffer& a, const Buffer& y,
                                const Mask& mask, const Exec& exec) {
    Launch::template run<Row, true>(rows, {a}, {y}, exec, mask);
  }
  template <class Row>
  static void masked_two_to_one(const Rows& rows, const Buffer& a, const Buffer& b, const Buffer& y,
                                const Mask& mask, const Exec& exec) {
    Launch::template run<Row, true>(rows, {a, b}, {y}, exec, mask);
  }
  template <class Row>
  static void masked_two_to_two(const Rows& rows, const Buffer& a, const Buffer& b, const Buffer& y,
                                const Buffer& z, const Mask& mask, const Exec& exec) {
    Launch::template run<Row, true>(rows, {a, b}, {y, z}, exec, mask);
  }
  // The tangents that are given decide what runs. Without ty the two results are VJPs of one point:
  // rare, and not worth a kernel of its own that reads y once.
  template <class Vjp, class Row>
  static void vjp_jvp(const Rows& rows, const Buffer& y, const Buffer& gy, const Buffer& ty,
                      const Buffer& tgy, const Buffer& gx, const Buffer& tgx, const Exec& exec) {
    if (!ty.given()) {
      two_to_one<Vjp>(rows, y, gy, gx, exec);
      two_to_one<Vjp>(rows, y, tgy, tgx, exec);
    } else {
      Launch::template run<Row>(rows, {y, gy, ty, tgy}, {gx, tgx}, exec);
    }
  }
};

}  // namespace jops::JOPS_ISA
