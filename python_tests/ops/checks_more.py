"""What an implementation of the other ops must satisfy, as functions of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from . import oracle, oracle_more
from .cases import Args
from .checks import (
    EPS32,
    NEAR,
    Impl,
    check_saliency,
    check_select_merge,
    merge_metric,
    to_cpu,
    true_saliencies,
)


def check_packed(impl: Impl, args: Args) -> Tensor:
    """Each sequence is what `attention_saliency` of it alone is."""
    out = impl(**args)
    host = to_cpu(args)
    assert out.shape == host["q"].shape[:1]
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    ends, lse, weight = host["cu_seqlens"].tolist(), host.get("lse"), host.get("query_weight")
    own = {n: v for n, v in host.items() if n in ("scale", "causal", "reduce")}
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        if a == b:
            continue
        alone = {n: host[n][a:b].transpose(0, 1)[None] for n in ("q", "k")}
        if lse is not None:
            alone["lse"] = lse[None, :, a:b]
        if weight is not None:
            alone["query_weight"] = weight[None, a:b]
        piece = out[a:b][None].cpu()
        check_saliency(lambda piece=piece, **_: piece, {**alone, **own})
    return out


def check_similarity(impl: Impl, args: Args) -> Tensor:
    out = impl(**args)
    host = to_cpu(args)
    ref = oracle_more.similarity_saliency(**host)
    assert out.shape == ref.shape
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    out = out.cpu()
    assert torch.equal(out.isnan(), ref.isnan())
    if host.get("visual_valid") is not None:
        assert not bool(out[~host["visual_valid"]].any()), "a masked token has a share"
    # A logit is known to its size times eps, and so is its exponential.
    floor = (4 + 2 / host.get("temperature", 0.01)) * EPS32
    for row, true in zip(out, ref, strict=True):
        fine = ~true.isnan()
        error = (row.double() - true)[fine].abs()
        if error.numel():
            assert float(error.max()) <= floor * float(true[fine].max())
    return out


def check_split(impl: Impl, args: Args) -> tuple[Tensor, Tensor]:
    """Exactly the split and the tokens that trying every split finds."""
    index, split = impl(**args)
    host = to_cpu(args)
    ref_index, ref_split = oracle_more.adaptive_split_select(**host)
    for out, ref in ((index, ref_index), (split, ref_split)):
        assert out.dtype == torch.int64
        assert out.is_contiguous()
        assert torch.equal(out.cpu(), ref)
    return index, split


def check_diverse(impl: Impl, args: Args) -> Tensor:
    """The chosen tokens can be put in an order in which each is the best there was, or within
    rounding of it. For finite features, and `dpp` below the rank."""
    index = impl(**args)
    host = to_cpu(args)
    features, keep, valid = host["features"], host["keep"], host.get("valid")
    relevance, objective = host.get("relevance"), host.get("objective", "maxmin")
    assert index.dtype == torch.int64
    assert index.shape == (len(features), keep)
    assert index.is_contiguous()
    for b, row in enumerate(index.tolist()):
        left = [i for i in range(features.shape[1]) if valid is None or bool(valid[b, i])]
        taken = [i for i in row if i >= 0]
        assert row == taken + [-1] * (keep - len(taken))
        assert taken == sorted(set(taken))
        assert set(taken) <= set(left), "an invalid token was chosen"
        assert len(taken) == min(keep, len(left))
        if len(taken) < len(left):
            worth = None if relevance is None else relevance[b]
            _replay(features[b], worth, objective, taken, left)
    return index


def check_diverse_merge(impl: Impl, args: Args) -> tuple[Tensor, ...]:
    """`check_select_merge` for a diverse choice: greedy, by places in the true consensus."""
    return check_select_merge(impl, args, _check_diverse_choice)


def _check_diverse_choice(index: Tensor, host: Args) -> None:
    valid = host.get("valid")
    rule = {name: host[name] for name in ("alpha", "fusion") if name in host}
    score, _ = oracle.consensus_score(*true_saliencies(host), valid=valid, **rule)
    choice = {"keep": host["keep"], "valid": valid, "objective": "dpp"}
    relevance = oracle_more.relevance_of_places(score, host["diversity"], valid)
    check_diverse(
        lambda **_: index.contiguous(),
        {"features": merge_metric(host), "relevance": relevance, **choice},
    )


def _replay(
    features: Tensor, worth: Tensor | None, objective: str, taken: list[int], left: list[int]
) -> None:
    cos = oracle_more.cosines(features)
    order: list[int] = []
    size = 1.0 if worth is None else float(worth[left].abs().max())
    near = NEAR * (size**2 if objective == "dpp" else 1.0)
    while len(order) < len(taken):
        score = oracle_more.greedy_scores(cos, worth, objective, order, left)
        ours = max((i for i in taken if i not in order), key=lambda i: (score[i], -i))
        best = max(left, key=lambda i: (score[i], -i))
        assert score[ours] >= score[best] - near, f"step {len(order)}: {best} was better"
        order.append(ours)
        left.remove(ours)
