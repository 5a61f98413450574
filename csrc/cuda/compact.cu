// SPDX-License-Identifier: Apache-2.0
// All layers' keys and values and all pairs of rows in one launch.
//
// Everything is a copy of the same kind: planes (layers, or the rows of a transposed buffer) of rows that are so many units long, a unit
// being the widest of 16, 8, 4, 2 and 1 bytes that divides addresses, strides and sizes. A warp takes a task of its own: up to 32
// neighbouring entries of the index, one a lane, of one plane; of long rows a piece. It reads its entries once and hands them round by
// shuffles. Lanes follow each other along the rows, and each loads eight units before it stores the first.
//
// How many entries are alive is known to the device alone, so there are tasks for all of them; one whose entries are dead ends
// when it has read them, and dead entries behind the last live one cost nothing.
#include "glimpse/compact.h"

#include "cuda/kernel.cuh"

namespace glimpse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kFlight = 8;           // units that a lane has under way
constexpr int kPass = 32 * kFlight;  // of a warp
constexpr int kMostPasses = 4;       // of a task
constexpr int kTasksOfProcessor = 64;
constexpr int kShift = 21;  // of the reciprocal of a number up to kPass: exact for what is below 32 times this number

struct Copy {
  const unsigned char* src;
  unsigned char* dst;
  int64_t src_plane, src_row, dst_plane, dst_row;  // strides in bytes
  int64_t units;                                   // of a row
  int32_t src_rows, dst_rows;
  uint32_t first, end;      // its tasks: plane by plane, in a plane group of entries by group, in a group piece by piece
  uint32_t groups, pieces;
  int32_t entries, piece;   // of a task: entries, and units of a row
  uint32_t reciprocal;      // of piece, in units of 2^-kShift
  int16_t unit, to_slots;
};

template <int N>
struct Copies {
  const int32_t* index;
  const int32_t* slots;
  int32_t count;
  uint32_t tasks;
  Copy copies[N];
};
constexpr int kFew = 8, kMany = 32;
static_assert(sizeof(Copies<kMany>) <= 4096, "the parameters of a kernel");

template <class Unit>
__device__ __forceinline__ Unit load(const unsigned char* from) {
  if constexpr (sizeof(Unit) == 16) {
    return load_16_streaming(from);
  } else {
    return *reinterpret_cast<const Unit*>(from);
  }
}

template <class Unit>
__device__ __forceinline__ void store(unsigned char* to, Unit x) {
  if constexpr (sizeof(Unit) == 16) {
    store_16(to, x);
  } else {
    *reinterpret_cast<Unit*>(to) = x;
  }
}

// src, dst: where row 0 of the piece begins. row, to: of this lane's entry; row is negative for a dead one. limit: units of all entries up to
// the last live one; `width` of the `piece` units of a row are there.
template <class Unit>
__device__ __forceinline__ void move(const Copy& c, const unsigned char* src, unsigned char* dst, int width, int row, int to,
                                     int limit) {
  const int lane = static_cast<int>(threadIdx.x % 32), piece = c.piece;
  const unsigned reciprocal = c.reciprocal;
  for (int start = 0; start < limit; start += kPass) {
    Unit held[kFlight];
    bool live[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int at = start + 32 * i + lane;
      const int entry = static_cast<int>(static_cast<unsigned>(at) * reciprocal >> kShift), column = at - entry * piece;
      const int from = __shfl_sync(kAll, row, entry);
      live[i] = at < limit && column < width && from >= 0;
      held[i] = Unit{};
      if (live[i]) held[i] = load<Unit>(src + (from * c.src_row + column * static_cast<int>(sizeof(Unit))));
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int at = start + 32 * i + lane;
      const int entry = static_cast<int>(static_cast<unsigned>(at) * reciprocal >> kShift), column = at - entry * piece;
      const int target = __shfl_sync(kAll, to, entry);
      if (live[i]) store(dst + (target * c.dst_row + column * static_cast<int>(sizeof(Unit))), held[i]);
    }
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads, 3) compact_kernel(const __grid_constant__ Copies<N> given) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t task = blockIdx.x * kWarps + threadIdx.x / 32;
  if (task >= given.tasks) return;
  int which = 0;
  while (task >= given.copies[which].end) ++which;
  const Copy& c = given.copies[which];
  const uint32_t own = task - c.first, stripe = own / c.pieces;
  const int64_t plane = stripe / c.groups;
  const int64_t entry = static_cast<int64_t>(stripe % c.groups) * c.entries + lane;
  int row = -1, to = -1;
  if (lane < c.entries && entry < given.count) {
    row = given.index[entry];
    to = c.to_slots ? given.slots[entry] : static_cast<int>(entry);
    if (row >= c.src_rows || to < 0 || to >= c.dst_rows) row = -1;
  }
  const unsigned alive = __ballot_sync(kAll, row >= 0);
  if (alive == 0) return;
  const int limit = (32 - __clz(static_cast<int>(alive))) * c.piece;
  const int64_t column = static_cast<int64_t>(own % c.pieces) * c.piece;
  const int width = static_cast<int>(min(static_cast<int64_t>(c.piece), c.units - column));
  const unsigned char* const src = c.src + plane * c.src_plane + column * c.unit;
  unsigned char* const dst = c.dst + plane * c.dst_plane + column * c.unit;
  switch (c.unit) {
    case 16:
      return move<uint4>(c, src, dst, width, row, to, limit);
    case 8:
      return move<uint2>(c, src, dst, width, row, to, limit);
    case 4:
      return move<uint32_t>(c, src, dst, width, row, to, limit);
    case 2:
      return move<uint16_t>(c, src, dst, width, row, to, limit);
    default:
      return move<uint8_t>(c, src, dst, width, row, to, limit);
  }
}

bool empty(const glimpse_compact_copy& c) {
  return c.layers <= 0 || c.src_rows <= 0 || c.dst_rows <= 0 || c.row_bytes <= 0;
}

// Bytes that divide all of these.
int unit_of(const glimpse_compact_copy& c) {
  uint64_t all = 16 | reinterpret_cast<uintptr_t>(c.src) | reinterpret_cast<uintptr_t>(c.dst) | static_cast<uint64_t>(c.row_bytes);
  if (c.src_rows > 1) all |= static_cast<uint64_t>(c.src_stride);
  if (c.dst_rows > 1) all |= static_cast<uint64_t>(c.dst_stride);
  if (c.layers > 1) all |= static_cast<uint64_t>(c.src_layer_stride) | static_cast<uint64_t>(c.dst_layer_stride);
  return static_cast<int>(all & (~all + 1));
}

struct Pieces {
  int64_t units, count, piece;

  Pieces(const glimpse_compact_copy& c, int unit)
      : units(c.row_bytes / unit), count(ceil_div<int64_t>(units, kPass)), piece(ceil_div(units, count)) {}
};

// Passes of a task: more where there are more tasks than the chip can run side by side, so that the entries are read less often.
int64_t passes_of_task(const glimpse_compact_params& p) {
  int64_t passes = 0;
  for (int64_t i = 0; i < p.copy_count; ++i) {
    const glimpse_compact_copy& c = p.copies[i];
    if (empty(c)) continue;
    const Pieces pieces(c, unit_of(c));
    passes += c.layers * pieces.count * ceil_div<int64_t>(p.count * pieces.piece, kPass);
  }
  const int64_t wanted = passes / (int64_t{chip().multiprocessors} * kTasksOfProcessor);
  return wanted < 1 ? 1 : wanted < kMostPasses ? wanted : kMostPasses;
}

// The launch copy of c, its tasks still counted from 0; how many it has is returned.
int64_t plan(const glimpse_compact_copy& c, int64_t count, int64_t passes, Copy& out) {
  const int64_t most = INT32_MAX;
  const int unit = unit_of(c);
  const Pieces pieces(c, unit);
  const int64_t fitting = passes * kPass / pieces.piece;
  out.src = static_cast<const unsigned char*>(c.src);
  out.dst = static_cast<unsigned char*>(c.dst);
  out.src_plane = c.src_layer_stride;
  out.src_row = c.src_stride;
  out.dst_plane = c.dst_layer_stride;
  out.dst_row = c.dst_stride;
  out.units = pieces.units;
  out.src_rows = static_cast<int32_t>(c.src_rows < most ? c.src_rows : most);
  out.dst_rows = static_cast<int32_t>(c.dst_rows < most ? c.dst_rows : most);
  out.entries = static_cast<int32_t>(fitting < 32 ? fitting : 32);
  out.piece = static_cast<int32_t>(pieces.piece);
  out.pieces = static_cast<uint32_t>(pieces.count);
  out.groups = static_cast<uint32_t>(ceil_div<int64_t>(count, out.entries));
  out.reciprocal = ((1u << kShift) + static_cast<uint32_t>(pieces.piece) - 1) / static_cast<uint32_t>(pieces.piece);
  out.unit = static_cast<int16_t>(unit);
  out.to_slots = c.to_slots != 0;
  return c.layers * out.groups * pieces.count;
}

template <int N>
glimpse_status launch_copies(const glimpse_compact_params& p, const glimpse_cuda_call& call, int64_t passes) {
  Copies<N> given;
  given.index = p.index;
  given.slots = p.slots;
  given.count = static_cast<int32_t>(p.count);
  for (int64_t next = 0; next < p.copy_count;) {
    int used = 0;
    int64_t tasks = 0;
    for (; next < p.copy_count && used < N; ++next) {
      if (empty(p.copies[next])) continue;
      const int64_t own = plan(p.copies[next], p.count, passes, given.copies[used]);
      if (own > INT32_MAX) return fail(GLIMPSE_UNSUPPORTED, "compact: copies[%lld]: too large", static_cast<long long>(next));
      if (tasks + own > INT32_MAX) break;
      given.copies[used].first = static_cast<uint32_t>(tasks);
      given.copies[used++].end = static_cast<uint32_t>(tasks += own);
    }
    if (used == 0) break;
    given.tasks = static_cast<uint32_t>(tasks);
    Launch how;
    how.grid.x = static_cast<unsigned>(ceil_div<int64_t>(tasks, kWarps));
    how.block.x = kThreads;
    how.stream = call.stream;
    if (const glimpse_status status = launch("compact", how, compact_kernel<N>, given); status != GLIMPSE_OK) return status;
  }
  return GLIMPSE_OK;
}

}  // namespace
}  // namespace glimpse::cuda

extern "C" glimpse_status glimpse_cuda_compact(const glimpse_compact_params* p, const glimpse_cuda_call* call) {
  using namespace glimpse::cuda;
  if (p->count < 0 || p->count > INT32_MAX)
    return glimpse::fail(GLIMPSE_INVALID, "compact: index: expected 0 to %d entries, found %lld", INT32_MAX,
                         static_cast<long long>(p->count));
  if (p->count == 0) return GLIMPSE_OK;
  for (int64_t i = 0; i < p->copy_count; ++i)
    if (p->copies[i].to_slots && p->slots == nullptr)
      return glimpse::fail(GLIMPSE_INVALID, "compact: slots: expected a pointer with copies that go to slots, found NULL");
  const int64_t passes = passes_of_task(*p);
  return p->copy_count <= kFew ? launch_copies<kFew>(*p, *call, passes) : launch_copies<kMany>(*p, *call, passes);
}
