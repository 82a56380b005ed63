// What the core offers besides kernels: the choice of an instruction set, and facts about the
// build.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace jops {

// The kernels of the chosen instruction set behind checks: sizes, dtypes, strides and pointers. A
// violation throws std::invalid_argument that names the op and the argument; empty tensors return
// at once.
const Kernels& kernels();

// The instruction set in use: the best one that the machine runs, or the one that the environment
// variable JACOBIAN_OPS_ISA names. Throws std::runtime_error if that one is unknown or cannot run
// here.
const std::string& isa();
std::vector<std::string> available_isas();

// Who made the processor: "intel", "amd" or "other".
const char* processor();

struct OpenMp {
  std::string library;  // path of the runtime that is loaded
  int version;          // the _OPENMP date of the compiler
  int max_threads;
};
OpenMp openmp();
std::string compiler();

// Half of the last-level cache, at most 32 MiB: an output of this many bytes or more does not stay
// in it.
std::int64_t stream_threshold();

}  // namespace jops
