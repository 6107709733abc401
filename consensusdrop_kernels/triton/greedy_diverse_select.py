"""`greedy_diverse_select`: the whole greedy loop in one launch, one program per sample.

A launch before it measures the tokens, and for `maxmin` without relevance another one scores every
token as the first. The loop keeps a few numbers per token in a workspace and reads the features
once a step, in blocks. Products are float64: the cosine of a vector with its copy is then 1 to the
bit, and vectors of any length need no scaling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._scores import pair_strides

#: What a token is to the loop. Shut: valid, but it can't be compared.
SHUT, OPEN, CHOSEN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NOBODY = tl.constexpr(0x7FFFFFFF)
#: `DPP_FLOOR` of the plain-torch definition.
FLOOR = tl.constexpr(1e-5)
BLOCK_N = 64


@triton.jit
def _cosine(product, squares):
    """float32 cosine from a product and the product of both squared lengths, all float64."""
    cosine = tl.where(squares == 0.0, 0.0, product / tl.sqrt(tl.where(squares == 0, 1.0, squares)))
    return tl.minimum(tl.maximum(cosine.to(tl.float32), -1.0), 1.0)


@triton.jit(
    do_not_specialize=[
        "stride_wb", "stride_wn", "stride_mb", "stride_mn", "tokens",
    ]
)  # fmt: skip
def _greedy_diverse_select_measure_kernel(
    x_ptr, worth_ptr, valid_ptr, square_ptr, state_ptr, score_ptr, value_ptr,
    stride_xb, stride_xn, stride_xf, stride_wb, stride_wn, stride_mb, stride_mn, tokens, width,
    DPP: tl.constexpr, HAS_WORTH: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Squared lengths, states, relevance, and what the first step goes by."""
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = token < tokens
    if HAS_VALID:
        at = valid_ptr + b * stride_mb + token * stride_mn.to(tl.int64)
        there = there & tl.load(at, mask=there, other=0).to(tl.int1)
    rows = x_ptr + b * stride_xb + token.to(tl.int64) * stride_xn
    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float64)
    for f in range(0, width, BLOCK_F):
        column = f + tl.arange(0, BLOCK_F)
        mask = there[:, None] & (column < width)[None, :]
        v = tl.load(rows[:, None] + column.to(tl.int64)[None, :] * stride_xf, mask=mask, other=0.0)
        v = v.to(tl.float64)
        total += v * v
    square = tl.sum(total, 1)
    worth = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_WORTH:
        at = worth_ptr + b * stride_wb + token * stride_wn.to(tl.int64)
        worth = tl.load(at, mask=there, other=0.0)
    comparable = square < float("inf")  # neither infinite nor NaN
    score = worth.to(tl.float64)
    if DPP:
        comparable = comparable & (worth == worth)
        score = tl.where(square > 0.0, 1.0, 0.0).to(tl.float64)
    inside = token < tokens
    line = b * tokens + token
    tl.store(square_ptr + line, square, mask=inside)
    state = tl.where(there, tl.where(comparable, OPEN, SHUT), 0)
    tl.store(state_ptr + line, state, mask=inside)
    tl.store(score_ptr + line, score, mask=inside)
    tl.store(value_ptr + line, worth, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _greedy_diverse_select_start_kernel(
    x_ptr, square_ptr, state_ptr, score_ptr, stride_xb, stride_xn, stride_xf, tokens, width,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Minus the cosine of each token with the other one likest to it."""
    b = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    x_ptr += b * stride_xb
    square_ptr += b * tokens
    state_ptr += b * tokens
    own_ptrs = x_ptr + own.to(tl.int64) * stride_xn
    own_square = tl.load(square_ptr + own, mask=own < tokens, other=0.0)
    most = tl.full([BLOCK_I], -2.0, tl.float32)
    for start in range(0, tokens, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        a_ptrs = own_ptrs
        c_ptrs = x_ptr + other.to(tl.int64) * stride_xn
        product = tl.zeros([BLOCK_I, BLOCK_J], tl.float64)
        for _ in range(0, width):  # an outer product a column: float64 has no tl.dot everywhere
            a = tl.load(a_ptrs, mask=own < tokens, other=0.0).to(tl.float64)
            c = tl.load(c_ptrs, mask=other < tokens, other=0.0).to(tl.float64)
            product += a[:, None] * c[None, :]
            a_ptrs += stride_xf
            c_ptrs += stride_xf
        other_square = tl.load(square_ptr + other, mask=other < tokens, other=0.0)
        cosine = _cosine(product, own_square[:, None] * other_square[None, :])
        state = tl.load(state_ptr + other, mask=other < tokens, other=0)
        fair = (state == OPEN)[None, :] & (own[:, None] != other[None, :])
        most = tl.maximum(most, tl.max(tl.where(fair, cosine, -2.0), 1))
    tl.store(score_ptr + b * tokens + own, -most.to(tl.float64), mask=own < tokens)


@triton.jit
def _products(
    x_ptr, last, token, tokens, stride_xn, stride_xf, width, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Products of a block of tokens with the token `last`, float64."""
    rows = x_ptr + token.to(tl.int64) * stride_xn
    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float64)
    for f in range(0, width, CHUNKS * BLOCK_F):
        for chunk in tl.static_range(CHUNKS):  # loads of all of them are under way at once
            column = f + chunk * BLOCK_F + tl.arange(0, BLOCK_F)
            step = column.to(tl.int64) * stride_xf
            in_width = column < width
            chosen = tl.load(x_ptr + last.to(tl.int64) * stride_xn + step, mask=in_width, other=0)
            mask = (token < tokens)[:, None] & in_width[None, :]
            v = tl.load(rows[:, None] + step[None, :], mask=mask, other=0.0)
            total += v.to(tl.float64) * chosen.to(tl.float64)[None, :]
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["tokens", "keep"])
def _greedy_diverse_select_loop_kernel(
    x_ptr, square_ptr, state_ptr, score_ptr, value_ptr, row_ptr, index_ptr,
    stride_xb, stride_xn, stride_xf, tokens, width, keep,
    DPP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """All steps of one sample, and its tokens in ascending order.

    `score` is minus the largest cosine with those chosen, or for `DPP` what is left of the squared
    length outside their span. Threads read what others wrote only behind a barrier, which orders
    global memory on CUDA; on ROCm it orders shared memory alone, and the program is one wavefront.
    """
    b = tl.program_id(0).to(tl.int64)
    x_ptr += b * stride_xb
    square_ptr += b * tokens
    state_ptr += b * tokens
    score_ptr += b * tokens
    value_ptr += b * tokens
    row_ptr += b * keep * tokens
    every, comparable = 0, 0
    for start in range(0, tokens, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        state = tl.load(state_ptr + token, mask=token < tokens, other=0)
        every += tl.sum((state != 0).to(tl.int32), 0)
        comparable += tl.sum((state == OPEN).to(tl.int32), 0)
    # Where all are kept there is nothing to compare.
    wanted = tl.where(every <= keep, 0, tl.minimum(keep, comparable))

    step = tl.full([], 0, tl.int32)
    last = tl.full([], 0, tl.int32)
    news = tl.full([], 0, tl.int32)  # whether `last` is still to be taken account of
    filling = tl.full([], 0, tl.int32)  # for DPP: nothing has a gain, relevance alone decides
    residual = tl.full([], 1.0, tl.float64)
    last_square = tl.full([], 0.0, tl.float64)
    while step < wanted:
        best = tl.full([], float("-inf"), tl.float64)
        at = tl.full([], NOBODY, tl.int32)
        first = tl.full([], NOBODY, tl.int32)
        for start in range(0, tokens, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            inside = token < tokens
            score = tl.load(score_ptr + token, mask=inside, other=0.0)
            if news != 0:
                product = _products(
                    x_ptr, last, token, tokens, stride_xn, stride_xf, width, BLOCK_N, BLOCK_F,
                    CHUNKS,
                )  # fmt: skip
                square = tl.load(square_ptr + token, mask=inside, other=0.0)
                cosine = _cosine(product, square * last_square).to(tl.float64)
                if DPP:
                    line = row_ptr
                    for _ in range(0, step - 1):
                        of_last = tl.load(line + last).to(tl.float64)
                        theirs = tl.load(line + token, mask=inside, other=0.0)
                        cosine -= of_last * theirs.to(tl.float64)
                        line += tokens
                    cosine = cosine / tl.sqrt(residual)
                    tl.store(line + token, cosine.to(tl.float32), mask=inside)
                    score -= cosine * cosine
                else:
                    score = tl.where(step == 1, -cosine, tl.minimum(score, -cosine))
                tl.store(score_ptr + token, score, mask=inside)
            offer = score
            if DPP:
                worth = tl.load(value_ptr + token, mask=inside, other=0.0).to(tl.float64)
                gain = tl.where(score > FLOOR, worth * worth * score, 0.0)
                offer = tl.where(filling != 0, worth, gain)
            is_open = tl.load(state_ptr + token, mask=inside, other=0) == OPEN
            number = is_open & (offer == offer)
            offer = tl.where(number, offer, float("-inf"))
            here = tl.max(offer, 0)
            place = tl.min(tl.where(number & (offer == here), token, NOBODY), 0)
            better = (place != NOBODY) & ((here > best) | (at == NOBODY))
            at = tl.where(better, place, at)  # strictly: earlier blocks hold lower tokens
            best = tl.where(better, here, best)
            first = tl.minimum(first, tl.min(tl.where(is_open, token, NOBODY), 0))
        news = tl.full([], 0, tl.int32)
        found = tl.full([], 1, tl.int32)
        if DPP:
            # Once none has a gain none will have: the step is taken again, by relevance.
            found = ((best > 0.0) | (filling != 0)).to(tl.int32)
            filling = 1 - found * (1 - filling)
        tl.debug_barrier()
        if found != 0:
            last = tl.where(at == NOBODY, first, at)  # only NaN is left: the lowest index
            tl.store(state_ptr + last, CHOSEN)
            residual = tl.load(score_ptr + last)
            last_square = tl.load(square_ptr + last)
            news = 1 - filling
            step += 1
        tl.debug_barrier()

    index_ptr += b * keep
    filled, shut = 0, 0
    for start in range(0, tokens, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        state = tl.load(state_ptr + token, mask=token < tokens, other=0)
        is_shut = state == SHUT
        number = shut + tl.cumsum(is_shut.to(tl.int32), 0) - 1
        shut += tl.sum(is_shut.to(tl.int32), 0)
        chosen = (state == CHOSEN) | (is_shut & (number < keep - wanted))
        chosen = tl.where(every <= keep, state != 0, chosen)
        slot = filled + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(index_ptr + slot, token.to(tl.int64), mask=chosen)
        filled += tl.sum(chosen.to(tl.int32), 0)
    for start in range(filled, keep, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        tl.store(index_ptr + slot, tl.full([BLOCK_N], -1, tl.int64), mask=slot < keep)


def greedy_diverse_select(
    features: Tensor,
    keep: int,
    *,
    relevance: Tensor | None = None,
    objective: str = "maxmin",
    valid: Tensor | None = None,
) -> Tensor:
    """The op; see `consensusdrop_kernels.greedy_diverse_select`."""
    _checks.diverse(features, keep, relevance=relevance, objective=objective, valid=valid)
    batch, tokens, width = features.shape
    index = torch.empty((batch, keep), dtype=torch.int64, device=features.device)
    if batch == 0:
        return index
    dpp = objective == "dpp"

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((batch, *shape, tokens), dtype=dtype, device=features.device)

    square, score = empty(torch.float64), empty(torch.float64)
    state, value = empty(torch.int32), empty(torch.float32)
    rows = empty(torch.float32, keep) if dpp else value  # any pointer: not read
    block_f = max(16, min(64, triton.next_power_of_2(width)))
    # A wavefront sees its own writes in order; several would need a barrier that waits for them.
    if torch.version.hip is not None:
        loop_f, chunks, loop_warps = 16, 1, 1
    elif width > 64:
        loop_f, chunks, loop_warps = 128, 2 if width > 128 else 1, 16
    else:
        loop_f, chunks, loop_warps = block_f, 1, 8
    blocks = triton.cdiv(tokens, BLOCK_N)
    _greedy_diverse_select_measure_kernel[(blocks, batch)](
        features, value if relevance is None else relevance, state if valid is None else valid,
        square, state, score, value, *features.stride(), *pair_strides(relevance),
        *pair_strides(valid), tokens, width, DPP=dpp, HAS_WORTH=relevance is not None,
        HAS_VALID=valid is not None, BLOCK_N=BLOCK_N, BLOCK_F=block_f, num_warps=8,
    )  # fmt: skip
    if not dpp and relevance is None:
        _greedy_diverse_select_start_kernel[(triton.cdiv(tokens, 32), batch)](
            features, square, state, score, *features.stride(), tokens, width, BLOCK_I=32,
            BLOCK_J=64, num_warps=4,
        )  # fmt: skip
    _greedy_diverse_select_loop_kernel[(batch,)](
        features, square, state, score, value, rows, index, *features.stride(), tokens, width, keep,
        DPP=dpp, BLOCK_N=BLOCK_N, BLOCK_F=loop_f, CHUNKS=chunks, num_warps=loop_warps,
    )  # fmt: skip
    return index
