// SPDX-License-Identifier: Apache-2.0
// Picture to patch rows. A channel has 256 possible values, so normalising is a look-up, exact to the reference's roundings.
// A resize happens on the way: one row of patches at a time, so the resized picture never exists as a whole.
#include "glimpse/patchify.h"

#include "cpu/resample.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

template <class T>
struct Tables {
  T value[3][256];
};

template <class T>
void fill(Tables<T>& tables, const glimpse_patchify_params& p) {
  for (int c = 0; c < 3; ++c)
    for (int v = 0; v < 256; ++v) {
      const float scaled = static_cast<float>(v * p.rescale);
      put(&tables.value[c][v], (scaled - p.mean[c]) / p.std[c]);
    }
}

// Where bytes lie: pixel (y, x, c) at y * row + x * pixel + c * channel.
struct Bytes {
  int64_t row, pixel, channel;
};

template <class T>
GLIMPSE_INLINE void cut(const glimpse_patchify_params& p, const Tables<T>& tables, const uint8_t* corner, Bytes at, T* out) {
  const int64_t size = p.patch_size, area = size * size;
  for (int c = 0; c < 3; ++c, out += p.frames * area) {
    const T* value = tables.value[c];
    for (int64_t y = 0; y < size; ++y) {
      const uint8_t* bytes = corner + y * at.row + c * at.channel;
      for (int64_t x = 0; x < size; ++x) out[y * size + x] = value[bytes[x * at.pixel]];
    }
    for (int64_t frame = 1; frame < p.frames; ++frame)
      memcpy(out + frame * area, out, static_cast<size_t>(area) * sizeof(T));
  }
}

// One row of patches; `bytes` is its upper left corner.
template <class T>
GLIMPSE_INLINE void cut_row(const glimpse_patchify_params& p, const Tables<T>& tables, int64_t patch_row,
                            const uint8_t* bytes, Bytes at) {
  const int64_t columns = p.out_width / p.patch_size, merge = p.merge_size;
  const int64_t patch_values = 3 * p.frames * p.patch_size * p.patch_size;
  T* const out = static_cast<T*>(p.out);
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t group = patch_row / merge * (columns / merge) + column / merge;
    const int64_t patch = (group * merge + patch_row % merge) * merge + column % merge;
    cut(p, tables, bytes + column * p.patch_size * at.pixel, at, out + patch * patch_values);
  }
}

// The parallel bodies are structs: binutils cannot read the names of lambdas in function templates, and a test reads them.
template <class T>
struct CutRows {
  const glimpse_patchify_params& p;
  const Tables<T>& tables;

  void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i)
      cut_row(p, tables, i, p.image + i * p.patch_size * p.image_stride, Bytes{p.image_stride, 3, 1});
  }
};

template <class T>
struct ResizeRows {
  const glimpse_patchify_params& p;
  const Tables<T>& tables;
  const Resize& job;
  bool& failed;

  void operator()(int64_t begin, int64_t end) const {
    const int64_t band = p.patch_size * job.line();
    uint8_t* const scratch = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(job.scratch() + band)));
    if (scratch == nullptr) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    Resampler rows(job, scratch, begin * p.patch_size);
    uint8_t* const bytes = scratch + job.scratch();
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t y = 0; y < p.patch_size; ++y) rows.row(i * p.patch_size + y, bytes + y * job.line());
      cut_row(p, tables, i, bytes, Bytes{job.line(), 1, job.plane()});
    }
  }
};

template <class T>
glimpse_status resized(const glimpse_patchify_params& p, const Tables<T>& tables) {
  Resize job{p.image, p.height, p.width, p.image_stride, p.out_height, p.out_width,
             p.down_first != 0, {}, {}};
  const bool made = make_filter(job.across, p.resample, p.width, p.out_width) &&
                    make_filter(job.down, p.resample, p.height, p.out_height);
  bool failed = !made;
  if (made) parallel_range(p.out_height / p.patch_size, 1, ResizeRows<T>{p, tables, job, failed});
  free(job.across.memory);
  free(job.down.memory);
  if (failed) return fail(GLIMPSE_OUT_OF_MEMORY, "patchify: no memory for the resize");
  return GLIMPSE_OK;
}

template <class T>
glimpse_status run(const glimpse_patchify_params& p) {
  if (p.out_height == 0 || p.out_width == 0) return GLIMPSE_OK;
  Tables<T> tables;
  fill(tables, p);
  if (p.height != p.out_height || p.width != p.out_width) return resized(p, tables);
  parallel_range(p.out_height / p.patch_size, 1, CutRows<T>{p, tables});
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status patchify(const glimpse_patchify_params& p) {
  const int64_t most = int64_t{1} << 24, unit = p.patch_size * p.merge_size;
  if (p.patch_size < 1 || p.merge_size < 1 || p.frames < 1 || p.out_height % unit != 0 || p.out_width % unit != 0)
    return fail(GLIMPSE_INVALID, "patchify: expected an output size in multiples of patch_size * merge_size");
  const bool resize = p.height != p.out_height || p.width != p.out_width;
  if (resize && (p.height < 1 || p.width < 1 || p.height > most || p.width > most || p.out_height > most || p.out_width > most))
    return fail(GLIMPSE_INVALID, "patchify: expected sides of 1 to %lld pixels", static_cast<long long>(most));
  switch (p.dtype) {
    case GLIMPSE_FLOAT32:
      return run<float>(p);
    case GLIMPSE_BFLOAT16:
      return run<bf16>(p);
    default:
      return fail(GLIMPSE_UNSUPPORTED, "patchify: no kernel for dtype %d", static_cast<int>(p.dtype));
  }
}

}  // namespace glimpse::GLIMPSE_ISA_NS
