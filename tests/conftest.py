# SPDX-License-Identifier: Apache-2.0
"""Before anything is imported: without a GPU, Triton kernels run in Triton's interpreter, CUDA kernels in their emulation.

Triton decides when a kernel is defined, so this has to stand before the first import of the package; the test of
`tests/kernels/test_interpreter.py` asserts that it did.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["GLIMPSE_CUDA_EMULATED"] = "1"
