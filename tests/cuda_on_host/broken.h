// The kernels with planted mistakes, for the Python module _broken.
#pragma once

#include <functional>
#include <vector>

namespace jops::JOPS_ISA::broken {

struct Case {
  const char* name;
  const char* found_by;  // the variants that raise or abort at the wrong form
  std::function<std::vector<float>(bool right)> run;
};
std::vector<Case> cases();

}  // namespace jops::JOPS_ISA::broken
