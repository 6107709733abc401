"""`select_merge` on the CPU against plain torch, a plain read of its inputs, and random choice.

Run with `make bench`, on an otherwise idle machine. Every call takes the next of several sets of
inputs that together exceed the last-level cache, for each contender alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
from baselines import Inputs, Shape, make_inputs, plain_read, plain_torch, random_tokens

import consensusdrop_kernels as cdrop

SHAPES = [
    Shape(batch=1, tokens=576, width=4096, keep=64),
    Shape(batch=8, tokens=576, width=4096, keep=128),
    Shape(batch=1, tokens=2880, width=4096, keep=160),
]
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = ["hf", "contiguous"]  # [B, rows, H, d] viewed as heads first, or heads first in memory
ROTATED_BYTES = 128 * 2**20


def select_merge(inputs: Inputs, keep: int) -> tuple[torch.Tensor, ...]:
    return cdrop.select_merge(*inputs.tensors, keep=keep, prefix=1, txt_reduce="max")


CONTENDERS: dict[str, Callable[[Inputs, int], object]] = {
    "select_merge": select_merge,
    "plain torch": plain_torch,
    "plain torch, index_add": lambda i, keep: plain_torch(i, keep, merge="index_add"),
    "random tokens": random_tokens,
    "plain read": lambda i, keep: plain_read(i),
}


@cache
def checked(shape: Shape, dtype: torch.dtype, layout: str) -> list[Inputs]:
    """Sets of inputs, after the kernel was seen to be right on the first: no timing otherwise."""
    first = make_inputs(shape, dtype, 0, layout == "contiguous")
    copies = -(-ROTATED_BYTES // first.bytes)
    sets = [first]
    sets += [
        Inputs(*(t.clone(memory_format=torch.preserve_format) for t in first.tensors))
        for _ in range(max(1, copies - 1))
    ]
    ours = select_merge(first, shape.keep)
    with cdrop.use_backend("reference"):
        right = select_merge(first, shape.keep)
    for name, a, b in zip(("index", "assign"), ours[1:3], right[1:3], strict=True):
        same = (a == b).float().mean()  # two scores closer than rounding may change places
        assert same > 0.99, f"only {same:.3f} of {name} agrees with the definition"
    rows = (ours[1] == right[1]) & (ours[3] == right[3])
    torch.testing.assert_close(ours[0][rows], right[0][rows])
    return sets


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_merge(benchmark, shape, dtype, layout, contender) -> None:
    sets = checked(shape, dtype, layout)
    rotation = itertools.cycle(sets)
    run = CONTENDERS[contender]
    benchmark.group = f"{shape} {str(dtype).removeprefix('torch.')} {layout}"
    benchmark.extra_info["bytes"] = sets[0].bytes
    benchmark.pedantic(
        run,
        setup=lambda: ((next(rotation), shape.keep), {}),
        rounds=10 if contender.startswith("plain torch") else 50,
        warmup_rounds=2,
    )
