// The process's allocator: whether it keeps freed memory or gives it back to the system.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace jops {

// Settings that were changed, by their names in mallopt(3); none where the allocator is not
// glibc's.
using HostMemorySettings = std::vector<std::pair<std::string, long>>;

// From now on freed memory stays with the process, so that it need not be mapped, zeroed and
// faulted in again.
HostMemorySettings retain_host_memory();

// Back to glibc's defaults; what is free now goes back to the system.
HostMemorySettings release_host_memory();

}  // namespace jops
