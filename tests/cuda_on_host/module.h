// What the Python module sets and asks.
#pragma once

#include <cstdint>
#include <string>

namespace cuda_on_host {

// Of the order in which threads and blocks run; JACOBIAN_OPS_SEED at first.
std::uint64_t seed();
void set_seed(std::uint64_t);

// Notes a kernel that ran, and the bytes of global memory that it read and wrote (checked build).
void record(const std::string& kernel, std::uint64_t read, std::uint64_t written);

}  // namespace cuda_on_host
