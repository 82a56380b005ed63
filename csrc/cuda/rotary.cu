// Launches of rotary position embedding.
#include "dtypes.h"
#include "families.h"
#include "rotary.cuh"

namespace jops::JOPS_ISA {
namespace {

void run(const Rotation& rotation, const Grid& x, const Grid& cos, const Grid& sin, const Grid& y,
         const Exec& exec) {
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    rotary::Call<T> call{};
    call.x = static_cast<const T*>(x.data);
    call.cos = static_cast<const T*>(cos.data);
    call.sin = static_cast<const T*>(sin.data);
    call.y = static_cast<T*>(y.data);
    call.n = x.n;
    call.half = cos.n;
    call.interleaved = rotation.interleaved;
    call.inverse = rotation.inverse;
    call.packs = x.n % kPack<T> == 0 && cos.n % kPack<T> == 0;
    const auto strides = [&](const Grid& g) {
      rotary::Strides s;
      call.packs = call.packs && packs_at(g.data);
      for (int k = 0; k < 3; ++k) {
        s.of[k] = g.strides[k];
        call.packs = call.packs && (g.sizes[k] == 1 || g.strides[k] % kPack<T> == 0);
      }
      return s;
    };
    call.x_strides = strides(x);
    call.cos_strides = strides(cos);
    call.sin_strides = strides(sin);
    call.y_strides = strides(y);
    std::int64_t points = 1;
    for (int k = 0; k < 3; ++k) points *= call.sizes[k] = x.sizes[k];
    const std::int64_t packs =
        (call.half + kPack<T> - 1) / kPack<T> + (x.n - 2 * call.half + kPack<T> - 1) / kPack<T>;
    dev::launch<rotary::rotate_all<T>>(
        blocks((points * packs + rotary::kThreads - 1) / rotary::kThreads), rotary::kThreads, 0,
        dev::stream_of(exec), call);
  });
}

}  // namespace

void register_rotary(Kernels& table) { table.rotary = run; }

}  // namespace jops::JOPS_ISA
