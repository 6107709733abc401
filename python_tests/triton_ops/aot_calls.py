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


def _packed(rows: int, width: int, **options: Any) -> Callable[[], object]:
    def call() -> object:
        from consensusdrop_kernels.triton.attention_saliency import attention_saliency_varlen

        q = meta(4096, 16, width, dtype=BF16)
        starts = meta(4096 // rows + 1, dtype=torch.int32)
        made = {"lse": lambda: meta(16, 4096), "query_weight": lambda: meta(4096)}
        given = {name: made[name]() if name in made else value for name, value in options.items()}
        return attention_saliency_varlen(q, q, starts, rows, **given)

    return call


SALIENCY = {
    "CLS row": _saliency(16, 16, 1, 577, 64, prefix=1),
    "CLS row, d 72": _saliency(16, 16, 1, 729, 72, F16),
    "last row, GQA": _saliency(28, 4, 1, 729, 128),
    "8 text rows, GQA": _saliency(28, 4, 8, 2880, 128, query_weight=True, key_valid=True),
    "8 text rows, max": _saliency(32, 32, 8, 2880, 128, query_weight=True, reduce="max"),
    "64 text rows": _saliency(32, 32, 64, 2880, 128, causal=True, query_weight=True),
    "few rows, d 256": _saliency(8, 4, 40, 576, 256),
    "packed windows of 64": _packed(64, 80),
    "packed, 1024, lse": _packed(1024, 80, lse=True),
    "packed, 4096, weighted": _packed(4096, 64, query_weight=True, causal=True),
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


def _select(
    tokens: int, fusion: str, *, text: bool = True, valid: bool = False, reserved: int = 0
) -> Callable[[], object]:
    def call() -> object:
        from consensusdrop_kernels.triton.consensus_select import consensus_select

        return consensus_select(
            meta(2, tokens), meta(2, tokens) if text else None, tokens // 4, fusion=fusion,
            valid=meta(2, tokens, dtype=torch.bool) if valid else None,
            priority=meta(tokens) if reserved else None, priority_keep=reserved,
        )  # fmt: skip

    return call


SELECT = {
    "image": _select(576, "rank"),
    "2048 tokens": _select(2048, "rank"),
    "4096 tokens": _select(4096, "rank", valid=True, reserved=64),
    **{f"4096 tokens, {f}": _select(4096, f, valid=True, reserved=64)
       for f in ("rrf", "sum", "zscore", "product", "max")},
    "one list": _select(4096, "rank", text=False, valid=True, reserved=64),
    "video": _select(32768, "rank", valid=True, reserved=64),
    "video, zscore": _select(32768, "zscore", valid=True),
    "video, max": _select(32768, "max"),
}  # fmt: skip


def _merge(
    tokens: int, keep: int, width: int, features: int, dtype: torch.dtype = BF16, *,
    contextual: int = 0, weight: bool = False, valid: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        from consensusdrop_kernels.triton.token_merge import token_merge

        return token_merge(
            meta(2, tokens, width, dtype=dtype), meta(2, tokens, features, dtype=dtype),
            meta(2, keep, dtype=torch.int64), contextual=contextual,
            weight=meta(2, tokens) if weight else None,
            valid=meta(2, tokens, dtype=torch.bool) if valid else None,
        )  # fmt: skip

    return call


MERGE = {
    "image": _merge(576, 64, 1024, 64),
    "image, contextual": _merge(576, 54, 4096, 64, F16, contextual=10),
    "tiles": _merge(2880, 160, 4096, 128, contextual=32, weight=True, valid=True),
    "video": _merge(32768, 4096, 3584, 128, weight=True, valid=True),
    "float32, wide metric": _merge(729, 64, 1152, 1152, F32),
    "narrow": _merge(60, 9, 40, 5, F32),
}


def _split(tokens: int, *, valid: bool = False) -> Callable[[], object]:
    def call() -> object:
        from consensusdrop_kernels.triton.adaptive_split_select import adaptive_split_select

        return adaptive_split_select(
            meta(2, tokens), meta(2, tokens), tokens // 4,
            valid=meta(2, tokens, dtype=torch.bool) if valid else None,
        )  # fmt: skip

    return call


SPLIT = {
    "image": _split(576),
    "4096 tokens": _split(4096, valid=True),
    "video": _split(32768, valid=True),
}


def _diverse(
    tokens: int, keep: int, width: int, objective: str, dtype: torch.dtype = BF16,
    *, relevance: bool = False, valid: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        from consensusdrop_kernels.triton.greedy_diverse_select import greedy_diverse_select

        return greedy_diverse_select(
            meta(2, tokens, width, dtype=dtype), keep, objective=objective,
            relevance=meta(2, tokens) if relevance else None,
            valid=meta(2, tokens, dtype=torch.bool) if valid else None,
        )  # fmt: skip

    return call


DIVERSE = {
    "image": _diverse(576, 64, 1024, "maxmin"),
    "tiles, relevance": _diverse(2880, 160, 4096, "maxmin", F16, relevance=True, valid=True),
    "image, dpp": _diverse(576, 64, 1024, "dpp", relevance=True),
    "narrow, dpp": _diverse(577, 64, 37, "dpp", F32, valid=True),
    "narrow": _diverse(60, 9, 5, "maxmin", F32),
}


def _similarity(
    rows: int, tokens: int, width: int, dtype: torch.dtype = BF16, reduce: str = "max",
    *, valid: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        from consensusdrop_kernels.triton.similarity_saliency import similarity_saliency

        masks = {
            name: meta(2, n, dtype=torch.bool) if valid else None
            for name, n in (("text_valid", rows), ("visual_valid", tokens))
        }
        return similarity_saliency(
            meta(2, rows, width, dtype=dtype), meta(2, tokens, width, dtype=dtype), reduce=reduce,
            **masks,
        )  # fmt: skip

    return call


SIMILARITY = {
    "image": _similarity(12, 576, 4096, valid=True),
    "image, float16": _similarity(12, 576, 4096, F16, "mean"),
    "tiles": _similarity(64, 2880, 4096, valid=True),
    "float32": _similarity(40, 577, 37, F32, "mean", valid=True),
}


def _flagship(tokens: int, keep: int, **options: Any) -> Callable[[], object]:
    def call() -> object:
        from consensusdrop_kernels.triton.select_merge import select_merge

        vis = [meta(2, 16, rows, 64, dtype=BF16) for rows in (1, tokens + 1)]
        txt = [meta(2, heads, n, 128, dtype=BF16) for heads, n in ((32, 8), (32, tokens))]
        return select_merge(
            meta(2, tokens, 4096, dtype=BF16), *vis, *txt, keep=keep, prefix=1, **options
        )

    return call


FLAGSHIP = {
    "image": _flagship(576, 64),
    "image, contextual": _flagship(576, 54, contextual=10, fusion="zscore"),
    "image, diverse": _flagship(576, 64, diversity=0.65),
}

OPS = {
    "attention_saliency": SALIENCY,
    "consensus_select": SELECT,
    "token_merge": MERGE,
    "select_merge": FLAGSHIP,
    "adaptive_split_select": SPLIT,
    "greedy_diverse_select": DIVERSE,
    "similarity_saliency": SIMILARITY,
}
CALLS: dict[str, Callable[[], object]] = {
    f"{op}: {name}": call for op, calls in OPS.items() for name, call in calls.items()
}
