// What the Python module of the kernels on the host tells and sets besides its kernels.
#include <pybind11/stl.h>

#include <cstdlib>
#include <mutex>
#include <tuple>
#include <vector>

#include "backend.h"
#include "module.h"

namespace cuda_on_host {
namespace {

std::uint64_t first_seed() {
  const char* text = std::getenv("JACOBIAN_OPS_SEED");
  return text ? std::strtoull(text, nullptr, 0) : 0;
}

struct Launches {
  std::mutex mutex;
  std::uint64_t seed = first_seed();
  bool counting = false;
  std::vector<std::tuple<std::string, std::uint64_t, std::uint64_t>> list;
};
Launches& launches() {
  static Launches all;
  return all;
}

}  // namespace

std::uint64_t seed() {
  const std::lock_guard<std::mutex> lock(launches().mutex);
  return launches().seed;
}
void set_seed(std::uint64_t seed) {
  const std::lock_guard<std::mutex> lock(launches().mutex);
  launches().seed = seed;
}
void record(const std::string& kernel, std::uint64_t read, std::uint64_t written) {
  const std::lock_guard<std::mutex> lock(launches().mutex);
  if (launches().counting) launches().list.emplace_back(kernel, read, written);
}

// What tests ask of the modules built here, for the project's kernels and for broken ones.
void add_functions(pybind11::module_& m) {
  m.attr("variant") = CUDA_ON_HOST_VARIANT;
  m.def("set_seed", set_seed, "Set the seed of the order in which threads and blocks run.");
  m.def(
      "reset_counters",
      [] {
        const std::lock_guard<std::mutex> lock(launches().mutex);
        launches().counting = true;
        launches().list.clear();
      },
      "Begin to count launches, and forget those counted so far.");
  m.def(
      "launches",
      [] {
        const std::lock_guard<std::mutex> lock(launches().mutex);
        return launches().list;
      },
      "(kernel, bytes of global memory read, bytes written) of each since reset_counters().");
}

}  // namespace cuda_on_host
