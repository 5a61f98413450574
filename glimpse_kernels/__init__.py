# SPDX-License-Identifier: Apache-2.0
"""Kernels for pruned inference on packed tokens.

Every op is one function here and one folder of the same name: the folder's ``naive.py`` is its definition in plain
PyTorch, the other files are backends. `explain` tells which backend serves an op on this machine and why.

    from glimpse_kernels import attention                           # the op, dispatched
    from glimpse_kernels.attention.naive import attention as oracle # its definition
"""

from __future__ import annotations

from glimpse_kernels.attention import attention
from glimpse_kernels.compact import compact
from glimpse_kernels.decode_attention import decode_attention
from glimpse_kernels.dispatch import UnsupportedError, explain, force_backend, support_table
from glimpse_kernels.drop_duplicates import drop_duplicates
from glimpse_kernels.farthest_points import farthest_points
from glimpse_kernels.glimpse_scores import glimpse_scores
from glimpse_kernels.graph_flow import graph_flow
from glimpse_kernels.greedy_dpp import greedy_dpp
from glimpse_kernels.last_row_attention import last_row_attention
from glimpse_kernels.linear import Int8Weight, gated_linear, linear, linear_group, quantize_int8
from glimpse_kernels.merge_nearest import merge_nearest
from glimpse_kernels.patchify import patchify
from glimpse_kernels.received_attention import received_attention
from glimpse_kernels.recording import Recording
from glimpse_kernels.rms_norm import rms_norm
from glimpse_kernels.rope import mrope_cos_sin, rope, vision_rotary
from glimpse_kernels.select_tokens import Selection, select_tokens
from glimpse_kernels.similarity import cosine_similarity
from glimpse_kernels.swiglu import swiglu
from glimpse_kernels.vip import VipWeights, vip, vip_conditions, vip_rotary
from glimpse_kernels.window_topk import window_topk

__all__ = [
    "Int8Weight",
    "Recording",
    "Selection",
    "UnsupportedError",
    "VipWeights",
    "attention",
    "compact",
    "cosine_similarity",
    "decode_attention",
    "drop_duplicates",
    "explain",
    "farthest_points",
    "force_backend",
    "gated_linear",
    "glimpse_scores",
    "graph_flow",
    "last_row_attention",
    "greedy_dpp",
    "linear",
    "linear_group",
    "merge_nearest",
    "mrope_cos_sin",
    "patchify",
    "quantize_int8",
    "received_attention",
    "rms_norm",
    "rope",
    "select_tokens",
    "support_table",
    "swiglu",
    "vip",
    "vip_conditions",
    "vip_rotary",
    "vision_rotary",
    "window_topk",
]
