"""What must hold for any input: hypothesis looks for one where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from . import checks
from .cases import Args, generator, merge_case, random_mask, saliency_case, scores
from .cases import select_merge_case as flagship
from .checks import assert_bitwise, assert_same

ops = torch.ops.cdrop
FUSIONS = st.sampled_from(["rank", "rrf", "sum", "zscore", "product", "max"])
SEEDS = st.integers(0, 2**20)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])

pytestmark = pytest.mark.usefixtures("poison")


class Recipe(dict):
    """Arguments that hypothesis can show in a line: as what made them, not as tensors."""

    def __init__(self, make: Callable[..., Args], /, **recipe: Any) -> None:
        super().__init__(make(**recipe))
        self.line = f"{make.__name__}({', '.join(f'{n}={v}' for n, v in recipe.items())})"

    def __repr__(self) -> str:
        return self.line


@st.composite
def saliencies(draw: st.DrawFn) -> Recipe:
    groups = draw(st.integers(1, 3))
    return Recipe(
        saliency_case,
        batch=draw(st.integers(1, 3)),
        heads=groups * draw(st.integers(1, 4)),
        groups=groups,
        rows=draw(st.integers(1, 20)),
        tokens=draw(st.integers(1, 90)),
        width=draw(st.integers(1, 70)),
        dtype=draw(DTYPES),
        layout=draw(st.sampled_from(["contiguous", "transposed", "offset", "gapped"])),
        seed=draw(SEEDS),
        prefix=draw(st.integers(0, 3)),
        causal=draw(st.booleans()),
        reduce=draw(st.sampled_from(["mean", "max"])),
    )


def weighted_merge_case(weight_seed: int | None, **recipe: Any) -> Args:
    args = merge_case(**recipe)
    if weight_seed is not None:
        weight = torch.rand(args["x"].shape[:2], generator=generator(weight_seed))
        args["weight"] = (weight * 3 - 0.5).clamp_min(0)
    return args


@st.composite
def merges(draw: st.DrawFn) -> Recipe:
    tokens = draw(st.integers(1, 60))
    return Recipe(
        weighted_merge_case,
        weight_seed=draw(st.none() | SEEDS),
        batch=draw(st.integers(1, 3)),
        tokens=tokens,
        keep=draw(st.integers(1, tokens)),
        width=draw(st.integers(1, 40)),
        features=draw(st.integers(1, 40)),
        dtype=draw(DTYPES),
        seed=draw(SEEDS),
        contextual=draw(st.integers(0, 6)),
        threshold=draw(st.sampled_from([-1.0, 0.0, 0.4])),
        blend=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@given(args=saliencies())
def test_saliency_is_the_definition(backend, args):
    checks.check_saliency(ops.attention_saliency, backend.place_all(args))


@given(args=merges())
def test_merge_is_the_definition(backend, args):
    checks.check_merge(ops.token_merge, backend.place_all(args))


@given(
    tokens=st.integers(1, 70), seed=SEEDS, levels=st.integers(1, 90), fusion=FUSIONS,
    alpha=st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]), data=st.data(),
)  # fmt: skip
def test_select_is_the_definition(backend, tokens, seed, levels, fusion, alpha, data):
    """Few levels mean many ties; a token may be invalid or NaN."""
    g = generator(seed)
    lists = [torch.randint(0, levels, (2, tokens), generator=g).float() for _ in range(2)]
    if data.draw(st.booleans()):
        lists[0][0, seed % tokens] = float("nan")
    keep = data.draw(st.integers(1, tokens))
    args = {"visual": lists[0], "textual": lists[1], "keep": keep, "fusion": fusion}
    valid = random_mask((2, tokens), seed) if data.draw(st.booleans()) else None
    args |= {"alpha": alpha, "valid": valid}
    if data.draw(st.booleans()):
        args["priority"] = torch.randint(0, 5, (tokens,), generator=g).float()
        args["priority_keep"] = data.draw(st.integers(0, keep))
    checks.check_select(ops.consensus_select, backend.place_all(args))


@given(args=saliencies(), seed=SEEDS)
def test_the_columns_add_up_to_the_live_rows(backend, args, seed):
    """Every row that sees a key hands out exactly its weight, once per head."""
    rows, keys = args["q"].shape[2], args["k"].shape[2]
    weight = torch.rand(args["q"].shape[0], rows, generator=generator(seed)) + 0.1
    args.update(prefix=0, reduce="mean", query_weight=weight)
    out = ops.attention_saliency(**backend.place_all(args)).cpu()
    live = torch.arange(rows) + (keys - rows) >= 0 if args["causal"] else torch.ones(rows) > 0
    share = (weight * live).sum(1) / weight.sum(1)
    torch.testing.assert_close(out.sum(1), share, rtol=1e-5, atol=1e-6)


@given(args=saliencies(), seed=SEEDS)
def test_the_order_of_heads_rows_and_samples_is_nothing(backend, args, seed):
    args["causal"] = False
    args = backend.place_all(args)
    out = ops.attention_saliency(**args)
    g = generator(seed)

    def shuffle(n: int) -> Tensor:
        return torch.randperm(n, generator=g).to(backend.device)

    batch, heads, rows, _ = args["q"].shape
    order = shuffle(batch)
    again = ops.attention_saliency(**{**args, "q": args["q"][order], "k": args["k"][order]})
    torch.testing.assert_close(again, out[order], rtol=1e-5, atol=1e-8)
    mixed = args["q"][:, :, shuffle(rows)]
    torch.testing.assert_close(
        ops.attention_saliency(**{**args, "q": mixed}), out, rtol=1e-5, atol=1e-8
    )
    groups = args["k"].shape[1]
    order = shuffle(groups)
    grouped = args["q"].unflatten(1, (groups, heads // groups))[:, order].flatten(1, 2)
    again = ops.attention_saliency(**{**args, "q": grouped, "k": args["k"][:, order]})
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-8)


@given(args=saliencies(), seed=SEEDS)
def test_permuting_the_keys_permutes_the_saliency(backend, args, seed):
    args.update(causal=False, prefix=0)
    args = backend.place_all(args)
    order = torch.randperm(args["k"].shape[2], generator=generator(seed)).to(backend.device)
    again = ops.attention_saliency(**{**args, "k": args["k"][:, :, order]})
    torch.testing.assert_close(
        again, ops.attention_saliency(**args)[:, order], rtol=1e-5, atol=1e-8
    )


@given(args=saliencies(), extra=st.integers(1, 40))
def test_padding_the_keys_changes_nothing(backend, args, extra):
    args["causal"] = False
    batch, _, keys, _ = args["k"].shape
    out = ops.attention_saliency(**backend.place_all(args))
    padded = torch.nn.functional.pad(args["k"], (0, 0, 0, extra), value=float("nan"))
    mask = (torch.arange(keys + extra) < keys).expand(batch, -1)
    again = ops.attention_saliency(**backend.place_all({**args, "k": padded, "key_valid": mask}))
    assert not again[:, out.shape[1] :].any()
    torch.testing.assert_close(again[:, : out.shape[1]], out, rtol=1e-5, atol=1e-8)


@given(tokens=st.integers(2, 80), seed=SEEDS, fusion=FUSIONS, data=st.data())
def test_permuting_the_tokens_permutes_the_choice(backend, tokens, seed, fusion, data):
    """Only where nothing ties: in `rank` at alpha 0.3 a tie needs 0.7 a + 0.3 b twice."""
    keep = data.draw(st.integers(1, tokens))
    visual, textual = scores(1, tokens, seed=seed), scores(1, tokens, seed=seed + 1)
    args = backend.place_all({"visual": visual, "textual": textual})
    options = {"keep": keep, "fusion": fusion, "alpha": 0.3}
    index, score = ops.consensus_select(**args, **options)
    ordered = score.cpu()[0].sort().values
    if (ordered.diff() < 1e-5 * ordered.abs().max()).any():
        return
    order = torch.randperm(tokens, generator=generator(seed)).to(backend.device)
    again, _ = ops.consensus_select(**{n: a[:, order] for n, a in args.items()}, **options)
    assert set(order[again[0]].tolist()) == set(index[0].tolist())


@given(tokens=st.integers(1, 80), seed=SEEDS, fusion=FUSIONS, extra=st.integers(1, 30))
def test_padding_the_scores_changes_nothing(backend, tokens, seed, fusion, extra):
    args = {"visual": scores(2, tokens, seed=seed), "textual": scores(2, tokens, seed=seed + 1)}
    keep = (tokens + 2) // 3
    index, score = ops.consensus_select(**backend.place_all(args), keep=keep, fusion=fusion)
    wide = {n: torch.nn.functional.pad(a, (0, extra), value=9.0) for n, a in args.items()}
    wide["valid"] = (torch.arange(tokens + extra) < tokens).expand(2, -1)
    again = ops.consensus_select(**backend.place_all(wide), keep=keep, fusion=fusion)
    exact = fusion in ("rank", "rrf", "product")
    rtol, atol = (0, 0) if exact else (1e-5, 1e-6)
    torch.testing.assert_close(again[1][:, :tokens], score, rtol=rtol, atol=atol)
    assert torch.equal(again[0], index)


@given(tokens=st.integers(1, 80), seed=SEEDS)
def test_keep_all_takes_all(backend, tokens, seed):
    visual = backend.place(scores(2, tokens, seed=seed))
    index, _ = ops.consensus_select(visual, visual.flip(1), tokens)
    assert index.tolist() == [list(range(tokens))] * 2


@given(args=merges())
def test_merged_mass_is_conserved(backend, args):
    """sum_s size_s tokens_s is the sum of the tokens that are in some slot."""
    args.pop("weight", None)
    args.update(blend=1.0, x=args["x"].float())
    tokens, assign, size = (t.cpu() for t in ops.token_merge(**backend.place_all(args)))
    inside = (assign >= 0).double()
    assert_bitwise(size.sum(1), inside.sum(1).float())
    merged = (size[:, :, None].double() * tokens.double()).sum(1)
    whole = (inside[:, :, None] * args["x"].double()).sum(1)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


@given(args=merges())
def test_a_merged_token_is_no_longer_than_its_parts(backend, args):
    """A mean, so within the range of what was merged, coordinate by coordinate."""
    tokens, assign, _ = (t.cpu() for t in ops.token_merge(**backend.place_all(args)))
    for b, s in (assign.new_ones(tokens.shape[:2])).nonzero().tolist():
        members = args["x"][b][assign[b] == s].float()
        if len(members):
            slack = 1e-6 + torch.finfo(tokens.dtype).eps * members.abs().amax(0)
            assert (tokens[b, s].float() <= members.amax(0) + slack).all()
            assert (tokens[b, s].float() >= members.amin(0) - slack).all()


@given(args=merges(), factor=st.sampled_from([0.25, 4.0]))
def test_only_the_ratio_of_weights_matters(backend, args, factor):
    """A power of two: not a bit of the tokens may change."""
    weight = args.setdefault("weight", torch.ones(args["x"].shape[:2]))
    tokens, assign, size = ops.token_merge(**backend.place_all(args))
    scaled = ops.token_merge(**backend.place_all({**args, "weight": weight * factor}))
    assert_same(scaled, (tokens, assign, size * factor))


@given(args=merges(), seed=SEEDS)
def test_samples_do_not_see_each_other(backend, args, seed):
    args = backend.place_all(args)
    outs = ops.token_merge(**args)
    order = torch.randperm(len(args["x"]), generator=generator(seed)).to(backend.device)
    mixed = {n: v[order] if isinstance(v, Tensor) else v for n, v in args.items()}
    assert_same(ops.token_merge(**mixed), tuple(t[order] for t in outs))


@given(args=merges(), extra=st.integers(1, 20))
def test_padding_the_tokens_changes_nothing(backend, args, extra):
    tokens = args["x"].shape[1]
    outs = ops.token_merge(**backend.place_all(args))
    wide = dict(args)
    for name in ("x", "metric"):
        pad = (0, 0, 0, extra)
        wide[name] = torch.nn.functional.pad(args[name], pad, value=float("nan"))
    if "weight" in args:
        wide["weight"] = torch.nn.functional.pad(args["weight"], (0, extra), value=2.0)
    wide["valid"] = (torch.arange(tokens + extra) < tokens).expand(len(args["x"]), -1)
    again = ops.token_merge(**backend.place_all(wide))
    assert (again[1][:, tokens:] == -1).all()
    assert torch.equal(again[1][:, :tokens], outs[1])
    torch.testing.assert_close(again[0], outs[0])
    torch.testing.assert_close(again[2], outs[2])


@given(
    tokens=st.integers(1, 50), seed=SEEDS, fusion=FUSIONS, contextual=st.integers(0, 5),
    text=st.booleans(), masked=st.booleans(), dtype=DTYPES, data=st.data(),
)  # fmt: skip
def test_select_merge_is_the_definition(
    backend, tokens, seed, fusion, contextual, text, masked, dtype, data
):
    args = flagship(
        2, tokens, data.draw(st.integers(1, tokens)), seed=seed, fusion=fusion, dtype=dtype,
        contextual=contextual, text=text, prefix=data.draw(st.integers(0, 2)), head_dim=24,
        layout=data.draw(st.sampled_from(["contiguous", "transposed", "gapped"])),
    )  # fmt: skip
    if masked:
        args["valid"] = random_mask((2, tokens), seed)
    checks.check_select_merge(ops.select_merge, backend.place_all(args))
