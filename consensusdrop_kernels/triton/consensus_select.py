"""`consensus_select`: the tokens that two score lists agree on, sorted only where it must be.

Up to `ONE_PROGRAM` tokens, two launches: places in both lists by counting the better tokens (many
programs, and only for the fusions that use places), then one program per sample that fuses, finds
the smallest key to keep bit by bit and writes the tokens above it in order, by a prefix sum.
Longer lists have the same scores and are sorted by radix (`_select_long.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._keys import ordered_bits, packed_key
from ._places import Places, place_counts, place_tile
from ._scores import Choice, fused_score, good_tile, pair_strides, scaling
from ._select_long import choose_long

#: The most tokens that one program chooses from.
ONE_PROGRAM = 4096


@triton.jit
def _smallest_kept(key, count, BITS: tl.constexpr):
    """The largest number that `count` of the distinct keys reach; 0 when there are fewer keys."""
    smallest = tl.full([], 0, tl.int64)
    step = tl.full([], 1 << (BITS - 1), tl.int64)
    for _ in range(BITS):
        trial = smallest + step
        reach = tl.sum((key >= trial).to(tl.int32), 0)
        smallest = tl.where(reach >= count, trial, smallest)
        step = step >> 1
    return smallest


@triton.jit
def _best(score, tie, there, count, LOG_N: tl.constexpr):
    """The `count` best tokens of those that are there: by score, ties to the smaller `tie`."""
    high = ordered_bits(score).to(tl.int64) + 0x80000000
    key = (high << LOG_N) + ((1 << LOG_N) - 1 - tie).to(tl.int64)
    key = tl.where(there, key, -1)
    return there & (key >= _smallest_kept(key, count, 32 + LOG_N))


@triton.jit
def _list_tile(visual_ptr, textual_ptr, stride_vn, stride_tn, token, there):
    """Scores of the list that this program is about. Two loads, one of them masked off: a pointer
    that depends on a branch is more than some compilers take."""
    textual = tl.program_id(2) == 1
    at = visual_ptr + token * stride_vn.to(tl.int64)
    v = tl.load(at, mask=there & (textual == 0), other=0.0)
    at = textual_ptr + token * stride_tn.to(tl.int64)
    return tl.where(textual, tl.load(at, mask=there & textual, other=0.0), v)


@triton.jit(
    do_not_specialize=[
        "tokens", "stride_vb", "stride_vn", "stride_tb", "stride_tn", "stride_mb", "stride_mn",
    ]
)  # fmt: skip
def _consensus_select_rank_kernel(
    visual_ptr, textual_ptr, valid_ptr, rank_ptr,
    stride_vb, stride_vn, stride_tb, stride_tn, stride_mb, stride_mn, tokens,
    HAS_VALID: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Place of each token in one of the two lists: how many valid tokens are better."""
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    visual_ptr += b * stride_vb
    textual_ptr += b * stride_tb
    valid_ptr += b * stride_mb
    own = _list_tile(visual_ptr, textual_ptr, stride_vn, stride_tn, token, token < tokens)
    key = packed_key(own, token, token < tokens)
    place = tl.zeros([BLOCK_I], tl.int32)
    for start in range(0, tokens, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        there = other < tokens
        theirs = _list_tile(visual_ptr, textual_ptr, stride_vn, stride_tn, other, there)
        if HAS_VALID:
            valid = tl.load(valid_ptr + other * stride_mn.to(tl.int64), mask=there, other=0)
            there = there & valid.to(tl.int1)
        rival = packed_key(theirs, other, there)
        place += tl.sum((rival[None, :] > key[:, None]).to(tl.int32), 1)  # [BLOCK_I, BLOCK_J]
    out = rank_ptr + (b * 2 + tl.program_id(2)) * tokens + token
    tl.store(out, place, mask=token < tokens)


@triton.jit(
    do_not_specialize=[
        "tokens", "keep", "reserved", "contextual", "slots", "targets", "share_v", "share_t",
        "stride_vb", "stride_vn", "stride_tb", "stride_tn", "stride_mb", "stride_mn", "stride_pb",
        "stride_pn",
    ]
)  # fmt: skip
def _consensus_select_kernel(
    visual_ptr, textual_ptr, valid_ptr, priority_ptr, rank_ptr, own_ptr, score_ptr,
    assign_ptr, joining_ptr, target_ptr, count_ptr,
    stride_vb, stride_vn, stride_tb, stride_tn, stride_mb, stride_mn, stride_pb, stride_pn,
    tokens, keep, reserved, contextual, slots, targets, share_v, share_t,
    FUSION: tl.constexpr, HAS_VALID: tl.constexpr, HAS_PRIORITY: tl.constexpr,
    PLACE: tl.constexpr, CONTEXTUAL: tl.constexpr, LOG_N: tl.constexpr,
):  # fmt: skip
    """One sample: scores, choice, ascending indices; with `PLACE` what `token_merge` prepares."""
    BLOCK_N: tl.constexpr = 1 << LOG_N
    b = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_N)
    visual_ptr += b * stride_vb
    textual_ptr += b * stride_tb
    valid_ptr += b * stride_mb
    HAS_TEXT: tl.constexpr = FUSION != "none"
    v, t, valid, good = good_tile(
        visual_ptr, textual_ptr, valid_ptr, stride_vn.to(tl.int64), stride_tn.to(tl.int64),
        stride_mn.to(tl.int64), token, tokens, HAS_VALID, HAS_TEXT,
    )  # fmt: skip
    count = tl.sum(valid.to(tl.int32), 0)
    tie = token
    score = v
    if HAS_TEXT:
        v0, v1, t0, t1 = scaling(
            visual_ptr, textual_ptr, valid_ptr, stride_vn.to(tl.int64), stride_tn.to(tl.int64),
            stride_mn.to(tl.int64), tokens, FUSION, HAS_VALID, BLOCK_N,
        )  # fmt: skip
        rank_v, rank_t = token, token
        if FUSION == "rank" or FUSION == "rrf":
            rank_ptr += b * 2 * tokens
            rank_v = tl.load(rank_ptr + token, mask=token < tokens, other=0)
            rank_t = tl.load(rank_ptr + tokens + token, mask=token < tokens, other=0)
        if FUSION == "rank":
            tie = rank_v
        score = fused_score(
            v, t, rank_v, rank_t, count, share_v, share_t, v0, v1, t0, t1, FUSION
        )  # fmt: skip
        score = tl.where(good, score, float("nan"))
    chosen = _best(score, tie, valid, keep - reserved, LOG_N)
    if HAS_PRIORITY:
        priority = tl.load(
            priority_ptr + b * stride_pb + token * stride_pn.to(tl.int64), mask=valid, other=0.0
        )
        left = valid & (chosen == 0)
        chosen = chosen | _best(priority, token, left, reserved, LOG_N)

    taken = chosen.to(tl.int32)
    slot = tl.cumsum(taken, 0) - 1
    found = tl.sum(taken, 0)
    own_ptr += b * slots
    tl.store(own_ptr + slot, token.to(tl.int64), mask=chosen)
    empty = tl.full([BLOCK_N], -1, tl.int64)
    tl.store(own_ptr + token, empty, mask=(token >= found) & (token < keep))
    if PLACE:
        place_tile(
            assign_ptr + b * tokens, own_ptr, joining_ptr + b * tokens, target_ptr + b * targets,
            token, tl.where(chosen, slot, -1), valid, 0, 0, count - found,
            tokens, keep, contextual, CONTEXTUAL,
        )  # fmt: skip
        place_counts(
            own_ptr, count_ptr + b * 2, found, count - found, keep, contextual, CONTEXTUAL,
            BLOCK_N,
        )  # fmt: skip
    else:
        score = tl.where(valid, score, float("-inf"))
        tl.store(score_ptr + b * tokens + token, score, mask=token < tokens)


def choose(choice: Choice, own: Tensor, score: Tensor | None, places: Places | None) -> None:
    """Choose from up to `ONE_PROGRAM` tokens.

    Args:
        own: `[B, S]` int64; the first `keep` columns are filled.
        score: `[B, N]` float32, filled where given.
        places: filled where given, instead of `score`; then `own` is filled to its last column.
    """
    visual, textual, keep, alpha, fusion, valid, priority, reserved = choice
    batch, tokens = visual.shape
    fusion = "none" if textual is None else fusion
    t = visual if textual is None else textual
    v_strides, t_strides, m_strides = visual.stride(), t.stride(), pair_strides(valid)
    rank = own  # any pointer: not read
    if fusion in ("rank", "rrf"):
        rank = torch.empty((batch, 2, tokens), dtype=torch.int32, device=visual.device)
        _consensus_select_rank_kernel[(triton.cdiv(tokens, 16), batch, 2)](
            visual, t, visual if valid is None else valid, rank, *v_strides, *t_strides,
            *m_strides, tokens, HAS_VALID=valid is not None, BLOCK_I=16, BLOCK_J=128, num_warps=4,
        )  # fmt: skip
    slots = own.shape[1]
    log_n = max(4, (tokens - 1).bit_length())
    out = places or Places(own, own, own, own)
    _consensus_select_kernel[(batch,)](
        visual, t, visual if valid is None else valid, visual if priority is None else priority,
        rank, own, own if score is None else score, out.assign, out.joining, out.target, out.counts,
        *v_strides, *t_strides, *m_strides, *pair_strides(priority), tokens, keep, reserved,
        slots - keep, slots, out.target.shape[1], 1.0 - alpha, alpha,
        FUSION=fusion, HAS_VALID=valid is not None, HAS_PRIORITY=reserved > 0,
        PLACE=places is not None, CONTEXTUAL=slots > keep, LOG_N=log_n,
        num_warps=4 if log_n <= 10 else 8 if log_n <= 11 else 16, enable_fp_fusion=False,
    )  # fmt: skip


def consensus_select(
    visual: Tensor,
    textual: Tensor | None,
    keep: int,
    *,
    alpha: float = 0.5,
    fusion: str = "rank",
    valid: Tensor | None = None,
    priority: Tensor | None = None,
    priority_keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """The op; see `consensusdrop_kernels.consensus_select`."""
    _checks.scores(visual, textual)
    batch, tokens = visual.shape
    _checks.selection(
        batch, tokens, visual, "visual", keep=keep, alpha=alpha, fusion=fusion, valid=valid,
        priority=priority, priority_keep=priority_keep,
    )  # fmt: skip
    index = torch.empty((batch, keep), dtype=torch.int64, device=visual.device)
    score = torch.empty((batch, tokens), dtype=torch.float32, device=visual.device)
    choice = Choice(visual, textual, keep, alpha, fusion, valid, priority, priority_keep)
    if batch > 0 and tokens <= ONE_PROGRAM:
        choose(choice, index, score, None)
    elif batch > 0:
        choose_long(choice, index, score)
    return index, score
