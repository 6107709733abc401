"""The other ops in float64 and in the plainest code, written from their definition alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import oracle

INF = math.inf


def attention_saliency_varlen(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, lse: Tensor | None = None,
    query_weight: Tensor | None = None, **args: object,
) -> Tensor:  # fmt: skip
    """`[T]` float64, one sequence after another."""
    out = torch.zeros(len(q), dtype=torch.float64)
    ends = cu_seqlens.tolist()
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        if a == b:
            continue
        heads_first = [t[a:b].transpose(0, 1)[None] for t in (q, k)]
        out[a:b] = oracle.attention_saliency(
            *heads_first,
            lse=None if lse is None else lse[None, :, a:b],
            query_weight=None if query_weight is None else query_weight[None, a:b],
            **args,
        )[0]
    return out


def unit(x: Tensor) -> Tensor:
    """Float64 unit vectors; a zero vector stays zero."""
    x = x.double()
    length = x.square().sum(-1, keepdim=True).sqrt()
    return torch.where(length == 0, 0.0, x / length)


def similarity_saliency(
    text: Tensor, visual: Tensor, *, temperature: float = 0.01, text_valid: Tensor | None = None,
    visual_valid: Tensor | None = None, reduce: str = "max",
) -> Tensor:  # fmt: skip
    """`[B, N]` float64, one text row after another."""
    batch, count = visual.shape[:2]
    out = torch.zeros(batch, count, dtype=torch.float64)
    for b in range(batch):
        seen = torch.arange(count) if visual_valid is None else visual_valid[b].nonzero()[:, 0]
        rows = [
            t for t in range(text.shape[1]) if text_valid is None or bool(text_valid[b, t])
        ]  # fmt: skip
        if len(seen) == 0 or not rows:
            continue
        shares = [
            torch.softmax(unit(visual[b, seen]) @ unit(text[b, t]) / temperature, 0) for t in rows
        ]
        stack = torch.stack(shares)
        out[b, seen] = stack.amax(0) if reduce == "max" else stack.mean(0)
    return out


def splits(
    visual: list[float], textual: list[float], tokens: list[int], keep: int, reserve: float
) -> tuple[list[int], int]:
    """The chosen tokens of one sample and `k1`, by trying every split."""
    places = min(keep, len(tokens))
    held = math.floor(reserve * places)
    rest = places - 2 * held
    by_v, by_t = (list(oracle.places(a, tokens)) for a in (visual, textual))

    def mass(order: list[int], score: list[float], count: int) -> float:
        total = 0.0
        for i in order[held : held + count]:
            total += 0.0 if math.isnan(score[i]) else score[i]
        return total

    best, k1 = -INF, 0
    for c in range(rest + 1):
        product = mass(by_t, textual, c) * mass(by_v, visual, rest - c)
        if product > best:
            best, k1 = product, c
    chosen = {*by_t[: held + k1], *by_v[: held + rest - k1]}
    of_text, of_visual = mass(by_t, textual, k1), mass(by_v, visual, rest - k1)
    fill = by_t if of_text >= of_visual else by_v
    for i in fill:
        if len(chosen) < places:
            chosen.add(i)
    return sorted(chosen), k1


def adaptive_split_select(
    visual: Tensor, textual: Tensor, keep: int, *, reserve: float = 0.25,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, count = visual.shape
    index = torch.full((batch, keep), -1)
    split = torch.zeros(batch, dtype=torch.int64)
    for b in range(batch):
        tokens = [i for i in range(count) if valid is None or bool(valid[b, i])]
        chosen, k1 = splits(
            visual[b].double().tolist(), textual[b].double().tolist(), tokens, keep, reserve
        )
        index[b, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
        split[b] = k1
    return index, split


def cosines(features: Tensor) -> Tensor:
    """`[N, N]` cosines of one sample in float64; exactly 1 for equal vectors, 0 for zero ones."""
    _, which = torch.unique(features, dim=0, return_inverse=True)
    u = unit(features)
    cos = (u @ u.T).clamp(-1, 1)
    same = (which[:, None] == which) & (u.square().sum(1) > 0)
    return torch.where(same, 1.0, cos)


def greedy_scores(
    cos: Tensor, relevance: Tensor | None, objective: str, chosen: list[int], left: list[int]
) -> dict[int, float]:
    """What each token left would be chosen by, after `chosen`: distance, relevance, or gain."""
    worth = torch.ones(len(cos)) if relevance is None else relevance
    worth = worth.double()
    if objective == "maxmin":
        if chosen:
            return {i: 1 - max(float(cos[i, c]) for c in chosen) for i in left}
        if relevance is not None:
            return {i: float(worth[i]) for i in left}
        others = {i: [j for j in left if j != i] for i in left}
        return {i: 1 - max((float(cos[i, j]) for j in others[i]), default=-INF) for i in left}
    out = {}
    inverse = torch.linalg.pinv(cos[chosen][:, chosen]) if chosen else None
    for i in left:
        inside = float(cos[i, chosen] @ inverse @ cos[chosen, i]) if chosen else 0.0
        out[i] = float(worth[i]) ** 2 * (float(cos[i, i]) - inside)
    return out


def relevance_of_places(score: Tensor, diversity: float, valid: Tensor | None = None) -> Tensor:
    """`exp(-(1 / diversity - 1) p)`, `p` the share of the valid tokens that is better."""
    out = torch.zeros(score.shape)
    for b, row in enumerate(score.tolist()):
        tokens = [i for i in range(len(row)) if valid is None or bool(valid[b, i])]
        for place, i in enumerate(sorted(tokens, key=lambda i: (-row[i], i))):  # noqa: B023
            out[b, i] = math.exp(-(1 / diversity - 1) * place / len(tokens))
    return out


def greedy_diverse_select(
    features: Tensor, keep: int, *, relevance: Tensor | None = None, objective: str = "maxmin",
    valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`[B, K]` by definition, for finite inputs without exhausted rank."""
    index = torch.full((len(features), keep), -1)
    for b, x in enumerate(features):
        left = [i for i in range(len(x)) if valid is None or bool(valid[b, i])]
        chosen: list[int] = []
        row, cos = None if relevance is None else relevance[b], cosines(x)
        while left and len(chosen) < keep:
            score = greedy_scores(cos, row, objective, chosen, left)
            best = max(left, key=lambda i: (score[i], -i))  # noqa: B023
            chosen.append(best)
            left.remove(best)
        index[b, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int64)
    return index
