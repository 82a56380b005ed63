// What each backend gives to its Python module besides its kernels.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace jops {

// The backend's kernels behind checks: sizes, dtypes, strides and pointers. A violation throws
// std::invalid_argument that names the op and the argument; empty tensors return at once.
const Kernels& kernels();

// `kind` ("cpu" or "cuda"), and facts about this build and this machine.
void add_facts(pybind11::module_& m);

}  // namespace jops
