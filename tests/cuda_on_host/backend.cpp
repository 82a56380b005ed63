// The facts of the backend _cuda_on_host.
#include "backend.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace cuda_on_host {
void add_functions(pybind11::module_& m);
}

namespace jops {

void add_facts(pybind11::module_& m) {
  m.attr("kind") = "cuda";
  m.def("architectures", [] { return std::vector<std::string>{"host"}; });
  m.def("runtime", [] { return "none"; });
  m.def("unusable", [] { return pybind11::none(); });
  cuda_on_host::add_functions(m);
}

}  // namespace jops
