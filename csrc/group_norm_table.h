// The entries of group_norm and batch_norm in the kernel table, the same for every backend. What
// differs is how a backend runs one of the rows of math/norm.h over groups:
//   struct Launch {
//     template <class Row>
//     static void run(const Groups&, const Buffer (&in)[Row::kIn],
//                     const Buffer (&of_channel)[kNormColumns], const Buffer& stats,
//                     const Buffer (&out)[Row::kOut], const Buffer& sums, const Exec&);
//   };
// Inputs but the first one, and what belongs to a channel, may be absent: 0, or 1 for the weight.
// With fixed statistics the means of everything are 0 but that of x, and P(q) = q: the same rows
// are then the derivatives of w (x - mean) r + b at a constant mean and r.
#pragma once

#include "kernels.h"
#include "math/norm.h"

namespace jops::JOPS_ISA {

template <class Launch>
struct GroupNormTable {
  static void put(Kernels& table) {
    table.group_norm = group_norm;
    table.group_norm_jvp = group_norm_jvp;
    table.group_norm_vjp = group_norm_vjp;
    table.group_norm_vjp_jvp = group_norm_vjp_jvp;
  }

 private:
  static void group_norm(const Groups& groups, const Buffer& x, const Buffer& weight,
                         const Buffer& bias, const Buffer& stats, const Buffer& y,
                         const Exec& exec) {
    Launch::template run<NormRow>(groups, {x}, {weight, bias, {}, {}}, stats, {y}, {}, exec);
  }
  static void group_norm_jvp(const Groups& groups, const Buffer& x, const Buffer& weight,
                             const Buffer& bias, const Buffer& tx, const Buffer& tweight,
                             const Buffer& tbias, const Buffer& stats, const Buffer& y,
                             const Buffer& ty, const Exec& exec) {
    Launch::template run<NormJvpRow>(groups, {x, tx}, {weight, bias, tweight, tbias}, stats,
                                     {y, ty}, {}, exec);
  }
  static void group_norm_vjp(const Groups& groups, const Buffer& x, const Buffer& weight,
                             const Buffer& gy, const Buffer& stats, const Buffer& gx,
                             const Buffer& sums, const Exec& exec) {
    Launch::template run<NormVjpRow>(groups, {x, gy}, {weight, {}, {}, {}}, stats, {gx}, sums,
                                     exec);
  }
  static void group_norm_vjp_jvp(const Groups& groups, const Buffer& x, const Buffer& weight,
                                 const Buffer& gy, const Buffer& tx, const Buffer& tweight,
                                 const Buffer& tgy, const Buffer& stats, const Buffer& gx,
                                 const Buffer& tgx, const Buffer& sums, const Exec& exec) {
    Launch::template run<NormVjpJvpRow>(groups, {x, gy, tx, tgy}, {weight, {}, tweight, {}}, stats,
                                        {gx, tgx}, sums, exec);
  }
};

}  // namespace jops::JOPS_ISA
