// The words of device code. A kernel includes this header and is compiled twice: by nvcc, and by
// the host compiler, where tests/cuda_on_host runs every CUDA thread as a fiber. Both give CUDA's
// own names and the namespace dev, for whatever needs PTX or differs.
#pragma once

#include <string>

#include "../kernels.h"
#include "../math/common.h"

namespace jops::JOPS_ISA::dev {

constexpr int kWarp = 32;

// A kernel's name with its template arguments, from the signature of launch<Kernel>; another
// function's signature as it is.
inline std::string kernel_name(const std::string& signature) {
  const std::string before = "Kernel = ";
  const auto at = signature.find(before);
  if (at == signature.npos) return signature;
  const auto begin = at + before.size();
  std::string name = signature.substr(begin, signature.find_first_of(";]", begin) - begin);
  for (const std::string prefix : {"jops::cuda::", "jops::"}) {
    for (auto at = name.find(prefix); at != name.npos; at = name.find(prefix)) {
      name.erase(at, prefix.size());
    }
  }
  return name;
}

}  // namespace jops::JOPS_ISA::dev

#ifdef __CUDACC__
#include "device_nvcc.h"
#else
#include "device_host.h"
#endif
