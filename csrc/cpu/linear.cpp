// SPDX-License-Identifier: Apache-2.0
// x weight^T with the weights where they lie, row by row.
//
// The columns of the result are cut into panels. For few rows of x a panel's weights are streamed once and multiplied as
// dot products: the time is that of reading them. For many rows they are packed into cache first, by the layout of
// tiles.h, and multiplied in register tiles. Either way a panel's sums land in a small fp32 block, which the epilogue
// turns into results. A panel of the gated epilogue is half gate, half up, so that both meet in one block.
#include "glimpse/linear.h"

#include "cpu/linear_pack.h"
#include "cpu/linear_stream.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

template <class T, class W, glimpse_linear_epilogue epilogue>
glimpse_status run(const params& p) {
  return p.rows <= kStreamedRows ? stream<T, W, epilogue>(p) : pack<T, W, epilogue>(p);
}

template <class T, class W>
glimpse_status run(const params& p) {
  switch (p.epilogue) {
    case GLIMPSE_LINEAR_NONE:
      return run<T, W, GLIMPSE_LINEAR_NONE>(p);
    case GLIMPSE_LINEAR_GELU:
      return run<T, W, GLIMPSE_LINEAR_GELU>(p);
    case GLIMPSE_LINEAR_GATED:
      return run<T, W, GLIMPSE_LINEAR_GATED>(p);
  }
  return fail(GLIMPSE_INVALID, "linear: epilogue: expected 0, 1 or 2, found %d", static_cast<int>(p.epilogue));
}

template <class T>
glimpse_status run(const params& p) {
  return p.parts[0].scales == nullptr ? run<T, T>(p) : run<T, int8_t>(p);
}

}  // namespace

glimpse_status linear(const glimpse_linear_params& p) {
  if (p.num_parts < 1 || p.num_parts > GLIMPSE_LINEAR_PARTS)
    return fail(GLIMPSE_INVALID, "linear: parts: expected 1 to %d, found %lld", GLIMPSE_LINEAR_PARTS,
                static_cast<long long>(p.num_parts));
  if (p.epilogue == GLIMPSE_LINEAR_GATED && (p.num_parts != 2 || p.parts[0].cols != p.parts[1].cols))
    return fail(GLIMPSE_INVALID, "linear: gated: expected two parts of equal size");
  for (int64_t i = 0; i < p.num_parts; ++i) {
    if ((p.parts[i].scales == nullptr) != (p.parts[0].scales == nullptr))
      return fail(GLIMPSE_INVALID, "linear: parts: expected scales for all or for none");
  }
  if (p.parts[0].scales != nullptr && (p.group < 32 || p.group % 32 != 0))
    return fail(GLIMPSE_INVALID, "linear: group: expected a positive multiple of 32, found %lld",
                static_cast<long long>(p.group));
  if (p.rows <= 0) return GLIMPSE_OK;
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS
