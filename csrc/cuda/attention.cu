// Launches of attention.
#include "attention.cuh"
#include "dtypes.h"
#include "families.h"

namespace jops::JOPS_ISA {
namespace {

// The tensors of a product, or their tangents.
struct Part {
  Heads q, k, v, bias, o, go, gq, gk, gv;
};
struct Numbers {
  Buffer lse, mu, delta;
};

template <class T>
attention::Call<T> call_of(const Scores& scores, const Part& primal, const Part& tangent,
                           const Numbers& numbers, const Mask& mask) {
  using A = Compute<T>;
  using Given = attention::Tensor<const T>;
  using Result = attention::Tensor<T>;
  const Heads& q = primal.q;
  const std::int64_t keys = primal.k.rows, queries = q.batch * q.heads * q.rows;
  attention::Call<T> call{{Given(q), Given(tangent.q)},
                          {Given(primal.k), Given(tangent.k)},
                          {Given(primal.v), Given(tangent.v)},
                          {Given(primal.bias), Given(tangent.bias)},
                          {Given(primal.go), Given(tangent.go)},
                          attention::Tensor<const std::uint8_t>(scores.keep),
                          {Result(primal.o), Result(tangent.o)},
                          {Result(primal.gq), Result(tangent.gq)},
                          {Result(primal.gk), Result(tangent.gk)},
                          {Result(primal.gv), Result(tangent.gv)},
                          static_cast<A*>(numbers.lse.data),
                          static_cast<A*>(numbers.mu.data),
                          static_cast<A*>(numbers.delta.data),
                          nullptr,
                          q.batch,
                          q.heads,
                          q.heads / primal.k.heads,
                          q.rows,
                          keys,
                          0,
                          0,
                          static_cast<A>(scores.scale),
                          scores.causal,
                          Dropout<A>(mask, queries * keys)};
  if (numbers.delta.size > queries) call.tdelta = call.delta + queries;
  return call;
}

// A block for each tile of `rows` rows and of `width` columns of the results.
template <auto Kernel, class T>
void launch_tiles(attention::Call<T> call, std::int64_t heads, std::int64_t rows,
                  std::int64_t width, const Exec& exec) {
  constexpr int kSide = attention::Shape<T>::kSide;
  call.tiles = (rows + kSide - 1) / kSide;
  call.chunks = (width + kSide - 1) / kSide;
  dev::launch<Kernel>(all_blocks(call.batch * heads * call.tiles * call.chunks),
                      attention::Shape<T>::kThreads, 0, dev::stream_of(exec), call);
}

template <bool kDual>
void run(const Scores& scores, const Part& primal, const Part& tangent, const Numbers& numbers,
         const Mask& mask, const Exec& exec) {
  with_storage(primal.q.dtype, [&](auto storage) {
    using T = decltype(storage);
    const auto call = call_of<T>(scores, primal, tangent, numbers, mask);
    const std::int64_t width = primal.v.width > 0 ? primal.v.width : 1;  // lse is wanted anyway
    launch_tiles<attention::forward<T, kDual>>(call, call.heads, call.queries, width, exec);
  });
}

template <bool kDual>
void run_vjp(const Scores& scores, const Part& primal, const Part& tangent, const Numbers& numbers,
             const Mask& mask, const Exec& exec) {
  with_storage(primal.q.dtype, [&](auto storage) {
    using T = decltype(storage);
    using Given = attention::Tensor<const T>;
    const auto call = call_of<T>(scores, primal, tangent, numbers, mask);
    const std::int64_t queries = call.batch * call.heads * call.queries;
    constexpr int kWarps = attention::kDeltaThreads / dev::kWarp;
    dev::launch<attention::delta<T>>(all_blocks((queries + kWarps - 1) / kWarps),
                                     attention::kDeltaThreads, 0, dev::stream_of(exec), call,
                                     Given(primal.o), Given(tangent.o));
    const auto width = [](const Heads& a, const Heads& b) {  // a tensor of size 0 has none
      return a.given() ? a.width : b.width;
    };
    const std::int64_t of_q = width(primal.gq, tangent.gq), of_k = width(primal.gk, tangent.gk);
    const std::int64_t of_v = width(primal.gv, tangent.gv);
    launch_tiles<attention::queries<T, kDual>>(call, call.heads, call.queries, of_q, exec);
    launch_tiles<attention::keys<T, kDual>>(call, primal.k.heads, call.keys,
                                            of_k > of_v ? of_k : of_v, exec);
  });
}

void forward(const Scores& scores, const Heads& q, const Heads& k, const Heads& v, const Heads& o,
             const Buffer& lse, const Mask& mask, const Exec& exec) {
  run<false>(scores, {q, k, v, scores.bias, o, {}, {}, {}, {}}, {}, {lse, {}, {}}, mask, exec);
}

void jvp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v, const Heads& tq,
         const Heads& tk, const Heads& tv, const Heads& tbias, const Heads& o, const Heads& to,
         const Buffer& lse, const Buffer& mu, const Mask& mask, const Exec& exec) {
  run<true>(scores, {q, k, v, scores.bias, o, {}, {}, {}, {}},
            {tq, tk, tv, tbias, to, {}, {}, {}, {}}, {lse, mu, {}}, mask, exec);
}

void vjp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v, const Heads& o,
         const Heads& go, const Buffer& lse, const Buffer& delta, const Heads& gq, const Heads& gk,
         const Heads& gv, const Mask& mask, const Exec& exec) {
  run_vjp<false>(scores, {q, k, v, scores.bias, o, go, gq, gk, gv}, {}, {lse, {}, delta}, mask,
                 exec);
}

void vjp_jvp(const Scores& scores, const Heads& q, const Heads& k, const Heads& v, const Heads& tq,
             const Heads& tk, const Heads& tv, const Heads& tbias, const Heads& o, const Heads& to,
             const Heads& go, const Heads& tgo, const Buffer& lse, const Buffer& mu,
             const Buffer& delta, const Heads& gq, const Heads& gk, const Heads& gv,
             const Heads& tgq, const Heads& tgk, const Heads& tgv, const Mask& mask,
             const Exec& exec) {
  run_vjp<true>(scores, {q, k, v, scores.bias, o, go, gq, gk, gv},
                {tq, tk, tv, tbias, to, tgo, tgq, tgk, tgv}, {lse, mu, delta}, mask, exec);
}

}  // namespace

void register_attention(Kernels& table) {
  table.attention = forward;
  table.attention_jvp = jvp;
  table.attention_vjp = vjp;
  table.attention_vjp_jvp = vjp_jvp;
}

}  // namespace jops::JOPS_ISA
