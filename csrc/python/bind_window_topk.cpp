// SPDX-License-Identifier: Apache-2.0
#include "glimpse/window_topk.h"

#include "python/bind.h"

namespace glimpse::python {

void bind_window_topk(py::module_& m) {
  m.def("window_topk", [](address scores, address cu_seqlens, address grids, address cu_picks, address picks, address keep,
                          int64_t tokens, int64_t groups, int64_t capacity, int64_t window, int64_t max_seqlen, bool share_up) {
    glimpse_window_topk_params p{};
    p.scores = pointer<const float>(scores);
    p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
    p.grids = pointer<const int32_t>(grids);
    p.cu_picks = pointer<const int32_t>(cu_picks);
    p.picks = pointer<int32_t>(picks);
    p.keep = pointer<uint8_t>(keep);
    p.tokens = tokens;
    p.groups = groups;
    p.capacity = capacity;
    p.window = window;
    p.max_seqlen = max_seqlen;
    p.share_up = share_up;
    call(glimpse_window_topk, p);
  });
}

}  // namespace glimpse::python
