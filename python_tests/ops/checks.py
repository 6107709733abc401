"""What an implementation must satisfy, as functions of the implementation.

They take any callable, so that `test_broken.py` can show them wrong ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import oracle
from .cases import Args

EPS32 = torch.finfo(torch.float32).eps
#: Two scores or cosines closer than this, relative to their size, may come in either order.
NEAR = 1e-5

Impl = Callable[..., object]


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: equal only if the bits are."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(kind[tensor.element_size()])


def assert_bitwise(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b)), f"{int((bits(a) != bits(b)).sum())} elements differ"


def assert_same(outs: object, refs: object) -> None:
    """Two results of an op, bitwise."""
    if isinstance(outs, Tensor):
        outs, refs = (outs,), (refs,)
    for a, b in zip(outs, refs, strict=True):
        assert_bitwise(a, b)


def to_cpu(args: Args) -> Args:
    return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in args.items()}


def _relative_norm(out: Tensor, ref: Tensor) -> float:
    return float((out.double() - ref).norm() / ref.norm().clamp_min(1e-300))


def _plain_saliency(args: Args) -> tuple[Tensor, float]:
    """The op in plain torch, float32, and the largest score: the yardstick for rounding."""
    q, k = args["q"].float(), args["k"].float()
    rows, keys = q.shape[2], k.shape[2]
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    s = s * (q.shape[-1] ** -0.5 if args.get("scale") is None else args["scale"])
    largest = float(s[s.isfinite()].abs().max()) if s.numel() else 0.0
    if args.get("key_valid") is not None:
        s = s.masked_fill(~args["key_valid"][:, None, None], -math.inf)
    if args.get("causal"):
        ahead = torch.arange(keys) > torch.arange(rows)[:, None] + (keys - rows)
        s = s.masked_fill(ahead, -math.inf)
    lse = args.get("lse")
    p = torch.softmax(s, -1) if lse is None else torch.exp(s - lse[..., None])
    p = torch.nan_to_num(p)
    weight = args.get("query_weight")
    weight = torch.ones(len(q), rows) if weight is None else weight
    if args.get("reduce", "mean") == "max":
        p = (p * (weight > 0)[:, None, :, None]).amax(2).mean(1)
    else:
        p = torch.einsum("bm,bhmn->bn", weight / weight.sum(1, keepdim=True), p) / q.shape[1]
    return p[:, args.get("prefix", 0) :].nan_to_num(), largest


def check_saliency(impl: Impl, args: Args) -> Tensor:
    out = impl(**args)
    host = to_cpu(args)
    ref = oracle.attention_saliency(**host)
    assert out.shape == ref.shape
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert not out.requires_grad
    out = out.cpu()
    missing = torch.isnan(ref)
    assert torch.equal(torch.isnan(out), missing), "NaN where there should be none, or the reverse"
    whole = out
    out, ref = out.masked_fill(missing, 0.0), ref.masked_fill(missing, 0.0)
    if ref.numel() == 0:
        return whole
    assert not bool(out[ref == 0].any()), "a masked key has a share"
    plain, largest = _plain_saliency(host)
    # Row by row: a sample, not the batch, is what a caller looks at.
    for row, true, rough in zip(out, ref, plain.masked_fill(missing, 0.0), strict=True):
        if not bool(true.any()):
            assert not bool(row.any())
            continue
        # Plain torch may be lucky; a score of size s is known to s * eps, and so is its exp.
        floor = (4 + 2 * largest) * EPS32
        allowed = max(2 * float((rough.double() - true).abs().max()), floor * float(true.max()))
        assert float((row.double() - true).abs().max()) <= allowed
        assert _relative_norm(row, true) < max(1e-5, floor)
    return whole


def check_select(impl: Impl, args: Args) -> tuple[Tensor, Tensor]:
    index, score = impl(**args)
    host = to_cpu(args)
    rule = {n: host.pop(n) for n in ("priority", "priority_keep") if n in host}
    keep, valid = host.pop("keep"), host.get("valid")
    ref, tie = oracle.consensus_score(**host)
    assert index.dtype == torch.int64
    assert index.shape == (len(ref), keep)
    assert score.dtype == torch.float32
    assert score.shape == ref.shape
    assert index.is_contiguous()
    assert score.is_contiguous()
    index, score = index.cpu(), score.cpu()
    if host.get("textual") is None:
        torch.testing.assert_close(score.double(), ref, rtol=0, atol=0, equal_nan=True)
    elif host.get("fusion", "rank") == "rank":
        assert torch.equal(score.nan_to_num(nan=7.0), ref.float().nan_to_num(nan=7.0)), (
            "the rank score is defined to the bit"
        )
    else:
        _check_fused_values(score, ref, host)
    # The choice must follow from the score that came back, to the last tie ...
    assert torch.equal(index, oracle.choose(score.double(), tie, keep, valid=valid, **rule))
    # ... and from the true score, wherever that is clear.
    if not rule and len(ref):
        slack = NEAR * torch.tensor(_magnitude(host, ref)).expand_as(ref)
        assert_choice_within(index, ref - slack, ref + slack, valid)
    return index, score


def _magnitude(host: Args, ref: Tensor) -> float:
    """The size of the two terms that a fused score adds up, which may cancel."""
    if host.get("textual") is None or host.get("fusion", "rank") in ("rank", "rrf"):
        terms = [(1.0, ref)]
    else:
        alpha = host.get("alpha", 0.5)
        ends = [oracle.consensus_score(**{**host, "alpha": a})[0] for a in (0.0, 1.0)]
        terms = list(zip((1 - alpha, alpha), ends, strict=True))
    return sum(part * float(end.abs().nan_to_num(0, 0, 0).max()) for part, end in terms)


def _check_fused_values(score: Tensor, ref: Tensor, host: Args) -> None:
    assert torch.equal(torch.isnan(score), torch.isnan(ref))
    assert torch.equal(torch.isneginf(score), torch.isneginf(ref))
    fine = torch.isfinite(ref)
    if bool(fine.any()):
        atol = NEAR * _magnitude(host, ref)
        torch.testing.assert_close(score[fine].double(), ref[fine], rtol=0, atol=atol)


def assert_choice_within(index: Tensor, low: Tensor, high: Tensor, valid: Tensor | None) -> None:
    """No token left out is surely better than one taken. NaN is worse than any number."""
    low, high = (t.nan_to_num(nan=-1e300, posinf=1e299, neginf=-1e299) for t in (low, high))
    for b, row in enumerate(index.tolist()):
        tokens = torch.ones(low.shape[1], dtype=torch.bool) if valid is None else valid[b].clone()
        taken = [i for i in row if i >= 0]
        assert len(taken) == min(len(row), int(tokens.sum()))
        assert taken == sorted(set(taken))
        assert row == taken + [-1] * (len(row) - len(taken))
        assert bool(tokens[taken].all()), "an invalid token was chosen"
        tokens[taken] = False
        if taken and bool(tokens.any()):
            assert float(low[b][tokens].max()) <= float(high[b][taken].min())


def rank_bounds(score: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The smallest and the largest place each token can have when near scores may swap."""
    value = score if valid is None else score.masked_fill(~valid, -1e300)
    above = value[:, None, :] - value[:, :, None]  # [b, i, j]: how far j is above i
    slack = NEAR * torch.maximum(value.abs()[:, None, :], value.abs()[:, :, None])
    self_ = torch.eye(value.shape[1], dtype=torch.bool)
    alive = torch.ones_like(value, dtype=torch.bool) if valid is None else valid
    surely = (above > slack) & alive[:, None, :]
    maybe = (above >= -slack) & alive[:, None, :] & ~self_
    return surely.sum(2).double(), maybe.sum(2).double()


def fused_bounds(
    visual: Tensor, textual: Tensor | None, alpha: float, fusion: str, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bounds of the fused score when the two scores are known but for near ties."""
    if textual is None:
        slack = NEAR * visual.abs()
        return visual - slack, visual + slack
    if fusion in ("rank", "rrf"):
        best, worst = zip(*(rank_bounds(a, valid) for a in (visual, textual)), strict=True)
        if fusion == "rank":
            fuse = lambda r: -((1 - alpha) * r[0] + alpha * r[1]) / visual.shape[1]  # noqa: E731
        else:
            fuse = lambda r: (1 - alpha) / (60 + r[0]) + alpha / (60 + r[1])  # noqa: E731
        return fuse(worst) - 1e-7, fuse(best) + 1e-7
    ref, _ = oracle.consensus_score(visual, textual, alpha=alpha, fusion=fusion, valid=valid)
    slack = 5 * NEAR * ref.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True).expand_as(ref)
    return ref - slack, ref + slack


def check_assignment(
    assign: Tensor, metric: Tensor, owners: list[int], keep: int, valid: Tensor | None, thr: float
) -> None:
    """One sample: every token joined its most similar slot, ties to the lower token index."""
    ref = oracle.assign(metric, owners, keep, valid, thr)
    if ref == assign.tolist():
        return
    contextual = len(owners) > keep
    hosts = {s: o for s, o in enumerate(owners) if o >= 0 and (s >= keep or not contextual)}
    tokens = list(hosts.values())
    for i, (ours, theirs) in enumerate(zip(assign.tolist(), ref, strict=True)):
        if ours == theirs:
            continue
        assert i not in owners, f"token {i} owns a slot and is in slot {ours}"
        assert valid is None or bool(valid[i]), f"invalid token {i} is in slot {ours}"
        cos = dict(zip(tokens, oracle.cosine(metric[[i]], metric[tokens])[0].tolist(), strict=True))
        best = max(cos.values())
        if ours < 0 or theirs < 0:
            assert abs(best - thr) < NEAR, f"token {i}: cosine {best}, threshold {thr}"
            continue
        assert ours in hosts, f"token {i} is in slot {ours}, which takes nobody"
        assert cos[hosts[ours]] > best - NEAR, f"token {i} joined {cos[hosts[ours]]}, not {best}"
        equal = [o for o in tokens if torch.equal(metric[o], metric[hosts[ours]])]
        assert hosts[ours] == min(equal), f"token {i}: tie went to {hosts[ours]}, not {min(equal)}"


def check_merged(
    tokens: Tensor, size: Tensor, x: Tensor, weight: Tensor, owners: list[int], assign: Tensor,
    blend: float,
) -> None:  # fmt: skip
    """One sample: tokens and sizes, given the assignment that came back."""
    assigned = assign.tolist()
    ref, true_size = oracle.merge(x, weight, owners, assigned, blend)
    torch.testing.assert_close(size.double(), true_size, rtol=2e-6, atol=0)
    half_ulp = torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else EPS32
    reach, _ = oracle.merge(x.abs(), weight, owners, assigned, blend)
    for slot, owner in enumerate(owners):
        joined = [i for i, s in enumerate(assigned) if s == slot and i != owner]
        if owner < 0:
            assert not bool(bits(tokens[slot]).any()), "an empty slot is not zero"
        elif blend * float(weight[joined].sum()) == 0.0:
            assert_bitwise(tokens[slot], x[owner])
        else:
            # One rounding to the dtype, and float32 sums: the bound of that, element by element.
            tiny = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
            sums = (4 + len(joined)) * EPS32 * reach[slot]
            bound = half_ulp * (ref[slot].abs() + sums) + sums + tiny
            error = (tokens[slot].double() - ref[slot]).abs()
            assert torch.equal(tokens[slot].isnan(), ref[slot].isnan())
            bad = (error > bound) & ref[slot].isfinite()
            assert not bool(bad.any()), f"slot {slot}: off by {float(error[bad].max())}"
    fine = ref.isfinite()
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[x.dtype]
    # Denormals have no relative precision; the bound above has covered them.
    if ref[fine].numel() and float(ref[fine].abs().max()) > 1e-30:
        assert _relative_norm(tokens[fine], ref[fine]) < limit


def check_merge(impl: Impl, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    outs = impl(**args)
    tokens, assign, size = (t.detach().cpu() for t in outs)
    host = to_cpu(args)
    x, keep, extra = host["x"], host["index"].shape[1], host.get("contextual", 0)
    assert tokens.shape == (len(x), keep + extra, x.shape[2])
    assert tokens.dtype == x.dtype
    assert assign.shape == x.shape[:2]
    assert assign.dtype == torch.int64
    assert size.shape == (len(x), keep + extra)
    assert size.dtype == torch.float32
    assert all(t.is_contiguous() for t in outs)
    owners = oracle.slots(host["index"], x.shape[1], extra, host.get("valid"))
    _check_samples(tokens, assign, size, host, host["metric"], owners, keep)
    return outs


def _check_samples(
    tokens: Tensor, assign: Tensor, size: Tensor, host: Args, metric: Tensor,
    owners: list[list[int]], keep: int,
) -> None:  # fmt: skip
    x, valid, weight = host["x"], host.get("valid"), host.get("weight")
    weight = torch.ones(x.shape[:2]) if weight is None else weight
    for b, own in enumerate(owners):
        seen = None if valid is None else valid[b]
        check_assignment(assign[b], metric[b], own, keep, seen, host.get("threshold", -1.0))
        blend = host.get("blend", 1.0)
        check_merged(tokens[b], size[b], x[b], weight[b], own, assign[b], blend)


def true_saliencies(host: Args) -> tuple[Tensor, Tensor | None]:
    """The two scores of `select_merge`, in float64."""
    valid, prefix = host.get("valid"), host.get("prefix", 0)
    keys = None
    if valid is not None:
        keys = torch.cat([torch.ones(len(valid), prefix, dtype=torch.bool), valid], 1)
    vis = oracle.attention_saliency(
        host["q_vis"], host["k_vis"], prefix=prefix, key_valid=keys,
        scale=host.get("scale_vis"), lse=host.get("lse_vis"),
    )  # fmt: skip
    if host.get("q_txt") is None:
        return vis, None
    txt = oracle.attention_saliency(
        host["q_txt"], host["k_txt"], key_valid=valid, query_weight=host.get("txt_weight"),
        scale=host.get("scale_txt"), lse=host.get("lse_txt"),
        reduce=host.get("txt_reduce", "mean"),
    )  # fmt: skip
    return vis, txt


def _check_flagship_choice(index: Tensor, host: Args) -> None:
    assert not host.get("diversity"), "for a diverse choice there is check_diverse_merge"
    vis, txt = true_saliencies(host)
    alpha, fusion, valid = host.get("alpha", 0.5), host.get("fusion", "rank"), host.get("valid")
    if host.get("priority_keep"):
        # Which of the tokens came by priority can't be told from outside: exact, or wrong.
        score, tie = oracle.consensus_score(vis, txt, alpha=alpha, fusion=fusion, valid=valid)
        rule = {"priority": host["priority"], "priority_keep": host["priority_keep"]}
        assert torch.equal(index, oracle.choose(score, tie, index.shape[1], valid=valid, **rule))
        return
    low, high = fused_bounds(vis, txt, alpha, fusion, valid)
    assert_choice_within(index, low, high, valid)


def merge_metric(host: Args) -> Tensor:
    """What `select_merge` goes by to tell which tokens are alike, `[B, N, F]`."""
    metric = host.get("metric")
    if metric is None:
        metric = host["k_vis"][:, :, host.get("prefix", 0) :].double().mean(1)
    return metric


def check_select_merge(
    impl: Impl, args: Args, choice: Callable[[Tensor, Args], None] = _check_flagship_choice
) -> tuple[Tensor, ...]:
    outs = impl(**args)
    tokens, index, assign, size = (t.detach().cpu() for t in outs)
    host = to_cpu(args)
    x, keep, extra, valid = host["x"], host["keep"], host.get("contextual", 0), host.get("valid")
    assert tokens.shape == (len(x), keep + extra, x.shape[2])
    assert tokens.dtype == x.dtype
    assert index.shape == size.shape == (len(x), keep + extra)
    assert assign.shape == x.shape[:2]
    assert index.dtype == assign.dtype == torch.int64
    assert size.dtype == torch.float32
    assert all(t.is_contiguous() for t in outs)
    choice(index[:, :keep], host)
    owners = oracle.slots(index[:, :keep], x.shape[1], extra, valid)
    assert index.tolist() == owners
    _check_samples(tokens, assign, size, host, merge_metric(host), owners, keep)
    return outs
