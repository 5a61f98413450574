// SPDX-License-Identifier: Apache-2.0
#include "glimpse/recording.h"

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/common.h"
#include "cpu/parallel.h"
#include "cpu/recording.h"

namespace {

struct Step {
  const char* name;
  glimpse::Runner run;
  size_t at;  // of its params, in units of max_align_t
};

}  // namespace

struct glimpse_recording {
  std::vector<Step> steps;
  std::vector<std::max_align_t> params;
  int64_t regions = 0;  // calls with work for several threads, when it was recorded
  std::atomic<bool> open{true};
};

namespace glimpse {
namespace {

thread_local glimpse_recording* current = nullptr;

// Their params point at arrays that the caller drops after the call.
const char* const not_recorded[] = {"compact"};

bool can_be_recorded(const char* name) {
  for (const char* other : not_recorded)
    if (std::strcmp(name, other) == 0) return false;
  return true;
}

glimpse_status run_steps(const glimpse_recording& recording) {
  for (const Step& step : recording.steps) {
    const glimpse_status status = step.run(&recording.params[step.at]);
    if (status == GLIMPSE_OK) continue;
    char why[384];  // fail() writes to the text that it would read
    std::snprintf(why, sizeof why, "%s", glimpse_last_error());
    return fail(status, "recording: op %zu of %zu (%s): %s", static_cast<size_t>(&step - recording.steps.data()) + 1,
                recording.steps.size(), step.name, why);
  }
  return GLIMPSE_OK;
}

}  // namespace

bool recording() { return current != nullptr; }

glimpse_status run_and_record(const char* name, Runner run, const void* params, size_t bytes) {
  glimpse_recording& r = *current;
  if (!can_be_recorded(name))
    return fail(GLIMPSE_UNSUPPORTED, "%s: cannot be recorded: its params point at memory of the call", name);
  const int64_t before = parallel_calls();
  const glimpse_status status = run(params);
  if (status != GLIMPSE_OK) return status;
  r.regions += parallel_calls() - before;
  const size_t at = r.params.size(), unit = sizeof(std::max_align_t);
  try {
    r.params.resize(at + (bytes + unit - 1) / unit);
    r.steps.push_back({name, run, at});
  } catch (const std::bad_alloc&) {
    return fail(GLIMPSE_OUT_OF_MEMORY, "%s: no memory to record it", name);
  }
  std::memcpy(&r.params[at], params, bytes);
  return GLIMPSE_OK;
}

}  // namespace glimpse

extern "C" glimpse_status glimpse_recording_begin(glimpse_recording** recording) {
  if (recording == nullptr) return glimpse::fail(GLIMPSE_INVALID, "recording: no place for it");
  *recording = nullptr;
  if (glimpse::current != nullptr)
    return glimpse::fail(GLIMPSE_INVALID, "recording: this thread is recording already, and recordings do not nest");
  *recording = new (std::nothrow) glimpse_recording;
  if (*recording == nullptr) return glimpse::fail(GLIMPSE_OUT_OF_MEMORY, "recording: no memory");
  glimpse::current = *recording;
  return GLIMPSE_OK;
}

extern "C" glimpse_status glimpse_recording_end(glimpse_recording* recording) {
  if (recording == nullptr || glimpse::current != recording)
    return glimpse::fail(GLIMPSE_INVALID, "recording: this thread is not recording it");
  glimpse::current = nullptr;
  recording->open.store(false, std::memory_order_release);
  return GLIMPSE_OK;
}

extern "C" glimpse_status glimpse_recording_replay(const glimpse_recording* recording) {
  if (recording == nullptr) return glimpse::fail(GLIMPSE_INVALID, "recording: expected one to replay, found none");
  if (recording->open.load(std::memory_order_acquire))
    return glimpse::fail(GLIMPSE_INVALID, "recording: it has not ended, so it cannot be replayed");
  if (glimpse::current != nullptr)
    return glimpse::fail(GLIMPSE_INVALID, "recording: no replay while this thread is recording");
  if (recording->regions < 2) return glimpse::run_steps(*recording);  // nothing to gain from a team
  struct Call {
    const glimpse_recording& recording;
    glimpse_status status;
  } call{*recording, GLIMPSE_OK};
  glimpse::with_team(
      [](void* context) {
        auto* call = static_cast<Call*>(context);
        call->status = glimpse::run_steps(call->recording);
      },
      &call);
  return call.status;
}

extern "C" int64_t glimpse_recording_size(const glimpse_recording* recording) {
  return recording == nullptr ? 0 : static_cast<int64_t>(recording->steps.size());
}

extern "C" const char* glimpse_recording_op(const glimpse_recording* recording, int64_t number) {
  if (number < 0 || number >= glimpse_recording_size(recording)) return nullptr;
  return recording->steps[static_cast<size_t>(number)].name;
}

extern "C" glimpse_status glimpse_recording_free(glimpse_recording* recording) {
  if (recording == nullptr) return GLIMPSE_OK;
  if (glimpse::current == recording)
    glimpse::current = nullptr;
  else if (recording->open.load(std::memory_order_acquire))
    return glimpse::fail(GLIMPSE_INVALID, "recording: another thread is recording it");
  delete recording;
  return GLIMPSE_OK;
}
