# SPDX-License-Identifier: Apache-2.0
"""What a multiprocessor has, and how many programs of a kernel fit: for the reports of Triton's and nvcc's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

REGISTERS = 65536
"""32-bit registers of a multiprocessor."""

WARP_REGISTERS = 256
"""A warp's registers are handed out in such pieces."""

SHARED: Mapping[int, int] = {80: 163, 90: 227, 100: 227}
"""KiB of shared memory one program can have, by capability. 8.6, 8.9 and 12.x, which take the kernels for 8.0, have 99."""

SHARED_SMALL = 99
SHARED_STATIC = 48
"""KiB that a kernel can have without asking the driver for more at its launch."""
SHARED_TOTAL: Mapping[int, int] = {80: 164, 90: 228, 100: 228}
SHARED_RESERVED = 1024
"""Bytes of shared memory the system takes for each program."""
WARPS = 64
PROGRAMS = 32
ARCHS = (80, 90, 100)
"""A100, H200, B200: the capabilities kernels are compiled for."""


def resident(arch: int, registers: int, shared: int, warps: int) -> int:
    """Programs of `warps` warps that a multiprocessor holds at once. registers: of a thread. shared: bytes of a program."""
    warp = -(-32 * registers // WARP_REGISTERS) * WARP_REGISTERS
    by_registers = REGISTERS // max(1, warp * warps)
    by_shared = 1024 * SHARED_TOTAL.get(arch, SHARED_TOTAL[80]) // (shared + SHARED_RESERVED)
    return min(PROGRAMS, WARPS // warps, by_registers, by_shared)


def markdown_table(heads: Sequence[str], right: int, left: int, rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for the docs: columns from `right` up to `left` are numbers."""
    rules = [" ---: |" if right <= i < left else " --- |" for i in range(len(heads))]
    return [f"| {' | '.join(heads)} |", "|" + "".join(rules), *(f"| {' | '.join(row)} |" for row in rows)]
