"""The test of the tests: implementations with one plausible mistake each must be rejected.

Every mistake is made on top of the correct result or of the float64 oracle, so nothing but the
mistake can be what the check sees; the same path without it must pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from . import oracle
from .cases import Args, generator, merge_case, random_mask, saliency_case, scores
from .cases import select_merge_case as flagship
from .checks import check_merge, check_saliency, check_select, check_select_merge

Impl = Callable[..., Any]


# --- honest implementations, from the oracle ---------------------------------------------------


def saliency(**args: Any) -> Tensor:
    return oracle.attention_saliency(**args).float()


def select(visual: Tensor, textual: Tensor | None, keep: int, **args: Any) -> tuple[Tensor, Tensor]:
    rule = {n: args.pop(n) for n in ("priority", "priority_keep") if n in args}
    score, tie = oracle.consensus_score(visual, textual, **args)
    score = score.float()
    index = oracle.choose(score.double(), tie, keep, valid=args.get("valid"), **rule)
    return index, score


def merge(
    x: Tensor,
    metric: Tensor,
    index: Tensor,
    *,
    contextual: int = 0,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    threshold: float = -1.0,
    blend: float = 1.0,
    owners: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    count, keep = x.shape[1], index.shape[1]
    weight = torch.ones(x.shape[:2]) if weight is None else weight
    owners = oracle.slots(index, count, contextual, valid) if owners is None else owners
    rows = []
    for b, own in enumerate(owners):
        seen = None if valid is None else valid[b]
        assigned = oracle.assign(metric[b], own, keep, seen, threshold)
        tokens, size = oracle.merge(x[b], weight[b], own, assigned, blend)
        rows.append((tokens.to(x.dtype), torch.tensor(assigned), size.float()))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def fused(x: Tensor, q_vis: Tensor, k_vis: Tensor, q_txt: Tensor, k_txt: Tensor, **args: Any):
    prefix, contextual = args.get("prefix", 0), args.get("contextual", 0)
    vis = oracle.attention_saliency(q_vis, k_vis, prefix=prefix)
    txt = oracle.attention_saliency(q_txt, k_txt)
    index, _ = select(vis, txt, args["keep"])
    metric = k_vis[:, :, prefix:].double().mean(1)
    tokens, assign, size = merge(x, metric, index, contextual=contextual)
    owners = oracle.slots(index, x.shape[1], contextual, None)
    return tokens, torch.tensor(owners), assign, size


# --- one mistake each --------------------------------------------------------------------------


def skips_the_last_tile(q: Tensor, k: Tensor, **args: Any) -> Tensor:
    """Keys past the last full tile of 64 are neither summed nor returned."""
    out = saliency(q=q, k=k[:, :, : k.shape[2] // 64 * 64], **args)
    return torch.nn.functional.pad(out, (0, k.shape[2] - out.shape[1]))


def sums_a_tile_twice(q: Tensor, k: Tensor, **args: Any) -> Tensor:
    """The normaliser counts one key in 300 a second time: 0.3 % off, everywhere."""
    k = torch.cat([k, k[:, :, -1:]], 2)
    return saliency(q=q, k=k, **args)[:, :-1]


def in_half_precision(q: Tensor, k: Tensor, **args: Any) -> Tensor:
    s = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).bfloat16().float()
    return s.softmax(-1).mean((1, 2))


def forgets_the_prefix(q: Tensor, k: Tensor, prefix: int = 0, **args: Any) -> Tensor:
    return saliency(q=q, k=k[:, :, prefix:], **args)


def causal_at_the_top_left(q: Tensor, k: Tensor, causal: bool = False, **args: Any) -> Tensor:
    s = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    ahead = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
    return s.masked_fill(ahead, -torch.inf).softmax(-1).mean((1, 2)).float()


def groups_interleaved(q: Tensor, k: Tensor, **args: Any) -> Tensor:
    """Query head h reads key head h % Hk instead of h // (Hq / Hk)."""
    return saliency(q=q, k=k.repeat(1, q.shape[1] // k.shape[1], 1, 1), **args)


def unweighted_mean(**args: Any) -> Tensor:
    weight = args.pop("query_weight")
    return saliency(**args, query_weight=(weight > 0).float())


def sum_over_heads(**args: Any) -> Tensor:
    return saliency(**args) * args["q"].shape[1]


def max_over_heads_too(q: Tensor, k: Tensor, **args: Any) -> Tensor:
    heads = [saliency(q=q[:, [h]], k=k[:, [h]], **args) for h in range(q.shape[1])]
    return torch.stack(heads).amax(0)


def one_element_unwritten(**args: Any) -> Tensor:
    out = saliency(**args)
    out[-1, -1] = torch.nan
    return out


def stale_element(**args: Any) -> Tensor:
    """What an unwritten element looks like when the memory held this op's last result."""
    out = saliency(**args)
    out[0, -1] = out[0, 0]
    return out


def masked_key_leaks(**args: Any) -> Tensor:
    """-1e4 where -inf is meant: right, until every score is that low."""
    return saliency(**args) + 1e-7 * ~args["key_valid"]


SALIENCY: list[tuple[Impl, Args]] = [
    (skips_the_last_tile, saliency_case(1, 2, 2, 3, 320 + 7, 64)),
    (sums_a_tile_twice, saliency_case(1, 2, 2, 3, 300, 64)),
    (in_half_precision, saliency_case(1, 2, 2, 3, 300, 64)),
    (forgets_the_prefix, saliency_case(1, 2, 2, 3, 300, 64, prefix=1)),
    (causal_at_the_top_left, saliency_case(1, 2, 2, 7, 33, 64, causal=True)),
    (groups_interleaved, saliency_case(1, 4, 2, 3, 33, 64)),
    (
        unweighted_mean,
        saliency_case(1, 2, 2, 5, 33, 64, query_weight=torch.rand(1, 5, generator=generator(1))),
    ),
    (sum_over_heads, saliency_case(1, 2, 2, 3, 33, 64)),
    (max_over_heads_too, saliency_case(1, 2, 2, 3, 33, 64, reduce="max")),
    (one_element_unwritten, saliency_case(2, 2, 2, 3, 33, 64)),
    (stale_element, saliency_case(2, 2, 2, 3, 33, 64)),
    (masked_key_leaks, saliency_case(2, 2, 2, 3, 33, 64, key_valid=random_mask((2, 33), 1))),
]


def ties_reversed(visual: Tensor, textual: Tensor, keep: int, **args: Any):
    """The higher index wins a tie."""
    index, score = select(visual.flip(1), textual.flip(1), keep, **args)
    return (visual.shape[1] - 1 - index).flip(1), score.flip(1)


def unsorted(**args: Any):
    index, score = select(**args)
    return index.flip(1), score


def pads_at_the_front(**args: Any):
    index, score = select(**args)
    return index.roll(1, 1), score


def sample_deviation(visual: Tensor, textual: Tensor, keep: int, **_: Any):
    z = sum((a - a.mean(1, keepdim=True)) / a.std(1, keepdim=True) for a in (visual, textual)) / 2
    return z.topk(keep).indices.sort(1).values, z


def ranks_from_one(visual: Tensor, textual: Tensor, keep: int, **_: Any):
    ranks = [a.argsort(1, descending=True).argsort(1) + 1.0 for a in (visual, textual)]
    score = sum(0.5 / (60 + r) for r in ranks)
    return score.topk(keep).indices.sort(1).values, score


def weights_swapped(alpha: float = 0.5, **args: Any):
    return select(alpha=1 - alpha, **args)


def takes_nan_for_the_best(**args: Any):
    index, score = select(**{**args, "visual": args["visual"].nan_to_num(1e9)})
    return index, score


def last_token_forgotten(visual: Tensor, textual: Tensor, keep: int, **args: Any):
    index, _ = select(visual[:, :-1], textual[:, :-1], keep, **args)
    return index, select(visual, textual, keep, **args)[1]


def priority_may_repeat(priority: Tensor, priority_keep: int, keep: int, **args: Any):
    """The reserve is taken before the score has had its say."""
    index, score = select(keep=keep, **args)
    best = set(priority.argsort(descending=True)[:priority_keep].tolist())
    rest = [i for i in score[0].argsort(descending=True).tolist() if i not in best]
    return torch.tensor([sorted([*best, *rest[: keep - priority_keep]])]), score


few = {
    "visual": torch.randint(0, 3, (2, 50), generator=generator(1)).float(),
    "textual": torch.randint(0, 3, (2, 50), generator=generator(2)).float(),
    "keep": 12,
}
many = {"visual": scores(2, 50), "textual": scores(2, 50, seed=1), "keep": 12}
one = {"visual": scores(1, 50), "textual": scores(1, 50, seed=1), "keep": 12}
short = torch.arange(50).expand(2, 50) < 9
nan_first = many["visual"].clone()
nan_first[0, 4] = torch.nan
best_is_last = many["visual"].clone()
best_is_last[:, -1] = 1e3

SELECT: list[tuple[Impl, Args]] = [
    *((ties_reversed, {**few, "fusion": f}) for f in ("rank", "rrf", "sum", "zscore")),
    (unsorted, many),
    (pads_at_the_front, {**many, "valid": short}),
    (sample_deviation, {**many, "fusion": "zscore"}),
    (ranks_from_one, {**many, "fusion": "rrf"}),
    (weights_swapped, {**many, "alpha": 0.3}),
    (takes_nan_for_the_best, {**many, "visual": nan_first}),
    (last_token_forgotten, {**many, "visual": best_is_last}),
    (
        priority_may_repeat,
        {**one, "priority": torch.rand(50, generator=generator(3)), "priority_keep": 5},
    ),
]


def sum_instead_of_mean(x: Tensor, **args: Any):
    tokens, assign, size = merge(x, **args)
    return tokens * size[:, :, None].to(x.dtype), assign, size


def mean_in_the_dtype(x: Tensor, **args: Any):
    """Sums in bfloat16: each addition rounds."""
    tokens, assign, size = merge(x, **args)
    sums = torch.zeros_like(tokens)
    for i in range(x.shape[1]):
        sums[0, assign[0, i]] += x[0, i]
    return sums / size[:, :, None].to(x.dtype), assign, size


def ceil_of_the_share(x: Tensor, metric: Tensor, index: Tensor, contextual: int, **args: Any):
    """Contextual references at ceil(c R / C)."""
    kept = index[0].tolist()
    dropped = [i for i in range(x.shape[1]) if i not in kept]
    extra = [dropped[-(-c * len(dropped) // contextual)] for c in range(contextual)]
    return merge(x, metric, index, contextual=contextual, owners=[kept + extra], **args)


def joins_kept_tokens_too(x: Tensor, metric: Tensor, index: Tensor, contextual: int, **args: Any):
    """Contextual slots act like more kept tokens."""
    owners = oracle.slots(index, x.shape[1], contextual, None)
    return merge(x, metric, torch.tensor(owners), **args)


def without_normalising(metric: Tensor, **args: Any):
    """Distance for cosine: the nearest instead of the most similar."""
    index, x = args["index"], args["x"]
    near = torch.cdist(metric, metric[:, index[0]]).argmin(2)
    near[0, index[0]] = torch.arange(index.shape[1])
    tokens, size = oracle.merge(
        x[0], torch.ones(x.shape[1]), index[0].tolist(), near[0].tolist(), 1
    )
    return tokens[None].to(x.dtype), near, size[None].float()


def ties_to_the_last(metric: Tensor, index: Tensor, x: Tensor, **args: Any):
    """The highest token index wins a tie."""
    count = x.shape[1]
    flipped = (count - 1 - index).flip(1)
    tokens, assign, size = merge(x.flip(1), metric.flip(1), flipped, **args)
    slot = index.shape[1] - 1 - assign
    return tokens.flip(1), slot.flip(1), size.flip(1)


def ignores_the_threshold(threshold: float, **args: Any):
    return merge(**args)


def blends_the_size(blend: float, **args: Any):
    tokens, assign, size = merge(blend=blend, **args)
    return tokens, assign, 1 + blend * (size - 1)


def rounds_lone_tokens(weight: Tensor, **args: Any):
    """(w x) / w where the token is alone: not the same bits."""
    tokens, assign, size = merge(weight=weight, **args)
    return tokens * 0.3 / 0.3, assign, size


def empty_slots_unwritten(**args: Any):
    tokens, assign, size = merge(**args)
    tokens[size == 0] = 1e-3
    return tokens, assign, size


equal = {**merge_case(1, 40, 8), "metric": torch.ones(1, 40, 7)}
lone = {**merge_case(1, 12, 12), "weight": torch.rand(1, 12, generator=generator(1)) + 0.1}

MERGE: list[tuple[Impl, Args]] = [
    (sum_instead_of_mean, merge_case(1, 40, 8)),
    (mean_in_the_dtype, merge_case(1, 200, 3, dtype=torch.bfloat16)),
    (ceil_of_the_share, merge_case(1, 40, 8, contextual=5)),
    (joins_kept_tokens_too, merge_case(1, 40, 8, contextual=5)),
    (without_normalising, merge_case(1, 40, 8)),
    (ties_to_the_last, equal),
    (ignores_the_threshold, merge_case(1, 40, 8, threshold=0.3)),
    (blends_the_size, merge_case(1, 40, 8, blend=0.5)),
    (rounds_lone_tokens, lone),
    (empty_slots_unwritten, merge_case(1, 40, 8, contextual=40)),
]


def metric_from_the_first_head(k_vis: Tensor, **args: Any):
    tokens, index, assign, size = fused(k_vis=k_vis, **args)
    out = merge(args["x"], k_vis[:, 0, args.get("prefix", 0) :], index[:, : args["keep"]])
    return out[0], index, out[1], out[2]


def metric_with_the_prefix(k_vis: Tensor, **args: Any):
    tokens, index, assign, size = fused(k_vis=k_vis, **args)
    out = merge(args["x"], k_vis[:, :, : args["x"].shape[1]].mean(1), index[:, : args["keep"]])
    return out[0], index, out[1], out[2]


def text_left_out(q_txt: Tensor, k_txt: Tensor, **args: Any):
    return fused(q_txt=args["q_vis"], k_txt=args["k_vis"], **args)


def reference_slots_missing(contextual: int, **args: Any):
    tokens, index, assign, size = fused(contextual=contextual, **args)
    index[:, -contextual:] = -1
    return tokens, index, assign, size


FLAGSHIP: list[tuple[Impl, Args]] = [
    (metric_from_the_first_head, flagship(1, 40, 8)),
    (metric_with_the_prefix, flagship(1, 40, 8, prefix=1)),
    (text_left_out, flagship(1, 40, 8)),
    (reference_slots_missing, flagship(1, 40, 8, contextual=3)),
]

CHECKS = [
    (check_saliency, saliency, SALIENCY),
    (check_select, select, SELECT),
    (check_merge, merge, MERGE),
    (check_select_merge, fused, FLAGSHIP),
]
BROKEN = [
    pytest.param(check, honest, wrong, args, id=f"{wrong.__name__}-{i}")
    for check, honest, rows in CHECKS
    for i, (wrong, args) in enumerate(rows)
]


@pytest.mark.parametrize(("check", "honest", "wrong", "args"), BROKEN)
def test_one_mistake_is_seen(check, honest, wrong, args):
    check(honest, args)
    with pytest.raises(AssertionError):
        check(wrong, args)
