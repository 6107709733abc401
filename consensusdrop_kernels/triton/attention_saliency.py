"""`attention_saliency`: column sums of a softmax that is never stored.

At most three launches. Without an `lse` the first reads the keys once and leaves each row's
statistics; the second holds a block of keys, walks over the query rows and writes the block's
column sums; the third adds the parts of the heads in a fixed order. A tile of rows is `HEADS`
query heads of one key head by `BLOCK_M` rows, so that few rows of many heads fill a tile and read
the keys together. Logits are in base 2: `s c` with `c = scale log2(e)`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._saliency_plan import Problem, Tiles, cdiv, in_units, tiles, wanted_programs

LOG2E = math.log2(math.e)
#: Splits of the keys beyond which putting them together again costs more than it gains.
MAX_SPLITS = 32


@triton.jit
def _finite_or_zero(x):
    """`x` where it can be subtracted without making a NaN."""
    return tl.where((x == float("inf")) | (x == float("-inf")), 0.0, x)


@triton.jit
def _sequence(cu_ptr, b, stride_cu):
    """Start and length of a packed sequence."""
    start = tl.load(cu_ptr + b * stride_cu).to(tl.int64)
    return start, (tl.load(cu_ptr + (b + 1) * stride_cu).to(tl.int64) - start).to(tl.int32)


@triton.jit
def _tile_rows(first_head, heads_end, m0, rows, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head and row of each line of a row tile, and whether it exists: three [HEADS * BLOCK_M]."""
    r = tl.arange(0, HEADS * BLOCK_M)
    head = first_head + r // BLOCK_M
    m = m0 + r % BLOCK_M
    return head, m, (head < heads_end) & (m < rows)


@triton.jit
def _load_block(ptrs, there, d0, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns `d0 ..` of the rows that `ptrs` [R] point at, zero outside: [R, BLOCK_D]."""
    d = d0 + tl.arange(0, BLOCK_D)
    return tl.load(ptrs[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _products(q, k, q_ptrs, q_there, k_ptrs, k_there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`Q K^T` of a row tile and a block of keys, float32: [R, BLOCK_N]. Of `q` and `k` the one
    that stays is loaded already, the other is None; where a chunk holds no whole vector neither
    is, and both come in chunks, which keeps float32 operands in registers."""
    if BLOCK_D >= D:
        if q is None:
            q = _load_block(q_ptrs, q_there, 0, D, BLOCK_D)  # [R, BLOCK_D]
        if k is None:
            k = _load_block(k_ptrs, k_there, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        s = tl.zeros([q_ptrs.shape[0], k_ptrs.shape[0]], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            part_q = _load_block(q_ptrs, q_there, d0, D, BLOCK_D)
            part_k = _load_block(k_ptrs, k_there, d0, D, BLOCK_D)
            s = tl.dot(part_q, tl.trans(part_k), s, input_precision="ieee")
    return s


@triton.jit(
    do_not_specialize=[
        "rows", "lines", "keys", "group", "chunks", "row_tiles", "splits", "keys_per_split",
        "scale2", "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vn", "stride_cu", "key_heads",
    ]
)  # fmt: skip
def _attention_saliency_rows_kernel(
    q_ptr, k_ptr, valid_ptr, cu_ptr, max_ptr, sum_ptr, stride_cu,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vn,
    key_heads, group, chunks, rows, lines, row_tiles, keys, splits, keys_per_split, scale2,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials of each row over one split of the keys, to
    [B, Hq, M, splits], of packed sequences to [Hq, T, splits]; their base-2 log-sum-exp, to
    `max_ptr`, when there is one split. A head has `lines` rows there. Strides of q and k are
    counted in `UNIT` elements."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    m0 = (pid % row_tiles) * BLOCK_M
    pid //= row_tiles
    chunk = pid % chunks
    key_head = (pid // chunks % key_heads).to(tl.int64)
    b = (pid // chunks // key_heads).to(tl.int64)

    first = key_head * group
    line = b * key_heads * group * lines
    if cu_ptr is not None:
        line, rows = _sequence(cu_ptr, b, stride_cu)
        keys = rows
        q_ptr += line * stride_qm * UNIT
        k_ptr += line * stride_kn * UNIT
    head, m, there = _tile_rows(
        first + chunk * HEADS, first + group, m0, rows, HEADS, BLOCK_M
    )  # [R]
    q_ptrs = q_ptr + (b * stride_qb + head * stride_qh + m.to(tl.int64) * stride_qm) * UNIT
    k_ptr += (b * stride_kb + key_head * stride_kh) * UNIT
    q = _load_block(q_ptrs, there, 0, D, BLOCK_D)  # [R, BLOCK_D]

    start = split * keys_per_split
    end = tl.minimum(start + keys_per_split, keys)
    if CAUSAL:  # aligned at the bottom right: the last row of the tile sees the most keys
        end = tl.minimum(end, tl.minimum(m0 + BLOCK_M, rows) + keys - rows)
    top = tl.full([HEADS * BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([HEADS * BLOCK_M], tl.float32)
    for n0 in range(start, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < end
        k_ptrs = k_ptr + n.to(tl.int64) * stride_kn * UNIT
        s = _products(q, None, q_ptrs, there, k_ptrs, inside, D, BLOCK_D) * scale2  # [R, BLOCK_N]
        seen = inside
        if valid_ptr is not None:
            seen &= tl.load(
                valid_ptr + b * stride_vb + n.to(tl.int64) * stride_vn, mask=inside, other=False
            )
        if CAUSAL:
            s = tl.where(seen[None, :] & (n[None, :] <= m[:, None] + keys - rows), s, float("-inf"))
        else:
            s = tl.where(seen[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = _finite_or_zero(new_top)
        # A row that has seen nothing has no shift to correct: 0 * inf would make it NaN.
        total = tl.where(total == 0.0, 0.0, total * tl.exp2(_finite_or_zero(top) - shift))
        total += tl.sum(tl.exp2(s - shift[:, None]), 1)
        top = new_top

    line = (line + head * lines + m) * splits + split
    if sum_ptr is None:
        tl.store(max_ptr + line, _finite_or_zero(top) + tl.log2(total), mask=there)
    else:
        tl.store(max_ptr + line, top, mask=there)
        tl.store(sum_ptr + line, total, mask=there)


@triton.jit
def _row_shift(lse_ptr, sum_ptr, line, there, splits, LSE: tl.constexpr, R: tl.constexpr):
    """Base-2 log-sum-exp of each row [R]: given in natural logarithms, left by the first launch,
    or to be put together from the pieces it left."""
    if LSE == "given":
        shift = tl.load(lse_ptr + line, mask=there, other=float("inf")) * 1.4426950408889634
    elif LSE == "whole":
        shift = tl.load(lse_ptr + line, mask=there, other=float("inf"))
    else:  # a few pieces at a time: all of them would take the registers that the products need
        top = tl.full([R], float("-inf"), tl.float32)
        total = tl.zeros([R], tl.float32)
        for first in range(0, splits, 8):
            piece = first + tl.arange(0, 8)
            at = line[:, None] + piece[None, :]  # [R, 8]
            mask = there[:, None] & (piece < splits)[None, :]
            tops = tl.load(lse_ptr + at, mask=mask, other=float("-inf"))
            sums = tl.load(sum_ptr + at, mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(tops, 1))
            shift = _finite_or_zero(new_top)
            factor = tl.exp2(_finite_or_zero(tops) - shift[:, None])
            total = tl.where(total == 0.0, 0.0, total * tl.exp2(_finite_or_zero(top) - shift))
            total += tl.sum(tl.where(sums == 0.0, 0.0, sums * factor), 1)
            top = new_top
        shift = _finite_or_zero(top) + tl.log2(total)
    return shift


@triton.jit
def _weight_sum(weight_ptr, rows, stride_wm, BLOCK_M: tl.constexpr):
    """Sum of a sample's weights, 1 if they are all 0; in float64, where no sum of float32 weights
    overflows or vanishes."""
    m = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float64)
    for m0 in range(0, rows, BLOCK_M):
        w = tl.load(weight_ptr + (m0 + m).to(tl.int64) * stride_wm, mask=m0 + m < rows, other=0.0)
        total += w.to(tl.float64)
    whole = tl.sum(total, 0)
    return tl.where(whole > 0.0, whole, 1.0)


@triton.jit(
    do_not_specialize=[
        "rows", "keys", "prefix", "group", "chunks", "chunks_per_part", "splits", "tokens",
        "scale2", "out_scale", "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh",
        "stride_kn", "stride_vb", "stride_vn", "stride_wb", "stride_wm", "stride_lb", "stride_lh",
        "stride_lm", "key_heads", "parts", "token_blocks", "stride_cu",
    ]
)  # fmt: skip
def _attention_saliency_columns_kernel(
    q_ptr, k_ptr, valid_ptr, cu_ptr, weight_ptr, lse_ptr, sum_ptr, out_ptr, stride_cu,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vn,
    stride_wb, stride_wm, stride_lb, stride_lh, stride_lm,
    key_heads, group, chunks, chunks_per_part, parts, rows, keys, prefix, tokens, token_blocks,
    splits, scale2, out_scale,
    MAX: tl.constexpr, CAUSAL: tl.constexpr, LSE: tl.constexpr, INLINE: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What one part of the heads gives to one block of keys, to [B, Hk * parts, N]."""
    pid = tl.program_id(0)
    n = (pid % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid //= token_blocks
    part = pid % parts
    key_head = pid // parts % key_heads
    # The last sample first: its keys are what the first launch left in the cache.
    batch = tl.num_programs(0) // token_blocks // parts // key_heads
    b = (batch - 1 - pid // parts // key_heads).to(tl.int64)

    out_ptr += ((b * key_heads + key_head) * parts + part) * tokens
    if cu_ptr is not None:  # the output is [Hk * parts, T]: no sequence has a row of its own
        at, rows = _sequence(cu_ptr, b, stride_cu)
        out_ptr += at - b * key_heads * parts * tokens
        keys = rows
        tokens = rows
        q_ptr += at * stride_qm * UNIT
        k_ptr += at * stride_kn * UNIT
        if weight_ptr is not None:
            weight_ptr += at * stride_wm
        elif not MAX:
            out_scale = out_scale / tl.maximum(rows, 1)
        lse_ptr += at * stride_lm
        if sum_ptr is not None:
            sum_ptr += at * stride_lm
    inside = n < tokens
    key = n + prefix
    k_ptr += (b * stride_kb + key_head.to(tl.int64) * stride_kh) * UNIT
    k_ptrs = k_ptr + key.to(tl.int64) * stride_kn * UNIT
    k = _load_block(k_ptrs, inside, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    q_ptr += b * stride_qb * UNIT
    if weight_ptr is not None:
        weight_ptr += b * stride_wb
        if INLINE:
            per_weight = 1.0 / _weight_sum(weight_ptr, rows, stride_wm, HEADS * BLOCK_M)
    first = key_head * group
    m_start = 0
    if CAUSAL:  # the rows above see none of these keys
        m_start = tl.maximum(tl.min(key, 0) - (keys - rows), 0) // BLOCK_M * BLOCK_M

    out = tl.zeros([BLOCK_N], tl.float32)
    last_chunk = tl.minimum((part + 1) * chunks_per_part, chunks)
    for chunk in range(part * chunks_per_part, last_chunk):
        # Probabilities are added or compared where they arise; one reduction at the end.
        if MAX:
            acc = tl.zeros([HEADS * BLOCK_M, BLOCK_N], tl.int32)
        else:
            acc = tl.zeros([HEADS * BLOCK_M, BLOCK_N], tl.float32)
        for m0 in range(m_start, rows, BLOCK_M):
            head, m, there = _tile_rows(
                first + chunk * HEADS, first + group, m0, rows, HEADS, BLOCK_M
            )  # [R]
            q_at = head.to(tl.int64) * stride_qh + m.to(tl.int64) * stride_qm
            q_ptrs = q_ptr + q_at * UNIT
            line = b * stride_lb + head.to(tl.int64) * stride_lh + m.to(tl.int64) * stride_lm
            shift = _row_shift(lse_ptr, sum_ptr, line, there, splits, LSE, HEADS * BLOCK_M)
            if weight_ptr is not None:
                w = tl.load(weight_ptr + m.to(tl.int64) * stride_wm, mask=there, other=0.0)
                if INLINE:
                    w = (w.to(tl.float64) * per_weight).to(tl.float32)
                # The weight goes into the exponent, so that nothing but the shift outlives it.
                more = shift if MAX else shift - tl.log2(w)
                shift = tl.where(w > 0.0, more, float("inf"))
            live = there & (shift != float("inf")) & (shift != float("-inf"))
            s = _products(None, k, q_ptrs, there, k_ptrs, inside, D, BLOCK_D)  # [R, BLOCK_N]
            p = tl.exp2(s * scale2 - shift[:, None])
            if CAUSAL:
                p = tl.where(live[:, None] & (key[None, :] <= m[:, None] + keys - rows), p, 0.0)
            else:
                p = tl.where(live[:, None], p, 0.0)
            if MAX:  # as integers, probabilities keep their order and NaN is above them all
                acc = tl.maximum(acc, p.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            else:
                acc += p
        if MAX:
            per_head = tl.max(tl.reshape(acc, [HEADS, BLOCK_M, BLOCK_N]), 1)
            out += tl.sum(per_head.to(tl.float32, bitcast=True), 0)
        else:
            out += tl.sum(acc, 0)

    out *= out_scale
    if valid_ptr is not None:
        seen = tl.load(
            valid_ptr + b * stride_vb + key.to(tl.int64) * stride_vn, mask=inside, other=False
        )
        out = tl.where(seen, out, 0.0)
    tl.store(out_ptr + n, out, mask=inside)


@triton.jit(do_not_specialize=["parts", "tokens", "token_blocks"])
def _attention_saliency_sum_kernel(
    part_ptr, out_ptr, parts, tokens, token_blocks, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds up [B, parts, N] over the parts, always in one order; many parts are on their way at
    once, where one after the other would each cost the latency of the memory."""
    pid = tl.program_id(0)
    n = (pid % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (pid // token_blocks).to(tl.int64)
    inside = n < tokens
    part_ptr += b * parts * tokens
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        ptrs = part_ptr + part.to(tl.int64)[:, None] * tokens + n[None, :]
        total += tl.load(ptrs, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + b * tokens + n, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "stride_wb", "stride_wm"])
def _attention_saliency_shares_kernel(
    weight_ptr, out_ptr, stride_wb, stride_wm, rows, BLOCK_M: tl.constexpr
):
    """Each row's share of its sample's weights, [B, M]."""
    b = tl.program_id(0).to(tl.int64)
    weight_ptr += b * stride_wb
    per_weight = 1.0 / _weight_sum(weight_ptr, rows, stride_wm, BLOCK_M)
    for m0 in range(0, rows, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        w = tl.load(weight_ptr + m.to(tl.int64) * stride_wm, mask=m < rows, other=0.0)
        share = (w.to(tl.float64) * per_weight).to(tl.float32)
        tl.store(out_ptr + b * rows + m, share, mask=m < rows)


def _strides(tensor: Tensor | None, rank: int) -> tuple[int, ...]:
    return (0,) * rank if tensor is None else tensor.stride()


class _Rows(NamedTuple):
    """What the second launch reads of each row: a given `lse`, or statistics of the first."""

    lse: Tensor
    strides: tuple[int, ...]
    sums: Tensor | None
    splits: int
    kind: str


def _row_statistics(p: Problem, t: Tiles) -> _Rows:
    group = p.heads // p.key_heads
    chunks, row_tiles = cdiv(group, t.heads), cdiv(p.rows, t.block_m)
    programs = p.batch * p.key_heads * chunks * row_tiles
    blocks = cdiv(p.keys, t.block_n)
    splits = min(cdiv(wanted_programs(p.q.device), programs), MAX_SPLITS, blocks)
    per_split = cdiv(blocks, splits) * t.block_n
    splits = cdiv(p.keys, per_split)
    # A packed row has its place among all T: the longest sequence must not cost memory in each.
    lines = p.rows if p.cu is None else p.tokens
    shape = (p.batch if p.cu is None else 1, p.heads, lines, splits)
    tops = torch.empty(shape, dtype=torch.float32, device=p.q.device)
    sums = torch.empty_like(tops) if splits > 1 else None
    _attention_saliency_rows_kernel[(programs, splits)](
        p.q, p.k, p.key_valid, p.cu, tops, sums, p.cu_stride, *p.strides,
        *_strides(p.key_valid, 2), p.key_heads, group, chunks, p.rows, lines, row_tiles, p.keys,
        splits, per_split, p.scale2,
        CAUSAL=p.causal, UNIT=p.unit, D=p.q.shape[-1], BLOCK_D=t.block_d, HEADS=t.heads,
        BLOCK_M=t.block_m, BLOCK_N=t.block_n, num_warps=t.warps, num_stages=t.stages,
        **t.registers(),
    )  # fmt: skip
    strides = (0 if p.cu is not None else tops.stride(0), *tops.stride()[1:3])
    return _Rows(tops, strides, sums, splits, "whole" if splits == 1 else "split")


def _shares(weight: Tensor) -> Tensor:
    batch, rows = weight.shape
    out = torch.empty(batch, rows, dtype=torch.float32, device=weight.device)
    _attention_saliency_shares_kernel[(batch,)](
        weight, out, *weight.stride(), rows, BLOCK_M=1024, num_warps=4
    )
    return out


def _columns(
    p: Problem, t: Tiles, stats: _Rows, weight: Tensor | None, weight_strides: tuple[int, ...],
    inline: bool, out: Tensor, out_scale: float, reduce: str,
) -> Tensor:  # fmt: skip
    group = p.heads // p.key_heads
    chunks, token_blocks = cdiv(group, t.heads), cdiv(p.keys - p.prefix, t.block_n)
    programs = p.batch * p.key_heads * token_blocks
    parts = min(cdiv(wanted_programs(p.q.device), programs), chunks)
    per_part = cdiv(chunks, parts)
    parts = cdiv(chunks, per_part)
    pieces, samples = p.key_heads * parts, out.numel() // p.tokens
    partial = out
    if pieces > 1:
        shape = (samples, pieces, p.tokens)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    _attention_saliency_columns_kernel[(programs * parts,)](
        p.q, p.k, p.key_valid, p.cu, weight, stats.lse, stats.sums, partial, p.cu_stride,
        *p.strides, *_strides(p.key_valid, 2), *weight_strides, *stats.strides, p.key_heads, group,
        chunks, per_part, parts, p.rows, p.keys, p.prefix, p.tokens, token_blocks, stats.splits,
        p.scale2, out_scale,
        MAX=reduce == "max", CAUSAL=p.causal, LSE=stats.kind, INLINE=inline, UNIT=p.unit,
        D=p.q.shape[-1], BLOCK_D=t.block_d, HEADS=t.heads, BLOCK_M=t.block_m, BLOCK_N=t.block_n,
        num_warps=t.warps, num_stages=1 if p.rows <= t.block_m else t.stages, **t.registers(),
    )  # fmt: skip
    if pieces > 1:
        blocks = cdiv(p.tokens, 64)
        _attention_saliency_sum_kernel[(blocks * samples,)](
            partial, out, pieces, p.tokens, blocks, BLOCK_P=16, BLOCK_N=64, num_warps=4
        )
    return out


def attention_saliency(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    key_valid: Tensor | None = None,
    query_weight: Tensor | None = None,
    prefix: int = 0,
    causal: bool = False,
    reduce: str = "mean",
) -> Tensor:
    """The op of this name; see `consensusdrop_kernels.attention_saliency`."""
    _checks.attention(
        q, k, scale=scale, lse=lse, key_valid=key_valid, query_weight=query_weight, prefix=prefix,
        reduce=reduce,
    )  # fmt: skip
    batch, heads, rows, width = q.shape
    key_heads, keys = k.shape[1:3]
    tokens, group = keys - prefix, heads // key_heads
    out = torch.empty(batch, tokens, dtype=torch.float32, device=q.device)
    if batch == 0:
        return out
    t = tiles(rows, group, width, q.dtype)
    scale2 = (width**-0.5 if scale is None else scale) * LOG2E
    strides, unit = in_units((*q.stride()[:3], *k.stride()[:3]), q.dtype)
    p = Problem(
        q, k, strides, unit, batch, heads, key_heads, rows, keys, tokens, prefix, key_valid, None,
        scale2, causal,
    )  # fmt: skip
    stats = _row_statistics(p, t) if lse is None else _Rows(lse, lse.stride(), None, 0, "given")
    out_scale = 1.0 / heads
    inline = False
    if reduce == "mean" and query_weight is None:
        out_scale /= rows
    elif reduce == "mean" and query_weight is not None:
        inline = rows <= t.block_m
        query_weight = query_weight if inline else _shares(query_weight)
    weight_strides = _strides(query_weight, 2)
    return _columns(p, t, stats, query_weight, weight_strides, inline, out, out_scale, reduce)


def attention_saliency_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    query_weight: Tensor | None = None,
    causal: bool = False,
    reduce: str = "mean",
) -> Tensor:
    """The overload for packed sequences; see `consensusdrop_kernels.attention_saliency_varlen`."""
    _checks.packed_attention(
        q, k, cu_seqlens, max_seqlen, scale=scale, lse=lse, query_weight=query_weight, reduce=reduce
    )
    total, heads, width = q.shape
    key_heads, batch = k.shape[1], cu_seqlens.shape[0] - 1
    out = torch.empty(total, dtype=torch.float32, device=q.device)
    if total == 0 or batch == 0 or max_seqlen == 0:
        return out.zero_()
    t = tiles(max_seqlen, heads // key_heads, width, q.dtype)
    scale2 = (width**-0.5 if scale is None else scale) * LOG2E
    strides, unit = in_units(
        (0, q.stride(1), q.stride(0), 0, k.stride(1), k.stride(0)), q.dtype
    )  # fmt: skip
    p = Problem(
        q, k, strides, unit, batch, heads, key_heads, max_seqlen, max_seqlen, total, 0, None,
        cu_seqlens, scale2, causal,
    )  # fmt: skip
    stats = (
        _row_statistics(p, t) if lse is None else _Rows(lse, (0, *lse.stride()), None, 0, "given")
    )
    # Every program adds up the weights of its sequence: no sequence is long enough for a launch.
    inline = reduce == "mean" and query_weight is not None
    weight_strides = (0, *_strides(query_weight, 1))
    return _columns(p, t, stats, query_weight, weight_strides, inline, out, 1.0 / heads, reduce)
