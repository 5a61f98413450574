// SPDX-License-Identifier: Apache-2.0
// The frame of an op file. Such a file is compiled once per instruction set (CMakeLists.txt defines GLIMPSE_ISA_NS and the
// flags). Everything in it but the entry point must have internal linkage: a function with a weak symbol (a template or
// inline function outside an anonymous namespace, most of the standard library) is kept once by the linker, perhaps in
// its AVX-512 version, and then runs on machines without AVX-512. So: no standard containers or algorithms here.
//
//   namespace glimpse::GLIMPSE_ISA_NS {
//   namespace { ... helpers ... }
//   glimpse_status my_op(const glimpse_my_op_params& p) { ... }
//   }
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu/common.h"
#include "cpu/parallel.h"

#ifndef GLIMPSE_ISA_NS
#error "compile through CMakeLists.txt, which names the instruction set"
#endif

#define GLIMPSE_INLINE static inline __attribute__((always_inline))
