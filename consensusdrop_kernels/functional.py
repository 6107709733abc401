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
    """`attention_saliency` of packed sequences: each attends to itself and scores its own tokens.

    One call for the images (or windows) that an encoder packs without padding. In
    `torch.ops.cdrop` it is the overload `attention_saliency.varlen`.

    Args:
        q: queries `[T, Hq, d]` of all sequences one after another, any strides with the last 1.
        k: keys `[T, Hk, d]`, same dtype; query head `h` reads key head `h // (Hq // Hk)`.
        cu_seqlens: `[S+1]` int32 or int64, where each of the `S` sequences starts, and `T` at the
            end; a sequence may be empty.
        max_seqlen: a length that no sequence exceeds.
        scale: factor on the logits, `d ** -0.5` by default.
        lse: `[Hq, T]` float32, natural-log sum-exp of each whole row; rows with +-inf contribute
            nothing. Without it each row is normalised over the keys of its sequence.
        query_weight: `[T]` float32, finite and >= 0, ones by default; a sequence whose weights are
            all 0 scores 0.
        causal: within a sequence, a row sees the keys up to its own.
        reduce: over the rows of a sequence, their weighted `"mean"`, or the `"max"` over rows of
            weight > 0; over heads it is always the mean.

    Returns:
        `[T]` float32. Not differentiable.

    Raises:
        RuntimeError: an argument is not as above. The values of `cu_seqlens` are looked at on the
            CPU, elsewhere only with `CDROP_CHECK=1`.
    """
    return torch.ops.cdrop.attention_saliency.varlen(
        q, k, cu_seqlens, max_seqlen, scale=scale, lse=lse, query_weight=query_weight,
        causal=causal, reduce=reduce,
    )  # fmt: skip


def similarity_saliency(
    text: Tensor,
    visual: Tensor,
    *,
    temperature: float = 0.01,
    text_valid: Tensor | None = None,
    visual_valid: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:
    """How much a text points at each visual token, by cosine similarity in a shared space.

    `softmax over the visual tokens of cosine / temperature`, then the maximum or mean over the text
    rows: the text signal of AdaFV (arXiv 2501.09532).

    Args:
        text: `[B, T, D]`; text rows, such as a model's input embeddings of the question.
        visual: `[B, N, D]`, same dtype; the projected visual tokens.
        temperature: finite and > 0.
        text_valid: `[B, T]` bool; rows marked false are left out of the maximum or mean. A sample
            without a valid row scores 0.
        visual_valid: `[B, N]` bool; tokens marked false take no part in the softmax and score 0.
        reduce: `"max"` or `"mean"` over the valid text rows.

    Returns:
        `[B, N]` float32. Not differentiable. A zero vector has cosine 0 with everything; a valid
        row or token with a NaN or infinite element makes its sample NaN.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return torch.ops.cdrop.similarity_saliency(
        text, visual, temperature=temperature, text_valid=text_valid, visual_valid=visual_valid,
        reduce=reduce,
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


def adaptive_split_select(
    visual: Tensor,
    textual: Tensor,
    keep: int,
    *,
    reserve: float = 0.25,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Share `keep` places between two score lists by where their mass lies.

    The rule of AdaFV (arXiv 2501.09532). With `k` the places of a sample (`keep`, or its number of
    valid tokens if that is less) and `h = floor(reserve * k)` in float64: the first `h` tokens of
    each list are taken, and of the other `R = k - 2 h` places `k1` go to the next of `textual`,
    `R - k1` to the next of `visual`. `k1` maximises `P_t(k1) * P_v(R - k1)`, where `P(c)` is the
    float64 sum, in the list's order, of the `c` scores after its first `h`.

    - Lists are in descending order, ties to the lower index, NaN last; a NaN adds 0 to a sum.
    - Of equal products the smallest `k1` wins; a product that is NaN counts as minus infinity.
    - The two parts are counted in each list by itself. Tokens in both are taken once; the freed
      places go to the next tokens not yet taken of the list with the larger of `P_t(k1)` and
      `P_v(R - k1)`, of `textual` where they are equal. So `k` distinct tokens come back.

    Args:
        visual, textual: `[B, N]` float32, higher is better; meant to be >= 0.
        keep: tokens to keep, in 1..N.
        reserve: share of the places reserved for the first of each list, in 0..0.5.
        valid: `[B, N]` bool; a sample with fewer than `keep` valid tokens keeps them all.

    Returns:
        `index [B, keep]` int64, ascending, -1 in unused places; `split [B]` int64, `k1`.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return torch.ops.cdrop.adaptive_split_select(
        visual, textual, keep, reserve=reserve, valid=valid
    )


def greedy_diverse_select(
    features: Tensor,
    keep: int,
    *,
    relevance: Tensor | None = None,
    objective: str = "maxmin",
    valid: Tensor | None = None,
) -> Tensor:
    """Choose tokens unlike one another, one at a time.

    - `"maxmin"`: each next token is the one whose largest cosine with those chosen is smallest
      (the max-min distance of DivPrune, arXiv 2503.02175). The first is the one of the largest
      `relevance`; without it, the one whose largest cosine with any other token is smallest.
    - `"dpp"`: each next token raises the determinant of `diag(r) S diag(r)` over the chosen most,
      with `S` the cosines and `r` the `relevance` or ones: the greedy maximum a posteriori of a
      determinantal point process, by incremental Cholesky (Chen et al., NeurIPS 2018). A token of
      which no more than 1e-5 of its squared length lies outside the span of those chosen, or of
      relevance 0, has no gain; once none has any, the rest is filled by relevance.

    Ties go to the lower index throughout. A zero vector has cosine 0 with every token, itself
    included: far from all for `maxmin`, without gain for `dpp`. Tokens with a NaN or infinite
    element, and for `dpp` those of NaN relevance, are like nothing and come last, by index.

    Args:
        features: `[B, N, F]`; only their directions matter.
        keep: tokens to keep, in 1..N.
        relevance: `[B, N]` float32; for `dpp` finite and >= 0.
        objective: `"maxmin"` or `"dpp"`.
        valid: `[B, N]` bool; a sample with fewer than `keep` valid tokens keeps them all.

    Returns:
        `index [B, keep]` int64, ascending (not in the order of choice), -1 in unused places.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return torch.ops.cdrop.greedy_diverse_select(
        features, keep, relevance=relevance, objective=objective, valid=valid
    )


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
    diversity: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score, choose and merge in one call: the whole of a visual-token reduction.

    Equals `attention_saliency` of both signals, `consensus_select`, `token_merge`, with `x` read
    once and nothing in between stored for all heads. With `diversity`, `greedy_diverse_select`
    chooses what is kept, and the consensus is its relevance.

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
        diversity: 0 keeps the best of the consensus, however alike they are. From 0.02 to 1, the
            most probable set, found greedily, of a determinantal point process over the cosines
            of `metric`, with a relevance of `exp(-(1 / diversity - 1) p)` for a token that a share
            `p` of the valid tokens is before in the consensus (ties in raster order, NaN last): at
            1 the metric alone decides. No more than `F` tokens can differ so; places beyond go
            to the best of the others. `priority_keep` must then be 0.

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
        diversity=diversity,
    )  # fmt: skip
