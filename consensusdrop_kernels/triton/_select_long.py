"""`consensus_select` beyond what one program holds: places and choice from a stable radix sort.

A list of scores becomes a list of 32-bit keys, ascending from the best token on, NaN after every
number and invalid tokens last. A sort that starts from the order of another list breaks its ties by
that list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._keys import ordered_bits
from ._radix import sort_pairs
from ._scores import Choice, fused_score, good_tile, pair_strides, scaling

BLOCK = 1024
EMIT_BLOCK = 4096


@triton.jit(do_not_specialize=["stride_sb", "stride_sn", "stride_mb", "stride_mn", "tokens"])
def _select_key_kernel(
    score_ptr, valid_ptr, chosen_ptr, order_ptr, key_ptr, item_ptr,
    stride_sb, stride_sn, stride_mb, stride_mn, tokens,
    HAS_VALID: tl.constexpr, HAS_CHOSEN: tl.constexpr, HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    token = place
    if HAS_ORDER:
        token = tl.load(order_ptr + b * tokens + place, mask=inside, other=0)
    there = inside
    if HAS_VALID:
        at = valid_ptr + b * stride_mb + token * stride_mn.to(tl.int64)
        there = there & tl.load(at, mask=inside, other=0).to(tl.int1)
    if HAS_CHOSEN:
        there = there & (tl.load(chosen_ptr + b * tokens + token, mask=inside, other=1) == 0)
    at = score_ptr + b * stride_sb + token * stride_sn.to(tl.int64)
    score = tl.load(at, mask=there, other=0.0)
    key = tl.where(score == score, ordered_bits(score) ^ 0x7FFFFFFF, -2)
    key = tl.where(there, key, -1)
    tl.store(key_ptr + b * tokens + place, key, mask=inside)
    tl.store(item_ptr + b * tokens + place, token, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _select_place_kernel(order_ptr, rank_ptr, tokens, BLOCK: tl.constexpr):
    """The place of each token in an order: its inverse."""
    row = tl.program_id(1).to(tl.int64) * tokens
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order_ptr + row + place, mask=place < tokens, other=0)
    tl.store(rank_ptr + row + token, place, mask=place < tokens)


@triton.jit(
    do_not_specialize=[
        "stride_vb", "stride_vn", "stride_tb", "stride_tn", "stride_mb", "stride_mn", "tokens",
    ]
)  # fmt: skip
def _select_scaling_kernel(
    visual_ptr, textual_ptr, valid_ptr, scaling_ptr,
    stride_vb, stride_vn, stride_tb, stride_tn, stride_mb, stride_mn, tokens,
    FUSION: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each sample: what its lists are shifted and divided by, and how many tokens are valid."""
    b = tl.program_id(0).to(tl.int64)
    visual_ptr += b * stride_vb
    textual_ptr += b * stride_tb
    valid_ptr += b * stride_mb
    v0, v1, t0, t1 = scaling(
        visual_ptr, textual_ptr, valid_ptr, stride_vn.to(tl.int64), stride_tn.to(tl.int64),
        stride_mn.to(tl.int64), tokens, FUSION, HAS_VALID, BLOCK,
    )  # fmt: skip
    count = tokens
    if HAS_VALID:
        count = 0
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            at = valid_ptr + token * stride_mn.to(tl.int64)
            count += tl.sum(tl.load(at, mask=token < tokens, other=0).to(tl.int32), 0)
    out = scaling_ptr + b * 5
    tl.store(out, v0)
    tl.store(out + 1, v1)
    tl.store(out + 2, t0)
    tl.store(out + 3, t1)
    tl.store(out + 4, count.to(tl.float32))  # exact: far below 2^24


@triton.jit(
    do_not_specialize=[
        "stride_vb", "stride_vn", "stride_tb", "stride_tn", "stride_mb", "stride_mn", "tokens",
        "batch", "share_v", "share_t",
    ]
)  # fmt: skip
def _select_score_kernel(
    visual_ptr, textual_ptr, valid_ptr, rank_ptr, scaling_ptr, score_ptr,
    stride_vb, stride_vn, stride_tb, stride_tn, stride_mb, stride_mn,
    tokens, batch, share_v, share_t,
    FUSION: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    HAS_TEXT: tl.constexpr = FUSION != "none"
    v, t, valid, good = good_tile(
        visual_ptr + b * stride_vb, textual_ptr + b * stride_tb, valid_ptr + b * stride_mb,
        stride_vn.to(tl.int64), stride_tn.to(tl.int64), stride_mn.to(tl.int64),
        token, tokens, HAS_VALID, HAS_TEXT,
    )  # fmt: skip
    score = v
    if HAS_TEXT:
        of = scaling_ptr + b * 5
        rank_v, rank_t = token, token
        if FUSION == "rank" or FUSION == "rrf":
            at = rank_ptr + b * tokens + token
            rank_v = tl.load(at, mask=token < tokens, other=0)
            rank_t = tl.load(at + batch.to(tl.int64) * tokens, mask=token < tokens, other=0)
        score = fused_score(
            v, t, rank_v, rank_t, tl.load(of + 4), share_v, share_t, tl.load(of),
            tl.load(of + 1), tl.load(of + 2), tl.load(of + 3), FUSION,
        )  # fmt: skip
        score = tl.where(good, score, float("nan"))
    score = tl.where(valid, score, float("-inf"))
    tl.store(score_ptr + b * tokens + token, score, mask=token < tokens)


@triton.jit(do_not_specialize=["stride_mb", "stride_mn", "tokens", "count"])
def _select_mark_kernel(
    order_ptr, valid_ptr, chosen_ptr, stride_mb, stride_mn, tokens, count,
    HAS_VALID: tl.constexpr, HAS_CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Marks the first `count` valid tokens of an order, beside those marked before."""
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    token = tl.load(order_ptr + b * tokens + place, mask=inside, other=0)
    chosen = place < count
    if HAS_VALID:
        at = valid_ptr + b * stride_mb + token * stride_mn.to(tl.int64)
        chosen = chosen & tl.load(at, mask=inside, other=0).to(tl.int1)
    chosen_ptr += b * tokens
    if HAS_CHOSEN:
        chosen = chosen | (tl.load(chosen_ptr + token, mask=inside, other=0) != 0)
    tl.store(chosen_ptr + token, chosen.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["tokens", "keep"])
def _select_emit_kernel(chosen_ptr, index_ptr, tokens, keep, BLOCK: tl.constexpr):
    """The marked tokens of a sample in ascending order, then -1."""
    b = tl.program_id(0).to(tl.int64)
    index_ptr += b * keep
    found = 0
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        taken = tl.load(chosen_ptr + b * tokens + token, mask=token < tokens, other=0).to(tl.int32)
        slot = found + tl.cumsum(taken, 0) - 1
        tl.store(index_ptr + slot, token.to(tl.int64), mask=taken != 0)
        found += tl.sum(taken, 0)
    for start in range(found, keep, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(index_ptr + slot, tl.full([BLOCK], -1, tl.int64), mask=slot < keep)


class _Lists:
    """Workspace and launches for the lists of one call."""

    def __init__(self, batch: int, tokens: int, valid: Tensor | None, device: torch.device):
        self.batch, self.tokens, self.valid, self.device = batch, tokens, valid, device
        self.grid = (triton.cdiv(tokens, BLOCK), batch)
        self.chosen: Tensor | None = None

    def empty(self, lists: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty((lists, self.batch, self.tokens), dtype=dtype, device=self.device)

    def order(self, *scores: Tensor, start: Tensor | None = None) -> Tensor:
        """The tokens from the best to the worst of each list, `[lists, B, N]` int32."""
        key, item = self.empty(len(scores)), self.empty(len(scores))
        for i, score in enumerate(scores):
            _select_key_kernel[self.grid](
                score, score if self.valid is None else self.valid,
                key if self.chosen is None else self.chosen, key if start is None else start,
                key[i], item[i], *pair_strides(score), *pair_strides(self.valid), self.tokens,
                HAS_VALID=self.valid is not None, HAS_CHOSEN=self.chosen is not None,
                HAS_ORDER=start is not None, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        _, order = sort_pairs(key.flatten(0, 1), item.flatten(0, 1), 32)
        return order.view_as(key)

    def mark(self, order: Tensor, count: int) -> Tensor:
        chosen = self.empty(1, torch.int8) if self.chosen is None else self.chosen
        _select_mark_kernel[self.grid](
            order, order if self.valid is None else self.valid, chosen,
            *pair_strides(self.valid), self.tokens, count, HAS_VALID=self.valid is not None,
            HAS_CHOSEN=self.chosen is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        return chosen


def choose_long(choice: Choice, index: Tensor, score: Tensor) -> None:
    """Choose from any number of tokens: fills `index [B, K]` and `score [B, N]`."""
    visual, textual, keep, alpha, fusion, valid, priority, reserved = choice
    batch, tokens = visual.shape
    lists = _Lists(batch, tokens, valid, visual.device)
    t = visual if textual is None else textual
    fusion = "none" if textual is None else fusion
    scores = (visual, t, visual if valid is None else valid)
    strides = (*visual.stride(), *t.stride(), *pair_strides(valid))
    rank = scaled = start = score  # any pointer: not read
    by_rank = fusion in ("rank", "rrf")
    if by_rank:
        start = lists.order(visual, t)
        rank = torch.empty_like(start)
        _select_place_kernel[(lists.grid[0], 2 * batch)](
            start, rank, tokens, BLOCK=BLOCK, num_warps=4
        )
    if fusion != "none":
        scaled = torch.empty((batch, 5), dtype=torch.float32, device=visual.device)
        _select_scaling_kernel[(batch,)](
            *scores, scaled, *strides, tokens, FUSION=fusion, HAS_VALID=valid is not None,
            BLOCK=EMIT_BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    _select_score_kernel[lists.grid](
        *scores, rank, scaled, score, *strides, tokens, batch, 1.0 - alpha, alpha, FUSION=fusion,
        HAS_VALID=valid is not None, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    # Equal scores of `rank` go to the better place in `visual`: the sort starts from its order.
    order = lists.order(score, start=start if fusion == "rank" else None)
    chosen = lists.mark(order, keep - reserved)
    if reserved > 0 and priority is not None:
        lists.chosen = chosen
        lists.mark(lists.order(priority), reserved)
    _select_emit_kernel[(batch,)](
        chosen, index, tokens, keep, BLOCK=EMIT_BLOCK, num_warps=8
    )  # fmt: skip
