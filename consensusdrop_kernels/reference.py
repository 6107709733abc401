"""Every op in plain torch: the definition the kernels are judged against.

Also the fallback on devices no kernel was built for, so it is right before it is fast: scores are
float32, ties go to the lower token index, NaN ranks below every number. Shapes: `B` batch, `N`
visual tokens, `M` query rows, `Hq`/`Hk` query and key heads, `d` head width, `D` model width,
`K` = `keep`, `C` = `contextual`, `P` = `prefix`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks


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
    """Attention that the query rows pay to each key past the prefix, `[B, N]` float32.

    A row whose normaliser is +-inf, or whose weight is 0, contributes nothing.
    """
    _checks.attention(
        q, k, scale=scale, lse=lse, key_valid=key_valid, query_weight=query_weight, prefix=prefix,
        reduce=reduce,
    )  # fmt: skip
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    scale = width**-0.5 if scale is None else scale
    weight = torch.ones(batch, rows, device=q.device) if query_weight is None else query_weight
    # In float64, where no sum of float32 weights overflows or vanishes.
    share = weight / weight.double().sum(1, keepdim=True)
    share = share.masked_fill(weight == 0, 0.0).float()
    masked = torch.zeros(batch, rows, keys, dtype=torch.bool, device=q.device)
    if key_valid is not None:
        masked = masked | ~key_valid[:, None, :]
    if causal:  # aligned at the bottom right: the last row sees every key
        row = torch.arange(rows, device=q.device)[:, None]
        masked = masked | (torch.arange(keys, device=q.device) > row + (keys - rows))

    out = torch.zeros(batch, keys - prefix, device=q.device)
    counted = (weight > 0)[:, :, None]
    for h in range(heads):
        kh = k[:, h // (heads // k.shape[1])].float()
        s = (scale * (q[:, h].float() @ kh.transpose(1, 2))).masked_fill(masked, -torch.inf)
        row_lse = s.logsumexp(-1) if lse is None else lse[:, h]
        off = masked | row_lse.isinf()[:, :, None] | ~counted
        p = (s - row_lse[:, :, None]).exp().masked_fill(off, 0.0)[:, :, prefix:]
        out += (p * share[:, :, None]).sum(1) if reduce == "mean" else p.amax(1)
    return out / heads


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
    """`attention_saliency` of packed sequences, each over itself alone: `[T]` float32."""
    _checks.packed_attention(
        q, k, cu_seqlens, max_seqlen, scale=scale, lse=lse, query_weight=query_weight, reduce=reduce
    )
    total = q.shape[0]
    if total == 0:
        return q.new_zeros(0, dtype=torch.float32)
    # As a padded batch, so that no length has to be known to the host. Padding rows weigh 0.
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    at = starts + torch.arange(max_seqlen, device=q.device)
    inside, at = at < ends, at.clamp_max(total - 1)
    weight = torch.ones(total, device=q.device) if query_weight is None else query_weight
    padded = attention_saliency(
        q[at].transpose(1, 2), k[at].transpose(1, 2), scale=scale,
        lse=None if lse is None else lse[:, at].transpose(0, 1), key_valid=inside,
        query_weight=weight[at].masked_fill(~inside, 0.0), causal=causal, reduce=reduce,
    )  # fmt: skip
    out = torch.zeros(total + 1, device=q.device)
    out[at.masked_fill(~inside, total)] = padded
    return out[:total]


def _cosine_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 unit vectors (zero vectors stay zero), and which tokens are finite throughout."""
    x = x.double()
    # Exact for every float32: neither the largest nor the smallest square leaves float64.
    length = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1.0), length[..., 0].isfinite()


def similarity_saliency(
    text: Tensor,
    visual: Tensor,
    *,
    temperature: float = 0.01,
    text_valid: Tensor | None = None,
    visual_valid: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:
    """Softmax over the visual tokens of cosine / temperature, over the text rows: `[B, N]`."""
    _checks.similarity(
        text, visual, temperature=temperature, text_valid=text_valid, visual_valid=visual_valid,
        reduce=reduce,
    )  # fmt: skip
    batch, rows, _ = text.shape
    cosine = _cosine_rows(text)[0] @ _cosine_rows(visual)[0].transpose(1, 2)
    logits = cosine.float() / temperature
    if visual_valid is not None:
        logits = logits.masked_fill(~visual_valid[:, None], -torch.inf)
    # A sample without a valid visual token has only -inf, whose softmax is NaN.
    dead = torch.isneginf(logits).all(2, keepdim=True)
    p = logits.softmax(2).masked_fill(dead | torch.isneginf(logits), 0.0)
    here = torch.ones(batch, rows, dtype=torch.bool, device=text.device)
    here = (here if text_valid is None else text_valid)[:, :, None]
    p = p.masked_fill(~here, 0.0)
    return p.amax(1) if reduce == "max" else p.sum(1) / here.sum(1).clamp_min(1)


def _order(valid: Tensor, *keys: Tensor) -> Tensor:
    """Token order `[B, N]`, best first: by the first key, ties by the next, then by index; NaN in
    the first key after every number, invalid tokens after those."""
    order = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    tier = keys[0].isnan().int() + 2 * (~valid).int()
    for key in (*reversed(keys), -tier):
        value = key.masked_fill(key.isnan(), -torch.inf) if key.is_floating_point() else key
        by = value.gather(1, order).sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, by)
    return order


def _place(order: Tensor) -> Tensor:
    """The place of each token in an order: its inverse permutation, `[B, N]` int64."""
    place = torch.empty_like(order)
    return place.scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand(order.shape)
    )


def _fuse(v: Tensor, t: Tensor, valid: Tensor, alpha: float, fusion: str) -> Tensor:
    """Fused score of each token; NaN in either list stays NaN and out of every statistic."""
    rv, rt = (_place(_order(valid, a)).float() for a in (v, t))
    good = valid & ~v.isnan() & ~t.isnan()
    wv, wt = 1.0 - alpha, alpha

    def safe_divide(a: Tensor, by: Tensor) -> Tensor:
        return torch.where(by == 0, 0.0, a / by)

    def total(a: Tensor) -> Tensor:
        """Sums are taken in float64: equal scores must have a deviation of exactly 0."""
        return a.double().masked_fill(~good, 0.0).sum(1, keepdim=True)

    def share(a: Tensor) -> Tensor:
        return safe_divide(a, total(a).float())

    def standard(a: Tensor) -> Tensor:
        count = good.sum(1, keepdim=True)
        mean = safe_divide(total(a), count)
        deviation = safe_divide(total((a.double() - mean).square()), count).sqrt()
        return safe_divide(a - mean.float(), deviation.float())

    def min_max(a: Tensor) -> Tensor:
        low = a.masked_fill(~good, torch.inf).amin(1, keepdim=True)
        high = a.masked_fill(~good, -torch.inf).amax(1, keepdim=True)
        return safe_divide(a - low, high - low)

    if fusion == "rank":
        score = -(wv * rv + wt * rt) / valid.sum(1, keepdim=True)
    elif fusion == "rrf":
        score = wv / (60.0 + rv) + wt / (60.0 + rt)
    elif fusion == "sum":
        score = wv * share(v) + wt * share(t)
    elif fusion == "zscore":
        score = wv * standard(v) + wt * standard(t)
    elif fusion == "product":
        score = wv * v.clamp_min(1e-30).log() + wt * t.clamp_min(1e-30).log()
    else:
        score = torch.maximum(2.0 * wv * min_max(v), 2.0 * wt * min_max(t))
    return torch.where(good, score, torch.nan)


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
    """The `keep` tokens that two score lists agree on: `index [B, K]`, `score [B, N]`."""
    _checks.scores(visual, textual)
    batch, tokens = visual.shape
    _checks.selection(
        batch, tokens, visual, "visual", keep=keep, alpha=alpha, fusion=fusion, valid=valid,
        priority=priority, priority_keep=priority_keep,
    )  # fmt: skip
    valid = torch.ones_like(visual, dtype=torch.bool) if valid is None else valid
    if textual is None:
        score = visual
        order = _order(valid, score)
    else:
        score = _fuse(visual, textual, valid, alpha, fusion)
        ties = [-_place(_order(valid, visual))] if fusion == "rank" else []
        order = _order(valid, score, *ties)
    chosen = valid & (_place(order) < keep - priority_keep)
    if priority is not None and priority_keep > 0:
        left = valid & ~chosen
        place = _place(_order(left, priority.expand(batch, tokens)))
        chosen = chosen | (left & (place < priority_keep))
    return _ascending(chosen, keep), score.masked_fill(~valid, -torch.inf)


def adaptive_split_select(
    visual: Tensor,
    textual: Tensor,
    keep: int,
    *,
    reserve: float = 0.25,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """AdaFV's choice from two lists: `index [B, K]`, `split [B]` (places that went to `textual`).

    All corners are those of `functional.adaptive_split_select`.
    """
    _checks.split(visual, textual, keep, reserve=reserve, valid=valid)
    batch, tokens = visual.shape
    valid = torch.ones_like(visual, dtype=torch.bool) if valid is None else valid
    budget = valid.sum(1, keepdim=True).clamp_max(keep)
    held = (reserve * budget.double()).floor().long()
    rest = budget - 2 * held
    place_v, place_t = (_place(_order(valid, a)) for a in (visual, textual))

    def prefix_sums(score: Tensor, place: Tensor) -> Tensor:
        """`[B, N+1]`: the mass of the unreserved tokens among the first so many of a list."""
        mass = score.double().masked_fill(score.isnan() | ~valid | (place < held), 0.0)
        listed = torch.zeros_like(mass).scatter(1, place, mass)
        return torch.nn.functional.pad(listed, (1, 0)).cumsum(1)

    mass_v, mass_t = prefix_sums(visual, place_v), prefix_sums(textual, place_t)
    k1 = torch.arange(keep + 1, device=visual.device).expand(batch, keep + 1)
    mass_v = mass_v.gather(1, (held + rest - k1).clamp_min(0))
    mass_t = mass_t.gather(1, (held + k1).clamp_max(tokens))
    product = mass_v * mass_t
    product = product.masked_fill((k1 > rest) | product.isnan(), -torch.inf)
    best = product.amax(1, keepdim=True)
    split = k1.masked_fill((product < best) | (k1 > rest), keep).amin(1, keepdim=True)

    taken = valid & ((place_t < held + split) | (place_v < held + rest - split))
    to_text = mass_t.gather(1, split) >= mass_v.gather(1, split)
    more = torch.where(to_text, place_t, place_v).masked_fill(taken | ~valid, tokens)
    more = _place(more.sort(dim=1, stable=True).indices)
    taken = taken | (more < budget - taken.sum(1, keepdim=True))
    return _ascending(taken, keep), split[:, 0]


def _ascending(taken: Tensor, keep: int) -> Tensor:
    """The chosen tokens of each sample in raster order, `[B, keep]`, -1 behind the last."""
    here = torch.arange(taken.shape[1], device=taken.device).expand(taken.shape)
    index = here.masked_fill(~taken, taken.shape[1]).sort(dim=1).values[:, :keep]
    return index.masked_fill(index == taken.shape[1], -1)


#: A token whose squared distance from the span of those chosen is no more than this share of its
#: squared length has nothing left to add: float32 cosines know no less.
DPP_FLOOR = 1e-5


def relevance_of_places(score: Tensor, diversity: float, valid: Tensor | None = None) -> Tensor:
    """What a diverse choice goes by, from the score of `consensus_select`: `[B, N]` float32.

    `exp((1 - 1 / diversity) p)` for a token that a share `p` of the valid tokens is before: 1 for
    the best, and the less it falls towards the last, the more diverse is the choice. Equal scores
    in raster order, NaN last; 0 for invalid tokens.
    """
    if valid is None:
        order = (-score).argsort(dim=1, stable=True)
        count: int | Tensor = score.shape[1]
    else:
        order, count = _order(valid, score), valid.sum(1, keepdim=True)
    place = torch.arange(score.shape[1], dtype=torch.float64, device=score.device)
    falling = ((1.0 - 1.0 / diversity) * (place / count)).exp().float()
    relevance = torch.empty_like(score).scatter_(1, order, falling.expand(score.shape))
    return relevance if valid is None else relevance.masked_fill(~valid, 0.0)


def greedy_diverse_select(
    features: Tensor,
    keep: int,
    *,
    relevance: Tensor | None = None,
    objective: str = "maxmin",
    valid: Tensor | None = None,
) -> Tensor:
    """Greedy choice of tokens unlike one another: `index [B, K]`, ascending.

    All corners are those of `functional.greedy_diverse_select`.
    """
    _checks.diverse(features, keep, relevance=relevance, objective=objective, valid=valid)
    batch, tokens, _ = features.shape
    unit, finite = _cosine_rows(features)
    valid = torch.ones_like(finite) if valid is None else valid
    good = valid & finite
    weight = unit.new_ones(batch, tokens) if relevance is None else relevance.double()
    if objective == "dpp":
        good = good & ~weight.isnan()
    unit = unit.masked_fill(~good[:, :, None], 0.0)
    pick = _maxmin if objective == "maxmin" else _dpp
    place = pick(unit, good, weight, keep, relevance is not None)
    # Then what could not be compared, in raster order.
    taken = (place >= 0) & good
    left = (valid & ~good).cumsum(1) - 1
    return _ascending(taken | (valid & ~good & (left < keep - taken.sum(1, keepdim=True))), keep)


def _first_best(score: Tensor, open_: Tensor) -> Tensor:
    """The open token of the highest score, the lower index of equals, NaN last: `[B, 1]`."""
    return _order(open_, score)[:, :1]


def _maxmin(unit: Tensor, good: Tensor, weight: Tensor, keep: int, given: bool) -> Tensor:
    """Order in which tokens are chosen (-1: not), each the least like its likest chosen one."""
    batch, tokens = good.shape
    place = torch.full_like(good, -1, dtype=torch.int64)
    if given:
        score = weight
    else:  # the token least like the one likest to it
        cosine = (unit @ unit.transpose(1, 2)).float().clamp(-1.0, 1.0)
        self_ = torch.eye(tokens, dtype=torch.bool, device=unit.device)
        score = -cosine.masked_fill(~good[:, None] | self_, -2.0).amax(2)
    nearest = unit.new_full((batch, tokens), -2.0, dtype=torch.float32)
    for step in range(keep):
        open_ = good & (place < 0)
        at = _first_best(score, open_)
        here = torch.zeros_like(good).scatter(1, at, True) & open_
        place = place.masked_fill(here, step)
        chosen = unit.gather(1, at[:, :, None].expand(-1, -1, unit.shape[2]))
        cosine = (unit @ chosen.transpose(1, 2))[:, :, 0].float().clamp(-1.0, 1.0)
        nearest = torch.maximum(nearest, cosine)
        score = -nearest
    return place


def _dpp(unit: Tensor, good: Tensor, weight: Tensor, keep: int, _: bool) -> Tensor:
    """Order in which tokens are chosen (-1: not): each raises the determinant of
    `diag(r) S diag(r)` most. The Cholesky rows are those of `S`; `r` scales the gains alone."""
    batch, tokens = good.shape
    place = torch.full_like(good, -1, dtype=torch.int64)
    rows = unit.new_zeros(batch, keep, tokens)
    residual = unit.square().sum(2).round()  # a vector's cosine with itself: 1, or 0 if it is zero
    for step in range(keep):
        open_ = good & (place < 0)
        gain = (weight.square() * residual).masked_fill(residual <= DPP_FLOOR, 0.0)
        none_left = ~((gain > 0) & open_).any(1, keepdim=True)
        at = _first_best(torch.where(none_left, weight, gain), open_)
        here = torch.zeros_like(good).scatter(1, at, True) & open_
        place = place.masked_fill(here, step)
        chosen = unit.gather(1, at[:, :, None].expand(-1, -1, unit.shape[2]))
        cosine = (unit @ chosen.transpose(1, 2))[:, :, 0].float().clamp(-1.0, 1.0).double()
        of_chosen = rows.gather(2, at[:, None].expand(-1, keep, -1))
        root = residual.gather(1, at).sqrt()
        row = (cosine - (of_chosen * rows).sum(1)) / root
        row = row.masked_fill(none_left, 0.0)
        rows[:, step] = row
        residual = residual - row.square()
    return place


def contextual_slots(dropped: Tensor, contextual: int) -> Tensor:
    """Reference token of each contextual slot, `[B, C]`: an even stride over the dropped tokens in
    raster order, or each of them when there are fewer than `C` (-1 pads)."""
    count = dropped.sum(1, keepdim=True)
    slot = torch.arange(contextual, device=dropped.device)
    number = torch.where(count >= contextual, slot * count // contextual, slot)
    raster = (~dropped).int().sort(dim=1, stable=True).indices
    reference = raster.gather(1, number.clamp_max(dropped.shape[1] - 1))
    return torch.where(slot < count, reference, -1)


def _nearest(metric: Tensor, slots: Tensor, joins: Tensor, threshold: float) -> Tensor:
    """Slot number `[B, N]` each joining token is most similar to (cosine; ties to the slot of the
    lower token; NaN counts as -2), -1 where it joins none."""
    # In float64 and then rounded, so that equal vectors have equal cosines whatever the order in
    # which a matmul adds.
    unit = metric.double()
    unit = unit / unit.norm(dim=2, keepdim=True).masked_fill(~metric.any(2, keepdim=True), 1.0)
    order = slots.masked_fill(slots < 0, metric.shape[1]).sort(dim=1).indices  # lower tokens first
    token = slots.gather(1, order)
    there = unit.gather(1, token.clamp_min(0)[:, :, None].expand(-1, -1, unit.shape[2]))
    cosine = (unit @ there.transpose(1, 2)).float().clamp(-1.0, 1.0)
    cosine = cosine.masked_fill(cosine.isnan(), -2.0).masked_fill((token < 0)[:, None, :], -3.0)
    best, at = cosine.max(dim=2)
    found = joins & (best >= threshold) & (token >= 0).any(1, keepdim=True)
    return order.gather(1, at).masked_fill(~found, -1)


def weighted_mean(
    x: Tensor, assign: Tensor, own: Tensor, weight: Tensor, blend: float
) -> tuple[Tensor, Tensor]:
    """`tokens [B, S, D]` and `size [B, S]` of an assignment; `own [B, S]` is each slot's token."""
    batch, tokens, width = x.shape
    slots = own.shape[1]
    there = own.clamp_min(0)
    is_own = torch.zeros_like(assign, dtype=torch.bool)
    is_own = is_own.scatter_reduce(1, there, own >= 0, "amax")
    joined = (assign >= 0) & ~is_own & (weight > 0)

    # Tokens sorted by the slot they joined (those that joined none last), so that each slot's sum
    # runs over its tokens in ascending order: deterministic on every device.
    bucket = assign.masked_fill(~joined, slots)
    order = bucket.sort(dim=1, stable=True).indices
    lengths = torch.zeros(batch, slots + 1, dtype=torch.int64, device=x.device)
    lengths = lengths.scatter_add(1, bucket, torch.ones_like(bucket))

    def per_slot(value: Tensor) -> Tensor:
        flat = value.gather(1, order[:, :, None].expand_as(value)).flatten(0, 1)
        total = torch.segment_reduce(flat, "sum", lengths=lengths.flatten(), unsafe=True)
        return total.view(batch, slots + 1, value.shape[2])[:, :slots]

    # Weights against the largest of their slot, so that no sum of them overflows or vanishes.
    takes_part = torch.where(is_own | joined, assign, slots).clamp_min(0)
    largest = torch.zeros(batch, slots + 1, device=x.device)
    largest = largest.scatter_reduce(1, takes_part, weight, "amax")
    relative = torch.where(weight > 0, weight / largest.gather(1, takes_part), 0.0)[:, :, None]
    add = blend * per_slot(relative * x.float())
    x_own = x.gather(1, there[:, :, None].expand(-1, -1, width))
    of_own = relative.gather(1, there[:, :, None])
    own_part = torch.where(of_own > 0, of_own * x_own.float(), 0.0)
    mean = (own_part + add) / (of_own + blend * per_slot(relative))
    alone = (lengths[:, :slots] == 0)[:, :, None] | (blend == 0)
    out = torch.where(alone, x_own, mean.to(x.dtype))
    own_weight = weight.gather(1, there).masked_fill(own < 0, 0.0)
    size = own_weight + per_slot(weight[:, :, None])[:, :, 0]
    return out.masked_fill((own < 0)[:, :, None], 0.0), size


def _merge(
    x: Tensor,
    metric: Tensor,
    index: Tensor,
    contextual: int,
    weight: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    blend: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_merge` without its checks; also returns the own token of every slot."""
    batch, tokens, _ = x.shape
    weight = torch.ones(batch, tokens, device=x.device) if weight is None else weight
    valid = torch.ones_like(weight, dtype=torch.bool) if valid is None else valid
    assign = torch.full((batch, tokens + 1), -1, dtype=torch.int64, device=x.device)
    dropped = (
        valid
        & ~torch.zeros_like(assign, dtype=torch.bool).scatter(
            1, index.masked_fill(index < 0, tokens), True
        )[:, :tokens]
    )
    keep = index.shape[1]
    own, joins, slots, first = index, dropped, index, 0
    threshold = max(threshold, -1.0)  # no cosine is below it, so only NaN (-2 here) fails
    if contextual > 0:
        slots, first = contextual_slots(dropped, contextual), keep
        own = torch.cat((index, slots), dim=1)
        threshold = -torch.inf
    number = torch.arange(own.shape[1], device=x.device).expand_as(own)
    assign = assign.scatter(1, own.masked_fill(own < 0, tokens), number)[:, :tokens]
    joins = joins & (assign < 0)
    near = _nearest(metric, slots, joins, threshold)
    assign = torch.where(near >= 0, near + first, assign)
    out, size = weighted_mean(x, assign, own, weight, blend)
    return out, assign, size, own


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
    """Merge dropped tokens into slots: `tokens [B, K+C, D]`, `assign [B, N]`, `size [B, K+C]`."""
    _checks.merge(
        x, metric, index, contextual=contextual, weight=weight, valid=valid, threshold=threshold,
        blend=blend,
    )  # fmt: skip
    return _merge(x, metric, index, contextual, weight, valid, threshold, blend)[:3]


def default_metric(k_vis: Tensor, prefix: int) -> Tensor:
    """Head mean of the encoder keys past the prefix, `[B, N, d]` float32."""
    return k_vis[:, :, prefix:].float().mean(dim=1)


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
    """Two saliencies, their consensus and the merge: `tokens`, `index`, `assign`, `size`."""
    _checks.fused(
        x, q_vis, k_vis, q_txt, k_txt, keep=keep, contextual=contextual, alpha=alpha, fusion=fusion,
        prefix=prefix, scale_vis=scale_vis, scale_txt=scale_txt, lse_vis=lse_vis, lse_txt=lse_txt,
        txt_weight=txt_weight, txt_reduce=txt_reduce, metric=metric, valid=valid, priority=priority,
        priority_keep=priority_keep, threshold=threshold, blend=blend, diversity=diversity,
    )  # fmt: skip
    key_valid = None
    if valid is not None:
        key_valid = torch.cat((valid.new_ones(valid.shape[0], prefix), valid), dim=1)
    visual = attention_saliency(
        q_vis, k_vis, scale=scale_vis, lse=lse_vis, key_valid=key_valid, prefix=prefix
    )
    textual = None
    if q_txt is not None and k_txt is not None:
        textual = attention_saliency(
            q_txt, k_txt, scale=scale_txt, lse=lse_txt, key_valid=valid, query_weight=txt_weight,
            reduce=txt_reduce,
        )  # fmt: skip
    index, score = consensus_select(
        visual, textual, keep, alpha=alpha, fusion=fusion, valid=valid, priority=priority,
        priority_keep=priority_keep,
    )  # fmt: skip
    if metric is None:
        metric = default_metric(k_vis, prefix)
    if diversity > 0:
        relevance = relevance_of_places(score, diversity, valid)
        index = greedy_diverse_select(
            metric, keep, relevance=relevance, objective="dpp", valid=valid
        )  # fmt: skip
    tokens, assign, size, own = _merge(x, metric, index, contextual, None, valid, threshold, blend)
    return tokens, own, assign, size


def merge_backward(
    grad_tokens: Tensor | None,
    grad_size: Tensor | None,
    x: Tensor | None,
    tokens: Tensor | None,
    weight: Tensor | None,
    assign: Tensor,
    own: Tensor,
    *,
    blend: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `tokens` and `size` for `x` (in `dtype`) and `weight`, assignment constant.

    With `f_j` 1 for a slot's own token and `blend` for one that joined, and `W_s = sum f_j w_j`:
    `dx_j = f_j w_j / W_s g_s` and `dw_j = f_j / W_s <g_s, x_j - tokens_s> + grad_size_s`. `x` and
    `tokens` are needed for `weight` alone; without them its gradient is not computed.
    """
    slot = assign.clamp_min(0)
    here = torch.arange(assign.shape[1], device=assign.device)
    inside = assign >= 0
    is_own = inside & (own.gather(1, slot) == here)
    factor = torch.where(is_own, 1.0, blend) * inside
    w = torch.ones_like(factor) if weight is None else weight
    total = torch.zeros(own.shape, device=w.device).scatter_add(1, slot, factor * w)
    below = total.gather(1, slot)
    per_weight = torch.where(below > 0, factor / below, 0.0)
    # A slot whose weights are all 0 returns its own token as it is.
    share = torch.where(is_own & (below == 0), 1.0, per_weight * w)

    def spread(a: Tensor) -> Tensor:
        """Each slot's row of `a`, for every token in it."""
        return a.float().gather(1, slot[:, :, None].expand(-1, -1, a.shape[2]))

    grad_x = grad_weight = None
    if grad_tokens is not None:
        g = spread(grad_tokens)
        grad_x = (share[:, :, None] * g).to(dtype)
        if x is not None and tokens is not None:
            grad_weight = per_weight * (g * (x.float() - spread(tokens))).sum(2)
    if grad_size is not None and x is not None:
        of_size = grad_size.gather(1, slot) * inside
        grad_weight = of_size if grad_weight is None else grad_weight + of_size
    return grad_x, grad_weight
