// The Python module _words: the device's words one by one. Arrays are given by their addresses.
#include "words.h"

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

PYBIND11_MODULE(JOPS_MODULE, m, py::mod_gil_not_used()) {
  namespace words = jops::JOPS_ISA::words;
  using Address = std::uintptr_t;
  const auto floats = [](Address a) { return reinterpret_cast<float*>(a); };
  const auto ints = [](Address a) { return reinterpret_cast<int*>(a); };
  m.def("product", [=](bool bf16, bool transposed, Address a, Address b, Address c) {
    words::run_product(bf16, transposed, floats(a), floats(b), floats(c));
  });
  m.def("shuffles", [=](int operand, int width, Address x, Address y) {
    words::run_shuffles(operand, width, ints(x), ints(y));
  });
  m.def("conversions", [=](bool bf16, Address x, Address y, int n) {
    words::run_conversions(bf16, floats(x), floats(y), n);
  });
  m.def("sparse_copy", [=](Address x, Address y) { words::run_sparse_copy(floats(x), floats(y)); });
  m.def("places", [=](Address y) { words::run_places(ints(y)); });
  m.def("nothing", [=](Address y) { words::run_nothing(ints(y)); });
}
