"""Shared by the microbenchmarks: which machine this is, and a table of ratios at the end."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import consensusdrop_kernels

sys.path.insert(0, str(Path(__file__).parent))

from summary import markdown_table  # noqa: E402


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Record what the figures depend on beside the processor."""
    from consensusdrop_kernels import _C

    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["kernels"] = consensusdrop_kernels.backends()["cpu"].reason
    machine_info["build_commit"] = _C.build_info()["commit"]


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Ratios within this run: the times themselves depend on the machine."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    rows = [
        {"group": b.group, "name": b.params["contender"], "median": b.stats.median, **b.extra_info}
        for b in session.benchmarks
        if not b.has_error and b.params and "contender" in b.params
    ]
    terminalreporter.write_line(markdown_table(rows))
