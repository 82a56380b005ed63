// What the host's bodies of CUDA's words ask of the machine that runs a block's threads as fibers.
// Kernels are compiled with this header, and in the checked build with a call at every access to
// memory: no state of the machine is touched in code that is inlined into them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace cuda_on_host {

// Shared memory of a block, as sm_86, sm_89 and sm_120 have; kernels ask for it as most_shared().
constexpr std::size_t kSharedBytes = 99 << 10;

#if defined(__aarch64__)
using Float16 = __fp16;
#else
using Float16 = _Float16;
#endif

// Where in a kernel: a line that the compiler told, or an address that addr2line will.
struct Site {
  const char* file;
  int line;
  const void* address = nullptr;
};

// threadIdx and its like, of the thread that runs.
struct Place {
  uint3 thread, block, block_dim, grid_dim;
};
// __thread: a thread_local of another file would be asked for its initialisation at every use.
extern __thread Place place __attribute__((tls_model("initial-exec")));

// Memory for a kernel's parameters, which are not global memory.
void* parameters(std::size_t bytes);

// Runs a kernel to its end. Throws std::runtime_error that names the kernel, the block, the thread
// and the line of whatever a GPU would have been wrong, undefined or hung at.
void run(const std::string& kernel, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
         void (*body)(const void* parameters), const void* parameters);

// The shared object of a key, the same for all threads of a block.
void* shared_object(const void* key, std::size_t bytes, const char* signature);
void* dynamic_shared();

void barrier(Site);
void sync_warp(unsigned mask, Site);
unsigned ballot(unsigned mask, bool predicate, Site);

enum class Move { kIndex, kXor, kDown, kUp };
std::uint64_t shuffle(Move, unsigned mask, std::uint64_t value, int operand, int width, Site);

void load_matrices(std::uint32_t* r, const void* shared_row, bool transposed, Site);
enum class Half { kBf16, kF16 };
void multiply_tiles(Half, float* c, const std::uint32_t* a, const std::uint32_t* b, Site);

void copy_async(void* shared_to, const void* global_from, bool valid, Site);
void commit_copies();
void wait_for_copies(int pending, Site);

}  // namespace cuda_on_host
