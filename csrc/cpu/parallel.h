// The one OpenMP region of the package.
#pragma once

#include <omp.h>

#include <exception>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "../math/common.h"

namespace jops::JOPS_ISA {

// A thread is worth waking for about this many elements of memory-bound work.
constexpr std::int64_t kElementsPerThread = 16384;

inline int useful_threads(std::int64_t elements, int threads) {
  const std::int64_t useful = elements / kElementsPerThread + 1;
  return useful < threads ? static_cast<int>(useful) : threads;
}

// While it lives, results of this thread's arithmetic that are too small for a normal number become
// zeros; tiny numbers that are only read, compared or moved stay. Intermediates of exponentials
// often are so small, and cost x86 processors more than a hundred cycles a vector.
class FlushesTinyResults {
#if defined(__SSE__)
 public:
  FlushesTinyResults() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushesTinyResults() { _mm_setcsr(before_); }
  FlushesTinyResults(const FlushesTinyResults&) = delete;
  FlushesTinyResults& operator=(const FlushesTinyResults&) = delete;

 private:
  unsigned before_;
#endif
};

template <class Body>
inline void parallel(std::int64_t tasks, int threads, const Body& body) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || omp_in_parallel()) {  // a forked child would hang at a region of two threads
    [[maybe_unused]] const FlushesTinyResults flushes;
    for (std::int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::exception_ptr error;  // one may not leave the region by itself
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const FlushesTinyResults flushes;
    const std::int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
    const std::int64_t end = tasks * (rank + 1) / team;
    try {
      for (std::int64_t task = tasks * rank / team; task < end; ++task) body(task);
    } catch (...) {
#pragma omp critical(jops_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace jops::JOPS_ISA
