// SPDX-License-Identifier: Apache-2.0
// The module glimpse_kernels._C: one function per op (bind_<op>.cpp), and the switches of the library.
#include <cctype>
#include <cstdlib>
#include <string>
#include <vector>

#include "glimpse/threads.h"
#include "python/bind.h"

namespace glimpse::python {

#define X(op) void bind_##op(py::module_& m);
#include "glimpse_ops.inc"
#undef X
void bind_recording(py::module_& m);
#ifdef GLIMPSE_WITH_CUDA
#define X(op) void bind_cuda_##op(py::module_& m);
#include "glimpse_cuda_ops.inc"
#undef X

// One function per op, as for the CPU, with stream, workspace and its bytes before the other arguments.
void bind_cuda(py::module_& m) {
#define X(op) bind_cuda_##op(m);
#include "glimpse_cuda_ops.inc"
#undef X
  m.def("missing", &glimpse_cuda_missing, "Why nothing runs on the current device; None if it does.");
}
#endif

namespace {

void set_isa(const std::string& name) {
  switch (glimpse_set_isa(name.c_str())) {
    case GLIMPSE_OK:
      return;
    case GLIMPSE_UNSUPPORTED:
      throw std::runtime_error(glimpse_last_error());
    default:
      throw py::value_error(glimpse_last_error());
  }
}

// Without spaces around it and in lower case, as environment variables are read everywhere in this package.
std::string normalised(const char* text) {
  std::string name;
  for (const char* c = text; *c != '\0'; ++c) name += static_cast<char>(std::tolower(static_cast<unsigned char>(*c)));
  const size_t begin = name.find_first_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : name.substr(begin, name.find_last_not_of(" \t\r\n") + 1 - begin);
}

std::vector<int64_t> thread_ids(int64_t tasks) {
  std::vector<int64_t> ids(static_cast<size_t>(tasks > 0 ? tasks : 0));
  py::gil_scoped_release release;
  glimpse_thread_ids(ids.data(), static_cast<int64_t>(ids.size()));
  return ids;
}

}  // namespace
}  // namespace glimpse::python

PYBIND11_MODULE(_C, m) {
  using namespace glimpse::python;
  m.doc() = "Compiled CPU kernels. Functions take raw addresses; the checked face is glimpse_kernels.";
  m.def("isa", &glimpse_isa, "Instruction set in use.");
  m.def("set_isa", &set_isa, "auto, avx512bf16, avx512, avx2 or baseline; ValueError, RuntimeError if not here.");
  m.def("num_threads", &glimpse_num_threads, "Threads a kernel called from this thread uses.");
  m.def("set_num_threads", &glimpse_set_num_threads, "Fixes the number of threads; 0: as torch.set_num_threads says.");
  m.def("thread_pool", &glimpse_thread_pool, "Which pool the kernels run on.");
  m.def("thread_ids", [](int64_t tasks) {
    py::list result;
    for (const int64_t id : thread_ids(tasks)) result.append(id);
    return result;
  });
#define X(op) bind_##op(m);
#include "glimpse_ops.inc"
#undef X
  bind_recording(m);
  m.attr("cuda_build") = GLIMPSE_CUDA_BUILD;
#ifdef GLIMPSE_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels, launched on a stream.");
  bind_cuda(cuda);
#endif
  const char* wanted = std::getenv("GLIMPSE_CPU_ISA");
  if (wanted != nullptr) {
    try {
      set_isa(normalised(wanted));
    } catch (const std::exception& error) {
      throw py::import_error(std::string("GLIMPSE_CPU_ISA: ") + error.what());
    }
  }
}
