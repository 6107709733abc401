"""`consensus_select` against its definition: fusions, ties, masks, NaN and the priority rule."""

from __future__ import annotations

import math

import pytest
import torch

import consensusdrop_kernels as cdrop

from .cases import Args, generator, laid_out, random_mask, scores
from .checks import assert_same, check_select

op = torch.ops.cdrop.consensus_select
FUSIONS = ("rank", "rrf", "sum", "zscore", "product", "max")
#: 1 - alpha rounds the same way in float32 and float64, so the rank score has one reading.
ALPHAS = (0.0, 0.25, 0.3, 0.5, 0.7, 1.0)

pytestmark = pytest.mark.usefixtures("poison")


def check(backend, **args: object) -> tuple[torch.Tensor, torch.Tensor]:
    return check_select(op, backend.place_all(args))


def pair(batch: int, tokens: int, seed: int = 0) -> Args:
    return {
        "visual": scores(batch, tokens, seed=seed),
        "textual": scores(batch, tokens, seed=seed + 100),
    }


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_fusions(backend, fusion, alpha):
    check(backend, **pair(2, 97), keep=20, fusion=fusion, alpha=alpha)


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 255, 256, 257, 576, 577, 729, 1024, 2880, 5000])
@pytest.mark.parametrize("fusion", ["rank", "zscore"])
def test_sizes(backend, tokens, fusion):
    for keep in {1, (tokens + 3) // 4, max(1, tokens - 1), tokens}:
        check(backend, **pair(1, tokens, seed=keep), keep=keep, fusion=fusion)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_batches(backend, batch, fusion):
    check(backend, **pair(batch, 33), keep=9, fusion=fusion)


@pytest.mark.parametrize("tokens", [1, 33, 577])
def test_without_text_the_visual_order_decides(backend, tokens):
    visual = scores(2, tokens, positive=False)
    for fusion in FUSIONS:
        index, score = check(
            backend, visual=visual, textual=None, keep=(tokens + 1) // 2, fusion=fusion
        )
        assert torch.equal(score.cpu(), visual)
    best = visual.argsort(dim=1, descending=True)[:, : (tokens + 1) // 2].sort(1).values
    assert torch.equal(index.cpu(), best)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("keep", [1, 5, 32, 33])
def test_all_equal_keeps_the_first(backend, fusion, keep):
    same = torch.full((2, 33), 0.25)
    index, _ = check(backend, visual=same, textual=same.clone(), keep=keep, fusion=fusion)
    assert index.cpu().tolist() == [list(range(keep))] * 2


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("levels", [2, 3, 7])
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_many_ties(backend, fusion, levels, alpha):
    """A few integer levels: nearly every comparison is a tie."""
    g = generator(levels)
    visual = torch.randint(0, levels, (3, 130), generator=g).float()
    textual = torch.randint(0, levels, (3, 130), generator=g).float()
    for keep in (1, 31, 64, 129):
        check(backend, visual=visual, textual=textual, keep=keep, fusion=fusion, alpha=alpha)


def test_rank_ties_go_to_the_better_visual_rank(backend):
    """Opposite orders tie every token at alpha 0.5; the visual order must then decide."""
    visual = torch.arange(40.0)[None]
    textual = -visual
    index, score = check(backend, visual=visual, textual=textual, keep=5)
    assert len(set(score.cpu()[0].tolist())) == 1
    assert index.cpu().tolist() == [[35, 36, 37, 38, 39]]


def test_rrf_ties_go_to_the_lower_index(backend):
    """Tokens 0 and 1 swap places in the two lists, so their scores are equal to the bit."""
    visual = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    textual = torch.tensor([[4.0, 5.0, 2.0, 3.0]])
    for keep, expected in ((1, [[0]]), (3, [[0, 1, 2]])):
        index, _ = check(backend, visual=visual, textual=textual, keep=keep, fusion="rrf")
        assert index.cpu().tolist() == expected


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_two_zeros_are_equal(backend, fusion):
    visual = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -0.0]])
    for textual in (None, visual.flip(1)):
        index, _ = check(backend, visual=visual, textual=textual, keep=2, fusion=fusion)
        assert index.cpu().tolist() == [[0, 1]]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("tokens", [33, 257])
def test_masked(backend, fusion, tokens):
    args = pair(4, tokens)
    valid = random_mask((4, tokens), seed=2, share=0.7)
    valid[1, 9:] = False  # fewer than keep
    valid[2] = False  # none
    valid[3, :] = False
    valid[3, 5] = True  # one
    index, score = check(backend, **args, keep=12, valid=valid, fusion=fusion)
    assert (index.cpu()[2] == -1).all()
    assert index.cpu()[3].tolist() == [5] + [-1] * 11
    assert torch.isneginf(score.cpu()[~valid]).all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_invalid_tokens_may_hold_anything(backend, fusion, junk):
    args = pair(2, 33)
    valid = random_mask((2, 33), seed=2, share=0.6)
    clean = check(backend, **args, keep=10, valid=valid, fusion=fusion)
    for name in ("visual", "textual"):
        args[name] = args[name].masked_fill(~valid, junk)
    assert_same(check(backend, **args, keep=10, valid=valid, fusion=fusion), clean)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("where", ["visual", "textual", "both", "all"])
def test_nan_comes_last_and_out_of_every_sum(backend, fusion, where):
    args = pair(2, 40)
    hurt = [3, 17, 25]
    if where in ("visual", "both"):
        args["visual"][0, hurt[:2]] = math.nan
    if where in ("textual", "both"):
        args["textual"][0, hurt[1:]] = math.nan
    if where == "all":
        args["visual"][0] = math.nan
    for keep in (20, 37, 40):
        index, score = check(backend, **args, keep=keep, fusion=fusion)
        if where != "all" and keep < 38:
            nan_at = score.cpu()[0].isnan().nonzero()[:, 0].tolist()
            assert not set(index.cpu()[0].tolist()) & set(nan_at)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nan_is_better_than_invalid(backend, fusion):
    args = pair(1, 20)
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[0, 10:] = False
    args["visual"][0, 4] = math.nan
    index, _ = check(backend, **args, keep=12, valid=valid, fusion=fusion)
    assert index.cpu().tolist() == [[*range(10), -1, -1]]


@pytest.mark.parametrize("fusion", ["rank", "rrf"])
@pytest.mark.parametrize("tokens", [11, 300])
def test_infinities_have_a_rank(backend, fusion, tokens):
    args = pair(1, tokens)
    args["visual"][0, [1, 7]] = math.inf
    args["visual"][0, [2, 9]] = -math.inf
    args["textual"][0, [1, 2]] = -math.inf
    args["textual"][0, [9]] = math.inf
    for keep in (1, 3, tokens // 2):
        check(backend, **args, keep=keep, fusion=fusion)
    check(backend, visual=args["visual"], textual=None, keep=3)


@pytest.mark.parametrize("fusion", ["rank", "rrf"])
def test_denormals_have_a_rank(backend, fusion):
    visual = torch.arange(40.0)[None] * 1.4e-45
    index, _ = check(backend, visual=visual, textual=visual.clone(), keep=3, fusion=fusion)
    assert index.cpu().tolist() == [[37, 38, 39]]


@pytest.mark.parametrize("fusion", ["sum", "zscore", "product", "max"])
@pytest.mark.parametrize("which", ["visual", "textual"])
def test_a_constant_score_has_no_say(backend, fusion, which):
    """A zero sum, deviation or range contributes 0, it does not divide by 0."""
    args = pair(1, 33)
    args[which] = torch.zeros(1, 33)
    _, score = check(backend, **args, keep=9, fusion=fusion)
    assert score.isfinite().all()


def test_a_constant_that_is_no_float_has_no_deviation(backend):
    """The mean of many 0.1 is not 0.1 in float32; the deviation must not be mere rounding."""
    args = pair(1, 1000)
    args["visual"] = torch.full((1, 1000), 0.1)
    check(backend, **args, keep=100, fusion="zscore")


@pytest.mark.parametrize("fusion", ["zscore", "max", "sum"])
def test_a_large_offset_does_not_drown_the_differences(backend, fusion):
    """Values near 1000 that differ by units: naive sums of squares would lose them."""
    g = generator(5)
    args = {n: 1000 + torch.randint(0, 50, (1, 400), generator=g).float() for n in pair(1, 1)}
    check(backend, **args, keep=100, fusion=fusion)


def test_product_clamps_at_1e_minus_30(backend):
    visual = torch.tensor([[0.0, -1.0, 1e-35, 1e-29, 0.5]])
    textual = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.0]])
    check(backend, visual=visual, textual=textual, keep=2, fusion="product")


@pytest.mark.parametrize("reserved", [0, 1, 5, 12])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_priority(backend, reserved, per_sample, fusion):
    priority = torch.rand((3, 50) if per_sample else (50,), generator=generator(8))
    valid = random_mask((3, 50), seed=3)
    valid[2, 8:] = False
    check(
        backend, **pair(3, 50), keep=12, fusion=fusion, valid=valid, priority=priority,
        priority_keep=reserved,
    )  # fmt: skip


def test_priority_ties_and_nan(backend):
    priority = torch.tensor([1.0, math.nan, 1.0, math.inf, -math.inf, 0.0, -0.0, 1.0])
    for reserved in range(5):
        check(backend, **pair(1, 8), keep=4, priority=priority, priority_keep=reserved)


def test_priority_takes_only_what_the_score_left(backend):
    visual = torch.tensor([[9.0, 8.0, 1.0, 2.0, 3.0]])
    priority = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    index, _ = check(
        backend, visual=visual, textual=None, keep=3, priority=priority, priority_keep=1
    )
    assert index.cpu().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("layout", ["transposed", "offset", "gapped", "expanded"])
def test_layouts(backend, layout):
    args = pair(4, 70)
    if layout == "expanded":
        args = {name: value[:1].expand(4, 70) for name, value in args.items()}
        valid = random_mask((1, 70), seed=1).expand(4, 70)
    elif layout == "transposed":
        args = {name: value.t().contiguous().t() for name, value in args.items()}
        valid = random_mask((70, 4), seed=1).t()
    else:
        args = {name: laid_out(value, layout) for name, value in args.items()}
        valid = random_mask((4, 71), seed=1)[:, 1:]
    priority = torch.rand(140, generator=generator(1))[::2]
    for fusion in FUSIONS:
        check(
            backend, **args, keep=20, valid=valid, fusion=fusion, priority=priority,
            priority_keep=3,
        )  # fmt: skip


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("hard", ["nothing", "infinities", "odd alpha"])
def test_backends_agree_where_the_definition_leaves_room(backend, fusion, hard):
    """Infinite scores in a sum, or an alpha that rounds two ways: as the reference does it."""
    args = {**pair(2, 60), "keep": 15, "fusion": fusion, "alpha": 0.5}
    if hard == "infinities":
        args["visual"][0, [3, 8]] = math.inf
        args["textual"][0, [8, 11]] = -math.inf
    elif hard == "odd alpha":
        args["alpha"] = 0.6
    index, score = op(**backend.place_all(args))
    with cdrop.use_backend("reference"):
        ref_index, ref_score = op(**args)
    assert torch.equal(index.cpu(), ref_index)
    exact = fusion == "rank"
    torch.testing.assert_close(
        score.cpu(), ref_score, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6,
        equal_nan=True,
    )  # fmt: skip


def test_the_function_is_the_op(backend):
    args = backend.place_all({**pair(1, 33), "keep": 9, "alpha": 0.25})
    assert_same(cdrop.consensus_select(**args), op(**args))
