// What the Python module of the CUDA kernels tells besides its kernels.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "backend.h"
#include "runtime.h"

namespace py = pybind11;

namespace jops {
namespace {

// JOPS_CUDA_ARCHS: "80,90,120"; the last one was compiled as PTX too.
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::string name;
  for (const char c : std::string(JOPS_CUDA_ARCHS) + ",") {
    if (c != ',') {
      name += c;
      continue;
    }
    names.push_back("sm_" + name);
    name.clear();
  }
  names.push_back("compute_" + names.back().substr(3));
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
