"""Shared by the microbenchmarks: their options, and what the figures depend on."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

import consensusdrop_kernels
from consensusdrop_kernels import _C

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are no part of the package

from benchmarks.cases import CASES  # noqa: E402
from benchmarks.gpu import OUT_OF_TIME, unreached  # noqa: E402

_START = pytest.StashKey[float]()
_LATE = pytest.StashKey[dict[str, None]]()  # by name, in order


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "install pytest-benchmark, or run benchmarks/gpu_ops.py, which times the ops without it"
        )
    group = parser.getgroup("consensusdrop_kernels")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    group.addoption(
        "--dtype",
        action="append",
        choices=("float32", "float16", "bfloat16"),
        default=[],
        help="may be given again (default: float32 on a CPU, where select_merge runs in bfloat16 "
        "too, and bfloat16 on a GPU)",
    )
    group.addoption("--small", action="store_true", help="a tiny case of each op, to see it work")
    group.addoption(
        "--only", action="append", choices=tuple(CASES), default=[],
        help="of test_ops.py the cases of this kind; may be given again",
    )  # fmt: skip
    group.addoption(
        "--seconds", type=float, metavar="N",
        help="start nothing later: what is left is skipped and named, and the exit code is "
        f"{OUT_OF_TIME} if nothing failed",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_START] = time.monotonic()
    config.stash[_LATE] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what begins too late."""
    seconds = item.config.getoption("seconds")
    if seconds is None or time.monotonic() - item.config.stash[_START] < seconds:
        return
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    item.config.stash[_LATE][case.name if case else item.name] = None
    pytest.skip("out of time")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """What began too late is no failure, but no success either."""
    if session.config.stash[_LATE] and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = OUT_OF_TIME


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Written into the results file; `summary.py` prints it."""
    device = config.getoption("device")
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["build_commit"] = _C.build_info()["commit"]
    if device == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()
    backend = os.environ.get("CDROP_BACKEND") or ("triton" if device == "cuda" else "cpu")
    machine_info["kernels"] = consensusdrop_kernels.backends()[backend].reason


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only `test_ops.py` runs on a GPU: what the others time is no figure of that device."""
    if config.getoption("device") == "cuda":
        skip = pytest.mark.skip(reason="times a CPU: pass --device cpu")
        for item in items:
            if item.path.name != "test_ops.py":
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not timed, and why."""
    for name in terminalreporter.config.stash[_LATE]:
        terminalreporter.write_line(unreached(name))
    for line in getattr(terminalreporter.config, "left_out", ()):  # set by `test_ops.py`
        terminalreporter.write_line(f"left out: {line}")
