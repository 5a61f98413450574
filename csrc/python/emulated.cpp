// SPDX-License-Identifier: Apache-2.0
// The module glimpse_kernels._emulated: the functions of _C.cuda, run on the host, and the switches of the emulation. For tests.
#include "glimpse/cuda_emulated.h"

#include <memory>

#include "python/bind.h"

namespace glimpse::python {

#define X(op) void bind_cuda_##op(py::module_& m);
#include "glimpse_cuda_ops.inc"
#undef X

namespace {

// Launches that were captured, to be run again: what a CUDA graph is on a GPU.
struct Graph {
  std::unique_ptr<void, void (*)(void*)> launches{glimpse_emulated_capture_end(), glimpse_emulated_free};
  void replay() { check(glimpse_emulated_replay(launches.get())); }
};

}  // namespace
}  // namespace glimpse::python

PYBIND11_MODULE(_emulated, m) {
  using namespace glimpse::python;
  m.doc() = "The CUDA kernels on the host, thread by thread. Functions take raw addresses; for tests.";
#define X(op) bind_cuda_##op(m);
#include "glimpse_cuda_ops.inc"
#undef X
  m.def("missing", [] { return py::none(); });
  m.def("set_chip", &glimpse_emulated_set_chip, "Compute capability (90) and multiprocessors that launches believe in.");
  m.def("set_order", &glimpse_emulated_set_order, "Of threads and blocks: 0 up, 1 down, more shuffled; -1 another each launch.");
  m.def("launches", &glimpse_emulated_launches, "Launches so far.");
  m.def("capture_begin", &glimpse_emulated_capture_begin, "From now on launches are kept, not run.");
  m.def("capture_end", [] { return std::make_unique<Graph>(); }, "What was kept since capture_begin.");
  py::class_<Graph>(m, "Graph").def("replay", &Graph::replay, "Run the launches, on what memory holds now.");
}
