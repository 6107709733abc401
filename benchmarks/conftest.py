"""Shared by the microbenchmarks: what the figures depend on beside the processor."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import consensusdrop_kernels
from consensusdrop_kernels import _C

sys.path.insert(0, str(Path(__file__).parent))  # for `baselines`


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Written into the results file; `summary.py` prints it."""
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["kernels"] = consensusdrop_kernels.backends()["cpu"].reason
    machine_info["build_commit"] = _C.build_info()["commit"]
