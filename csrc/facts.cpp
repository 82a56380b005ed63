// What the Python module of the CPU tells besides its kernels.
#include <pybind11/stl.h>

#include "backend.h"
#include "core.h"
#include "memory.h"

namespace py = pybind11;

namespace jops {

void add_facts(py::module_& m) {
  m.attr("kind") = "cpu";
  m.def("fma_peak", [](int dtype, int threads) {
    const py::gil_scoped_release release;
    return kernels().fma_peak(static_cast<Dtype>(dtype), Exec{threads});
  });
  m.def("copy_bandwidth", [](std::int64_t bytes, bool non_temporal, int threads) {
    const py::gil_scoped_release release;
    return kernels().copy_bandwidth(bytes, non_temporal, Exec{threads});
  });
  m.def("retain_host_memory", retain_host_memory);
  m.def("release_host_memory", release_host_memory);
  m.def("isa", isa);
  m.def("processor", processor);
  m.def("available_isas", available_isas);
  m.def("compiler", compiler);
  m.def("openmp", [] {
    const OpenMp facts = openmp();
    py::dict d;
    d["library"] = facts.library;
    d["version"] = facts.version;
    d["max_threads"] = facts.max_threads;
    return d;
  });
}

}  // namespace jops
