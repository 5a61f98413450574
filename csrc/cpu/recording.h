// SPDX-License-Identifier: Apache-2.0
// What the entry points need of glimpse/recording.h.
#pragma once

#include <cstddef>

#include "glimpse/common.h"

namespace glimpse {

// Runs an op on whatever instruction set is in use, its params behind a pointer.
using Runner = glimpse_status (*)(const void* params);

// True while the calling thread records.
bool recording();

// Runs the op and appends it to the calling thread's recording. `name` lives as long as the program.
glimpse_status run_and_record(const char* name, Runner run, const void* params, size_t bytes);

}  // namespace glimpse
