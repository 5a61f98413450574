# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the CUDA C++ kernels, read from the machine code in a built file by NVIDIA's cuobjdump."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.occupancy import SHARED_RESERVED, SHARED_STATIC, resident

TOOL = "cuobjdump"
TOOL_SECONDS = 300
NO_CODE = "does not contain device code"
PARAMETERS = 4096
"""Bytes of arguments that every driver takes."""

FEATURES: Mapping[str, str] = {
    "mma": r"(HMMA|IMMA|HGMMA|UTCHMMA|QMMA)\b",
    "tma": r"(UBLKCP|UTMALDG|UTMASTG)\b",
    "cp.async": r"LDGSTS\b",
    "cluster": r"UCGABAR_(ARV|WAIT)\b",
    "dependent": r"ACQBULK\b",
    "release": r"PREEXIT\b",
    "atomics": r"(ATOMG|ATOM|RED|REDG)\b",
    "shared atomics": r"ATOMS\b",
    "votes": r"(VOTE|VOTEU|MATCH|REDUX|CREDUX)\b",
    "shuffles": r"SHFL\b",
}
"""What to look for among the opcodes. dependent: waits for the grid before; release: lets the grid behind it begin."""

TYPES = {
    "__nv_bfloat16": "bf16",
    "__half": "fp16",
    "float": "fp32",
    "unsigned char": "uint8",
    "unsigned int": "uint32",
    "unsigned long": "uint64",
    "unsigned short": "uint16",
}


@dataclass
class Kernel:
    """One kernel for one architecture. home: the file it is in, without ".cu". arch: such as "90a".

    stack: bytes a thread keeps in local memory. shared: bytes of static shared memory a block has, without what the system takes.
    parameters: bytes of its arguments. constants: bytes of constant memory besides. threads: the most a block may have
    (__launch_bounds__), 0 where the source does not say. barriers: block-wide ones it uses. code: how often each opcode stands in it.
    """

    name: str
    home: str
    symbol: str
    arch: str
    registers: int
    stack: int
    shared: int
    constants: int
    parameters: int = 0
    threads: int = 0
    barriers: int = 0
    code: Counter[str] = field(default_factory=Counter)

    @property
    def capability(self) -> int:
        return int(re.sub(r"\D", "", self.arch))

    @property
    def local(self) -> tuple[int, int]:
        """Loads and stores of local memory: spilled registers, arrays that no register holds, a called function's stack."""
        return self.count(r"LDL\b"), self.count(r"STL\b")

    @property
    def resident(self) -> int:
        """Blocks of the largest size, without dynamic shared memory, that a multiprocessor holds at once; 0: of no known size."""
        warps = -(-self.threads // 32)
        return resident(self.capability, self.registers, self.shared, warps) if warps else 0

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(name for name, pattern in FEATURES.items() if self.count(pattern))

    def count(self, pattern: str) -> int:
        """Instructions whose opcode begins so."""
        return sum(n for opcode, n in self.code.items() if re.match(pattern, opcode))

    def widths(self, kind: str) -> dict[int, int]:
        """Bytes → instructions that move so many a thread. kind: "load" or "store" of global memory."""
        pattern = r"(LDG|LD|LDGSTS)\." if kind == "load" else r"(STG|ST)\."
        found: Counter[int] = Counter()
        for opcode, number in self.code.items():
            if re.match(pattern, opcode):
                found[width(opcode)] += number
        return dict(sorted(found.items(), reverse=True))

    def faults(self) -> list[str]:
        """What no kernel here may have."""
        title, faults = f"{self.name} (sm_{self.arch})", []
        if self.stack:
            faults.append(f"{title}: {self.stack} bytes of stack, expected none")
        if any(self.local):
            loads, stores = self.local
            faults.append(f"{title}: {loads} loads and {stores} stores of local memory, expected none")
        if self.shared > 1024 * SHARED_STATIC:
            faults.append(
                f"{title}: {self.shared / 1024:.1f} KiB of static shared memory, expected at most {SHARED_STATIC}"
            )
        if self.parameters > PARAMETERS:
            faults.append(f"{title}: {self.parameters} bytes of arguments, expected at most {PARAMETERS}")
        if self.threads and not self.resident:
            faults.append(f"{title}: {self.registers} registers x {self.threads} threads do not fit")
        return faults

    def record(self) -> dict[str, Any]:
        """For JSON."""
        more = {
            "local_loads": self.local[0], "local_stores": self.local[1], "resident": self.resident,
            "loads": self.widths("load"), "stores": self.widths("store"), "features": list(self.features),
        }  # fmt: skip
        return {**vars(self), "code": dict(sorted(self.code.items())), **more}


@dataclass(frozen=True)
class Report:
    """nvcc: the version of the assembler that made the code, such as "13.0.88". kernels: in the order of the table."""

    nvcc: str
    kernels: list[Kernel]

    @property
    def architectures(self) -> list[str]:
        """The oldest first."""
        return [a for _, a in sorted({(k.capability, k.arch) for k in self.kernels})]


def width(opcode: str) -> int:
    """Bytes a thread moves by a load or store: "LDG.E.128.CONSTANT" → 16."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[part] for part in opcode.split(".")[1:] if part in sizes), 4)


def find_tool(name: str = TOOL) -> Path | None:
    """A tool of the CUDA toolkit: in PATH, beside nvcc, or, for cuobjdump, in the installed triton package."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        folders.append(str(Path(nvcc).resolve().parents[1]))
    places = [Path(folder) / part for folder in folders if folder for part in ("bin", "compute-sanitizer")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or next((p for d in places if (p := shutil.which(name, path=str(d)))), None)
    return Path(found) if found else None


def demangled(symbol: str) -> str:
    """The name as the source has it, by the C++ library's own function; the symbol itself where there is none."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return symbol
    demangle = library.__cxa_demangle
    demangle.restype = ctypes.c_void_p
    demangle.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
    status = ctypes.c_int()
    text = demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    try:
        return ctypes.string_at(text).decode()
    finally:
        free = ctypes.CDLL(None).free
        free.argtypes = [ctypes.c_void_p]
        free(text)


def readable(symbol: str) -> str:
    """A kernel's name and template arguments, without namespaces, its result's type and its parameters."""
    text = demangled(symbol).replace("(anonymous namespace)::", "")
    depth, end = 0, len(text)
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = at
            break
    text = re.sub(r"\b(?:[A-Za-z_]\w*::)+", "", text[:end]).removeprefix("void ").strip()
    for long, short in TYPES.items():
        text = re.sub(rf"\b{long}\b", short, text)
    text = re.sub(r"\(([A-Za-z_][\w ]*)\)(-?\d+)", r"\1 \2", text)  # (Kind)1
    return re.sub(r"\b(\d+)[uUlL]+\b", r"\1", text)


def home(symbol: str) -> str:
    """The file a kernel in an unnamed namespace comes from, as nvcc writes it into the symbol; else the kernel's own name."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]{8}_(\d+)_", symbol)
    if not found:
        return readable(symbol).partition("<")[0]
    return symbol[found.end() : found.end() + int(found[1])].removesuffix("_cu")


def dump(file: Path, option: str) -> str:
    """What cuobjdump says of a file."""
    tool = find_tool()
    if tool is None:
        raise FileNotFoundError(f"{TOOL}: not in PATH, nor beside nvcc, nor in the triton package")
    command = [str(tool), option, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    if NO_CODE in done.stdout + done.stderr:
        return ""
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def parts(text: str) -> Iterator[tuple[str, str]]:
    """(architecture, text) of each piece of machine code."""
    for part in text.split("Fatbin elf code:")[1:]:
        part = part.partition("Fatbin ptx code:")[0]
        arch = re.search(r"^arch = sm_(\w+)", part, re.MULTILINE)
        if arch:
            yield arch[1], part


def read(file: Path) -> Report:
    """Every kernel in a file for every architecture."""
    found: dict[tuple[str, str], Kernel] = {}
    elf = dump(file, "-elf")
    for arch, text in parts(dump(file, "--dump-resource-usage")):
        for kernel in resources(arch, text):
            found[arch, kernel.symbol] = kernel
    for arch, text in parts(elf):
        launch_facts({symbol: k for (a, symbol), k in found.items() if a == arch}, text)
    for arch, text in parts(dump(file, "-sass")):
        for symbol, code in opcodes(text):
            if (arch, symbol) in found:
                found[arch, symbol].code = code
    version = re.search(r"Tool Name:\s*ptxas\s+Tool Version:.*\bV([\d.]+)", elf)
    order = sorted(found.values(), key=lambda k: (k.home, k.name, k.capability, k.arch, k.symbol))
    return Report(version[1] if version else "", order)


def resources(arch: str, text: str) -> Iterator[Kernel]:
    """From `cuobjdump --dump-resource-usage`."""
    for symbol, line in re.findall(r"^ *Function (\S+):\s*\n\s*(.*)$", text, re.MULTILINE):
        numbers = {name: int(n) for name, n in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
        constants = sum(n for name, n in numbers.items() if re.fullmatch(r"CONSTANT\[[1-9]\d*\]", name))
        stack = numbers.get("STACK", 0) + numbers.get("LOCAL", 0)
        yield Kernel(
            readable(symbol), home(symbol), symbol, arch, numbers["REG"], stack, numbers.get("SHARED", 0), constants
        )  # fmt: skip


def launch_facts(kernels: Mapping[str, Kernel], text: str) -> None:
    """From `cuobjdump -elf`: arguments, launch bounds, barriers; and whether shared memory counts what the system takes."""
    reserved = SHARED_RESERVED if ".nv.shared.reserved." in text else 0
    for section in re.split(r"^\.nv\.info\.(?=\S+$)", text, flags=re.MULTILINE)[1:]:
        symbol, _, rest = section.partition("\n")
        kernel = kernels.get(symbol.strip())
        if kernel is None:
            continue
        values = dict(re.findall(r"^\s*Attribute:\s*EIATTR_(\w+)\n.*\n\s*Value:\s*(.*)$", rest, re.MULTILINE))
        kernel.parameters = int(values.get("CBANK_PARAM_SIZE", "0"), 16)
        kernel.barriers = int(values.get("NUM_BARRIERS", "0"), 16)
        bound = values.get("REQNTID") or values.get("MAX_THREADS") or "0x0"
        kernel.threads = 1
        for n in bound.split():
            kernel.threads *= int(n, 16)
        kernel.shared = max(0, kernel.shared - reserved)


def opcodes(text: str) -> Iterator[tuple[str, Counter[str]]]:
    """From `cuobjdump -sass`: each function's opcodes, counted."""
    for function in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        symbol, _, rest = function.partition("\n")
        found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", rest, re.MULTILINE)
        yield symbol.strip(), Counter(found)
