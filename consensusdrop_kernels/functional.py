"""The ops as documented Python functions: each is one call of `torch.ops.cdrop`.

All take float32, float16 or bfloat16, accumulate in float32, are deterministic, give ties to the
lower token index and rank NaN below every number. Bad input raises `RuntimeError` with one sentence
that names the argument. Shapes: `B` batch, `N` visual tokens, `M` query rows, `Hq`/`Hk` query and
key heads, `d` head width, `D` model width, `K` = `keep`, `C` = `contextual`, `P` = `prefix`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops  # noqa: F401  (defines torch.ops.cdrop)


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
    """How much attention a set of query rows pays to each key, without the attention map.

    Args:
        q: queries `[B, Hq, M, d]`, any strides with the last 1; `Hq` is a multiple of `Hk`, and
            query head `h` reads key head `h // (Hq // Hk)`.
        k: keys `[B, Hk, P+N, d]`, same dtype, any strides with the last 1.
        scale: factor on the logits, `d ** -0.5` by default.
        lse: `[B, Hq, M]` float32, natural-log sum-exp of each whole row as FlashAttention returns
            it (it may cover keys not given here); rows with +-inf contribute nothing. Without it
            each row is normalised over the keys given.
        key_valid: `[B, P+N]` bool; keys marked false take no part and score 0.
        query_weight: `[B, M]` float32, finite and >= 0, ones by default; rows of weight 0 are
            skipped, and a sample whose weights are all 0 scores 0.
        prefix: the first `P` keys (CLS, registers) are in the softmax but not in the result.
        causal: row `m` sees keys `j <= m + (P+N-M)`, as FlashAttention aligns it.
        reduce: over the rows, their weighted `"mean"`, or the `"max"` over rows of weight > 0;
            over heads it is always the mean.

    Returns:
        `[B, N]` float32. Not differentiable.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return torch.ops.cdrop.attention_saliency(
        q, k, scale=scale, lse=lse, key_valid=key_valid, query_weight=query_weight,
        prefix=prefix, causal=causal, reduce=reduce,
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
    """Choose the `keep` tokens two score lists agree on.

    Args:
        visual: `[B, N]` float32, higher is better.
        textual: the same, or None: then `visual` alone decides.
        keep: tokens to keep, in 1..N.
        alpha: share of `textual` in the consensus, in 0..1.
        fusion: `"rank"` (mean of the two ranks), `"rrf"` (reciprocal ranks, constant 60; Cormack et
            al., SIGIR 2009), `"sum"` (of the scores as shares), `"zscore"`, `"product"` (weighted
            geometric mean), `"max"` (of the min-max scores).
        valid: `[B, N]` bool; a sample with fewer than `keep` valid tokens keeps them all.
        priority: `[B, N]` or `[N]` float32, an order of its own, such as an even coverage of the
            grid.
        priority_keep: how many of the `keep` places go to the best by `priority` among the tokens
            that the consensus did not choose.

    Returns:
        `index [B, keep]` int64, ascending, -1 in unused places; `score [B, N]` float32, the fused
        score (`visual` itself without `textual`), NaN where an input was, -inf where invalid.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return torch.ops.cdrop.consensus_select(
        visual, textual, keep, alpha=alpha, fusion=fusion, valid=valid, priority=priority,
        priority_keep=priority_keep,
    )  # fmt: skip


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
    """Merge the tokens that were not kept into those that were.

    Args:
        x: tokens `[B, N, D]`.
        metric: `[B, N, F]`; a dropped token joins the slot of the highest cosine similarity.
        index: kept tokens `[B, K]` int64, -1 in unused places, as the select ops return it.
        contextual: `C` = 0: dropped tokens join kept ones. `C` > 0: an even stride of the dropped
            tokens becomes `C` further slots, and all other dropped tokens join those.
        weight: `[B, N]` float32, finite and >= 0; ones by default.
        valid: `[B, N]` bool; invalid tokens go nowhere.
        threshold: with `contextual=0`, a dropped token below this cosine is dropped for good.
        blend: weight of the joining tokens against the slot's own, in 0..1: 1 is a true mean, 0
            leaves the slot's token as it is.

    Returns:
        `tokens [B, K+C, D]` in `x.dtype`, zero in unused slots; `assign [B, N]` int64, the slot of
        each token or -1; `size [B, K+C]` float32, the weight merged into each slot.
        Differentiable in `x` and `weight`, with the assignment a constant.

    Raises:
        RuntimeError: an argument is not as above; `index` names a token twice or an invalid one.
    """
    return torch.ops.cdrop.token_merge(
        x, metric, index, contextual=contextual, weight=weight, valid=valid, threshold=threshold,
        blend=blend,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score, choose and merge in one call: the whole of a visual-token reduction.

    Equals `attention_saliency` of both signals, `consensus_select`, `token_merge`, with `x` read
    once and nothing in between stored for all heads.

    Args:
        x: visual tokens `[B, N, D]`.
        q_vis, k_vis: encoder queries `[B, Hq, M, d]` (the CLS row, say) and keys
            `[B, Hk, P+N, d]`.
        q_txt, k_txt: question queries `[B, Hq', M', d']` and the keys of the same `N` tokens
            `[B, Hk', N, d']`; both or neither (then the encoder alone decides).
        prefix: the first `P` encoder keys are no tokens (CLS, registers).
        scale_vis, scale_txt, lse_vis, lse_txt: as in `attention_saliency`, per side.
        txt_weight, txt_reduce: `query_weight` and `reduce` of the question side.
        metric: `[B, N, F]` for the merge; by default the head mean of the encoder keys.
        keep, alpha, fusion, valid, priority, priority_keep: as in `consensus_select`; `valid`
            also masks the keys of both saliencies.
        contextual, threshold, blend: as in `token_merge`.

    Returns:
        `tokens [B, K+C, D]`; `index [B, K+C]` int64, each slot's own token, ascending within the
        first `K` and within the last `C`, -1 in unused slots; `assign [B, N]`; `size [B, K+C]`.
        Differentiable in `x`, with the choice a constant.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return torch.ops.cdrop.select_merge(
        x, q_vis, k_vis, q_txt, k_txt, keep=keep, contextual=contextual, alpha=alpha,
        fusion=fusion, prefix=prefix, scale_vis=scale_vis, scale_txt=scale_txt, lse_vis=lse_vis,
        lse_txt=lse_txt, txt_weight=txt_weight, txt_reduce=txt_reduce, metric=metric, valid=valid,
        priority=priority, priority_keep=priority_keep, threshold=threshold, blend=blend,
    )  # fmt: skip
