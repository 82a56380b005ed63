// Launches of sums over rows.
#include "columns.cuh"
#include "columns.h"
#include "dtypes.h"
#include "families.h"

namespace jops::JOPS_ISA {

void sum_partials(const Rows& rows, const Buffer& sum, const Exec& exec) {
  add_partials({rows.outer, column_parts(rows.n), rows.inner}, exec.workspace, sum, exec);
}

void add_partials(const Rows& rows, const void* partial, const Buffer& sum, const Exec& exec) {
  with_storage(sum.dtype, [&](auto storage) {
    using T = decltype(storage);
    const std::int64_t strips = (rows.inner + columns::kColumns - 1) / columns::kColumns;
    dev::launch<columns::add_parts<T>>(
        all_blocks(strips * rows.outer), columns::kThreads, 0, dev::stream_of(exec),
        static_cast<const Compute<T>*>(partial), static_cast<int>(rows.n), rows.inner,
        static_cast<T*>(sum.data));
  });
}

void column_sum(const Matrix& x, const Buffer& y, const Exec& exec) {
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    const std::int64_t width = columns::kColumns * kPack<T>, strips = (x.cols + width - 1) / width;
    const int parts = column_parts(x.rows);
    const bool packs = packs_at(x.data) && x.col_stride == 1 && x.cols % kPack<T> == 0 &&
                       x.row_stride % kPack<T> == 0 && x.batch_stride % kPack<T> == 0;
    dev::launch<columns::sum_parts<T>>(dim3(all_blocks(strips * x.batch), parts), columns::kThreads,
                                       0, dev::stream_of(exec), x, packs, parts,
                                       static_cast<Compute<T>*>(exec.workspace));
  });
  sum_partials({x.batch, x.rows, x.cols}, y, exec);
}

namespace {

std::int64_t sum_workspace(const Rows& rows) {
  constexpr std::int64_t kWidest = 8;  // bytes of a number
  return rows.outer * column_parts(rows.n) * rows.inner * kWidest;
}

}  // namespace

void register_columns(Kernels& table) {
  table.column_sum = column_sum;
  table.sum_workspace = sum_workspace;
}

}  // namespace jops::JOPS_ISA
