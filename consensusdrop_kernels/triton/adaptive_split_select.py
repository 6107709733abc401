"""`adaptive_split_select`: two orders, their prefix sums, and the best of all splits.

Places in both lists come from the kernels of `consensus_select`: by counting up to `ONE_PROGRAM`
tokens, by radix sort beyond. Then three launches, for lists of any length: scores into the order of
their list, prefix sums (one program per list), and the choice (one program per sample). They are
launches of their own because each reads what other threads of the one before wrote.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._scores import pair_strides
from ._select_long import BLOCK, _Lists, _select_place_kernel
from .consensus_select import ONE_PROGRAM, _consensus_select_rank_kernel

#: The most tokens of a sample that a program holds at once.
TILE = 4096


@triton.jit
def _there(valid_ptr, stride_mn, token, tokens, HAS_VALID: tl.constexpr):
    """Which tokens exist and are valid."""
    there = token < tokens
    if HAS_VALID:
        at = valid_ptr + token * stride_mn.to(tl.int64)
        there = there & tl.load(at, mask=there, other=0).to(tl.int1)
    return there


@triton.jit
def _shares(
    valid_ptr, stride_mn, tokens, keep, reserve_bits, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr
):
    """Of one sample: the places there are, those each list has for itself, and the others."""
    budget = keep
    if HAS_VALID:
        count = 0
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            there = _there(valid_ptr, stride_mn, token, tokens, HAS_VALID)
            count += tl.sum(there.to(tl.int32), 0)
        budget = tl.minimum(count, keep)
    # A float argument would come as float32, where 0.29 * 100 is no longer below 29.
    reserve = reserve_bits.to(tl.int64).to(tl.float64, bitcast=True)
    held = (reserve * budget.to(tl.float64)).to(tl.int32)  # not negative: this is the floor
    return budget, held, budget - 2 * held


@triton.jit(
    do_not_specialize=[
        "stride_vb", "stride_vn", "stride_tb", "stride_tn", "stride_mb", "stride_mn", "stride_rb",
        "stride_rl", "tokens",
    ]
)  # fmt: skip
def _adaptive_split_select_list_kernel(
    visual_ptr, textual_ptr, valid_ptr, rank_ptr, listed_ptr,
    stride_vb, stride_vn, stride_tb, stride_tn, stride_mb, stride_mn, stride_rb, stride_rl, tokens,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores in the order of their list, to [B, 2, N]; a NaN adds nothing to a sum."""
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = _there(valid_ptr + b * stride_mb, stride_mn, token, tokens, HAS_VALID)
    rank_ptr += b * stride_rb
    listed_ptr += b * 2 * tokens
    v = tl.load(visual_ptr + b * stride_vb + token * stride_vn.to(tl.int64), mask=there, other=0.0)
    t = tl.load(textual_ptr + b * stride_tb + token * stride_tn.to(tl.int64), mask=there, other=0.0)
    place_v = tl.load(rank_ptr + token, mask=there, other=0)
    place_t = tl.load(rank_ptr + stride_rl.to(tl.int64) + token, mask=there, other=0)
    tl.store(listed_ptr + place_v, tl.where(v == v, v, 0.0), mask=there)
    tl.store(listed_ptr + tokens + place_t, tl.where(t == t, t, 0.0), mask=there)


@triton.jit(do_not_specialize=["stride_mb", "stride_mn", "tokens", "keep", "reserve_bits"])
def _adaptive_split_select_mass_kernel(
    valid_ptr, listed_ptr, mass_ptr, stride_mb, stride_mn, tokens, keep, reserve_bits,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mass of the first 0, 1, ... tokens after those a list has for itself, [B, 2, K+1].

    Both lists are added in the same tree, so that equal lists have equal masses to the bit.
    """
    b = tl.program_id(1).to(tl.int64)
    _, held, rest = _shares(
        valid_ptr + b * stride_mb, stride_mn, tokens, keep, reserve_bits, HAS_VALID, BLOCK
    )
    line = b * 2 + tl.program_id(0)
    listed_ptr += line * tokens + held
    mass_ptr += line * (keep + 1)
    total = tl.full([], 0.0, tl.float64)
    tl.store(mass_ptr, total)
    for start in range(0, rest, BLOCK):
        place = start + tl.arange(0, BLOCK)
        score = tl.load(listed_ptr + place, mask=place < rest, other=0.0).to(tl.float64)
        tl.store(mass_ptr + 1 + place, total + tl.cumsum(score, 0), mask=place < rest)
        total += tl.sum(score, 0)


@triton.jit
def _taken(rank_ptr, stride_rl, token, there, of_visual, of_text, to_text):
    """Which tokens are among the first of a list, and the place of each in the list that fills."""
    place_v = tl.load(rank_ptr + token, mask=there, other=0)
    place_t = tl.load(rank_ptr + stride_rl.to(tl.int64) + token, mask=there, other=0)
    taken = there & ((place_v < of_visual) | (place_t < of_text))
    return taken, tl.where(to_text, place_t, place_v)


@triton.jit(
    do_not_specialize=[
        "stride_mb", "stride_mn", "stride_rb", "stride_rl", "tokens", "keep", "reserve_bits",
        "bits",
    ]
)  # fmt: skip
def _adaptive_split_select_choice_kernel(
    valid_ptr, rank_ptr, mass_ptr, index_ptr, split_ptr,
    stride_mb, stride_mn, stride_rb, stride_rl, tokens, keep, reserve_bits, bits,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample: the first split of the largest product, and its tokens in ascending order."""
    b = tl.program_id(0).to(tl.int64)
    valid_ptr += b * stride_mb
    rank_ptr += b * stride_rb
    budget, held, rest = _shares(
        valid_ptr, stride_mn, tokens, keep, reserve_bits, HAS_VALID, BLOCK
    )  # fmt: skip
    mass_v = mass_ptr + b * 2 * (keep + 1)
    mass_t = mass_v + keep + 1
    most = tl.full([], float("-inf"), tl.float64)
    split = tl.full([], 0, tl.int32)
    for start in range(0, rest + 1, BLOCK):
        k1 = start + tl.arange(0, BLOCK)
        product = tl.load(mass_t + k1, mask=k1 <= rest, other=0.0)
        product *= tl.load(mass_v + rest - k1, mask=k1 <= rest, other=0.0)
        product = tl.where((k1 <= rest) & (product == product), product, float("-inf"))
        here = tl.max(product, 0)
        first = tl.min(tl.where(product == here, k1, 0x7FFFFFFF), 0)
        split = tl.where(here > most, first, split)  # strictly: the first of equal products
        most = tl.maximum(most, here)
    tl.store(split_ptr + b, split.to(tl.int64))
    of_text, of_visual = held + split, held + rest - split
    to_text = tl.load(mass_t + split) >= tl.load(mass_v + rest - split)

    found = 0
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = _there(valid_ptr, stride_mn, token, tokens, HAS_VALID)
        taken, _ = _taken(rank_ptr, stride_rl, token, there, of_visual, of_text, to_text)
        found += tl.sum(taken.to(tl.int32), 0)
    # Places freed by tokens in both lists: the largest bound, bit by bit, below which no more of
    # the tokens left lie than there are such places. Places are distinct, so it is met exactly.
    bound = 0
    for bit in range(0, bits):
        trial = bound + (1 << (bits - 1 - bit))
        below = 0
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            there = _there(valid_ptr, stride_mn, token, tokens, HAS_VALID)
            taken, place = _taken(rank_ptr, stride_rl, token, there, of_visual, of_text, to_text)
            below += tl.sum((there & (taken == 0) & (place < trial)).to(tl.int32), 0)
        bound = tl.where(below <= budget - found, trial, bound)

    index_ptr += b * keep
    filled = 0
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = _there(valid_ptr, stride_mn, token, tokens, HAS_VALID)
        taken, place = _taken(rank_ptr, stride_rl, token, there, of_visual, of_text, to_text)
        chosen = taken | (there & (place < bound))
        slot = filled + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(index_ptr + slot, token.to(tl.int64), mask=chosen)
        filled += tl.sum(chosen.to(tl.int32), 0)
    for start in range(filled, keep, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(index_ptr + slot, tl.full([BLOCK], -1, tl.int64), mask=slot < keep)


def _places(visual: Tensor, textual: Tensor, valid: Tensor | None) -> tuple[Tensor, int, int]:
    """The place of each valid token in both lists, int32, and the strides of samples and lists."""
    batch, tokens = visual.shape
    rank = torch.empty((2, batch, tokens), dtype=torch.int32, device=visual.device)
    if tokens <= ONE_PROGRAM:
        _consensus_select_rank_kernel[(triton.cdiv(tokens, 16), batch, 2)](
            visual, textual, visual if valid is None else valid, rank, *visual.stride(),
            *textual.stride(), *pair_strides(valid), tokens, HAS_VALID=valid is not None,
            BLOCK_I=16, BLOCK_J=128, num_warps=4,
        )  # fmt: skip
        return rank, 2 * tokens, tokens  # it writes [B, 2, N]
    lists = _Lists(batch, tokens, valid, visual.device)
    order = lists.order(visual, textual)
    _select_place_kernel[(lists.grid[0], 2 * batch)](order, rank, tokens, BLOCK=BLOCK, num_warps=4)
    return rank, tokens, batch * tokens


def adaptive_split_select(
    visual: Tensor,
    textual: Tensor,
    keep: int,
    *,
    reserve: float = 0.25,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op; see `consensusdrop_kernels.adaptive_split_select`."""
    _checks.split(visual, textual, keep, reserve=reserve, valid=valid)
    batch, tokens = visual.shape
    device = visual.device
    index = torch.empty((batch, keep), dtype=torch.int64, device=device)
    split = torch.empty((batch,), dtype=torch.int64, device=device)
    if batch == 0:
        return index, split
    rank, *rank_strides = _places(visual, textual, valid)
    listed = torch.empty((batch, 2, tokens), dtype=torch.float32, device=device)
    mass = torch.empty((batch, 2, keep + 1), dtype=torch.float64, device=device)
    mask, mask_strides = visual if valid is None else valid, pair_strides(valid)
    given = valid is not None
    _adaptive_split_select_list_kernel[(triton.cdiv(tokens, 1024), batch)](
        visual, textual, mask, rank, listed, *visual.stride(), *textual.stride(), *mask_strides,
        *rank_strides, tokens, HAS_VALID=given, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    (bits,) = struct.unpack("<q", struct.pack("<d", reserve))
    tile = min(TILE, max(16, triton.next_power_of_2(tokens)))
    warps = 4 if tile <= 1024 else 8
    _adaptive_split_select_mass_kernel[(2, batch)](
        mask, listed, mass, *mask_strides, tokens, keep, bits, HAS_VALID=given, BLOCK=tile,
        num_warps=warps,
    )  # fmt: skip
    _adaptive_split_select_choice_kernel[(batch,)](
        mask, rank, mass, index, split, *mask_strides, *rank_strides, tokens, keep, bits,
        tokens.bit_length(), HAS_VALID=given, BLOCK=tile, num_warps=warps,
    )  # fmt: skip
    return index, split
