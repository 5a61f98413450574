# SPDX-License-Identifier: Apache-2.0
"""How many threads torch and the kernels use.

There is one number, torch's own (`torch.set_num_threads`), and the kernels follow it. `GLIMPSE_NUM_THREADS` sets it when
`glimpse_kernels` is imported. torch knows the cores that a process may run on, but not the share of their time that a
container may use (the CFS quota of its cgroup, `docker run --cpus`): with 64 threads on a share of 2 cores most of the
time is spent waiting for threads that are out of quota. `respect_limits` mends that default.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from glimpse_kernels import _ext

logger = logging.getLogger(__name__)

# Under these, OpenMP narrows the affinity of the calling thread itself.
_PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

_lowered: tuple[int, str] | None = None  # the number that `respect_limits` set, and why


def usable_cpus() -> int:
    """Cores' worth of time this process can get: the cores it may run on, or less if its cgroup has a quota.

    A quota of part of a core counts as a whole one.
    """
    quota = cpu_quota()
    return len(_cpus()) if quota is None else min(len(_cpus()), max(1, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The smallest CFS quota on the way from this process's cgroup to the top, in cores; None: no limit to be seen.

    Reads `cpu.max` (cgroup v2) and `cpu.cfs_quota_us` (v1), both where a system has both. Whatever cannot be read or
    understood is no limit.

    Args:
        root: of the file system, for tests.
    """
    found = [quota for folder in _cgroups(root) if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


def respect_limits(device: torch.device | str = "cpu") -> None:
    """Lower torch's default number of threads to `usable_cpus()`; logged, once a process.

    Nothing happens where anybody chose the number: `GLIMPSE_NUM_THREADS`, `OMP_NUM_THREADS`, `MKL_NUM_THREADS`, or a
    call of `torch.set_num_threads` with any number but what torch takes by itself on such a machine.
    """
    global _lowered
    number = torch.get_num_threads()
    if torch.device(device).type != "cpu" or _lowered or _environment() or number not in _defaults():
        return
    limit, quota = usable_cpus(), cpu_quota()
    if number <= limit:
        return
    what = "the cores it may run on" if quota is None else f"the CPU quota of its cgroup ({quota:g})"
    _lowered = limit, f"{what}; torch's default is {number}"
    _ext.set_num_threads(limit)
    logger.warning(
        "%d threads instead of torch's %d: the process gets no more cores by %s. "
        "GLIMPSE_NUM_THREADS chooses another number.",
        limit, number, what,
    )  # fmt: skip


def explain() -> str:
    """Where torch's present number of threads comes from, in words."""
    number = torch.get_num_threads()
    name, value = _environment() or ("", "")
    if value == str(number):
        return f"{name}={value}"
    if _lowered and _lowered[0] == number:
        return _lowered[1]
    return "torch.set_num_threads" if name or number not in _defaults() else "torch's default"


def _environment() -> tuple[str, str] | None:
    """The variable that decides about threads, and its value (of a list by level, the first)."""
    _ext.requested_threads()  # an error if it is no number
    for name in ("GLIMPSE_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()
        if value:
            return name, value
    return None


def _defaults() -> set[int]:
    """What torch may have taken by itself: all cores or, with MKL, one thread a physical core."""
    here, everywhere = _cpus(), set(range(os.cpu_count() or 1))
    return {len(here), _physical(here), len(everywhere), _physical(everywhere)}


def _cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity") and not any(os.environ.get(name) for name in _PINNING):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical(cpus: set[int]) -> int:
    siblings = {
        _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu)
        for cpu in cpus
    }
    return len(siblings)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _quota_of(folder: Path) -> float | None:
    """Cores, by the files of one cgroup."""
    pair = _read(folder / "cpu.max").split()  # "200000 100000", or "max 100000"
    if not pair:
        pair = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]  # -1: no limit
    try:
        quota, period = int(pair[0]), int(pair[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _cgroups(root: Path) -> Iterator[Path]:
    """Folders of the cgroups that this process is in and of all that these are in, as far as they are mounted."""
    mounts = list(_mounts(_read(root / "proc/self/mountinfo")))
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")  # "0::/path" is version 2, "4:cpu,cpuacct:/path" version 1
        if not path.startswith("/") or (controllers and "cpu" not in controllers.split(",")):
            continue
        for kind, top, point in mounts:
            if kind != ("cpu" if controllers else "cgroup2"):
                continue
            # The mount shows the tree from `top` on. In a container the path may be that of the host, outside of it.
            inside = PurePosixPath(path)
            below = inside.relative_to(top) if inside.is_relative_to(top) else PurePosixPath()
            here = root / point.lstrip("/")
            yield here
            for part in below.parts:
                if part == "..":
                    break
                here = here / part
                yield here


def _mounts(mountinfo: str) -> Iterator[tuple[str, str, str]]:
    """("cgroup2", or "cpu" for version 1 with that controller; top of the tree that is mounted; mount point)."""
    for line in mountinfo.splitlines():
        place, _, kind = line.partition(" - ")
        fields, about = place.split(), kind.split()
        if len(fields) < 5 or len(about) < 3:
            continue
        top, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text) for text in fields[3:5])
        if about[0] == "cgroup2":
            yield "cgroup2", top, point
        elif about[0] == "cgroup" and "cpu" in about[2].split(","):
            yield "cpu", top, point
