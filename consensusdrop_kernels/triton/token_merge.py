"""`token_merge`: where the dropped tokens go, and the weighted means that they leave behind.

Six launches, whatever the sizes up to `COUNTED` tokens: unit vectors of the metric; the kept
tokens' slots; who joins and who may be joined; the most similar slot of each joining token, by
tiles of a matrix product that is never stored; each slot's list, by counting; the means, a row of
`x` read once and a row of the output written once. Longer lists are sorted by radix instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._places import Places, place_counts, place_tile
from ._radix import sort_pairs
from ._scores import pair_strides

#: The most tokens whose lists are built by counting; its work grows with their square.
COUNTED = 4096


@triton.jit
def _metric_tile(
    metric_ptr, row, inside, column, stride_mh, stride_mn, stride_mf,
    HEADS: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Head mean of some columns of some metric rows, float32: [BLOCK_N, BLOCK_F]."""
    at = metric_ptr + row.to(tl.int64)[:, None] * stride_mn + column.to(tl.int64) * stride_mf
    mask = inside[:, None] & (column < F)
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, HEADS):
        at += stride_mh
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return total / HEADS if HEADS > 1 else total


@triton.jit(do_not_specialize=["tokens"])
def _token_merge_unit_kernel(
    metric_ptr, unit_ptr, assign_ptr, stride_mb, stride_mh, stride_mn, stride_mf, tokens,
    CLEAR: tl.constexpr, HEADS: tl.constexpr, F: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Unit vectors `[B, N, F]` float32 of the metric, and with `CLEAR` an `assign` of -1.

    Each vector is divided by its largest element before its squares are summed, so that none
    overflows or vanishes; a zero vector stays one, and any NaN or infinity makes NaN.
    """
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < tokens
    if CLEAR:
        nowhere = tl.full([BLOCK_N], -1, tl.int64)
        tl.store(assign_ptr + b * tokens + row, nowhere, mask=inside)
    metric_ptr += b * stride_mb
    unit_ptr += (b * tokens + row.to(tl.int64))[:, None] * F
    column = tl.arange(0, BLOCK_F)[None, :]
    # The first columns, mostly all there are, stay in registers; others are read once a step.
    v = _metric_tile(
        metric_ptr, row, inside, column, stride_mh, stride_mn, stride_mf, HEADS, F
    )  # [BLOCK_N, BLOCK_F]
    largest = tl.max(tl.where(v == v, tl.abs(v), 0.0), 1)
    for f in range(BLOCK_F, F, BLOCK_F):
        more = _metric_tile(
            metric_ptr, row, inside, column + f, stride_mh, stride_mn, stride_mf, HEADS, F
        )  # [BLOCK_N, BLOCK_F]
        largest = tl.maximum(largest, tl.max(tl.where(more == more, tl.abs(more), 0.0), 1))
    largest = tl.where(largest == 0, 1.0, largest)[:, None]
    v = tl.div_rn(v, largest)
    squares = tl.sum(v * v, 1)
    for f in range(BLOCK_F, F, BLOCK_F):
        more = _metric_tile(
            metric_ptr, row, inside, column + f, stride_mh, stride_mn, stride_mf, HEADS, F
        )  # fmt: skip
        more = tl.div_rn(more, largest)
        squares += tl.sum(more * more, 1)
    length = tl.sqrt_rn(squares)
    length = tl.where(length == 0, 1.0, length)[:, None]
    tl.store(unit_ptr + column, tl.div_rn(v, length), mask=inside[:, None] & (column < F))
    for f in range(BLOCK_F, F, BLOCK_F):
        more = _metric_tile(
            metric_ptr, row, inside, column + f, stride_mh, stride_mn, stride_mf, HEADS, F
        )  # fmt: skip
        unit = tl.div_rn(tl.div_rn(more, largest), length)
        tl.store(unit_ptr + column + f, unit, mask=inside[:, None] & (column + f < F))


@triton.jit(do_not_specialize=["stride_ib", "stride_is", "tokens", "keep", "slots"])
def _token_merge_slot_kernel(
    index_ptr, assign_ptr, own_ptr, stride_ib, stride_is, tokens, keep, slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each kept token's slot. An index out of range, checked for only on request, is no token."""
    b = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = index_ptr + b * stride_ib + slot * stride_is.to(tl.int64)
    token = tl.load(at, mask=slot < keep, other=-1)
    there = (token >= 0) & (token < tokens)
    tl.store(own_ptr + b * slots + slot, tl.where(there, token, -1), mask=slot < keep)
    tl.store(assign_ptr + b * tokens + token, slot.to(tl.int64), mask=there)


@triton.jit(
    do_not_specialize=[
        "stride_mb", "stride_mn", "tokens", "keep", "contextual", "slots", "targets",
    ]
)  # fmt: skip
def _token_merge_place_kernel(
    valid_ptr, assign_ptr, own_ptr, joining_ptr, target_ptr, count_ptr, stride_mb, stride_mn,
    tokens, keep, contextual, slots, targets,
    HAS_VALID: tl.constexpr, CONTEXTUAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One sample: its joining tokens and its targets, from the kept tokens in `assign`."""
    b = tl.program_id(0).to(tl.int64)
    valid_ptr += b * stride_mb
    assign_ptr += b * tokens
    own_ptr += b * slots
    total = 0
    if CONTEXTUAL:  # where the references are depends on how many tokens were dropped
        for start in range(0, tokens, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            there = token < tokens
            slot = tl.load(assign_ptr + token, mask=there, other=0)
            if HAS_VALID:
                at = valid_ptr + token * stride_mn.to(tl.int64)
                there = there & tl.load(at, mask=there, other=0).to(tl.int1)
            total += tl.sum((there & (slot < 0)).to(tl.int32), 0)
    kept, dropped = 0, 0
    for start in range(0, tokens, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        there = token < tokens
        slot = tl.load(assign_ptr + token, mask=there, other=-1).to(tl.int32)
        if HAS_VALID:
            at = valid_ptr + token * stride_mn.to(tl.int64)
            there = there & tl.load(at, mask=there, other=0).to(tl.int1)
        place_tile(
            assign_ptr, own_ptr, joining_ptr + b * tokens, target_ptr + b * targets, token, slot,
            there, kept, dropped, total, tokens, keep, contextual, CONTEXTUAL,
        )  # fmt: skip
        kept += tl.sum((there & (slot >= 0)).to(tl.int32), 0)
        dropped += tl.sum((there & (slot < 0)).to(tl.int32), 0)
    place_counts(
        own_ptr, count_ptr + b * 2, kept, dropped, keep, contextual, CONTEXTUAL, BLOCK_N
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "keep", "targets", "threshold"])
def _token_merge_nearest_kernel(
    unit_ptr, joining_ptr, target_ptr, count_ptr, assign_ptr, found_ptr,
    tokens, keep, targets, threshold,
    CONTEXTUAL: tl.constexpr, F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The most similar target of a tile of joining tokens; ties to the lower token, NaN never.

    `found` is the slot of each joining token, -1 for none, and `assign` gets it too.
    """
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    joining = tl.load(count_ptr + b * 2)
    if first >= joining:
        return
    offered = tl.load(count_ptr + b * 2 + 1)
    line = first + tl.arange(0, BLOCK_N)
    here = line < joining
    token = tl.load(joining_ptr + b * tokens + line, mask=here, other=0)
    unit_ptr += b * tokens * F
    token_at = unit_ptr + token.to(tl.int64) * F
    target_ptr += b * targets
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    at = tl.full([BLOCK_N], -1, tl.int32)
    for start in range(0, offered, BLOCK_T):
        number = start + tl.arange(0, BLOCK_T)
        target = tl.load(target_ptr + number, mask=number < offered, other=0)
        target_at = unit_ptr + target.to(tl.int64) * F
        cosine = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for f in range(0, F, BLOCK_F):
            column = f + tl.arange(0, BLOCK_F)
            mask = here[:, None] & (column < F)[None, :]
            ours = tl.load(token_at[:, None] + column[None, :], mask=mask, other=0.0)
            mask = (number < offered)[None, :] & (column < F)[:, None]
            theirs = tl.load(target_at[None, :] + column[:, None], mask=mask, other=0.0)
            cosine = tl.dot(ours, theirs, cosine, input_precision="ieee")
        # What lies outside -1..1 is rounding: two targets there are equally similar.
        fair = (cosine == cosine) & (number < offered)[None, :]
        cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
        cosine = tl.where(fair, cosine, float("-inf"))
        most = tl.max(cosine, 1)
        place = tl.min(tl.where(cosine == most[:, None], number[None, :], 0x7FFFFFFF), 1)
        better = most > best  # strictly: earlier tiles hold lower tokens
        best = tl.where(better, most, best)
        at = tl.where(better, place, at)
    if CONTEXTUAL:  # everyone joins; a token similar to nobody joins the first
        slot = keep + tl.maximum(at, 0)
    else:
        joins = (at >= 0) & (best >= threshold)
        target = tl.load(target_ptr + at, mask=here & joins, other=0)
        slot = tl.load(assign_ptr + b * tokens + target, mask=here & joins, other=-1).to(tl.int32)
    tl.store(found_ptr + b * tokens + line, slot, mask=here)
    tl.store(assign_ptr + b * tokens + token, slot.to(tl.int64), mask=here)


@triton.jit(do_not_specialize=["tokens", "slots"])
def _token_merge_list_kernel(
    joining_ptr, found_ptr, count_ptr, member_ptr, bound_ptr, tokens, slots,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The tokens that joined each slot, by slot and then by token, and where each list begins.

    The place of a token is the number of tokens with a smaller pair (slot, token), the beginning
    of a list the number with a smaller slot: one comparison of packed keys counts both. Lines
    below `tokens` are joining tokens, those from there on are slots, and the end of the last.
    """
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_I
    joining = tl.load(count_ptr + b * 2)
    if (first + BLOCK_I <= tokens) & (first >= joining):
        return
    found_ptr += b * tokens
    line = first + tl.arange(0, BLOCK_I)
    is_token = line < joining
    slot = tl.load(found_ptr + line, mask=is_token, other=-1)
    joins = is_token & (slot >= 0)
    key = tl.where(joins, slot, line - tokens).to(tl.int64) << 32
    key += tl.where(joins, line, 0).to(tl.int64)
    place = tl.zeros([BLOCK_I], tl.int32)
    for start in range(0, joining, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        theirs = tl.load(found_ptr + other, mask=other < joining, other=-1)
        rival = (theirs.to(tl.int64) << 32) + other.to(tl.int64)
        before = (rival[None, :] < key[:, None]) & (theirs >= 0)[None, :]  # [BLOCK_I, BLOCK_J]
        place += tl.sum(before.to(tl.int32), 1)
    token = tl.load(joining_ptr + b * tokens + line, mask=joins, other=0)
    tl.store(member_ptr + b * tokens + place, token, mask=joins)
    is_slot = (line >= tokens) & (line - tokens <= slots)
    tl.store(bound_ptr + b * (slots + 1) + line - tokens, place, mask=is_slot)


@triton.jit(do_not_specialize=["tokens", "slots"])
def _token_merge_key_kernel(
    joining_ptr, found_ptr, count_ptr, key_ptr, item_ptr, tokens, slots, BLOCK: tl.constexpr
):  # fmt: skip
    """Keys that sort the joining tokens by slot; those without one come last."""
    row = tl.program_id(1).to(tl.int64) * tokens
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    joining = tl.load(count_ptr + tl.program_id(1).to(tl.int64) * 2)
    slot = tl.load(found_ptr + row + line, mask=line < joining, other=-1)
    token = tl.load(joining_ptr + row + line, mask=line < joining, other=0)
    tl.store(key_ptr + row + line, tl.where(slot >= 0, slot, slots), mask=line < tokens)
    tl.store(item_ptr + row + line, token, mask=line < tokens)


@triton.jit(do_not_specialize=["tokens", "slots", "steps"])
def _token_merge_bound_kernel(
    key_ptr, bound_ptr, tokens, slots, steps, BLOCK: tl.constexpr
):  # fmt: skip
    """Where each slot begins in sorted keys, by bisection."""
    b = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + tokens
    for _ in range(steps):
        middle = (low + high) // 2
        key = tl.load(key_ptr + b * tokens + middle, mask=low < high, other=0)
        below = (low < high) & (key < slot)
        high = tl.where(below | (low >= high), high, middle)
        low = tl.where(below, middle + 1, low)
    tl.store(bound_ptr + b * (slots + 1) + slot, low, mask=slot <= slots)


@triton.jit
def _weigh(
    weight_ptr, member_ptr, begin, end, own_weight, stride_wn,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one slot: the sum of the weights that joined it, and the largest weight in it."""
    joined = (end - begin).to(tl.float32)
    largest = own_weight
    if HAS_WEIGHT:
        joined = tl.full([], 0.0, tl.float32)
        for start in range(begin, end, BLOCK):
            line = start + tl.arange(0, BLOCK)
            token = tl.load(member_ptr + line, mask=line < end, other=0).to(tl.int64)
            weight = tl.load(weight_ptr + token * stride_wn, mask=line < end, other=0.0)
            joined += tl.sum(weight, 0)
            largest = tl.maximum(largest, tl.max(weight, 0))
    return joined, tl.where(largest > 0, largest, 1.0)


@triton.jit
def _joined_rows(
    x_at, weight_ptr, member_ptr, line, end, in_width, largest, stride_xn, stride_wn,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Rows of some tokens of a list, times their weights, and those weights."""
    here = line < end
    token = tl.load(member_ptr + line, mask=here, other=0).to(tl.int64)
    weight = here.to(tl.float32)
    if HAS_WEIGHT:  # a token that weighs nothing is not read: it may be NaN
        weight = tl.load(weight_ptr + token * stride_wn, mask=here, other=0.0)
        here = weight > 0
        weight = tl.div_rn(weight, tl.zeros(weight.shape, tl.float32) + largest)
    at = x_at[None, :] + token[:, None] * stride_xn
    rows = tl.load(at, mask=here[:, None] & in_width[None, :], other=0.0).to(tl.float32)
    return rows * weight[:, None], weight


@triton.jit(
    do_not_specialize=["stride_wb", "stride_wn", "tokens", "slots", "stretches", "blend"],
)
def _token_merge_mean_kernel(
    x_ptr, weight_ptr, own_ptr, member_ptr, bound_ptr, out_ptr, size_ptr,
    stride_xb, stride_xn, stride_xd, stride_wb, stride_wn, tokens, slots, stretches, width, blend,
    HAS_WEIGHT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A stretch of columns of one slot: its own token and those that joined it.

    Row r of the accumulator adds up every `BLOCK_R`-th token of the list, in ascending order. Long
    lists go `BLOCKS` blocks at a time, so that many loads are under way at once. Weights count
    against the largest of their slot, so that no sum of them overflows or vanishes.
    """
    slot = tl.program_id(0) // stretches
    stretch = tl.program_id(0) % stretches
    b = tl.program_id(1).to(tl.int64)
    column = stretch * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = column < width
    x_at = x_ptr + b * stride_xb + column.to(tl.int64) * stride_xd
    weight_ptr += b * stride_wb
    member_ptr += b * tokens
    own = tl.load(own_ptr + b * slots + slot)
    there = own >= 0
    own_x = tl.load(x_at + own * stride_xn, mask=in_width & there, other=0.0)  # [BLOCK_D]
    own_weight = there.to(tl.float32)
    if HAS_WEIGHT:
        own_weight = tl.load(weight_ptr + own * stride_wn, mask=there, other=0.0)
    bound_ptr += b * (slots + 1) + slot
    begin = tl.load(bound_ptr)
    end = tl.load(bound_ptr + 1)
    joined, largest = _weigh(
        weight_ptr, member_ptr, begin, end, own_weight, stride_wn, HAS_WEIGHT, 128
    )
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    shares = tl.zeros([BLOCK_R], tl.float32)
    STEP: tl.constexpr = BLOCKS * BLOCK_R
    whole_steps = begin + (end - begin) // STEP * STEP
    for start in range(begin, whole_steps, STEP):
        for block in tl.static_range(BLOCKS):
            line = start + block * BLOCK_R + tl.arange(0, BLOCK_R)
            rows, weight = _joined_rows(
                x_at, weight_ptr, member_ptr, line, end, in_width, largest, stride_xn, stride_wn,
                HAS_WEIGHT,
            )  # fmt: skip
            total += rows
            shares += weight
    for start in range(whole_steps, end, BLOCK_R):
        line = start + tl.arange(0, BLOCK_R)
        rows, weight = _joined_rows(
            x_at, weight_ptr, member_ptr, line, end, in_width, largest, stride_xn, stride_wn,
            HAS_WEIGHT,
        )  # fmt: skip
        total += rows
        shares += weight
    own_share = tl.div_rn(own_weight, largest) if HAS_WEIGHT else own_weight
    pull = blend * (tl.sum(shares, 0) if HAS_WEIGHT else joined)
    own_part = tl.where(own_share > 0, own_share * own_x.to(tl.float32), 0.0)
    whole = tl.where(pull == 0, 1.0, own_share + pull)
    mean = own_part + blend * tl.sum(total, 0)
    mean = tl.div_rn(mean, tl.zeros([BLOCK_D], tl.float32) + whole)
    # A slot that nothing was added to is its own token, bit for bit.
    out = tl.where(pull == 0, own_x, mean.to(own_x.dtype))
    tl.store(out_ptr + (b * slots + slot) * width + column, out, mask=in_width)
    if stretch == 0:
        tl.store(size_ptr + b * slots + slot, own_weight + joined)


def unit_vectors(metric: Tensor, assign: Tensor | None) -> Tensor:
    """Unit vectors `[B, N, F]` float32 of the head mean of `metric [B, H, N, F]`; where `assign`
    is given it is filled with -1 on the way."""
    batch, heads, tokens, width = metric.shape
    unit = torch.empty((batch, tokens, width), dtype=torch.float32, device=metric.device)
    block_f = min(1024, triton.next_power_of_2(width))
    block_n = 1024 // block_f
    _token_merge_unit_kernel[(triton.cdiv(tokens, block_n), batch)](
        metric, unit, unit if assign is None else assign, *metric.stride(), tokens,
        CLEAR=assign is not None, HEADS=heads, F=width, BLOCK_N=block_n, BLOCK_F=block_f,
        num_warps=4,
    )  # fmt: skip
    return unit


def empty_places(x: Tensor, keep: int, contextual: int) -> tuple[Places, Tensor]:
    """Outputs and workspace of one call: `Places`, and `own [B, S]`, the token of each slot."""
    batch, tokens = x.shape[:2]
    targets = min(contextual, tokens) if contextual > 0 else keep

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((batch, columns), dtype=dtype, device=x.device)

    places = Places(
        empty(tokens, torch.int64), empty(tokens, torch.int32), empty(targets, torch.int32),
        empty(2, torch.int32),
    )  # fmt: skip
    return places, empty(keep + contextual, torch.int64)


def place(index: Tensor, valid: Tensor | None, places: Places, own: Tensor) -> None:
    """Fill `places` and `own` for the kept tokens `index`; `places.assign` holds -1."""
    (batch, keep), tokens, slots = index.shape, places.assign.shape[1], own.shape[1]
    _token_merge_slot_kernel[(triton.cdiv(keep, 256), batch)](
        index, places.assign, own, *index.stride(), tokens, keep, slots, BLOCK=256, num_warps=4
    )
    _token_merge_place_kernel[(batch,)](
        places.assign if valid is None else valid, places.assign, own, places.joining,
        places.target, places.counts, *pair_strides(valid), tokens, keep, slots - keep, slots,
        places.target.shape[1], HAS_VALID=valid is not None, CONTEXTUAL=slots > keep,
        BLOCK_N=min(2048, max(16, triton.next_power_of_2(tokens))),
        num_warps=4 if tokens <= 1024 else 8,
    )  # fmt: skip


def _lists(places: Places, found: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Tokens by the slot they joined `[B, N]`, and where each slot's begin `[B, S + 1]`, int32."""
    batch, tokens = found.shape
    member = torch.empty_like(found)
    bound = torch.empty((batch, slots + 1), dtype=torch.int32, device=found.device)
    if tokens <= COUNTED:
        _token_merge_list_kernel[(triton.cdiv(tokens + slots + 1, 16), batch)](
            places.joining, found, places.counts, member, bound, tokens, slots, BLOCK_I=16,
            BLOCK_J=128, num_warps=4,
        )  # fmt: skip
        return member, bound
    key = torch.empty_like(found)
    _token_merge_key_kernel[(triton.cdiv(tokens, 1024), batch)](
        places.joining, found, places.counts, key, member, tokens, slots, BLOCK=1024, num_warps=4
    )
    key, member = sort_pairs(key, member, slots.bit_length())
    _token_merge_bound_kernel[(triton.cdiv(slots + 1, 256), batch)](
        key, bound, tokens, slots, tokens.bit_length(), BLOCK=256, num_warps=4
    )
    return member, bound


def merge(
    x: Tensor,
    unit: Tensor,
    places: Places,
    own: Tensor,
    *,
    keep: int,
    weight: Tensor | None,
    threshold: float,
    blend: float,
) -> tuple[Tensor, Tensor]:
    """Assign the joining tokens, in `places.assign`, and merge: `tokens [B, S, D]`, `size`."""
    (batch, count, width), slots = x.shape, own.shape[1]
    features = unit.shape[2]
    found = torch.empty_like(places.joining)
    _token_merge_nearest_kernel[(triton.cdiv(count, 16), batch)](
        unit, places.joining, places.target, places.counts, places.assign, found, count, keep,
        places.target.shape[1], max(threshold, -1.0), CONTEXTUAL=slots > keep, F=features,
        BLOCK_N=16, BLOCK_T=64, BLOCK_F=32 if features > 16 else 16,
        num_warps=4,
    )  # fmt: skip
    member, bound = _lists(places, found, slots)
    tokens = torch.empty((batch, slots, width), dtype=x.dtype, device=x.device)
    size = torch.empty((batch, slots), dtype=torch.float32, device=x.device)
    block_d = min(256, max(16, triton.next_power_of_2(width)))
    stretches = max(1, triton.cdiv(width, block_d))
    _token_merge_mean_kernel[(slots * stretches, batch)](
        x, size if weight is None else weight, own, member, bound, tokens, size, *x.stride(),
        *pair_strides(weight), count, slots, stretches, width, blend, HAS_WEIGHT=weight is not None,
        BLOCK_R=8, BLOCK_D=block_d, BLOCKS=4 if weight is None else 2, num_warps=2,
    )  # fmt: skip
    return tokens, size


def token_merge(
    x: Tensor,
    metric: Tensor,
    index: Tensor,
    *,
    contextual: int = 0,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    threshold: float = -1.0,
    blend: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op; see `consensusdrop_kernels.token_merge`."""
    _checks.merge(
        x, metric, index, contextual=contextual, weight=weight, valid=valid, threshold=threshold,
        blend=blend,
    )  # fmt: skip
    keep = index.shape[1]
    places, own = empty_places(x, keep, contextual)
    if x.shape[0] == 0:
        size = torch.empty(own.shape, dtype=torch.float32, device=x.device)
        return x.new_empty((0, own.shape[1], x.shape[2])), places.assign, size
    unit = unit_vectors(metric.unsqueeze(1), places.assign)
    place(index, valid, places, own)
    tokens, size = merge(
        x, unit, places, own, keep=keep, weight=weight, threshold=threshold, blend=blend
    )
    return tokens, places.assign, size
