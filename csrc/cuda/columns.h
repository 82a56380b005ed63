// Sums over n of (outer, n, inner) elements, in two stages and in an order that follows from the
// shape alone. The first stage leaves sums of parts of n, (outer, parts, inner) of them in the type
// that the elements are computed in, in the workspace; the second adds these up.
#pragma once

#include "../kernels.h"
#include "../math/common.h"

namespace jops::JOPS_ISA {

// Parts of n: enough of them to occupy a GPU, few enough for a short second stage.
inline int column_parts(std::int64_t n) {
  const std::int64_t parts = (n + 7) / 8;
  return static_cast<int>(parts < 1 ? 1 : parts < 256 ? parts : 256);
}

// y = the sums of x over its rows.
void column_sum(const Matrix& x, const Buffer& y, const Exec& exec);

// The second stage: sum = the partial sums of the workspace, added up.
void sum_partials(const Rows& rows, const Buffer& sum, const Exec& exec);

// The second stage for (outer, n, inner) partial sums of any other first one.
void add_partials(const Rows& rows, const void* partial, const Buffer& sum, const Exec& exec);

}  // namespace jops::JOPS_ISA
