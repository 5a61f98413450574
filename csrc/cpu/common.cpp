// SPDX-License-Identifier: Apache-2.0
#include "cpu/common.h"

#include <cstdarg>
#include <cstdio>

namespace glimpse {
namespace {
thread_local char last_error[512];
}

glimpse_status fail(glimpse_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace glimpse

extern "C" const char* glimpse_last_error(void) { return glimpse::last_error; }
