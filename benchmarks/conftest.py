"""Shared by the microbenchmarks: their options, and what the figures depend on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import consensusdrop_kernels
from consensusdrop_kernels import _C

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `benchmarks.cases`


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
    for line in getattr(terminalreporter.config, "left_out", ()):  # set by `test_ops.py`
        terminalreporter.write_line(f"left out: {line}")
