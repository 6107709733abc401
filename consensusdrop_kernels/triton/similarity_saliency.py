"""`similarity_saliency`: column maxima or means of a softmax over cosines that is never stored.

The launcher of `attention_saliency` would need unit vectors in float32, a copy twice the size of
half-precision tokens; here the vectors are multiplied as they are and the lengths divided out of
the products. Four launches: lengths of the text rows and of the tokens, the statistics of each row
over splits of the tokens, then blocks of tokens that walk over the rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._saliency_plan import cdiv, wanted_programs
from ._scores import pair_strides

LOG2E = math.log2(math.e)
#: Splits of the tokens beyond which putting them together again costs more than it gains.
MAX_SPLITS = 32
BLOCK_N = 64


@triton.jit
def _marked(valid_ptr, stride, at, count, HAS_VALID: tl.constexpr):
    """Which rows exist and are valid."""
    there = at < count
    if HAS_VALID:
        there = there & tl.load(valid_ptr + at * stride.to(tl.int64), mask=there, other=0).to(
            tl.int1
        )
    return there


@triton.jit
def _power(exponent):
    """2 to an integer power in -126..126."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["stride_mb", "stride_mn", "count", "blocks", "temperature"])
def _similarity_saliency_measure_kernel(
    x_ptr, valid_ptr, power_ptr, factor_ptr, stride_xb, stride_xn, stride_xf, stride_mb, stride_mn,
    count, blocks, width, temperature,
    HAS_VALID: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Of each row a power of two that brings its length near 1, so that no product overflows, and
    what is still to be multiplied: one over the length of the row so scaled. A zero vector has a
    factor of 0, one with NaN or infinity NaN. Without `SCALE` the power is 1."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    row = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = _marked(valid_ptr + b * stride_mb, stride_mn, row, count, HAS_VALID)
    rows = x_ptr + b * stride_xb + row.to(tl.int64) * stride_xn
    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float64)
    for f in range(0, width, BLOCK_F):
        column = f + tl.arange(0, BLOCK_F)
        mask = there[:, None] & (column < width)[None, :]
        v = tl.load(rows[:, None] + column.to(tl.int64)[None, :] * stride_xf, mask=mask, other=0.0)
        v = v.to(tl.float64)
        total += v * v
    length = tl.sqrt(tl.sum(total, 1))
    power = tl.full([BLOCK_N], 1.0, tl.float32)
    if SCALE:  # of the float64 length, whose exponent a float32 may not hold
        exponent = ((length.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int32)
        power = _power(tl.minimum(tl.maximum(-exponent, -126), 126))
    factor = 1.0 / (length * power.to(tl.float64))
    factor = tl.where(length < float("inf"), factor, float("nan"))
    factor = tl.where(length == 0.0, 0.0, factor) * temperature
    tl.store(power_ptr + b * count + row, power, mask=row < count)
    tl.store(factor_ptr + b * count + row, factor.to(tl.float32), mask=row < count)


@triton.jit
def _tile(rows, there, power, column, width, stride_xf):
    """Columns of some rows, scaled, in their own dtype; what is not there is 0."""
    mask = there[:, None] & (column < width)[None, :]
    v = tl.load(rows[:, None] + column.to(tl.int64)[None, :] * stride_xf, mask=mask, other=0.0)
    return (v.to(tl.float32) * power[:, None]).to(v.dtype)


@triton.jit
def _logits(
    text_ptr, visual_ptr, t, text_there, n, there, text_power, power, text_factor, factor, width,
    stride_tt, stride_tf, stride_vn, stride_vf, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Cosine over temperature in base 2, [BLOCK_T, BLOCK_N]. Chunks of columns are added in
    float64: a logit is the cosine a hundredfold, and so is its error."""
    text_rows = text_ptr + t.to(tl.int64) * stride_tt
    rows = visual_ptr + n.to(tl.int64) * stride_vn
    total = tl.zeros([t.shape[0], n.shape[0]], tl.float64)
    for f in range(0, width, BLOCK_F):
        column = f + tl.arange(0, BLOCK_F)
        a = _tile(text_rows, text_there, text_power, column, width, stride_tf)
        c = _tile(rows, there, power, column, width, stride_vf)
        total += tl.dot(a, tl.trans(c), input_precision="ieee").to(tl.float64)
    scale = text_factor.to(tl.float64)[:, None] * factor.to(tl.float64)[None, :]
    return (total * scale).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "stride_mb", "stride_mn", "stride_wb", "stride_wt", "count", "row_tiles", "tokens",
        "splits", "per_split",
    ]
)  # fmt: skip
def _similarity_saliency_rows_kernel(
    text_ptr, visual_ptr, text_valid_ptr, valid_ptr, text_power_ptr, text_factor_ptr, power_ptr,
    factor_ptr, top_ptr, sum_ptr, stride_tb, stride_tt, stride_tf, stride_vb, stride_vn, stride_vf,
    stride_wb, stride_wt, stride_mb, stride_mn, count, row_tiles, tokens, width, splits, per_split,
    HAS_TEXT: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials of each row over one split, [B, T, splits]."""
    pid = tl.program_id(0)
    t = (pid % row_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = pid // row_tiles % splits
    b = (pid // row_tiles // splits).to(tl.int64)
    here = _marked(text_valid_ptr + b * stride_wb, stride_wt, t, count, HAS_TEXT)
    text_power = tl.load(text_power_ptr + b * count + t, mask=here, other=1.0)
    text_factor = tl.load(text_factor_ptr + b * count + t, mask=here, other=0.0)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    start = split * per_split
    for n0 in range(start, tl.minimum(start + per_split, tokens), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        there = _marked(valid_ptr + b * stride_mb, stride_mn, n, tokens, HAS_VALID)
        power = tl.load(power_ptr + b * tokens + n, mask=there, other=1.0)
        factor = tl.load(factor_ptr + b * tokens + n, mask=there, other=0.0)
        s = _logits(
            text_ptr + b * stride_tb, visual_ptr + b * stride_vb, t, here, n, there, text_power,
            power, text_factor, factor, width, stride_tt, stride_tf, stride_vn, stride_vf, BLOCK_F,
        )  # fmt: skip
        s = tl.where(there[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = tl.where(total == 0.0, 0.0, total * tl.exp2(top - shift))
        total += tl.sum(tl.exp2(s - shift[:, None]), 1)  # a NaN logit makes it NaN for good
        top = new_top
    line = (b * count + t) * splits + split
    tl.store(top_ptr + line, top, mask=t < count)
    tl.store(sum_ptr + line, total, mask=t < count)


@triton.jit(
    do_not_specialize=[
        "stride_mb", "stride_mn", "stride_wb", "stride_wt", "count", "tokens", "blocks", "splits",
    ]
)  # fmt: skip
def _similarity_saliency_columns_kernel(
    text_ptr, visual_ptr, text_valid_ptr, valid_ptr, text_power_ptr, text_factor_ptr, power_ptr,
    factor_ptr, top_ptr, sum_ptr, out_ptr, stride_tb, stride_tt, stride_tf, stride_vb, stride_vn,
    stride_vf, stride_wb, stride_wt, stride_mb, stride_mn, count, tokens, blocks, width, splits,
    MAX: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The maximum or mean over the rows, for one block of tokens."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = _marked(valid_ptr + b * stride_mb, stride_mn, n, tokens, HAS_VALID)
    power = tl.load(power_ptr + b * tokens + n, mask=there, other=1.0)
    factor = tl.load(factor_ptr + b * tokens + n, mask=there, other=0.0)
    most = tl.zeros([BLOCK_N], tl.int32)
    total = tl.zeros([BLOCK_N], tl.float32)
    live = 0
    for t0 in range(0, count, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        here = _marked(text_valid_ptr + b * stride_wb, stride_wt, t, count, HAS_TEXT)
        live += tl.sum(here.to(tl.int32), 0)
        text_power = tl.load(text_power_ptr + b * count + t, mask=here, other=1.0)
        text_factor = tl.load(text_factor_ptr + b * count + t, mask=here, other=0.0)
        top = tl.full([BLOCK_T], float("-inf"), tl.float32)
        line = (b * count + t) * splits
        for piece in range(0, splits):
            top = tl.maximum(top, tl.load(top_ptr + line + piece, mask=here, other=0.0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        whole = tl.zeros([BLOCK_T], tl.float32)
        for piece in range(0, splits):
            part = tl.load(top_ptr + line + piece, mask=here, other=0.0)
            whole += tl.load(sum_ptr + line + piece, mask=here, other=0.0) * tl.exp2(part - shift)
        s = _logits(
            text_ptr + b * stride_tb, visual_ptr + b * stride_vb, t, here, n, there, text_power,
            power, text_factor, factor, width, stride_tt, stride_tf, stride_vn, stride_vf, BLOCK_F,
        )  # fmt: skip
        p = tl.exp2(s - shift[:, None]) / whole[:, None]
        p = tl.where(here[:, None] & there[None, :], p, 0.0)
        if MAX:  # as integers, probabilities keep their order and NaN is above them all
            most = tl.maximum(most, tl.max(p.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
        else:
            total += tl.sum(p, 0)
    out = most.to(tl.float32, bitcast=True) if MAX else total / tl.maximum(live, 1)
    tl.store(out_ptr + b * tokens + n, out, mask=n < tokens)


def similarity_saliency(
    text: Tensor,
    visual: Tensor,
    *,
    temperature: float = 0.01,
    text_valid: Tensor | None = None,
    visual_valid: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:
    """The op; see `consensusdrop_kernels.similarity_saliency`."""
    _checks.similarity(
        text, visual, temperature=temperature, text_valid=text_valid, visual_valid=visual_valid,
        reduce=reduce,
    )  # fmt: skip
    batch, count, width = text.shape
    tokens, device = visual.shape[1], visual.device
    out = torch.empty((batch, tokens), dtype=torch.float32, device=device)
    if batch == 0:
        return out

    def empty(*shape: int) -> Tensor:
        return torch.empty((batch, *shape), dtype=torch.float32, device=device)

    powers, factors = (empty(count), empty(tokens)), (empty(count), empty(tokens))
    sides = ((text, text_valid, LOG2E / temperature), (visual, visual_valid, 1.0))
    for side, (x, valid, unit) in enumerate(sides):
        pieces = cdiv(x.shape[1], 16)
        _similarity_saliency_measure_kernel[(pieces * batch,)](
            x, powers[side] if valid is None else valid, powers[side], factors[side], *x.stride(),
            *pair_strides(valid), x.shape[1], pieces, width, unit, HAS_VALID=valid is not None,
            # Half precision needs no scaling and has no room for it.
            SCALE=x.dtype != torch.float16, BLOCK_N=16, BLOCK_F=128, num_warps=4,
        )  # fmt: skip
    given = {"HAS_TEXT": text_valid is not None, "HAS_VALID": visual_valid is not None}
    masks = (
        out if text_valid is None else text_valid,
        out if visual_valid is None else visual_valid,
    )
    strides = (*text.stride(), *visual.stride(), *pair_strides(text_valid),
               *pair_strides(visual_valid))  # fmt: skip
    read = (text, visual, *masks, powers[0], factors[0], powers[1], factors[1])
    # Float32 is multiplied without tensor cores, from registers, which few rows leave room for.
    single = text.dtype == torch.float32
    block_t = 16 if count <= 16 or single else 32
    row_tiles, blocks = cdiv(count, block_t), cdiv(tokens, BLOCK_N)
    splits = min(cdiv(wanted_programs(device), row_tiles * batch), MAX_SPLITS, blocks)
    per_split = cdiv(blocks, splits) * BLOCK_N
    splits = cdiv(tokens, per_split)
    tops, sums = empty(count, splits), empty(count, splits)
    shape = {"BLOCK_T": block_t, "BLOCK_N": BLOCK_N, "BLOCK_F": 32 if single else 64}
    shape["num_warps"] = 8 if single else 4
    if not single and torch.version.hip is None:
        # Left to itself, ptxas spills to keep more programs resident.
        shape["maxnreg"] = 168 if block_t == 16 else 255
    _similarity_saliency_rows_kernel[(row_tiles * splits * batch,)](
        *read, tops, sums, *strides, count, row_tiles, tokens, width, splits, per_split, **given,
        **shape,
    )  # fmt: skip
    _similarity_saliency_columns_kernel[(blocks * batch,)](
        *read, tops, sums, out, *strides, count, tokens, blocks, width, splits,
        MAX=reduce == "max", **given, **shape,
    )  # fmt: skip
    return out
