#include "names.h"

namespace jops {

const char* activation_name(Activation code) {
  switch (code) {
    case Activation::kIdentity:
      return "identity";
    case Activation::kRelu:
      return "relu";
    case Activation::kLeakyRelu:
      return "leaky_relu";
    case Activation::kElu:
      return "elu";
    case Activation::kHardtanh:
      return "hardtanh";
    case Activation::kSigmoid:
      return "sigmoid";
    case Activation::kTanh:
      return "tanh";
    case Activation::kGelu:
      return "gelu";
    case Activation::kGeluTanh:
      return "gelu_tanh";
    case Activation::kSilu:
      return "silu";
    case Activation::kSoftplus:
      return "softplus";
    case Activation::kMish:
      return "mish";
    case Activation::kHardswish:
      return "hardswish";
    case Activation::kHardsigmoid:
      return "hardsigmoid";
    case Activation::kLogsigmoid:
      return "logsigmoid";
    case Activation::kSigmoidY:
      return "sigmoid_y";
    case Activation::kTanhY:
      return "tanh_y";
    case Activation::kCount:
      break;
  }
  return "";
}

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kBfloat16:
      return "bfloat16";
    case Dtype::kFloat16:
      return "float16";
  }
  return "unknown";
}

}  // namespace jops
