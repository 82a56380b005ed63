#include <cuda_runtime.h>

#include "runtime.h"

namespace jops {
namespace {

std::string dotted(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

__global__ void probe() {}

}  // namespace

std::string cuda_runtime() { return dotted(CUDART_VERSION); }

std::string cuda_unusable(const std::string& architectures) {
  const std::string built =
      "these kernels were built with CUDA " + cuda_runtime() + " for " + architectures;
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) return built + ", and there is no driver";
    return built + ", and the driver is one for CUDA " + dotted(driver) +
           ": update it, or build jacobian_ops with an older toolkit";
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return built + ", and no GPU was found";
  }
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
  }
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    int device = 0;
    cudaDeviceProp properties{};
    cudaGetDevice(&device);
    cudaGetDeviceProperties(&properties, device);
    cudaGetLastError();
    return built + ", and this GPU, " + properties.name + ", is sm_" +
           std::to_string(properties.major * 10 + properties.minor) +
           ": build jacobian_ops for it (JACOBIAN_OPS_CUDA_ARCHS)";
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return built + ", and CUDA says " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
  }
  return "";
}

}  // namespace jops
