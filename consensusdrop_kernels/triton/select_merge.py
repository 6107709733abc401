"""`select_merge`: two saliencies, their consensus and the merge, with nothing else in between.

After the saliencies six launches up to `ONE_PROGRAM` tokens: unit vectors of the metric (the head
mean of the keys is taken while they are read), places in both lists, choice, most similar slots,
lists, means. The choice leaves what the merge needs, so that no launch looks at the indices again.
With a diverse choice there are twelve.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ..reference import relevance_of_places
from ._keys import packed_key
from ._scores import Choice, pair_strides
from .attention_saliency import attention_saliency
from .consensus_select import ONE_PROGRAM, choose, choose_long, consensus_select
from .greedy_diverse_select import greedy_diverse_select
from .token_merge import empty_places, merge, place, unit_vectors


def _saliencies(
    q_vis: Tensor,
    k_vis: Tensor,
    q_txt: Tensor | None,
    k_txt: Tensor | None,
    *,
    prefix: int,
    scale_vis: float | None,
    scale_txt: float | None,
    lse_vis: Tensor | None,
    lse_txt: Tensor | None,
    txt_weight: Tensor | None,
    txt_reduce: str,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Both score lists `[B, N]`, over the keys that `valid` leaves."""
    key_valid = valid
    if valid is not None and prefix > 0:
        key_valid = torch.nn.functional.pad(valid, (prefix, 0), value=True)
    visual = attention_saliency(
        q_vis, k_vis, scale=scale_vis, lse=lse_vis, key_valid=key_valid, prefix=prefix
    )
    if q_txt is None or k_txt is None:
        return visual, None
    return visual, attention_saliency(
        q_txt, k_txt, scale=scale_txt, lse=lse_txt, key_valid=valid, query_weight=txt_weight,
        reduce=txt_reduce,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "rate", "stride_mb", "stride_mn"])
def _select_merge_relevance_kernel(
    score_ptr, valid_ptr, relevance_ptr, stride_mb, stride_mn, tokens, rate,
    HAS_VALID: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """What the share of the valid tokens that are better leaves of a token's relevance."""
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    score_ptr += b * tokens
    valid_ptr += b * stride_mb
    key = packed_key(tl.load(score_ptr + token, mask=token < tokens, other=0.0), token, token >= 0)
    better = tl.zeros([BLOCK_I], tl.int32)
    count = tl.full([], 0, tl.int32)
    for start in range(0, tokens, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        there = other < tokens
        if HAS_VALID:
            valid = tl.load(valid_ptr + other * stride_mn.to(tl.int64), mask=there, other=0)
            there = there & valid.to(tl.int1)
        theirs = tl.load(score_ptr + other, mask=there, other=0.0)
        rival = packed_key(theirs, other, there)
        better += tl.sum((rival[None, :] > key[:, None]).to(tl.int32), 1)  # [BLOCK_I, BLOCK_J]
        count += tl.sum(there.to(tl.int32), 0)
    before = better.to(tl.float32) / tl.maximum(count, 1).to(tl.float32)
    tl.store(relevance_ptr + b * tokens + token, tl.exp(rate * before), mask=token < tokens)


def _relevance(score: Tensor, diversity: float, valid: Tensor | None) -> Tensor:
    """See `reference.relevance_of_places`; of invalid tokens, some number."""
    batch, tokens = score.shape
    if tokens > ONE_PROGRAM:  # where all pairs are too many
        return relevance_of_places(score, diversity, valid)
    out = torch.empty_like(score)
    _select_merge_relevance_kernel[(triton.cdiv(tokens, 16), batch)](
        score, score if valid is None else valid, out, *pair_strides(valid), tokens,
        1.0 - 1.0 / diversity, HAS_VALID=valid is not None, BLOCK_I=16, BLOCK_J=128, num_warps=4,
    )  # fmt: skip
    return out


def _diverse(choice: Choice, metric: Tensor | None, heads: Tensor, diversity: float) -> Tensor:
    """What is kept, `[B, K]`, where the consensus is the relevance of a diverse choice."""
    _, score = consensus_select(
        choice.visual, choice.textual, choice.keep, alpha=choice.alpha, fusion=choice.fusion,
        valid=choice.valid,
    )  # fmt: skip
    relevance = _relevance(score, diversity, choice.valid)
    features = heads.mean(1, dtype=torch.float32) if metric is None else metric
    return greedy_diverse_select(
        features, choice.keep, relevance=relevance, objective="dpp", valid=choice.valid
    )  # fmt: skip


def select_merge(
    x: Tensor,
    q_vis: Tensor,
    k_vis: Tensor,
    q_txt: Tensor | None = None,
    k_txt: Tensor | None = None,
    *,
    keep: int,
    contextual: int = 0,
    alpha: float = 0.5,
    fusion: str = "rank",
    prefix: int = 0,
    scale_vis: float | None = None,
    scale_txt: float | None = None,
    lse_vis: Tensor | None = None,
    lse_txt: Tensor | None = None,
    txt_weight: Tensor | None = None,
    txt_reduce: str = "mean",
    metric: Tensor | None = None,
    valid: Tensor | None = None,
    priority: Tensor | None = None,
    priority_keep: int = 0,
    threshold: float = -1.0,
    blend: float = 1.0,
    diversity: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op; see `consensusdrop_kernels.select_merge`."""
    _checks.fused(
        x, q_vis, k_vis, q_txt, k_txt, keep=keep, contextual=contextual, alpha=alpha, fusion=fusion,
        prefix=prefix, scale_vis=scale_vis, scale_txt=scale_txt, lse_vis=lse_vis, lse_txt=lse_txt,
        txt_weight=txt_weight, txt_reduce=txt_reduce, metric=metric, valid=valid, priority=priority,
        priority_keep=priority_keep, threshold=threshold, blend=blend, diversity=diversity,
    )  # fmt: skip
    batch, count, width = x.shape
    places, own = empty_places(x, keep, contextual)
    if batch == 0:
        size = torch.empty(own.shape, dtype=torch.float32, device=x.device)
        return x.new_empty((0, own.shape[1], width)), own, places.assign, size
    one_program = count <= ONE_PROGRAM and diversity == 0
    heads = k_vis[:, :, prefix:] if metric is None else metric.unsqueeze(1)
    unit = unit_vectors(heads, None if one_program else places.assign)
    visual, textual = _saliencies(
        q_vis, k_vis, q_txt, k_txt, prefix=prefix, scale_vis=scale_vis, scale_txt=scale_txt,
        lse_vis=lse_vis, lse_txt=lse_txt, txt_weight=txt_weight, txt_reduce=txt_reduce, valid=valid,
    )  # fmt: skip
    choice = Choice(visual, textual, keep, alpha, fusion, valid, priority, priority_keep)
    if one_program:
        choose(choice, own, None, places)
    elif diversity > 0:
        place(_diverse(choice, metric, heads, diversity), valid, places, own)
    else:
        index = torch.empty((batch, keep), dtype=torch.int64, device=x.device)
        choose_long(choice, index, torch.empty_like(visual))
        place(index, valid, places, own)
    tokens, size = merge(
        x, unit, places, own, keep=keep, weight=None, threshold=threshold, blend=blend
    )
    return tokens, own, places.assign, size
