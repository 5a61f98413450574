// SPDX-License-Identifier: Apache-2.0
// For the bind_<op>.cpp files: pointers arrive as integers, failures leave as Python exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#include "glimpse/common.h"
#include "glimpse/cuda.h"

namespace glimpse::python {

namespace py = pybind11;

// Address of a tensor's memory; 0 is NULL.
using address = std::uintptr_t;

template <class T = void>
T* pointer(address a) {
  return reinterpret_cast<T*>(a);
}

inline glimpse_dtype dtype_of(int code) { return static_cast<glimpse_dtype>(code); }

// ValueError, TypeError or MemoryError with the kernel's own words unless `status` is GLIMPSE_OK.
inline void check(glimpse_status status) {
  switch (status) {
    case GLIMPSE_OK:
      return;
    case GLIMPSE_UNSUPPORTED:
      throw py::type_error(glimpse_last_error());
    case GLIMPSE_OUT_OF_MEMORY:
      throw std::bad_alloc();
    case GLIMPSE_DEVICE:
      throw std::runtime_error(glimpse_last_error());
    default:
      throw py::value_error(glimpse_last_error());
  }
}

// Runs an op without the GIL; fails as `check` does.
template <class Params>
void call(glimpse_status (*op)(const Params*), const Params& params) {
  glimpse_status status;
  {
    py::gil_scoped_release release;
    status = op(&params);
  }
  check(status);
}

// `pack` turns the arguments of a Python function into the params of an op (or into something that converts to them). One pack serves
// both sides: compiled with GLIMPSE_BIND_CUDA it makes the function of the CUDA module, which takes stream, workspace and its bytes first.
template <class Params, class Packed, class... Args>
void define(py::module_& m, const char* name, glimpse_status (*op)(const Params*), Packed (*pack)(Args...)) {
  m.def(name, [op, pack](Args... args) {
    const Packed packed = pack(args...);
    call<Params>(op, packed);
  });
}

template <class Params, class Packed, class... Args>
void define_cuda(py::module_& m, const char* name, glimpse_status (*op)(const Params*, const glimpse_cuda_call*),
                 Packed (*pack)(Args...)) {
  m.def(name, [op, pack](address stream, address workspace, size_t workspace_bytes, Args... args) {
    const Packed packed = pack(args...);
    const Params& params = packed;
    const glimpse_cuda_call how{pointer(stream), pointer(workspace), workspace_bytes};
    check(op(&params, &how));  // a launch is too short to let go of the GIL
  });
}

// `sizes` makes params of which the sizes alone are set: <op>_workspace(sizes...) in Python tells how many bytes a call of them needs.
template <class Params, class... Args>
void define_workspace(py::module_& m, const char* name, size_t (*workspace)(const Params*), Params (*sizes)(Args...)) {
  m.def(name, [workspace, sizes](Args... args) {
    const Params params = sizes(args...);
    return workspace(&params);
  });
}

}  // namespace glimpse::python

// GLIMPSE_BIND_WORKSPACE, in place of GLIMPSE_BIND, for an op with glimpse_cuda_<op>_workspace: wants a function `sizes` beside `pack`.
#ifdef GLIMPSE_BIND_CUDA
#define GLIMPSE_BIND(op) \
  void bind_cuda_##op(py::module_& m) { define_cuda(m, #op, glimpse_cuda_##op, pack); }
#define GLIMPSE_BIND_WORKSPACE(op)                                           \
  void bind_cuda_##op(py::module_& m) {                                      \
    define_cuda(m, #op, glimpse_cuda_##op, pack);                            \
    define_workspace(m, #op "_workspace", glimpse_cuda_##op##_workspace, sizes); \
  }
#else
#define GLIMPSE_BIND(op) \
  void bind_##op(py::module_& m) { define(m, #op, glimpse_##op, pack); }
#define GLIMPSE_BIND_WORKSPACE(op)                \
  void bind_##op(py::module_& m) {                \
    static_cast<void>(sizes); /* CUDA alone */    \
    define(m, #op, glimpse_##op, pack);           \
  }
#endif
