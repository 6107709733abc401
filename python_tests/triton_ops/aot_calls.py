"""The calls whose kernels are compiled ahead of time: a handful of each op, one for each
configuration of tiles that its launcher knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _saliency(
    heads: int, groups: int, rows: int, keys: int, width: int, dtype: torch.dtype = BF16,
    batch: int = 2, **options: Any,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        from consensusdrop_kernels.triton.attention_saliency import attention_saliency

        q = meta(batch, heads, rows, width, dtype=dtype)
        k = meta(batch, groups, keys, width, dtype=dtype)
        made = {
            "lse": lambda: meta(batch, heads, rows),
            "key_valid": lambda: meta(batch, keys, dtype=torch.bool),
            "query_weight": lambda: meta(batch, rows),
        }
        given = {name: made[name]() if name in made else value for name, value in options.items()}
        return attention_saliency(q, k, **given)

    return call


SALIENCY = {
    "CLS row": _saliency(16, 16, 1, 577, 64, prefix=1),
    "CLS row, d 72": _saliency(16, 16, 1, 729, 72, F16),
    "last row, GQA": _saliency(28, 4, 1, 729, 128),
    "8 text rows, GQA": _saliency(28, 4, 8, 2880, 128, query_weight=True, key_valid=True),
    "8 text rows, max": _saliency(32, 32, 8, 2880, 128, query_weight=True, reduce="max"),
    "64 text rows": _saliency(32, 32, 64, 2880, 128, causal=True, query_weight=True),
    "few rows, d 256": _saliency(8, 4, 40, 576, 256),
    "few rows, float32": _saliency(8, 4, 7, 576, 64, F32, query_weight=True, key_valid=True),
    "square, d 64": _saliency(16, 16, 576, 576, 64),
    "square, d 64, max": _saliency(16, 16, 576, 576, 64, reduce="max", key_valid=True),
    "square, d 72, lse": _saliency(16, 16, 729, 729, 72, lse=True),
    "square, d 128, causal": _saliency(28, 4, 4096, 4096, 128, causal=True, query_weight=True),
    "square, d 128, lse": _saliency(28, 4, 4096, 4096, 128, F16, causal=True, lse=True),
    "square, d 128, max": _saliency(28, 4, 4096, 4096, 128, lse=True, reduce="max"),
    "square, one head, causal": _saliency(
        1, 1, 600, 600, 128, batch=1, causal=True, query_weight=True
    ),
    "square, d 256": _saliency(8, 4, 1024, 1024, 256),
    "square, float32": _saliency(16, 16, 576, 576, 64, F32),
    "square, float32, d 256": _saliency(8, 4, 576, 576, 256, F32, causal=True, reduce="max"),
}

CALLS: dict[str, Callable[[], object]] = {
    f"{op}: {name}": call
    for op, calls in {"attention_saliency": SALIENCY}.items()
    for name, call in calls.items()
}
