// What the Python module of the CUDA kernels tells besides its kernels.
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "backend.h"
#include "runtime.h"

namespace py = pybind11;

namespace jops {
namespace {

// JOPS_CUDA_ARCHS: "sm_80,sm_90,sm_120,compute_80".
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::istringstream text(JOPS_CUDA_ARCHS);
  for (std::string name; std::getline(text, name, ',');) names.push_back(name);
  return names;
}

}  // namespace

void add_facts(py::module_& m) {
  m.attr("kind") = "cuda";
  m.def("architectures", architectures);
  m.def("runtime", cuda_runtime);
  m.def("unusable", []() -> py::object {
    std::string joined;
    for (const std::string& name : architectures()) joined += (joined.empty() ? "" : ", ") + name;
    const std::string reason = cuda_unusable(joined);
    return reason.empty() ? py::none() : py::object(py::str(reason));
  });
}

}  // namespace jops
