/* SPDX-License-Identifier: Apache-2.0 */
/* A list of op calls that runs again in one call: what a CUDA graph is to a GPU.
 *
 * Between begin and end, every op of the flat interface that this thread calls runs as always and, if it succeeds, is
 * appended to the recording with a copy of its params struct. Replay runs the list in order. Only addresses are kept: what
 * they point to is read again by each replay and must still be there, so whatever changes from one replay to the next
 * lies in memory (lengths, slots, tables), never in a number of the params.
 *
 * Ops whose params point at more than tensors, at arrays that live for the call only, are refused while recording
 * (GLIMPSE_UNSUPPORTED): compact. */
#ifndef GLIMPSE_RECORDING_H
#define GLIMPSE_RECORDING_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct glimpse_recording glimpse_recording;

/* Starts a new recording on this thread. GLIMPSE_INVALID if the thread records already. */
GLIMPSE_API glimpse_status glimpse_recording_begin(glimpse_recording** recording);

/* Stops it. GLIMPSE_INVALID unless this thread is recording it. */
GLIMPSE_API glimpse_status glimpse_recording_end(glimpse_recording* recording);

/* Runs all ops on the instruction set and threads in force now; stops at the first failure, gives its status and says in
 * glimpse_last_error() which op it was. GLIMPSE_INVALID while it is, or this thread is, still recording. */
GLIMPSE_API glimpse_status glimpse_recording_replay(const glimpse_recording* recording);

/* Ops recorded so far, and the name of one of them (NULL if there are not so many). */
GLIMPSE_API int64_t glimpse_recording_size(const glimpse_recording* recording);
GLIMPSE_API const char* glimpse_recording_op(const glimpse_recording* recording, int64_t number);

/* Frees it; ends it first if this thread is recording it. GLIMPSE_INVALID, and nothing is freed, while another thread
 * records it. NULL is allowed. */
GLIMPSE_API glimpse_status glimpse_recording_free(glimpse_recording* recording);

#ifdef __cplusplus
}
#endif

#endif
