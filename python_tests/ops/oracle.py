"""The ops once more, in float64 and in the plainest code: written from their definition alone.

Nothing here is shared with the package. Where the definition is silent, a comment says which
reading was taken.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

INF = math.inf


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
    """`[B, N]` float64, one batch and one head at a time."""
    batch, heads, rows, width = q.shape
    groups, keys = k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    out = torch.zeros(batch, keys - prefix, dtype=torch.float64)
    for b in range(batch):
        weight = torch.ones(rows) if query_weight is None else query_weight[b]
        weight = weight.double()
        # Rows of weight 0 are left out, not multiplied by 0: what they hold may be NaN.
        live = torch.nonzero(weight > 0)[:, 0]
        if len(live) == 0 or keys == prefix:
            continue
        seen = torch.ones(len(live), keys, dtype=torch.bool)
        if key_valid is not None:
            seen &= key_valid[b]
        if causal:
            seen &= torch.arange(keys) <= live[:, None] + (keys - rows)
        for h in range(heads):
            row_q, row_k = q[b, h, live].double(), k[b, h // (heads // groups)].double()
            s = (scale * (row_q @ row_k.T)).masked_fill(~seen, -INF)
            whole = torch.logsumexp(s, dim=1) if lse is None else lse[b, h, live].double()
            p = torch.exp(s - whole[:, None])
            p = p.masked_fill(~seen | torch.isinf(whole)[:, None], 0.0)
            if reduce == "mean":
                column = (weight[live, None] * p).sum(0) / weight.sum()
            else:
                column = p.amax(0)
            out[b] += column[prefix:] / heads
    return out


def places(values: list[float], tokens: list[int]) -> dict[int, int]:
    """Place of every token in the descending order of its value; NaN last, ties by index."""
    order = sorted(tokens, key=lambda i: (math.isnan(values[i]), -_number(values[i]), i))
    return {token: place for place, token in enumerate(order)}


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _safe_div(a: float, b: float) -> float:
    return 0.0 if b == 0 else a / b


def _fused(
    fusion: str, alpha: float, v: list[float], t: list[float], valid: list[int]
) -> tuple[dict[int, float], dict[int, int]]:
    """Score of every valid token (NaN where v or t is NaN), and its place in `v`."""
    rv, rt = places(v, valid), places(t, valid)
    whole = [i for i in valid if not (math.isnan(v[i]) or math.isnan(t[i]))]
    n = len(valid)
    score = dict.fromkeys(valid, math.nan)

    def share(a: list[float], i: int) -> float:
        return _safe_div(a[i], math.fsum(a[j] for j in whole))

    def z(a: list[float]) -> dict[int, float]:
        mean = math.fsum(a[j] for j in whole) / len(whole)
        deviation = math.sqrt(math.fsum((a[j] - mean) ** 2 for j in whole) / len(whole))
        return {j: _safe_div(a[j] - mean, deviation) for j in whole}

    def spread(a: list[float]) -> dict[int, float]:
        low, high = min(a[j] for j in whole), max(a[j] for j in whole)
        return {j: _safe_div(a[j] - low, high - low) for j in whole}

    if not whole:
        return score, rv
    if fusion == "rank":
        # The one score with many exact ties, so its roundings are part of the definition.
        one, two = np.float32(1 - alpha), np.float32(alpha)
        for i in whole:
            mixed = np.float32(one * np.float32(rv[i])) + np.float32(two * np.float32(rt[i]))
            score[i] = float(-np.float32(np.float32(mixed) / np.float32(n)))
    elif fusion == "rrf":
        for i in whole:
            score[i] = (1 - alpha) / (60 + rv[i]) + alpha / (60 + rt[i])
    elif fusion == "sum":
        total_v, total_t = math.fsum(v[j] for j in whole), math.fsum(t[j] for j in whole)
        for i in whole:
            score[i] = (1 - alpha) * _safe_div(v[i], total_v) + alpha * _safe_div(t[i], total_t)
    elif fusion == "zscore":
        zv, zt = z(v), z(t)
        score.update({i: (1 - alpha) * zv[i] + alpha * zt[i] for i in whole})
    elif fusion == "product":
        for i in whole:
            log_v, log_t = math.log(max(v[i], 1e-30)), math.log(max(t[i], 1e-30))
            score[i] = (1 - alpha) * log_v + alpha * log_t
    else:
        mv, mt = spread(v), spread(t)
        score.update({i: max(2 * (1 - alpha) * mv[i], 2 * alpha * mt[i]) for i in whole})
    return score, rv


def consensus_score(
    visual: Tensor,
    textual: Tensor | None,
    *,
    alpha: float = 0.5,
    fusion: str = "rank",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fused score `[B, N]` in float64, and the places `rv` that break the ties of `rank`."""
    batch, count = visual.shape
    score = torch.full((batch, count), -INF, dtype=torch.float64)
    tie = torch.zeros(batch, count, dtype=torch.int64)
    for b in range(batch):
        tokens = [i for i in range(count) if valid is None or bool(valid[b, i])]
        v = visual[b].double().tolist()
        if textual is None:
            fused, rv = {i: v[i] for i in tokens}, {}
        else:
            fused, rv = _fused(fusion, alpha, v, textual[b].double().tolist(), tokens)
        for i in tokens:
            score[b, i] = fused[i]
            tie[b, i] = rv.get(i, 0) if fusion == "rank" else 0
    return score, tie


def choose(
    score: Tensor,
    tie: Tensor,
    keep: int,
    *,
    valid: Tensor | None = None,
    priority: Tensor | None = None,
    priority_keep: int = 0,
) -> Tensor:
    """`[B, K]`: the best `K - R` by score, then `R` by priority, ascending, -1 at the end."""
    batch, count = score.shape
    index = torch.full((batch, keep), -1, dtype=torch.int64)
    for b in range(batch):
        tokens = [i for i in range(count) if valid is None or bool(valid[b, i])]
        fused, place = score[b].tolist(), tie[b].tolist()
        # A token without a score has no place either: its index alone decides.
        best = sorted(
            tokens,
            key=lambda i: (
                math.isnan(fused[i]),
                -_number(fused[i]),
                0 if math.isnan(fused[i]) else place[i],
                i,
            ),
        )
        chosen = best[: keep - priority_keep]
        if priority_keep:
            row = (priority if priority.ndim == 1 else priority[b]).double().tolist()
            rest = places(row, [i for i in tokens if i not in chosen])
            chosen += list(rest)[:priority_keep]
        chosen.sort()
        index[b, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return index


def slots(index: Tensor, count: int, contextual: int, valid: Tensor | None) -> list[list[int]]:
    """The token each slot belongs to, per sample; -1 for an empty slot."""
    out = []
    for b, kept in enumerate(index.tolist()):
        dropped = [
            i for i in range(count) if i not in kept and (valid is None or bool(valid[b, i]))
        ]
        if len(dropped) < contextual:
            extra = dropped
        else:
            extra = [dropped[c * len(dropped) // contextual] for c in range(contextual)]
        out.append(kept + extra + [-1] * (contextual - len(extra)))
    return out


def cosine(tokens: Tensor, references: Tensor) -> Tensor:
    """Cosines in float64; equal references get the very same number, 0 for a zero vector."""
    distinct, which = torch.unique(references.double(), dim=0, return_inverse=True)
    tokens = tokens.double()
    norms = tokens.norm(dim=1)[:, None] * distinct.norm(dim=1)
    cos = torch.where(norms == 0, 0.0, (tokens @ distinct.T) / norms)
    return cos.clamp(-1, 1)[:, which]


def assign(
    metric: Tensor, owners: list[int], keep: int, valid: Tensor | None, threshold: float
) -> list[int]:
    """Slot of every token of one sample, given the token that owns each slot."""
    count, contextual = len(metric), len(owners) > keep
    hosts = [(o, s) for s, o in enumerate(owners) if o >= 0 and (s >= keep or not contextual)]
    hosts.sort()  # by token, so that the first maximum is the lower token index
    out = [-1] * count
    for slot, owner in enumerate(owners):
        if owner >= 0:
            out[owner] = slot
    movers = [
        i for i in range(count) if i not in owners and (valid is None or bool(valid[i])) and hosts
    ]
    if not movers:
        return out
    cos = cosine(metric[movers], metric[[o for o, _ in hosts]])
    for i, row in zip(movers, cos.tolist(), strict=True):
        best = max(range(len(row)), key=lambda c: (not math.isnan(row[c]), _number(row[c]), -c))
        if contextual or row[best] >= threshold:  # NaN >= anything is false
            out[i] = hosts[best][1]
    return out


def merge(
    x: Tensor, weight: Tensor, owners: list[int], assigned: list[int], blend: float
) -> tuple[Tensor, Tensor]:
    """Tokens and sizes of one sample in float64, given the assignment."""
    x, weight = x.double(), weight.double()
    tokens = torch.zeros(len(owners), x.shape[1], dtype=torch.float64)
    size = torch.zeros(len(owners), dtype=torch.float64)
    members: list[list[int]] = [[] for _ in owners]
    for i, slot in enumerate(assigned):
        if slot >= 0:
            members[slot].append(i)
    for slot, owner in enumerate(owners):
        if owner < 0:
            continue
        joined = [i for i in members[slot] if i != owner]
        size[slot] = weight[members[slot]].sum()
        pull = blend * weight[joined]
        if not joined or float(pull.sum()) == 0.0:
            tokens[slot] = x[owner]
        else:
            top = weight[owner] * x[owner] + (pull[:, None] * x[joined]).sum(0)
            tokens[slot] = top / (weight[owner] + pull.sum())
    return tokens, size
