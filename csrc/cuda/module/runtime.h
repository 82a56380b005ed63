// What the CUDA runtime says, without its header.
#pragma once

#include <string>

namespace jops {

// Of the runtime that is linked in, as "13.0".
std::string cuda_runtime();

// Why no kernel can run in this process, as a sentence that says what was built for, what was found
// and what to do; empty if there is a GPU.
std::string cuda_unusable(const std::string& architectures);

}  // namespace jops
