// The Python module of a backend: one line a kernel. Arguments are plain tuples, described at the
// casters. Built once for each backend, with its name in JOPS_MODULE.
#include <pybind11/pybind11.h>

#include "backend.h"
#include "names.h"

namespace py = pybind11;

namespace jops {

// Reads a tuple of exactly the given fields; false, so that pybind11 raises TypeError, if it is not
// one.
template <class... Fields>
bool read(py::handle source, Fields&... fields) {
  if (!py::isinstance<py::tuple>(source)) return false;
  const auto tuple = py::reinterpret_borrow<py::tuple>(source);
  if (tuple.size() != sizeof...(fields)) return false;
  std::size_t i = 0;
  ((fields = tuple[i++].cast<Fields>()), ...);
  return true;
}

}  // namespace jops

namespace pybind11::detail {

// (address, size, dtype), or None for an argument left out
template <>
struct type_caster<jops::Buffer> {
  PYBIND11_TYPE_CASTER(jops::Buffer, const_name("Buffer"));
  bool load(handle source, bool) {
    if (source.is_none()) return true;
    std::uintptr_t address = 0;
    int dtype = 0;
    if (!jops::read(source, address, value.size, dtype)) return false;
    value.data = reinterpret_cast<void*>(address);
    value.dtype = static_cast<jops::Dtype>(dtype);
    return true;
  }
};

// (address, extent, dtype, batch, rows, cols, batch stride, row stride, col stride), or None
template <>
struct type_caster<jops::Matrix> {
  PYBIND11_TYPE_CASTER(jops::Matrix, const_name("Matrix"));
  bool load(handle source, bool) {
    if (source.is_none()) return true;
    std::uintptr_t address = 0;
    int dtype = 0;
    if (!jops::read(source, address, value.extent, dtype, value.batch, value.rows, value.cols,
                    value.batch_stride, value.row_stride, value.col_stride)) {
      return false;
    }
    value.data = reinterpret_cast<void*>(address);
    value.dtype = static_cast<jops::Dtype>(dtype);
    return true;
  }
};

// (address, extent, dtype, four sizes, four strides), or None
template <>
struct type_caster<jops::Heads> {
  PYBIND11_TYPE_CASTER(jops::Heads, const_name("Heads"));
  bool load(handle source, bool) {
    if (source.is_none()) return true;
    std::uintptr_t address = 0;
    int dtype = 0;
    if (!jops::read(source, address, value.extent, dtype, value.batch, value.heads, value.rows,
                    value.width, value.batch_stride, value.head_stride, value.row_stride,
                    value.col_stride)) {
      return false;
    }
    value.data = reinterpret_cast<void*>(address);
    value.dtype = static_cast<jops::Dtype>(dtype);
    return true;
  }
};

// (scale, causal, keep, bias)
template <>
struct type_caster<jops::Scores> {
  PYBIND11_TYPE_CASTER(jops::Scores, const_name("Scores"));
  bool load(handle source, bool) {
    return jops::read(source, value.scale, value.causal, value.keep, value.bias);
  }
};

// (code, a, b, c)
template <>
struct type_caster<jops::Act> {
  PYBIND11_TYPE_CASTER(jops::Act, const_name("Act"));
  bool load(handle source, bool) {
    int code = 0;
    if (!jops::read(source, code, value.a, value.b, value.c)) return false;
    value.code = static_cast<jops::Activation>(code);
    return true;
  }
};

// (p, address of the seeds, batch), or None
template <>
struct type_caster<jops::Mask> {
  PYBIND11_TYPE_CASTER(jops::Mask, const_name("Mask"));
  bool load(handle source, bool) {
    if (source.is_none()) return true;
    std::uintptr_t seeds = 0;
    if (!jops::read(source, value.p, seeds, value.batch)) return false;
    value.seeds = reinterpret_cast<const std::int64_t*>(seeds);
    return true;
  }
};

// (outer, n, inner, scale)
template <>
struct type_caster<jops::Rows> {
  PYBIND11_TYPE_CASTER(jops::Rows, const_name("Rows"));
  bool load(handle source, bool) {
    return jops::read(source, value.outer, value.n, value.inner, value.scale);
  }
};

// (eps, centred)
template <>
struct type_caster<jops::Norm> {
  PYBIND11_TYPE_CASTER(jops::Norm, const_name("Norm"));
  bool load(handle source, bool) { return jops::read(source, value.eps, value.centred); }
};

// (address of the classes, their number or -1, probabilities, weight, ignore_index, smoothing)
template <>
struct type_caster<jops::Target> {
  PYBIND11_TYPE_CASTER(jops::Target, const_name("Target"));
  bool load(handle source, bool) {
    std::uintptr_t classes = 0;
    if (!jops::read(source, classes, value.rows, value.probabilities, value.weight,
                    value.ignore_index, value.smoothing)) {
      return false;
    }
    value.classes = reinterpret_cast<const std::int64_t*>(classes);
    return true;
  }
};

// (address, extent, dtype, n, three sizes, three strides)
template <>
struct type_caster<jops::Grid> {
  PYBIND11_TYPE_CASTER(jops::Grid, const_name("Grid"));
  bool load(handle source, bool) {
    std::uintptr_t address = 0;
    int dtype = 0;
    auto& [a, b, c] = value.sizes;
    auto& [p, q, r] = value.strides;
    if (!jops::read(source, address, value.extent, dtype, value.n, a, b, c, p, q, r)) return false;
    value.data = reinterpret_cast<void*>(address);
    value.dtype = static_cast<jops::Dtype>(dtype);
    return true;
  }
};

// (outer, channels, inner, groups, eps, fixed)
template <>
struct type_caster<jops::Groups> {
  PYBIND11_TYPE_CASTER(jops::Groups, const_name("Groups"));
  bool load(handle source, bool) {
    return jops::read(source, value.outer, value.channels, value.inner, value.groups, value.eps,
                      value.fixed);
  }
};

// (interleaved, inverse)
template <>
struct type_caster<jops::Rotation> {
  PYBIND11_TYPE_CASTER(jops::Rotation, const_name("Rotation"));
  bool load(handle source, bool) { return jops::read(source, value.interleaved, value.inverse); }
};

// the number of threads, or (stream, address of the workspace, its bytes)
template <>
struct type_caster<jops::Exec> {
  PYBIND11_TYPE_CASTER(jops::Exec, const_name("Exec"));
  bool load(handle source, bool) {
    if (!isinstance<tuple>(source)) {
      value.threads = source.cast<int>();
      return true;
    }
    std::uintptr_t workspace = 0;
    if (!jops::read(source, value.stream, workspace, value.workspace_bytes)) return false;
    value.workspace = reinterpret_cast<void*>(workspace);
    return true;
  }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(JOPS_MODULE, m, py::mod_gil_not_used()) {
  const jops::Kernels& k = jops::kernels();
  const auto def = [&m](const char* name, auto kernel) {
    m.def(name, kernel, py::call_guard<py::gil_scoped_release>());
  };
  def("activation", k.activation);
  def("activation_vjp", k.activation_vjp);
  def("activation_jvp", k.activation_jvp);
  def("activation_vjp_vjp", k.activation_vjp_vjp);
  def("activation_vjp_jvp", k.activation_vjp_jvp);
  def("activation_vjp_sum", k.activation_vjp_sum);
  def("gated", k.gated);
  def("gated_jvp", k.gated_jvp);
  def("gated_vjp", k.gated_vjp);
  def("gated_vjp_vjp", k.gated_vjp_vjp);
  def("gated_vjp_jvp", k.gated_vjp_jvp);
  def("dropout", k.dropout);
  def("dropout_add", k.dropout_add);
  def("softmax", k.softmax);
  def("softmax_vjp", k.softmax_vjp);
  def("softmax_jvp", k.softmax_jvp);
  def("softmax_vjp_vjp", k.softmax_vjp_vjp);
  def("softmax_vjp_jvp", k.softmax_vjp_jvp);
  def("log_softmax", k.log_softmax);
  def("log_softmax_vjp", k.log_softmax_vjp);
  def("log_softmax_tangent", k.log_softmax_tangent);
  def("log_softmax_jvp", k.log_softmax_jvp);
  def("log_softmax_vjp_vjp", k.log_softmax_vjp_vjp);
  def("log_softmax_vjp_jvp", k.log_softmax_vjp_jvp);
  def("softmax_dropout", k.softmax_dropout);
  def("softmax_dropout_vjp", k.softmax_dropout_vjp);
  def("softmax_dropout_jvp", k.softmax_dropout_jvp);
  def("norm", k.norm);
  def("norm_jvp", k.norm_jvp);
  def("norm_vjp", k.norm_vjp);
  def("norm_vjp_jvp", k.norm_vjp_jvp);
  def("cross_entropy", k.cross_entropy);
  def("cross_entropy_jvp", k.cross_entropy_jvp);
  def("cross_entropy_vjp", k.cross_entropy_vjp);
  def("cross_entropy_vjp_jvp", k.cross_entropy_vjp_jvp);
  def("group_norm", k.group_norm);
  def("group_norm_jvp", k.group_norm_jvp);
  def("group_norm_vjp", k.group_norm_vjp);
  def("group_norm_vjp_jvp", k.group_norm_vjp_jvp);
  def("attention", k.attention);
  def("attention_jvp", k.attention_jvp);
  def("attention_vjp", k.attention_vjp);
  def("attention_vjp_jvp", k.attention_vjp_jvp);
  def("rotary", k.rotary);
  def("linear", k.linear);
  def("linear_act_dropout", k.linear_act_dropout);
  def("linear_act_dropout_jvp", k.linear_act_dropout_jvp);
  def("linear_act_dropout_vjp", k.linear_act_dropout_vjp);
  def("linear_vjp", k.linear_vjp);
  def("column_sum", k.column_sum);

  m.def("sum_workspace", k.sum_workspace);
  m.def("group_norm_workspace", k.group_norm_workspace);

  m.attr("version") = JOPS_VERSION;
  jops::add_facts(m);
  m.def("dtypes", [] {
    py::dict d;
    for (int code = 0; code < 4; ++code) d[jops::dtype_name(static_cast<jops::Dtype>(code))] = code;
    return d;
  });
  m.def("activations", [] {
    py::dict d;
    for (int code = 0; code < static_cast<int>(jops::Activation::kCount); ++code) {
      d[jops::activation_name(static_cast<jops::Activation>(code))] = code;
    }
    return d;
  });
}
