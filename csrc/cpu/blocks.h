// What the CPU families share. Every csrc/cpu/*.cpp is compiled once per instruction set, inside
//   namespace jops::JOPS_ISA { ... }
// (JOPS_ISA is a macro set by the build), with its kernels in an anonymous namespace and one
// visible function
//   void register_<family>(Kernels& table)
// that puts them into the table. Arguments arrive checked (csrc/checked.cpp), so kernels check
// nothing. Avoid std:: templates that may not be inlined here: their weak symbols would be merged
// across instruction sets.
#pragma once

#include "../core.h"
#include "../math/simd.h"

namespace jops::JOPS_ISA {

void register_linear(Kernels& table);
void register_probe(Kernels& table);

// Calls f(T()) with the storage type of a dtype.
template <class F>
JOPS_HD void with_storage(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kBfloat16:
      return f(Bf16());
    case Dtype::kFloat16:
      return f(F16());
  }
}

// The activation as tensors of `dtype` see it: bounds are numbers of that type, as in torch, so
// that what hardtanh has put to a bound compares equal to it.
inline Act stored(Act act, Dtype dtype) {
  if (act.code != Activation::kHardtanh) return act;
  with_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    Compute<T> bounds[] = {static_cast<Compute<T>>(act.a), static_cast<Compute<T>>(act.b)};
    T narrow[2];
    store_n(narrow, load_n(bounds, 2), 2);
    act.a = load_n(narrow, 1)[0];
    act.b = load_n(narrow + 1, 1)[0];
  });
  return act;
}

}  // namespace jops::JOPS_ISA

// JOPS_BASE is JOPS_ISA itself, or the instruction set that JOPS_ISA only has other matrix products
// than: everything else is then compiled once for the two.
namespace jops::JOPS_BASE {

void register_activation(Kernels& table);
void register_cross_entropy(Kernels& table);
void register_attention(Kernels& table);
void register_dropout(Kernels& table);
void register_group_norm(Kernels& table);
void register_gated(Kernels& table);
void register_norm(Kernels& table);
void register_rotary(Kernels& table);
void register_softmax(Kernels& table);

// Block primitives work on a few KiB that stay in L1: compute type A (float or double), unit
// stride.
constexpr int kBlock = 1024;  // elements of a staging block: 4 or 8 KiB

// y[i] = f(x[i]), i < n; x == y is allowed. Get the pointer once, outside the loops.
template <class A>
using ActivationBlock = void (*)(const Act&, const A* x, A* y, std::int64_t n);
template <class A>
ActivationBlock<A> activation_block(Activation code);  // A = float, double

// y[i] = f(x[i]), ty[i] = f'(x[i]) tx[i]; in place is allowed.
template <class A>
using ActivationJvpBlock = void (*)(const Act&, const A* x, const A* tx, A* y, A* ty,
                                    std::int64_t n);
template <class A>
ActivationJvpBlock<A> activation_jvp_block(Activation code);

// Kernels of the table that others use.
void activation_vjp(const Act&, int order, const Buffer& x, const Buffer& gy, const Buffer& gx,
                    const Mask&, const Exec&);
void activation_vjp_sum(const Act&, const Rows&, const Buffer& x, const Buffer& gy,
                        const Buffer& gx, const Buffer& sum, const Mask&, const Exec&);

// m[i] = dropout multiplier (0 or 1/(1-p)) of element `first + i` of sample `sample`, i < n.
// The caller multiplies: y = m * f(z), so that a dropped NaN or infinity gives NaN, as torch does.
template <class A>
void dropout_block(const Mask& mask, std::int64_t sample, std::int64_t first, A* m, std::int64_t n);

// The same for elements of a whole buffer of `size` elements, whatever samples they belong to.
template <class A>
void dropout_range(const Mask& mask, std::int64_t size, std::int64_t first, A* m, std::int64_t n);

// Conversion between storage (element index `first` of `data`) and a block; one rounding at the
// store.
template <class A>
void load_block(Dtype dtype, const void* data, std::int64_t first, A* block, std::int64_t n);
template <class A>
void store_block(Dtype dtype, void* data, std::int64_t first, const A* block, std::int64_t n);

}  // namespace jops::JOPS_BASE

namespace jops::JOPS_ISA {

using namespace JOPS_BASE;

// Outputs of at least this many bytes are written past the caches, which they would sweep for
// nothing.
inline bool should_stream(std::int64_t bytes) { return bytes >= stream_threshold(); }
// Whether whole vectors from here on can be.
template <class T>
inline bool can_stream(const T* to) {
  return reinterpret_cast<std::uintptr_t>(to) % (Vec<Compute<T>>::kLanes * sizeof(T)) == 0;
}

// Threads. parallel(tasks, threads, body) runs body(task) for 0 <= task < tasks on at most
// `threads` threads, contiguous ranges of tasks each; serially when threads == 1, for one task, or
// inside another parallel region. The tasks must not depend on `threads` (same bits for every
// thread count). What a body throws is thrown again.
template <class Body>
inline void parallel(std::int64_t tasks, int threads, const Body& body);

}  // namespace jops::JOPS_ISA

#include "parallel.h"
