"""What the compiler makes of some calls, without a GPU: that it takes them, and how they load."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from . import aot
from .aot_calls import CALLS as TABLE
from .aot_calls import meta


def _saliency() -> object:
    from consensusdrop_kernels.triton.attention_saliency import attention_saliency

    return attention_saliency(
        meta(1, 1, 1, 1), meta(1, 1, 1, 1), key_valid=meta(1, 1, dtype=torch.bool),
        query_weight=meta(1, 1), lse=meta(1, 1, 1),
    )  # fmt: skip


def _square() -> object:
    from consensusdrop_kernels.triton.attention_saliency import attention_saliency

    return attention_saliency(meta(1, 1, 128, 1), meta(1, 1, 128, 1), causal=True)


def _packed() -> object:
    from consensusdrop_kernels.triton.attention_saliency import attention_saliency_varlen

    return attention_saliency_varlen(
        meta(1, 1, 1), meta(1, 1, 1), meta(2, dtype=torch.int32), 1, query_weight=meta(1)
    )


def _similarity() -> object:
    from consensusdrop_kernels.triton.similarity_saliency import similarity_saliency

    one = meta(1, 1, dtype=torch.bool)
    return similarity_saliency(meta(1, 1, 1), meta(1, 1, 1), text_valid=one, visual_valid=one)


def _select() -> object:
    from consensusdrop_kernels.triton.consensus_select import consensus_select

    return consensus_select(
        meta(1, 1), meta(1, 1), 1, valid=meta(1, 1, dtype=torch.bool), priority=meta(1, 1),
        priority_keep=1,
    )  # fmt: skip


def _long_select() -> object:
    from consensusdrop_kernels.triton.consensus_select import consensus_select

    return consensus_select(
        meta(1, 4097), meta(1, 4097), 1, valid=meta(1, 4097, dtype=torch.bool),
        priority=meta(4097), priority_keep=1,
    )  # fmt: skip


def _split() -> object:
    from consensusdrop_kernels.triton.adaptive_split_select import adaptive_split_select

    return adaptive_split_select(
        meta(1, 1), meta(1, 1), 1, reserve=0.0, valid=meta(1, 1, dtype=torch.bool)
    )


def _diverse() -> object:
    from consensusdrop_kernels.triton.greedy_diverse_select import greedy_diverse_select

    return greedy_diverse_select(meta(1, 1, 1), 1)


def _dpp() -> object:
    from consensusdrop_kernels.triton.greedy_diverse_select import greedy_diverse_select

    return greedy_diverse_select(
        meta(1, 1, 1), 1, objective="dpp", relevance=meta(1, 1),
        valid=meta(1, 1, dtype=torch.bool),
    )  # fmt: skip


def _merge() -> object:
    from consensusdrop_kernels.triton.token_merge import token_merge

    return token_merge(
        meta(1, 1, 1), meta(1, 1, 1), meta(1, 1, dtype=torch.int64), contextual=1,
        weight=meta(1, 1), valid=meta(1, 1, dtype=torch.bool),
    )  # fmt: skip


def _flagship() -> object:
    """Heads of width 1, side by side: their stride is 1 as well."""
    from consensusdrop_kernels.triton.select_merge import select_merge

    k = meta(1, 2, 4, 1).transpose(1, 2)
    return select_merge(meta(1, 2, 1), k[:, :, :1], k, k[:, :, :1], k, keep=1)


CALLS = (
    _saliency, _square, _packed, _similarity, _select, _long_select, _split, _diverse, _dpp, _merge,
    _flagship,
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__[1:])
def test_the_smallest_call_compiles(call: Callable[[], object]):
    """Triton makes a constant of a stride that is 1, and a constant has no type to convert."""
    launches = aot.record(call)
    assert launches
    for launch in launches:
        aot.compile_launch(*launch, "sm90")


@pytest.mark.parametrize("kernel", ["unit", "mean"])
def test_rows_are_read_16_bytes_at_a_time(kernel: str):
    """The keys of all heads, and the tokens: most of the bytes that `select_merge` reads."""
    launches = aot.record(TABLE["select_merge: image"])
    (launch,) = [x for x in launches if x[0].__name__ == f"_token_merge_{kernel}_kernel"]
    text = aot.compile_launch(*launch, "sm90").asm["ptx"]
    assert "ld.global.v4" in text
    assert "ld.global.b16" not in text
