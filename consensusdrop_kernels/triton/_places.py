"""Who joins and who may be joined, once the kept tokens are known."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Places(NamedTuple):
    """Where every token of a sample stands; the lists are in ascending order of the tokens."""

    assign: Tensor  # [B, N] int64: slot of each token, -1 for none
    joining: Tensor  # [B, N] int32: tokens that must find a slot
    target: Tensor  # [B, T] int32: tokens that may be joined
    counts: Tensor  # [B, 2] int32: how many of either


@triton.jit
def place_tile(
    assign_ptr,
    own_ptr,
    joining_ptr,
    target_ptr,
    token,  # [BLOCK_N]
    slot,  # [BLOCK_N]: of a kept token, else -1
    there,  # [BLOCK_N]: valid, and in range
    kept_before,
    dropped_before,
    dropped_total,
    tokens,
    keep,
    contextual,
    CONTEXTUAL: tl.constexpr,
):
    """Writes one tile of a sample; the pointers are those of the sample.

    `joining` lists the tokens that must find a slot, `target` those that have one to offer, both
    ascending. Contextual slot c belongs to dropped token number `floor(c R / C)`, so the token
    numbered r is a reference if that formula gives r for the first c that reaches it, and that c
    is the number of references before it.
    """
    kept = there & (slot >= 0)
    dropped = there & (slot < 0)
    number = dropped_before + tl.cumsum(dropped.to(tl.int32), 0) - 1
    if CONTEXTUAL:
        many = dropped_total >= contextual
        wide = number.to(tl.int64)
        whole = tl.maximum(dropped_total, 1)
        ceiling = (wide * contextual + whole - 1) // whole
        before = tl.where(many, ceiling, wide).to(tl.int32)
        back = tl.where(many, before.to(tl.int64) * dropped_total // contextual, wide)
        reference = dropped & (before < contextual) & (back == wide)
        tl.store(target_ptr + before, token, mask=reference)
        tl.store(own_ptr + keep + before, token.to(tl.int64), mask=reference)
        tl.store(joining_ptr + number - before, token, mask=dropped & (reference == 0))
        slot = tl.where(reference, keep + before, slot)
    else:
        place = kept_before + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(target_ptr + place, token, mask=kept)
        tl.store(joining_ptr + number, token, mask=dropped)
    tl.store(assign_ptr + token, slot.to(tl.int64), mask=token < tokens)


@triton.jit
def place_counts(
    own_ptr,
    count_ptr,
    kept,
    dropped,
    keep,
    contextual,
    CONTEXTUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes how many join and how many may be joined, and empties unused contextual slots."""
    if CONTEXTUAL:
        targets = tl.minimum(dropped, contextual)
        tl.store(count_ptr, dropped - targets)
        tl.store(count_ptr + 1, targets)
        for start in range(targets, contextual, BLOCK):
            at = start + tl.arange(0, BLOCK)
            empty = tl.full([BLOCK], -1, tl.int64)
            tl.store(own_ptr + keep + at, empty, mask=at < contextual)
    else:
        tl.store(count_ptr, dropped)
        tl.store(count_ptr + 1, kept)
