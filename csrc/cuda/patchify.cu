// SPDX-License-Identifier: Apache-2.0
// From bytes to patches in one launch. A byte of a channel has 256 values to become; each block works them out, in the arithmetic of the
// definition (every step of it is rounded as IEEE 754 says, so the result is the same bit for bit on every device), while its part of the
// picture is on the way.
//
// That part is a few merge groups that lie side by side: runs of picture rows go to shared memory as they are. A thread then looks up
// neighbours of one channel, as many as it stores at once, and stores them into every frame.
#include "glimpse/patchify.h"

#include "cuda/kernel.cuh"

namespace glimpse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 3;
constexpr int64_t kTileBytes = 8 << 10;      // of the picture that a block takes, but at least a group
constexpr int64_t kBlocksOfProcessor = 4;
constexpr int64_t kMostShared = 96 << 10;

// A number to divide by: KNOWN to the compiler, or, for 0, given with its reciprocal, and then for numerators u of (u + 1) * number <= 2^32.
template <int KNOWN>
struct Divisor {
  explicit Divisor(int64_t) {}
  __device__ int number() const { return KNOWN; }
  __device__ int divide(int u) const { return static_cast<int>(static_cast<unsigned>(u) / KNOWN); }
};
template <>
struct Divisor<0> {
  int known;
  uint32_t reciprocal;

  explicit Divisor(int64_t n) : known(static_cast<int>(n)), reciprocal(0xffffffffu / static_cast<uint32_t>(n)) {}
  __device__ int number() const { return known; }
  __device__ int divide(int u) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(u) + 1) * reciprocal >> 32);
  }
};

// WIDTH: neighbours that a thread stores at once; divides patch * patch.
template <int PATCH, int MERGE, int WIDTH>
struct Shape {
  const uint8_t* image;
  int64_t image_stride;      // bytes from one picture row to the next
  int64_t groups_x, tiles_x; // along a picture row
  int tile;                  // groups of a tile; the last one of a row may have fewer
  int frames;
  bool words;  // every run of a picture row begins and ends at a multiple of 4 bytes
  Divisor<PATCH> patch;
  Divisor<MERGE> merge;
  Divisor<MERGE * MERGE> members;
  Divisor<PATCH * PATCH / WIDTH> stores;  // of a channel of a patch in one frame
  Divisor<0> line, line_words;            // of a tile
  float mean[kChannels], std[kChannels];
  double rescale;
};

template <class T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Neighbours {
  T x[WIDTH];
};

template <class T, int PATCH, int MERGE, int WIDTH>
__global__ void __launch_bounds__(kThreads)
    patchify_kernel(T* out, const __grid_constant__ Shape<PATCH, MERGE, WIDTH> shape) {
  using Table = T[kChannels][256];
  static_assert(kMostShared + sizeof(Table) <= 99 << 10, "what a block can have on every chip");
  SHARED(Table, table);
  unsigned char* const bytes = dynamic_shared();  // [merge * patch] runs
  const int thread = static_cast<int>(threadIdx.x);
  const int patch = shape.patch.number(), side = shape.merge.number() * patch, line = shape.line.number();
  const int64_t tile_y = blockIdx.x / static_cast<unsigned>(shape.tiles_x);
  const int64_t left = (blockIdx.x - tile_y * shape.tiles_x) * shape.tile;
  const int groups = static_cast<int>(min(static_cast<int64_t>(shape.tile), shape.groups_x - left));
  const uint8_t* const corner = shape.image + tile_y * side * shape.image_stride + left * side * kChannels;
  const int live = groups * side * kChannels;  // bytes of a run that are there

  if (shape.words) {
    const int words = shape.line_words.number();
#pragma unroll 4
    for (int i = thread; i < side * words; i += kThreads) {
      const int y = shape.line_words.divide(i), x = 4 * (i - y * words);
      if (x < live) reinterpret_cast<uint32_t*>(bytes)[i] = __ldg(reinterpret_cast<const uint32_t*>(corner + y * shape.image_stride + x));
    }
  } else {
#pragma unroll 4
    for (int i = thread; i < side * line; i += kThreads) {
      const int y = shape.line.divide(i), x = i - y * line;
      if (x < live) bytes[i] = __ldg(corner + y * shape.image_stride + x);
    }
  }
  static_assert(kThreads == 256, "a thread for each value of a byte");
  const float scaled = static_cast<float>(thread * shape.rescale);
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    table[c][thread] = from_float<T>(__fdiv_rn(__fsub_rn(scaled, shape.mean[c]), shape.std[c]));
  __syncthreads();

  const int stores = shape.stores.number(), area = patch * patch, members = shape.members.number();
  const int64_t first = (tile_y * shape.groups_x + left) * members;  // patch of the result
  T* const rows = out + first * kChannels * shape.frames * area;
  const int count = groups * members * kChannels * stores;
#pragma unroll 2
  for (int i = thread; i < count; i += kThreads) {
    const int plane = shape.stores.divide(i), pixel = (i - plane * stores) * WIDTH;  // plane: channel of a patch
    const int which = plane / kChannels, channel = plane % kChannels;
    const int group = shape.members.divide(which), member = which - group * members;
    const int row = shape.merge.divide(member), column = member - row * shape.merge.number();
    const unsigned char* const begin = bytes + row * patch * line + (group * side + column * patch) * kChannels + channel;
    Neighbours<T, WIDTH> found;
#pragma unroll
    for (int n = 0; n < WIDTH; ++n) {
      const int y = shape.patch.divide(pixel + n), x = pixel + n - y * patch;
      found.x[n] = table[channel][begin[y * line + x * kChannels]];
    }
    T* to = rows + static_cast<int64_t>(plane) * shape.frames * area + pixel;
    for (int frame = 0; frame < shape.frames; ++frame, to += area) *reinterpret_cast<Neighbours<T, WIDTH>*>(to) = found;
  }
}

template <class T, int PATCH, int MERGE, int WIDTH>
glimpse_status run(const glimpse_patchify_params& p, const glimpse_cuda_call& call) {
  const int64_t side = p.patch_size * p.merge_size;
  const int64_t groups_x = p.out_width / side, groups_y = p.out_height / side, bytes = side * side * kChannels;
  // Several groups a block, but no fewer blocks than keep the chip busy.
  int64_t tile = kTileBytes / bytes, busy = groups_x * groups_y / (kBlocksOfProcessor * chip().multiprocessors);
  if (tile > busy) tile = busy;
  if (tile > groups_x) tile = groups_x;
  if (tile < 1) tile = 1;
  const int64_t tiles_x = ceil_div(groups_x, tile), line = tile * side * kChannels;
  if (tiles_x * groups_y > INT32_MAX || p.frames > INT32_MAX) return fail(GLIMPSE_UNSUPPORTED, "patchify: image: too large");
  const uint64_t begins = reinterpret_cast<uintptr_t>(p.image) | static_cast<uint64_t>(p.image_stride) | static_cast<uint64_t>(side);
  const Shape<PATCH, MERGE, WIDTH> shape{p.image,
                                         p.image_stride,
                                         groups_x,
                                         tiles_x,
                                         static_cast<int>(tile),
                                         static_cast<int>(p.frames),
                                         begins % 4 == 0,
                                         Divisor<PATCH>(p.patch_size),
                                         Divisor<MERGE>(p.merge_size),
                                         Divisor<MERGE * MERGE>(p.merge_size * p.merge_size),
                                         Divisor<PATCH * PATCH / WIDTH>(p.patch_size * p.patch_size / WIDTH),
                                         Divisor<0>(line),
                                         Divisor<0>(ceil_div<int64_t>(line, 4)),
                                         {p.mean[0], p.mean[1], p.mean[2]},
                                         {p.std[0], p.std[1], p.std[2]},
                                         p.rescale};
  Launch how;
  how.grid.x = static_cast<unsigned>(tiles_x * groups_y);
  how.block.x = kThreads;
  how.shared = static_cast<size_t>(tile * bytes);
  how.stream = call.stream;
  return launch("patchify", how, patchify_kernel<T, PATCH, MERGE, WIDTH>, static_cast<T*>(p.out), shape);
}

template <class T>
glimpse_status run(const glimpse_patchify_params& p, const glimpse_cuda_call& call) {
  const bool wide = p.patch_size % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % (4 * sizeof(T)) == 0;
  if (!wide) return run<T, 0, 0, 1>(p, call);
  return p.patch_size == 14 && p.merge_size == 2 ? run<T, 14, 2, 4>(p, call) : run<T, 0, 0, 4>(p, call);
}

}  // namespace
}  // namespace glimpse::cuda

extern "C" glimpse_status glimpse_cuda_patchify(const glimpse_patchify_params* p, const glimpse_cuda_call* call) {
  using namespace glimpse::cuda;
  const int64_t side = p->patch_size * p->merge_size;
  if (p->patch_size < 1 || p->merge_size < 1 || p->frames < 1 || p->out_height % side != 0 || p->out_width % side != 0)
    return glimpse::fail(GLIMPSE_INVALID, "patchify: expected an output size in multiples of patch_size * merge_size");
  if (p->height != p->out_height || p->width != p->out_width)
    return glimpse::fail(GLIMPSE_UNSUPPORTED, "patchify: the CUDA kernel cuts pictures that have their size; resize first");
  if (p->out_height == 0 || p->out_width == 0) return GLIMPSE_OK;
  if (side * side * kChannels > kMostShared)
    return glimpse::fail(GLIMPSE_UNSUPPORTED, "patchify: patch_size * merge_size: expected at most 181, found %lld",
                         static_cast<long long>(side));
  return by_dtype("patchify", p->dtype, [&](auto zero) { return run<decltype(zero)>(*p, *call); });
}
