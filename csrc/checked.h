// The last line of defence: no mistake of a caller can make a kernel read or write out of bounds.
#pragma once

#include "kernels.h"

namespace jops {

// Takes an instruction set's kernels and returns a table with the same functions behind checks.
// There is one such table in a process.
Kernels checked(const Kernels& unchecked);

}  // namespace jops
