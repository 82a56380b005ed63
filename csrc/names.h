// Names of codes, as messages and Python know them.
#pragma once

#include "kernels.h"

namespace jops {

const char* activation_name(Activation code);
const char* dtype_name(Dtype dtype);

}  // namespace jops
