// SPDX-License-Identifier: Apache-2.0
// Failure reporting for the kernels.
#pragma once

#include "glimpse/common.h"

namespace glimpse {

// Stores a printf-style text for glimpse_last_error() and returns `status`.
glimpse_status fail(glimpse_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace glimpse
