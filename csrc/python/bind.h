// SPDX-License-Identifier: Apache-2.0
// For the bind_<op>.cpp files: pointers arrive as integers, failures leave as Python exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#include "glimpse/common.h"

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

}  // namespace glimpse::python
