"""Ranges that show a patched model's steps in a profiler; off unless `CDROP_NVTX=1`.

A range costs the host microseconds, so the variable is read once, when this module is imported, and
without it nothing is wrapped. With it each step is a range `cdrop.<step>`: of NVTX where torch was
built for a GPU (Nsight Systems, Nsight Compute), of `torch.profiler` elsewhere. The ranges of the
C++ launchers, in the NVTX domain `cdrop`, are always there.

Steps: `encode` (vision tower with its tap, and projector), `choose` (signals, and what the method
keeps and merges), within it `probe` (the question's rows) and `lookahead` (text that runs ahead),
`shorten` (the shorter sequence), `stage` (one pruning inside the decoder).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

ENABLED = os.environ.get("CDROP_NVTX") == "1"


def step(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: each call of the function is a range `cdrop.<name>`, if ranges are on."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if not ENABLED:
            return function

        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with span(f"cdrop.{name}"):
                return function(*args, **kwargs)

        return inside

    return decorate


def span(name: str) -> AbstractContextManager[None]:
    """A range of this name in whatever profiler there is, on or off."""
    if torch.version.cuda or torch.version.hip:
        return torch.cuda.nvtx.range(name)
    return torch.profiler.record_function(name)
