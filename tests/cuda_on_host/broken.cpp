// The Python module _broken: kernels with planted mistakes.
#include "broken.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace cuda_on_host {
void add_functions(py::module_& m);
}

PYBIND11_MODULE(JOPS_MODULE, m, py::mod_gil_not_used()) {
  namespace broken = jops::JOPS_ISA::broken;
  cuda_on_host::add_functions(m);
  m.def("cases", [] {
    py::dict found_by;
    for (const auto& c : broken::cases()) found_by[c.name] = py::str(c.found_by).attr("split")();
    return found_by;
  });
  m.def("run", [](const std::string& name, bool right) {
    for (const auto& c : broken::cases()) {
      if (c.name == name) return c.run(right);
    }
    throw std::invalid_argument("no case " + name);
  });
}
