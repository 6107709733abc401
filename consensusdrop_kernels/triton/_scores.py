"""The fused score of `consensus_select`, step by step as its definition rounds it."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def good_tile(
    visual_ptr, textual_ptr, valid_ptr, stride_vn, stride_tn, stride_mn, token, tokens,
    HAS_VALID: tl.constexpr, HAS_TEXT: tl.constexpr,
):  # fmt: skip
    """Scores of some tokens of one sample, which of them are valid and which count: no NaN."""
    valid = token < tokens
    if HAS_VALID:
        valid = valid & tl.load(valid_ptr + token * stride_mn, mask=valid, other=0).to(tl.int1)
    v = tl.load(visual_ptr + token * stride_vn, mask=valid, other=0.0)
    t = v
    if HAS_TEXT:
        t = tl.load(textual_ptr + token * stride_tn, mask=valid, other=0.0)
    return v, t, valid, valid & (v == v) & (t == t)


@triton.jit
def _ratio(a, by):
    """`a / by`, rounded once; 0 where `by` is 0."""
    return tl.where(by == 0, 0.0, tl.div_rn(a, tl.where(by == 0, 1.0, by)))


@triton.jit
def _deviation(squares, count):
    return tl.sqrt(squares / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)


@triton.jit
def scaling(
    visual_ptr, textual_ptr, valid_ptr, stride_vn, stride_tn, stride_mn, tokens,
    FUSION: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What each list of a sample is shifted and divided by: `v0, v1, t0, t1`, float32.

    Sums are float64: equal scores must have a deviation of exactly 0.
    """
    v0, t0, v1, t1 = 0.0, 0.0, 1.0, 1.0
    if FUSION == "max":
        low_v, low_t, high_v, high_t = float("inf"), float("inf"), float("-inf"), float("-inf")
        for start in range(0, tokens, BLOCK_N):
            v, t, _, good = good_tile(
                visual_ptr, textual_ptr, valid_ptr, stride_vn, stride_tn, stride_mn,
                start + tl.arange(0, BLOCK_N), tokens, HAS_VALID, True,
            )  # fmt: skip
            low_v = tl.minimum(low_v, tl.min(tl.where(good, v, float("inf")), 0))
            low_t = tl.minimum(low_t, tl.min(tl.where(good, t, float("inf")), 0))
            high_v = tl.maximum(high_v, tl.max(tl.where(good, v, float("-inf")), 0))
            high_t = tl.maximum(high_t, tl.max(tl.where(good, t, float("-inf")), 0))
        v0, v1, t0, t1 = low_v, high_v - low_v, low_t, high_t - low_t
    if FUSION == "sum" or FUSION == "zscore":
        sum_v, sum_t = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        count = 0
        for start in range(0, tokens, BLOCK_N):
            v, t, _, good = good_tile(
                visual_ptr, textual_ptr, valid_ptr, stride_vn, stride_tn, stride_mn,
                start + tl.arange(0, BLOCK_N), tokens, HAS_VALID, True,
            )  # fmt: skip
            sum_v += tl.sum(tl.where(good, v, 0.0).to(tl.float64), 0)
            sum_t += tl.sum(tl.where(good, t, 0.0).to(tl.float64), 0)
            count += tl.sum(good.to(tl.int32), 0)
        v1, t1 = sum_v.to(tl.float32), sum_t.to(tl.float32)
    if FUSION == "zscore":
        mean_v = sum_v / tl.maximum(count, 1).to(tl.float64)
        mean_t = sum_t / tl.maximum(count, 1).to(tl.float64)
        square_v, square_t = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        for start in range(0, tokens, BLOCK_N):
            v, t, _, good = good_tile(
                visual_ptr, textual_ptr, valid_ptr, stride_vn, stride_tn, stride_mn,
                start + tl.arange(0, BLOCK_N), tokens, HAS_VALID, True,
            )  # fmt: skip
            off_v = tl.where(good, v.to(tl.float64) - mean_v, 0.0)
            off_t = tl.where(good, t.to(tl.float64) - mean_t, 0.0)
            square_v += tl.sum(off_v * off_v, 0)
            square_t += tl.sum(off_t * off_t, 0)
        v0, t0 = mean_v.to(tl.float32), mean_t.to(tl.float32)
        v1, t1 = _deviation(square_v, count), _deviation(square_t, count)
    return v0, v1, t0, t1


@triton.jit
def fused_score(
    v, t, rank_v, rank_t, count, share_v, share_t, v0, v1, t0, t1, FUSION: tl.constexpr
):  # fmt: skip
    """The fused score of each token, every step rounded as the definition rounds it.

    Kernels that call this are launched with `enable_fp_fusion=False`: a multiplication contracted
    into the addition would tell tokens apart that are equal by definition.
    """
    if FUSION == "rank":
        mixed = share_v * rank_v.to(tl.float32) + share_t * rank_t.to(tl.float32)
        score = tl.div_rn(mixed * -1.0, count.to(tl.float32))
    elif FUSION == "rrf":
        one = tl.full(v.shape, 1.0, tl.float32)
        score = tl.div_rn(one, 60.0 + rank_v.to(tl.float32)) * share_v
        score += tl.div_rn(one, 60.0 + rank_t.to(tl.float32)) * share_t
    elif FUSION == "product":
        score = share_v * tl.log(tl.maximum(v, 1e-30)) + share_t * tl.log(tl.maximum(t, 1e-30))
    elif FUSION == "max":
        a = (2.0 * share_v) * _ratio(v - v0, v1)
        b = (2.0 * share_t) * _ratio(t - t0, t1)
        score = tl.where((a != a) | (b != b), a + b, tl.maximum(a, b))
    else:
        score = share_v * _ratio(v - v0, v1) + share_t * _ratio(t - t0, t1)
    return score


class Choice(NamedTuple):
    """What to choose from and how: the arguments of the op, checked."""

    visual: Tensor
    textual: Tensor | None
    keep: int
    alpha: float
    fusion: str
    valid: Tensor | None
    priority: Tensor | None
    priority_keep: int


def pair_strides(t: Tensor | None) -> tuple[int, int]:
    """Strides of a `[B, N]` tensor, of one row for every sample, or of none."""
    if t is None:
        return 0, 0
    return (0, t.stride(0)) if t.dim() == 1 else (t.stride(0), t.stride(1))
