/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_COMPACT_H
#define GLIMPSE_COMPACT_H

#include "glimpse/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One set of rows to gather, in `layers` layers. Strides and sizes in BYTES: these are copies, the dtype does not matter. */
typedef struct glimpse_compact_copy {
  const void* src; /* [layers, src_rows] rows of row_bytes */
  void* dst;       /* [layers, dst_rows] rows of row_bytes */
  int64_t layers, src_rows, dst_rows, row_bytes;
  int64_t src_layer_stride, src_stride;
  int64_t dst_layer_stride, dst_stride;
  int32_t to_slots; /* 1: entry i goes to row slots[i]; 0: to row i */
} glimpse_compact_copy;

/* Entry i copies source row index[i]; an index or slot of -1 skips it. Sources and destinations must not overlap. */
typedef struct glimpse_compact_params {
  const int32_t* index; /* [count] */
  const int32_t* slots; /* [count], NULL if no copy goes to slots */
  int64_t count;
  const glimpse_compact_copy* copies; /* [copy_count] */
  int64_t copy_count;
} glimpse_compact_params;

/* GLIMPSE_INVALID for an index or a slot outside of its rows. */
GLIMPSE_API glimpse_status glimpse_compact(const glimpse_compact_params* p);
/* An index or a slot outside of its rows is skipped, any negative one too: a device cannot say what is wrong. `copies` is host memory. One
 * launch for 32 copies. */
GLIMPSE_API glimpse_status glimpse_cuda_compact(const glimpse_compact_params* p, const glimpse_cuda_call* call);

#ifdef __cplusplus
}
#endif

#endif
