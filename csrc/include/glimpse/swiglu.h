/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_SWIGLU_H
#define GLIMPSE_SWIGLU_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out = gate / (1 + exp(-gate)) * up. Row strides in elements, rows contiguous. out may be gate or up. */
typedef struct glimpse_swiglu_params {
  const void* gate; /* [rows, cols] */
  const void* up;   /* [rows, cols] */
  void* out;        /* [rows, cols] */
  int64_t rows, cols;
  int64_t gate_stride, up_stride, out_stride;
  glimpse_dtype dtype;
} glimpse_swiglu_params;

GLIMPSE_API glimpse_status glimpse_swiglu(const glimpse_swiglu_params* p);

#ifdef __cplusplus
}
#endif

#endif
