# SPDX-License-Identifier: Apache-2.0
"""The number of threads under the limits of a container."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_kernels import _ext
from glimpse_runtime import threads

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)


def tree(root: Path, mounts: str, cgroup: str, **files: str) -> Path:
    """A file system with `/proc/self` and cgroup files, their paths below /sys/fs/cgroup written with `__` for `/`."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "mountinfo").write_text("27 1 254:0 / / rw - ext4 /dev/vda rw\n" + mounts)
    (proc / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = (
            root
            / "sys/fs/cgroup"
            / name.replace("__", "/").replace("cpu_", "cpu.").replace("cpucpu", "cpu,cpu")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("mounts", "cgroup", "files", "want"),
    [
        (V2, "0::/", {}, None),
        (V2, "0::/", {"cpu_max": "200000 100000"}, 2.0),
        (V2, "0::/", {"cpu_max": "max 100000"}, None),
        (V2, "0::/", {"cpu_max": "garbage"}, None),
        (V2, "0::/", {"cpu_max": "100000 0"}, None),
        (V2, "0::/a/b", {"a__b__cpu_max": "150000 100000"}, 1.5),
        (V2, "0::/a/b", {"a__cpu_max": "100000 50000", "a__b__cpu_max": "max 100000"}, 2.0),
        (V2, "0::/a/b", {"a__cpu_max": "400000 100000", "a__b__cpu_max": "50000 100000"}, 0.5),
        (V2, "0::/a/b", {"a__other__cpu_max": "50000 100000"}, None),
        # the path of the host, seen from inside a container
        (V2, "0::/../../host", {"cpu_max": "300000 100000", "host__cpu_max": "100000 100000"}, 3.0),
        (V2, "0::/gone", {"cpu_max": "300000 100000"}, 3.0),
        (
            V2.replace(" / /sys", " /docker/1 /sys"),
            "0::/docker/1/x",
            {"x__cpu_max": "100000 100000"},
            1.0,
        ),
        (V2.replace(" / /sys", " /docker/1 /sys"), "0::/other", {"cpu_max": "700000 100000"}, 7.0),
        (V1, "4:cpu,cpuacct:/d\n3:cpuset:/", {"cpucpuacct__d__cpu_cfs_quota_us": "-1"}, None),
        (
            V1,
            "4:cpu,cpuacct:/d\n3:cpuset:/",
            {"cpucpuacct__d__cpu_cfs_quota_us": "250000", "cpucpuacct__d__cpu_cfs_period_us": "100000"},
            2.5,
        ),
        # both versions at once: the controller is in one of them
        (
            V1 + V2.replace("cgroup rw,", "cgroup/unified rw,", 1),
            "4:cpuacct,cpu:/\n0::/x",
            {"cpucpuacct__cpu_cfs_quota_us": "100000", "cpucpuacct__cpu_cfs_period_us": "100000"},
            1.0,
        ),
        ("", "0::/", {"cpu_max": "200000 100000"}, None),
        (V2, "nonsense", {"cpu_max": "200000 100000"}, None),
    ],
)  # fmt: skip
def test_cpu_quota(
    tmp_path: Path, mounts: str, cgroup: str, files: dict[str, str], want: float | None
) -> None:
    assert threads.cpu_quota(tree(tmp_path, mounts, cgroup, **files)) == want


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path) is None
    tree(tmp_path, V2, "0::/")
    (tmp_path / "sys/fs/cgroup/cpu.max").mkdir(parents=True)
    assert threads.cpu_quota(tmp_path) is None


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    tree(tmp_path, V2.replace("/sys/fs/cgroup", "/a\\040place"), "0::/")
    (tmp_path / "a place").mkdir()
    (tmp_path / "a place" / "cpu.max").write_text("100000 100000")
    assert threads.cpu_quota(tmp_path) == 1.0


@pytest.mark.parametrize(
    ("quota", "cores", "want"), [(None, 8, 8), (0.2, 8, 1), (2.5, 8, 3), (4.0, 8, 4), (9.0, 8, 8)]
)
def test_usable_cpus(quota: float | None, cores: int, want: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "_cpus", lambda: set(range(cores)))
    assert threads.usable_cpus() == want


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Six cores of which the process may use 1.5, torch at its default."""
    before = torch.get_num_threads()
    for name in ("GLIMPSE_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_lowered", None)
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(threads, "_cpus", lambda: set(range(6)))
    torch.set_num_threads(6)
    yield monkeypatch
    torch.set_num_threads(before)


def test_a_quota_lowers_the_default(
    machine: pytest.MonkeyPatch, golden: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert threads.explain() == "torch's default"
    with caplog.at_level(logging.WARNING, "glimpse_runtime"):
        glimpse.GlimpseModel.from_pretrained(golden / "base", dtype=torch.float32)
        assert torch.get_num_threads() == 2
        glimpse.GlimpseModel.from_pretrained(golden / "base", dtype=torch.float32)
    said = [r.getMessage() for r in caplog.records if r.name == "glimpse_runtime.threads"]
    assert len(said) == 1
    assert "2 threads instead of torch's 6" in said[0] and "CPU quota of its cgroup (1.5)" in said[0]
    assert threads.explain() == "the CPU quota of its cgroup (1.5); torch's default is 6"
    module = _ext.compiled()
    assert module is None or module.num_threads() == 2
    torch.set_num_threads(6)  # whoever insists
    threads.respect_limits()
    assert torch.get_num_threads() == 6


def test_a_wrapped_model_respects_the_quota(machine: pytest.MonkeyPatch, hf_model: torch.nn.Module) -> None:
    glimpse.GlimpseModel.from_hf(hf_model)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["GLIMPSE_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_from_the_environment_stays(machine: pytest.MonkeyPatch, name: str) -> None:
    machine.setenv(name, "6")
    threads.respect_limits()
    assert torch.get_num_threads() == 6
    assert threads.explain() == f"{name}=6"
    torch.set_num_threads(4)
    assert threads.explain() == "torch.set_num_threads"


def test_a_number_of_the_caller_stays(machine: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(5)
    threads.respect_limits()
    assert torch.get_num_threads() == 5
    assert threads.explain() == "torch.set_num_threads"


def test_no_limit_no_change(machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    machine.setattr(threads, "cpu_quota", lambda: None)
    threads.respect_limits()
    threads.respect_limits("meta")
    assert torch.get_num_threads() == 6 and not caplog.records


def test_pinned_threads_do_not_hide_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_PROC_BIND leaves the thread that asks with the affinity of one core."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity on this system")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads._cpus() == {0}
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert threads._cpus() == set(range(6))


def test_torchs_number_in_a_new_thread(model: glimpse.GlimpseModel) -> None:
    """OpenMP keeps the number a thread; a model called from a fresh one uses torch's all the same."""
    module, before, found = _ext.compiled(), torch.get_num_threads(), []
    if module is None:
        pytest.skip(f"compiled extension not available: {_ext.compiled_error()}")

    def ask() -> None:
        ids = torch.arange(20)[None]
        model.prefill(ids, attention_mask=torch.ones_like(ids))
        found.append(module.num_threads())

    torch.set_num_threads(3)
    try:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3]


@pytest.mark.skipif(
    os.environ.get("OMP_WAIT_POLICY", "").lower() == "active", reason="OMP_WAIT_POLICY=active: spin"
)
def test_nothing_runs_after_a_decode(model: glimpse.GlimpseModel) -> None:
    ids = torch.arange(40)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    time.sleep(0.05)  # OpenMP's threads spin for some milliseconds before they sleep
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02
