// SPDX-License-Identifier: Apache-2.0
#include "glimpse/recording.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

class Recording {
 public:
  Recording() = default;
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  ~Recording() { glimpse_recording_free(held_); }

  void begin() {
    if (held_ != nullptr) throw py::value_error("recording: it was begun already");
    check(glimpse_recording_begin(&held_));
  }

  void end() { check(glimpse_recording_end(held_)); }

  // Back to an empty recording, which may begin anew.
  void clear() {
    check(glimpse_recording_free(held_));
    held_ = nullptr;
  }

  void replay() const {
    glimpse_status status;
    {
      py::gil_scoped_release release;
      status = glimpse_recording_replay(held_);
    }
    check(status);
  }

  int64_t size() const { return glimpse_recording_size(held_); }

  py::list ops() const {
    py::list names;
    for (int64_t i = 0; i < size(); ++i) names.append(glimpse_recording_op(held_, i));
    return names;
  }

 private:
  glimpse_recording* held_ = nullptr;
};

}  // namespace

void bind_recording(py::module_& m) {
  py::class_<Recording>(m, "Recording", "Op calls of one thread, to run again. See glimpse_kernels.Recording.")
      .def(py::init<>())
      .def("begin", &Recording::begin)
      .def("end", &Recording::end)
      .def("clear", &Recording::clear)
      .def("replay", &Recording::replay)
      .def("ops", &Recording::ops)
      .def("__len__", &Recording::size);
}

}  // namespace glimpse::python
