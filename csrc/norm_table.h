// The norms' entries of the kernel table, the same for every backend. What differs is how a backend
// runs one of the rows of math/norm.h:
//   struct Launch {
//     template <class Row, bool kCentred>
//     static void run(double eps, const Rows&, const Buffer (&in)[Row::kIn],
//                     const Buffer (&of_column)[kNormColumns], const Buffer (&out)[Row::kOut],
//                     const Buffer& sums, const Buffer& added, const Buffer& sum, const Exec&);
//   };
// Inputs but the first one, and what belongs to a column, may be absent: 0, or 1 for the weight.
// `added` is the operand of Row::kAdded, or absent; `sum` is written where that is added to x.
#pragma once

#include "kernels.h"
#include "math/norm.h"

namespace jops::JOPS_ISA {

template <class Launch>
struct NormTable {
  static void put(Kernels& table) {
    table.norm = norm;
    table.norm_jvp = norm_jvp;
    table.norm_vjp = norm_vjp;
    table.norm_vjp_jvp = norm_vjp_jvp;
  }

 private:
  template <class Row>
  static void run(const Norm& norm, const Rows& rows, const Buffer (&in)[Row::kIn],
                  const Buffer (&of_column)[kNormColumns], const Buffer (&out)[Row::kOut],
                  const Buffer& sums, const Buffer& added, const Buffer& sum, const Exec& exec) {
    if (norm.centred)
      Launch::template run<Row, true>(norm.eps, rows, in, of_column, out, sums, added, sum, exec);
    else
      Launch::template run<Row, false>(norm.eps, rows, in, of_column, out, sums, added, sum, exec);
  }
  static void norm(const Norm& norm, const Rows& rows, const Buffer& x, const Buffer& residual,
                   const Buffer& weight, const Buffer& bias, const Buffer& y, const Buffer& sum,
                   const Exec& exec) {
    run<NormRow>(norm, rows, {x}, {weight, bias, {}, {}}, {y}, {}, residual, sum, exec);
  }
  static void norm_jvp(const Norm& norm, const Rows& rows, const Buffer& x, const Buffer& weight,
                       const Buffer& bias, const Buffer& tx, const Buffer& tweight,
                       const Buffer& tbias, const Buffer& y, const Buffer& ty, const Exec& exec) {
    run<NormJvpRow>(norm, rows, {x, tx}, {weight, bias, tweight, tbias}, {y, ty}, {}, {}, {}, exec);
  }
  static void norm_vjp(const Norm& norm, const Rows& rows, const Buffer& x, const Buffer& weight,
                       const Buffer& gy, const Buffer& gsum, const Buffer& gx, const Buffer& sums,
                       const Exec& exec) {
    run<NormVjpRow>(norm, rows, {x, gy}, {weight, {}, {}, {}}, {gx}, sums, gsum, {}, exec);
  }
  static void norm_vjp_jvp(const Norm& norm, const Rows& rows, const Buffer& x,
                           const Buffer& weight, const Buffer& gy, const Buffer& tx,
                           const Buffer& tweight, const Buffer& tgy, const Buffer& gx,
                           const Buffer& tgx, const Buffer& sums, const Exec& exec) {
    run<NormVjpJvpRow>(norm, rows, {x, gy, tx, tgy}, {weight, {}, tweight, {}}, {gx, tgx}, sums, {},
                       {}, exec);
  }
};

}  // namespace jops::JOPS_ISA
