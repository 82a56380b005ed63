// Cross-entropy's entries of the kernel table, the same for every backend. What differs is how a
// backend runs one of the rows of math/cross_entropy.h:
//   struct Launch {
//     template <class Row>
//     static void run(const Rows&, const Target&, const EntropyCall&, const Exec&);
//   };
#pragma once

#include "kernels.h"
#include "math/cross_entropy.h"

namespace jops::JOPS_ISA {

// What a call has of these; tg may be absent.
struct EntropyCall {
  Buffer x, tx, g, tg, loss, tloss, gx, tgx;
};

template <class Launch>
struct EntropyTable {
  static void put(Kernels& table) {
    table.cross_entropy = loss;
    table.cross_entropy_jvp = jvp;
    table.cross_entropy_vjp = vjp;
    table.cross_entropy_vjp_jvp = vjp_jvp;
  }

 private:
  static void loss(const Rows& rows, const Target& target, const Buffer& x, const Buffer& loss,
                   const Exec& exec) {
    EntropyCall call;
    call.x = x;
    call.loss = loss;
    Launch::template run<EntropyRow<false, false>>(rows, target, call, exec);
  }
  static void jvp(const Rows& rows, const Target& target, const Buffer& x, const Buffer& tx,
                  const Buffer& loss, const Buffer& tloss, const Exec& exec) {
    EntropyCall call;
    call.x = x;
    call.tx = tx;
    call.loss = loss;
    call.tloss = tloss;
    Launch::template run<EntropyRow<true, false>>(rows, target, call, exec);
  }
  static void vjp(const Rows& rows, const Target& target, const Buffer& x, const Buffer& g,
                  const Buffer& gx, const Exec& exec) {
    EntropyCall call;
    call.x = x;
    call.g = g;
    call.gx = gx;
    Launch::template run<EntropyRow<false, true>>(rows, target, call, exec);
  }
  static void vjp_jvp(const Rows& rows, const Target& target, const Buffer& x, const Buffer& g,
                      const Buffer& tx, const Buffer& tg, const Buffer& gx, const Buffer& tgx,
                      const Exec& exec) {
    Launch::template run<EntropyRow<true, true>>(rows, target, {x, tx, g, tg, {}, {}, gx, tgx},
                                                 exec);
  }
};

}  // namespace jops::JOPS_ISA
