# SPDX-License-Identifier: Apache-2.0
"""What a compiled Triton kernel is made of, read from Triton's metadata, its PTX and the assembler's report."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton
from rich.table import Table

from bench.fake_driver import PTXAS_LOG, Launched
from bench.occupancy import SHARED, SHARED_SMALL, markdown_table, resident

FEATURES: Mapping[str, str] = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.(ca|cg)\.shared",
    "ld128": r"ld\.global\S*\.(v4\.(b32|u32|f32)|v2\.(b64|u64|f64)|v8\.b32|v4\.b64)|cp\.async\.cg\.shared\.global[^;]*, 0x10",
    "st128": r"st\.global\S*\.(v4\.(b32|u32|f32)|v2\.(b64|u64|f64)|v8\.b32|v4\.b64)",
}
"""What to look for in the PTX. ld128, st128: global memory in pieces of 16 bytes or more."""


@dataclass
class Compiled:
    """One kernel for one architecture. Home: the op whose folder it is in. Constants: its constexprs by name. Where: rows of the
    benchmark that launch it, of these ops and dtypes.

    stack, spill_stores, spill_loads: bytes a thread. shared: bytes a program, as launched. scratch: bytes of global memory a
    program asks the runtime for. serialized: the assembler waits after each wgmma, so they do not overlap.
    """

    name: str
    home: str
    arch: int
    digest: str
    constants: dict[str, str]
    signature: dict[str, str]
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int
    stages: int
    scratch: int
    serialized: bool
    features: tuple[str, ...]
    ptx: str
    ops: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    grids: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def resident(self) -> int:
        """Programs of it a multiprocessor holds at once."""
        return resident(self.arch, self.registers, self.shared, self.warps)

    @property
    def spilled(self) -> int:
        """Bytes a thread moves to local memory because registers ran out."""
        return max(self.spill_stores, self.spill_loads)

    def faults(self) -> list[str]:
        """What keeps it from running at all."""
        most = SHARED.get(self.arch, SHARED_SMALL)
        name = f"{self.name} (sm_{self.arch}, {self.constants_text()})"
        faults = []
        if self.shared > 1024 * most:
            faults.append(f"{name}: {self.shared / 1024:.1f} KiB of shared memory, expected at most {most}")
        if self.resident < 1:
            faults.append(
                f"{name}: {self.registers} registers x {self.warps} warps do not fit a multiprocessor"
            )
        if self.scratch:
            faults.append(
                f"{name}: asks for {self.scratch} bytes of global scratch, which a CUDA graph cannot allocate"
            )
        return faults

    def constants_text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.constants.items())

    def file_name(self) -> str:
        return f"{self.name}-sm{self.arch}-{self.digest[:10]}"

    def record(self) -> dict[str, Any]:
        """For JSON: all but the PTX."""
        kept = {name: value for name, value in vars(self).items() if name != "ptx"}
        return kept | {"spilled": self.spilled, "resident": self.resident, "features": list(self.features)}


def collect(
    found: dict[tuple[int, str, str], Compiled], launch: Launched, arch: int, op: str, dtype: str, where: str
) -> None:
    """Adds the kernel of a launch to `found`, or its place to one that is there with the same code."""
    ptx = launch.kernel.asm["ptx"]
    code = re.sub(
        r"^\s*(\.loc|\.file|//).*$", "", ptx.partition(".section")[0], flags=re.MULTILINE
    )  # without its source lines
    digest = hashlib.sha256(code.encode()).hexdigest()
    key = (arch, launch.function.fn.__name__, digest)
    if key not in found:
        found[key] = _read(launch, arch, digest, ptx)
    for held, new in ((found[key].ops, op), (found[key].dtypes, dtype), (found[key].where, where)):
        if new and new not in held:
            held.append(new)
    if launch.grid not in found[key].grids:
        found[key].grids.append(launch.grid)


def _read(launch: Launched, arch: int, digest: str, ptx: str) -> Compiled:
    kernel, meta = launch.kernel, launch.kernel.metadata
    log = getattr(meta, PTXAS_LOG)
    names = launch.function.arg_names

    def number(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, log)), default=0)

    given = {p.name for p in launch.function.params if p.is_constexpr}
    constants = {}
    for path, value in kernel.src.constants.items():
        if len(path) == 1 and names[path[0]] in given:
            constants[names[path[0]]] = str(getattr(value, "name", value)).replace("triton.language.", "")
    return Compiled(
        name=launch.function.fn.__name__,
        home=launch.function.fn.__module__.removeprefix("glimpse_kernels.").partition(".")[0],
        arch=arch,
        digest=digest,
        constants=constants,
        signature={name: str(kind) for name, kind in kernel.src.signature.items() if kind != "constexpr"},
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared=meta.shared,
        warps=meta.num_warps,
        stages=meta.num_stages,
        scratch=getattr(meta, "global_scratch_size", 0) or 0,
        serialized="serialized" in log,
        features=tuple(name for name, pattern in FEATURES.items() if re.search(pattern, ptx)),
        ptx=ptx,
    )


HEADS = (
    "kernel",
    "sm",
    "dtype",
    "constants",
    "warps",
    "stages",
    "registers",
    "spilled",
    "shared KiB",
    "resident",
    "with",
    "from",
)


def _cells(kernel: Compiled) -> list[str]:
    notes = [*kernel.features, *(["wgmma serialized"] if kernel.serialized else [])]
    more = f" (+{len(kernel.where) - 1})" if len(kernel.where) > 1 else ""
    return [
        kernel.name,
        str(kernel.arch),
        " ".join(kernel.dtypes),
        kernel.constants_text(),
        str(kernel.warps),
        str(kernel.stages),
        str(kernel.registers),
        str(kernel.spilled) + (f", stack {kernel.stack}" if kernel.stack else ""),
        f"{kernel.shared / 1024:.1f}",
        str(kernel.resident),
        " ".join(notes),
        kernel.where[0] + more,
    ]


def _sorted(kernels: Sequence[Compiled]) -> list[Compiled]:
    return sorted(
        kernels, key=lambda k: (k.home, k.name, k.dtypes, k.constants_text(), k.where, k.arch, k.digest)
    )


def terminal(kernels: Sequence[Compiled]) -> Table:
    table = Table(
        title=f"Triton {triton.__version__}: compiled kernels",
        caption="resident: programs on a multiprocessor at once",
    )
    for head in HEADS:
        table.add_column(head, overflow="fold", justify="right" if head in HEADS[4:10] else "left")
    for kernel in _sorted(kernels):
        style = (
            "red"
            if kernel.spilled or kernel.stack or kernel.faults()
            else "yellow"
            if kernel.serialized
            else None
        )
        table.add_row(*_cells(kernel), style=style)
    return table


def markdown(kernels: Sequence[Compiled]) -> str:
    """The table for the docs, equal for equal kernels."""
    lines = [
        "# Compiled Triton kernels",
        "",
        "Written by `python -m bench.triton_compile --markdown docs/triton-kernels.md`; a test compares it.",
        f"Triton {triton.__version__} with the assembler it brings; nothing here was measured or run.",
        "",
        "- **spilled**: bytes a thread moves to local memory for want of registers; stack: bytes a thread keeps there.",
        "- **resident**: programs that a multiprocessor holds at once, by registers, shared memory and warps.",
        "- **with**: instructions found: warpgroup (wgmma) or warp (mma) tensor-core products, TMA loads (tma), asynchronous",
        "  copies, loads and stores of 16 bytes and more (ld128, st128).",
        "- **from**: the row of the kernel benchmark it was compiled for, and how many more launch the same code.",
        "",
    ]
    by_op: dict[str, list[Compiled]] = {}
    for kernel in _sorted(kernels):
        by_op.setdefault(kernel.home, []).append(kernel)
    for op, group in by_op.items():
        lines += [f"## {op}", "", *markdown_table(HEADS, 4, 10, [_cells(kernel) for kernel in group]), ""]
    return "\n".join(lines)
