# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for runs on a GPU: `python -m pytest -p bench.gpu_pytest --gpu-log DIR tests/kernels`.

Selects the tests of GPU kernels, waits for the device after each (a fault belongs to the test that caused it), ends a
worker whose device is lost (pytest-xdist starts another), and writes what was collected and each outcome as lines of JSON,
so that a run that is cut short still tells what it saw.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_facts import GPU_BACKENDS

MARK = "gpu"
ARENA = "tests.kernels.arena"
LOST = 70
_tests: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--gpu-log", metavar="DIR", help="where to write collected-*.jsonl and outcomes-*.jsonl")
    group.addoption("--gpu-ops", default="", help="only these ops, with commas between")
    group.addoption(
        "--gpu-memory",
        choices=("any", "small", "large"),
        default="any",
        help="large: tests that use the arena",
    )
    group.addoption(
        "--gpu-rehearse", type=int, default=0, help="interpreted: this many tests an op, backend and dtype"
    )


def about(item: pytest.Item) -> dict[str, Any] | None:
    """Op, backend and dtype of a test of a GPU kernel; None of others."""
    case = getattr(getattr(item, "callspec", None), "params", {}).get("kernel")
    marked = item.get_closest_marker(MARK) is not None
    backend = getattr(case, "backend", None)
    if not marked and not (item.config.getoption("--gpu-rehearse") and backend in GPU_BACKENDS):
        return None
    dtype = getattr(case, "dtype", None)
    stem = item.path.stem.removeprefix("test_")
    named = next((b for b in GPU_BACKENDS if stem.endswith(f"_{b}")), None)
    return {
        "test": item.nodeid,
        "op": getattr(case, "op", None) or stem.removesuffix(f"_{named}"),
        "backend": backend or named or "triton",
        "dtype": str(dtype).removeprefix("torch.") if dtype is not None else None,
    }


def large(item: pytest.Item) -> bool:
    """Whether the test, or a function of its module that it calls, uses `tests.kernels.arena`, whose tensors take a good part of
    a GPU's memory: not for many processes at once."""
    known = vars(getattr(item, "module", None) or object)
    open_, seen = _names(inspect.unwrap(getattr(item, "function", large))), set[str]()
    while open_:
        name = open_.pop()
        value = known.get(name)
        if getattr(value, "__module__", "") == ARENA:
            return True
        if name not in seen and inspect.isfunction(value) and value.__module__ == known["__name__"]:
            open_ |= _names(inspect.unwrap(value))
        seen.add(name)
    return False


def _names(function: Any) -> set[str]:
    """Global names and attributes in a function and in the functions inside it."""
    found: set[str] = set()
    codes = [getattr(function, "__code__", None)]
    while codes:
        code = codes.pop()
        if code is not None:
            found.update(code.co_names)
            codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from glimpse_kernels import _cuda  # not before conftest.py has set the environment

    wanted = {op for op in config.getoption("--gpu-ops").split(",") if op}
    limit, memory = config.getoption("--gpu-rehearse"), config.getoption("--gpu-memory")
    absent = (
        ["cuda"] if _cuda.missing() else []
    )  # `bench.gpu_check` says why: it built the extension, or could not
    counts: dict[tuple[str, str, str | None], int] = {}
    kept: list[pytest.Item] = []
    for item in items:
        facts = about(item)
        if facts is None or (wanted and facts["op"] not in wanted) or facts["backend"] in absent:
            continue
        if memory != "any" and large(item) is not (memory == "large"):
            continue
        kind = facts["op"], facts["backend"], facts["dtype"]
        counts[kind] = counts.get(kind, 0) + 1
        if not limit or counts[kind] <= limit:
            kept.append(item)
            _tests[item.nodeid] = facts
    items[:] = kept


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """The only process, or the first worker, tells what there is to run."""
    if session.items and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        _write(session.config, "collected", [_tests[item.nodeid] for item in session.items])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.nodeid in _tests:
        item.user_properties.append(("gpu", _tests[item.nodeid]))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as problem:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(LOST)
            pytest.exit(f"the device is lost: {problem}", LOST)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process that has the terminal; every phase that decided something."""
    if _config is None or (report.when != "call" and report.outcome == "passed"):
        return
    facts: Any = dict(report.user_properties).get("gpu") or {"test": report.nodeid}
    why = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = str(crash.message if crash else report.longrepr).strip()[:400]
    elif report.skipped:
        why = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]
    outcome = {
        "outcome": report.outcome,
        "when": report.when,
        "seconds": round(report.duration, 3),
        "why": why,
    }
    _write(_config, "outcomes", [facts | outcome])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if _config is not None and report.failed:
        fact = {
            "test": report.nodeid,
            "outcome": "failed",
            "when": "collect",
            "why": str(report.longrepr)[-400:],
        }
        _write(_config, "outcomes", [fact])


_config: pytest.Config | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _config
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _config = config


def _write(config: pytest.Config, name: str, facts: Sequence[dict[str, Any]]) -> None:
    folder = config.getoption("--gpu-log")
    if folder:
        memory = config.getoption("--gpu-memory")  # runs side by side have files of their own
        with (Path(folder) / f"{name}-{memory}.jsonl").open("a") as file:
            file.write("".join(json.dumps(fact) + "\n" for fact in facts))
