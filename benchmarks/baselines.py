"""What the ops are measured against: each takes the tensors of its op and computes the same thing.

- plain torch: the composition an engineer would write, few-row products and no attention map.
- eager maps: what published methods do, which ask the model for its attention weights: every layer
  makes the whole map and keeps it. One layer's queries and keys stand for all of them, which spares
  the baseline some reading; its values are not needed for the map and left out.
- random tokens: the floor of any choice.
- plain read: the floor of anything that looks at its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

Inputs = tuple[Tensor, ...]


# --- saliency -----------------------------------------------------------------------------------


def _received(p: Tensor, reduce: str) -> Tensor:
    """`[B, H, M, N]` to `[B, N]`: over the rows, then over the heads."""
    return (p.mean(2) if reduce == "mean" else p.amax(2)).mean(1)


def plain_saliency(inputs: Inputs, prefix: int = 0, reduce: str = "mean") -> Tensor:
    """Logits of the given rows, softmax in float32; grouped queries share one product."""
    q, k = inputs
    heads, rows = k.shape[1], q.shape[2]
    grouped = q.unflatten(1, (heads, -1)).flatten(2, 3)
    logits = (grouped @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    p = logits.float().softmax(-1)[..., prefix:]
    return _received(p.unflatten(2, (-1, rows)).flatten(1, 2), reduce)


def eager_map(q: Tensor, k: Tensor) -> Tensor:
    """The attention weights as Hugging Face's eager attention makes them: keys repeated for grouped
    queries, softmax in float32, weights in the dtype of `q`."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32).to(q.dtype)


def eager_saliency(
    inputs: Inputs, rows: slice, layers: int, prefix: int = 0, reduce: str = "mean"
) -> Tensor:
    """Some rows of the last layer's map, where every layer's map is made and kept.

    Args:
        inputs: the op's `q` and `k`, and the queries of all rows.
        rows: which rows of the map ask.
        layers: how many maps the model returns.
        prefix: keys that get no score.
        reduce: over the rows, "mean" or "max".
    """
    _, k, whole = inputs
    maps = [eager_map(whole, k) for _ in range(layers)]
    return _received(maps[-1][:, :, rows, prefix:].float(), reduce)


def plain_packed(inputs: Inputs, count: int) -> Tensor:
    """Packed sequences that are all as long: one batch of square maps."""
    q, k = (t.unflatten(0, (count, -1)).transpose(1, 2) for t in inputs[:2])
    return plain_saliency((q, k)).flatten()


def plain_similarity(inputs: Inputs) -> Tensor:
    """Unit vectors, one product, softmax over the tokens, maximum over the text."""
    text, visual = (normalize(t.float(), dim=-1) for t in inputs)
    return ((text @ visual.transpose(1, 2)) / 0.01).softmax(-1).amax(1)


# --- choice -------------------------------------------------------------------------------------


def _rank(score: Tensor) -> Tensor:
    """Place of each token in the descending order, `[B, N]`."""
    order = score.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def plain_select(inputs: Inputs, keep: int) -> Tensor:
    """Mean of the two ranks, by two sorts and a top-k."""
    visual, textual = inputs
    score = 0.5 * _rank(visual) + 0.5 * _rank(textual)
    return score.topk(keep, largest=False).indices.sort(dim=1).values


def plain_split(inputs: Inputs, keep: int, reserve: float = 0.25) -> Tensor:
    """The split by two sorts and two prefix sums; a freed place goes to the textual list."""
    visual, textual = inputs
    held = int(reserve * keep)
    rest = keep - 2 * held

    def mass(score: Tensor) -> Tensor:
        best = score.sort(dim=1, descending=True, stable=True).values
        return pad(best[:, held : held + rest].double().cumsum(1), (1, 0))

    split = (mass(textual) * mass(visual).flip(1)).argmax(1, keepdim=True)
    rank_v, rank_t = _rank(visual), _rank(textual)
    first = (rank_v < held + rest - split) | (rank_t < held + split)
    best = torch.where(first, -1, rank_t)
    return best.topk(keep, largest=False).indices.sort(dim=1).values


def plain_diverse(inputs: Inputs, keep: int) -> Tensor:
    """All cosines, then a loop that takes the token farthest from those taken."""
    unit = normalize(inputs[0].float(), dim=-1)
    away = 1 - unit @ unit.transpose(1, 2)
    itself = torch.eye(away.shape[1], dtype=torch.bool, device=away.device)
    taken = [away.masked_fill(itself, torch.inf).amin(2).argmax(1, keepdim=True)]
    nearest = torch.full_like(away[:, 0], torch.inf)
    rows = torch.arange(len(away), device=away.device)
    for _ in range(keep - 1):
        nearest = torch.minimum(nearest, away[rows, taken[-1][:, 0]])
        nearest.scatter_(1, taken[-1], -torch.inf)
        taken.append(nearest.argmax(1, keepdim=True))
    return torch.cat(taken, 1).sort(1).values


def plain_dpp(features: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """The most probable set, one token after another: all cosines, and a row of their Cholesky
    factor a step; by relevance once the rank is used up."""
    unit = normalize(features.float(), dim=-1)
    alike = unit @ unit.transpose(1, 2)
    batch, count = relevance.shape
    rows = torch.zeros(batch, keep, count, device=unit.device)
    residual = torch.ones(batch, count, device=unit.device)
    at = torch.arange(batch, device=unit.device)
    open_, taken = torch.ones_like(residual), []
    for step in range(keep):
        gain = torch.where(residual > 1e-5, relevance.square() * residual, 0.0) * open_
        none_left = gain.amax(1, keepdim=True) <= 0
        best = torch.where(none_left, relevance * open_, gain).argmax(1)
        taken.append(best)
        open_[at, best] = 0
        explained = (rows[at, :, best][:, None] @ rows)[:, 0]
        row = (alike[at, best] - explained) / residual[at, best].clamp_min(1e-5).sqrt()[:, None]
        row = row.masked_fill(none_left, 0.0)
        rows[:, step] = row
        residual = residual - row.square()
    return torch.stack(taken, 1).sort(1).values


def some_tokens(batch: int, tokens: int, keep: int, device: str | torch.device) -> Tensor:
    """`keep` distinct tokens at random, ascending, `[B, K]`."""
    return torch.rand(batch, tokens, device=device).topk(keep).indices.sort(dim=1).values


def random_choice(inputs: Inputs, keep: int) -> Tensor:
    """Tokens at random, with a look at the number of tokens alone."""
    first = inputs[0]
    return some_tokens(first.shape[0], first.shape[1], keep, first.device)


# --- merge --------------------------------------------------------------------------------------


def plain_merge(inputs: Inputs, by: str = "index_add") -> Tensor:
    """Similarity of every token to the kept ones, argmax, and a scatter for the mean.

    Args:
        inputs: `x [B, N, D]`, `metric [B, N, F]` and `index [B, K]`.
        by: how the mean is made, "index_add" or "scatter_reduce".
    """
    x, metric, index = inputs
    batch, _, width = x.shape
    keep = index.shape[1]
    unit = normalize(metric.float(), dim=-1)
    slot = torch.arange(keep, device=x.device).expand(batch, keep)
    there = unit.gather(1, index[:, :, None].expand(-1, -1, unit.shape[2]))
    nearest = (unit @ there.transpose(1, 2)).argmax(-1).scatter(1, index, slot)
    if by == "scatter_reduce":
        out = torch.zeros(batch, keep, width, device=x.device)
        to = nearest[:, :, None].expand(-1, -1, width)
        return out.scatter_reduce(1, to, x.float(), "mean", include_self=False).to(x.dtype)
    flat = (nearest + keep * torch.arange(batch, device=x.device)[:, None]).flatten()
    total = torch.zeros(batch * keep, width, device=x.device)
    total = total.index_add(0, flat, x.float().flatten(0, 1))
    count = torch.zeros(batch * keep, device=x.device)
    count = count.index_add(0, flat, torch.ones_like(flat, dtype=torch.float32))
    return (total / count[:, None]).view(batch, keep, width).to(x.dtype)


def _reduced(
    inputs: Inputs, visual: Tensor, keep: int, prefix: int, by: str, diversity: float
) -> Tensor:
    """What follows the encoder's saliency."""
    x, _, k_vis, q_txt, k_txt = inputs[:5]
    textual = plain_saliency((q_txt, k_txt), reduce="max")
    metric = k_vis[:, :, prefix:].float().mean(1)
    if diversity > 0:
        place = _rank(-0.5 * _rank(visual) - 0.5 * _rank(textual))
        relevance = ((1 - 1 / diversity) * place / place.shape[1]).exp()
        index = plain_dpp(metric, relevance, keep)
    else:
        index = plain_select((visual, textual), keep)
    return plain_merge((x, metric, index), by)


def plain_select_merge(
    inputs: Inputs, keep: int, prefix: int = 1, by: str = "index_add", diversity: float = 0.0
) -> Tensor:
    """The whole reduction, composed of the parts above."""
    visual = plain_saliency(inputs[1:3], prefix)
    return _reduced(inputs, visual, keep, prefix, by, diversity)


def eager_select_merge(
    inputs: Inputs, keep: int, layers: int, prefix: int = 1, diversity: float = 0.0
) -> Tensor:
    """The same with the first row of the encoder's eager maps; the queries of all its rows come
    after the tensors of the op."""
    _, q, k, _, _, whole = inputs
    visual = eager_saliency((q, k, whole), slice(0, q.shape[2]), layers, prefix)
    return _reduced(inputs, visual, keep, prefix, "index_add", diversity)


def random_tokens(inputs: Inputs, keep: int) -> Tensor:
    """Keep tokens of `x` at random, look at nothing else."""
    x = inputs[0]
    return x.gather(1, random_choice(inputs, keep)[:, :, None].expand(-1, -1, x.shape[2]))


def plain_read(inputs: Inputs) -> None:
    """Read every byte once, threaded and vectorised: sums over 32-bit words."""
    for t in inputs:
        words = t.transpose(1, 2) if t.dim() == 4 and not t.is_contiguous() else t
        words.view(torch.float32).sum()
