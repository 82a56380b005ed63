// The limits of the machine, measured by the instructions that the kernels are made of.
#include <chrono>
#include <cstdlib>

#include "gemm.h"

namespace jops::JOPS_ISA {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best of several tries: what the machine can do when nobody disturbs it.
template <class Work>
double best_seconds(const Work& work) {
  double best = 1e30;
  const double start = seconds();
  for (int i = 0; i < 3 || seconds() - start < 0.25; ++i) {
    const double t = seconds();
    work();
    const double elapsed = seconds() - t;
    if (elapsed < best) best = elapsed;
  }
  return best;
}

// The asm keeps the compiler from folding the chains, and the accumulators in registers.
#if defined(__x86_64__)
#define JOPS_KEEP(v) asm volatile("" : "+x"(v))
#else
#define JOPS_KEEP(v) asm volatile("" : "+w"(v))
#endif

constexpr int kChains =
    12;  // enough to hide a latency of 4 to 6 cycles at two instructions a cycle
constexpr std::int64_t kSteps = 1 << 20;

// Flops of one thread's run.
template <class A>
double multiply_adds() {
  Vec<A> sum[kChains], a(A(1) - A(1e-3)), b(A(1e-3));
  for (Vec<A>& s : sum) s = Vec<A>(A(1));
  for (std::int64_t i = 0; i < kSteps; ++i) {
    for (Vec<A>& s : sum) {
      s = fma(s, a, b);
      JOPS_KEEP(s.v);
    }
  }
  return 2.0 * Vec<A>::kLanes * kChains * kSteps;
}

#if defined(__AMX_BF16__)
double bf16_multiply_adds() {
  constexpr std::int64_t kProducts = 4;  // squares of sums, as in a tile of linear
  const Bf16Squares::Session session;
  for (std::int64_t i = 0; i < kSteps / kProducts; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return 2.0 * 16 * 16 * 32 * kSteps;
}
#elif defined(__AVX512BF16__)
double bf16_multiply_adds() {
  __m512 sum[kChains];
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3f00);
  for (__m512& s : sum) s = _mm512_set1_ps(1.0f);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    for (__m512& s : sum) {
      s = _mm512_dpbf16_ps(s, a, b);
      JOPS_KEEP(s);
    }
  }
  return 2.0 * 32 * kChains * kSteps;
}
#endif

double (*work_of(Dtype dtype))() {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::kBfloat16) return bf16_multiply_adds;
#endif
  return dtype == Dtype::kFloat64 ? multiply_adds<double> : multiply_adds<float>;
}

double fma_peak(Dtype dtype, const Exec& exec) {
  const auto work = work_of(dtype);
  double flops = 0;
  const double elapsed = best_seconds([&] {
    parallel(exec.threads, exec.threads, [&](std::int64_t task) {
      const double done = work();
      if (task == 0) flops = done;
    });
  });
  return flops * exec.threads / elapsed;
}

// Every thread copies a share of its own over and over, so that starting threads costs nothing.
double copy_bandwidth(std::int64_t bytes, bool non_temporal, const Exec& exec) {
  constexpr std::int64_t kAlign = 4096, kEnough = 1 << 24;  // bytes that a thread copies at least
  const std::int64_t share = (bytes / exec.threads + kAlign - 1) / kAlign * kAlign;
  const std::int64_t repeats = share < kEnough ? kEnough / share : 1;
  const std::int64_t size = share * exec.threads;
  char* from = static_cast<char*>(std::aligned_alloc(kAlign, static_cast<std::size_t>(2 * size)));
  if (from == nullptr) return 0;
  char* to = from + size;
  std::memset(from, 1, static_cast<std::size_t>(2 * size));
  const double elapsed = best_seconds([&] {
    parallel(exec.threads, exec.threads, [&](std::int64_t task) {
      const float* in = reinterpret_cast<const float*>(from + task * share);
      float* out = reinterpret_cast<float*>(to + task * share);
      for (std::int64_t k = 0; k < repeats; ++k) {
        for (std::int64_t i = 0; i < share / 4; i += Vec<float>::kLanes) {
          prefetch(in + i + 2048);
          if (non_temporal) {
            stream(out + i, load(in + i));
          } else {
            store(out + i, load(in + i));
          }
        }
        asm volatile("" : : "r"(out) : "memory");
      }
      stream_fence();
    });
  });
  std::free(from);
  return 2.0 * static_cast<double>(size * repeats) / elapsed;
}

}  // namespace

void register_probe(Kernels& table) {
  table.fma_peak = fma_peak;
  table.copy_bandwidth = copy_bandwidth;
}

}  // namespace jops::JOPS_ISA
