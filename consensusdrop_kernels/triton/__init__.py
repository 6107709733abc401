"""The ops as Triton kernels, for any CUDA or ROCm device: one file per op, kernel and launcher.

Importing this package imports neither Triton nor a kernel; `function` does, when an op is first
called. Under `TRITON_INTERPRET=1` the same kernels run on CPU tensors, float32 only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

#: Each op that has a Triton kernel, and the module of this package that holds its launcher, a
#: function of the op's name (of an overload, `<op>_<overload>`) and schema.
OPS = {
    "attention_saliency": "attention_saliency",
    "attention_saliency.varlen": "attention_saliency",
    "consensus_select": "consensus_select",
    "token_merge": "token_merge",
    "select_merge": "select_merge",
    "adaptive_split_select": "adaptive_split_select",
    "greedy_diverse_select": "greedy_diverse_select",
    "similarity_saliency": "similarity_saliency",
}


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def installed() -> bool:
    """Whether the package triton is there; it is not imported to see."""
    return importlib.util.find_spec("triton") is not None


def missing() -> str:
    """Why the kernels can't run here, or an empty string."""
    if not installed():
        return "the package triton is not installed"
    if interpreted() or torch.cuda.is_available():
        return ""
    return "no CUDA or ROCm device is here and TRITON_INTERPRET is not 1"


def function(op: str) -> Callable[..., Any]:
    """The op as a function that imports its kernels at the first call and launches them on the
    device of its first argument."""
    launcher: Callable[..., Any] | None = None

    def call(first: torch.Tensor, *args: Any, **options: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = _load(op)
        device = first.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launcher(first, *args, **options)
        return launcher(first, *args, **options)

    return call


@functools.cache
def _load(op: str) -> Callable[..., Any]:
    if interpreted():
        from . import _interpreter

        _interpreter.prepare()
    module = importlib.import_module(f".{OPS[op]}", __name__)
    return getattr(module, op.replace(".", "_"))
