"""The methods that act before the LLM: worked examples, and what all of them must keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from consensusdrop_kernels.methods import (
    AdaFV,
    CDPruner,
    DivPrune,
    FasterVLM,
    Full,
    Method,
    Selection,
    Signals,
    ToMe,
    Uniform,
    VisionZip,
    Words,
)

from .cases import at_angles, by_scores, column, draw, rows_of, tokens_of

# Each by a budget; the tests give it one.
METHODS = {
    "AdaFV": AdaFV,
    "AdaFV, merging": lambda keep: AdaFV(keep, merge=True),
    "CDPruner": CDPruner,
    "DivPrune": DivPrune,
    "FasterVLM": FasterVLM,
    "ToMe": ToMe,
    "Uniform": Uniform,
    "VisionZip": VisionZip,
    "VisionZip, 3 contextual": lambda keep: VisionZip(keep, contextual=3),
}
MERGING = ("AdaFV, merging", "ToMe", "VisionZip", "VisionZip, 3 contextual")
every = pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))
padded = pytest.mark.parametrize(
    "make",
    [m for n, m in METHODS.items() if n != "Uniform"],
    ids=[n for n in METHODS if n != "Uniform"],
)


# --- worked examples ----------------------------------------------------------------------------


def test_fastervlm_by_hand() -> None:
    """Scores .1 .4 .3 .2: tokens 1 and 2 stay as they are."""
    signals = Signals(
        x=column(3, 6, 5, 9), grid=(2, 2), visual=torch.tensor([[0.1, 0.4, 0.3, 0.2]]),
        metric=column(1, 1, 1, 1),
    )  # fmt: skip
    chosen = FasterVLM(keep=2).select(signals)
    assert chosen.index.tolist() == [[1, 2]]
    assert chosen.assign.tolist() == [[-1, 0, 1, -1]]
    assert chosen.size.tolist() == [[1.0, 1.0]]
    assert chosen.tokens.flatten().tolist() == [6.0, 5.0]
    scores = FasterVLM(keep=2).scores(signals)
    assert scores.textual is None
    assert scores.fused.argsort(descending=True).tolist() == [[1, 2, 3, 0]]


def test_visionzip_by_hand() -> None:
    """Scores put tokens 0 and 2 first. Of the others, 1 3 4 5, each second one is contextual: 1
    and 4. Token 3 points like 1, token 5 like 4, so the slots are 1, 3, (2+4)/2 and (5+6)/2."""
    signals = Signals(
        x=column(1, 2, 3, 4, 5, 6), grid=(2, 3),
        visual=torch.tensor([[0.5, 0.1, 0.4, 0.0, 0.05, 0.02]]),
        metric=at_angles(45, 0, 45, 6, 90, 84),
    )  # fmt: skip
    chosen = VisionZip(keep=4, contextual=2).select(signals)
    assert chosen.index.tolist() == [[0, 2, 1, 4]]
    assert chosen.assign.tolist() == [[0, 2, 1, 2, 3, 3]]
    assert chosen.size.tolist() == [[1.0, 1.0, 2.0, 2.0]]
    assert chosen.tokens.flatten().tolist() == [1.0, 3.0, 3.0, 5.5]


@pytest.mark.parametrize(("keep", "dominant"), [(64, 54), (128, 108), (192, 162)])
def test_visionzip_shares_the_budget_as_its_paper(keep: int, dominant: int) -> None:
    signals = by_scores(draw(1, 576))
    chosen = VisionZip(keep=keep).select(signals)
    best = signals.visual.topk(dominant).indices.sort().values
    assert torch.equal(chosen.index[:, :dominant], best)
    assert chosen.index.shape == (1, keep)
    assert chosen.size.sum() == 576
    assert chosen.size[0, dominant:].sum() == 576 - dominant


def test_divprune_by_hand() -> None:
    """Directions at 0, 10, 90, 100, 200 degrees. Nearest neighbours are 10 degrees away but for
    200, which is 100 away: it comes first. Farthest from it is 10 (170 away), then 100 (90 from
    10, 100 from 200)."""
    signals = Signals(x=at_angles(0, 10, 90, 100, 200), grid=(1, 5))
    assert DivPrune(keep=1).select(signals).index.tolist() == [[4]]
    assert DivPrune(keep=2).select(signals).index.tolist() == [[1, 4]]
    chosen = DivPrune(keep=3).select(signals)
    assert chosen.index.tolist() == [[1, 3, 4]]
    assert torch.equal(chosen.tokens, signals.x[:, [1, 3, 4]])


def test_cdpruner_by_hand() -> None:
    """Tokens at 0, 0, 90, 180 degrees and a question at 0: cosines 1 1 0 -1, relevance 1 1 .5 0.
    Token 0 has the largest gain; its double has none left, token 2 has .5 squared, token 3 none:
    0 and 2 are kept, and the third place goes by relevance to token 1. A question at 180 has
    relevance 0 0 .5 1: tokens 3 and 2. Words at 80 and 280 say the same as one at 0."""
    x = at_angles(0, 0, 90, 180)

    def kept(keep: int, *angles: float) -> list[int]:
        words = Words(at_angles(*angles), torch.ones(1, len(angles), dtype=torch.bool), (True,))
        signals = Signals(x=x, grid=(2, 2), words=lambda _: words)
        return CDPruner(keep=keep).select(signals).index[0].tolist()

    assert kept(1, 0) == [0]
    assert kept(2, 0) == [0, 2]
    assert kept(3, 0) == [0, 1, 2]
    assert kept(2, 180) == [2, 3]
    assert kept(3, 80, 280) == kept(3, 0)


def test_cdpruner_without_a_question_goes_by_diversity() -> None:
    """Directions 0, 30, 60, 90, no question: token 0 by its index, then 90, which is orthogonal.
    The same where the question says no more of one token than of another."""
    x = at_angles(0, 30, 60, 90)
    nothing = Words(torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.bool), (False,))
    method = CDPruner(keep=2)
    with pytest.warns(UserWarning, match="no text: its image goes by diversity alone"):
        chosen = method.select(Signals(x=x, grid=(2, 2), words=lambda _: nothing))
    assert chosen.index.tolist() == [[0, 3]]
    alike = Words(torch.tensor([[[0.0, 0.0]]]), torch.ones(1, 1, dtype=torch.bool), (True,))
    assert method.select(Signals(x, (2, 2), words=lambda _: alike)).index.tolist() == [[0, 3]]


def test_full() -> None:
    signals = draw()
    assert Full().budget(24) == 24
    chosen = Full().select(signals)
    assert torch.equal(chosen.tokens, signals.x)
    assert chosen.index.tolist() == chosen.assign.tolist() == [list(range(24))] * 3
    valid = torch.ones(3, 24, dtype=torch.bool)
    valid[1, :20] = False
    chosen = Full().select(replace(signals, valid=valid))
    assert chosen.index[1].tolist() == [20, 21, 22, 23] + [-1] * 20
    assert torch.equal(chosen.tokens[1, :4], signals.x[1, 20:])
    assert chosen.tokens[1, 4:].abs().sum() == 0
    with pytest.raises(TypeError, match="keep"):
        Full(keep=0.5)  # type: ignore[call-arg]


# --- what holds for all -------------------------------------------------------------------------


def check_selection(chosen: Selection, signals: Signals, keep: int, *, merging: bool) -> None:
    """The promises of a `Selection` whose slots are all in use."""
    rows, tokens, _ = signals.x.shape
    assert chosen.index.shape == (rows, keep)
    for row in range(rows):
        index, assign = chosen.index[row].tolist(), chosen.assign[row].tolist()
        assert len(set(index)) == keep
        assert all(assign[token] == slot for slot, token in enumerate(index))
        counts = [assign.count(slot) for slot in range(keep)]
        assert chosen.size[row].tolist() == counts
        assert merging or sum(counts) == keep
        for slot in range(keep):
            members = torch.tensor([t for t in range(tokens) if assign[t] == slot])
            mean = signals.x[row, members].mean(0)
            torch.testing.assert_close(chosen.tokens[row, slot], mean)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [4, 7, 0.5, 23])
def test_budgets_are_exact(name: str, keep: int | float) -> None:
    signals, method = draw(), METHODS[name](keep)
    count = 12 if keep == 0.5 else int(keep)
    assert method.budget(24) == count
    merging = name in MERGING
    check_selection(method.select(signals), signals, count, merging=merging)
    if merging:
        assert method.select(signals).size.sum(1).tolist() == [24.0] * 3


@every
def test_a_budget_above_the_tokens_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"keep must be in 1..N=24, got 25"):
        make(25).budget(24)


@every
def test_permuting_the_batch_permutes_the_choice(make: Any) -> None:
    signals, order = draw(4), [2, 0, 3, 1]
    one, two = make(6).select(signals), make(6).select(rows_of(signals, order))
    assert torch.equal(one.index[order], two.index)
    assert torch.equal(one.assign[order], two.assign)
    torch.testing.assert_close(one.tokens[order], two.tokens)


@every
def test_a_second_image_changes_nothing(make: Any) -> None:
    signals = draw(5)
    together = make(6).select(signals)
    for row in range(5):
        alone = make(6).select(rows_of(signals, [row]))
        assert torch.equal(together.index[row], alone.index[0])
        assert torch.equal(together.assign[row], alone.assign[0])
        torch.testing.assert_close(together.tokens[row], alone.tokens[0])


@padded
def test_padding_is_as_if_it_were_not_there(make: Any) -> None:
    """Images with scattered padding choose as the same images without those tokens."""
    signals, keep = draw(4), 6
    valid = torch.ones(4, 24, dtype=torch.bool)
    valid[0, 15:] = False
    valid[1, ::3] = False
    valid[2, 5:] = False  # fewer than the budget: all stay
    method = make(keep)
    chosen = method.select(replace(signals, valid=valid))
    assert chosen.padded
    for row in (0, 1, 2, 3):
        real = valid[row].nonzero().flatten()
        kept = min(keep, len(real))
        if len(real) < keep:
            index = chosen.index[row]
            assert sorted(index.tolist()) == [-1, *real.tolist()]
            torch.testing.assert_close(chosen.tokens[row, :kept], signals.x[row, index[:kept]])
        else:
            alone = method.select(tokens_of(rows_of(signals, [row]), real))
            assert torch.equal(chosen.index[row], real[alone.index[0]])
            assert torch.equal(chosen.assign[row, real], alone.assign[0])
            torch.testing.assert_close(chosen.tokens[row], alone.tokens[0])
            torch.testing.assert_close(chosen.size[row], alone.size[0])
        assert (chosen.assign[row, ~valid[row]] == -1).all()
        assert (chosen.size[row, kept:] == 0).all()
        assert (chosen.tokens[row, kept:] == 0).all()


@every
def test_both_ways_of_the_encoder(make: Any) -> None:
    signals = draw()
    one, two = make(6).select(signals), make(6).select(by_scores(signals))
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.assign, two.assign)


@every
def test_half_precision(make: Any) -> None:
    signals = draw()
    words = signals.words("after_image")
    half = words._replace(embeds=words.embeds.bfloat16())
    chosen = make(6).select(
        replace(by_scores(signals), x=signals.x.bfloat16(), words=lambda _: half)
    )
    assert chosen.tokens.dtype == torch.bfloat16
    assert chosen.index.shape == (3, 6)


@every
def test_gradients_reach_the_tokens(make: Any) -> None:
    """`size * tokens` sums what went into the slots: each token that went somewhere counts once."""
    signals = draw()
    signals = replace(signals, x=signals.x.requires_grad_())
    chosen = make(6).select(signals)
    (chosen.size[:, :, None] * chosen.tokens).sum().backward()
    want = (chosen.assign >= 0).float()[:, :, None].expand_as(signals.x)
    torch.testing.assert_close(signals.x.grad, want)


@every
def test_nothing_waits_for_the_device(make: Any) -> None:
    """Tensors without values go through: no number is read back to the host."""
    signals = draw()
    words = signals.words("after_image")
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(getattr(signals, n)) for n in ("x", "q_vis", "k_vis")}
        question = Words(mode.from_tensor(words.embeds), mode.from_tensor(words.valid), words.asked)
        chosen = make(6).select(replace(signals, **fake, words=lambda _: question))
    assert chosen.tokens.shape == (3, 6, 6)
    assert chosen.index.shape == (3, 6)


@every
def test_no_images(make: Any) -> None:
    chosen = make(6).select(rows_of(draw(), []))
    assert chosen.tokens.shape == (0, 6, 6)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        (AdaFV, {"reserve": 0.6}, r"reserve must be a number in 0..0.5, got 0.6"),
        (AdaFV, {"temperature": 0}, "temperature must be a number"),
        (AdaFV, {"merge": 1}, "merge must be True or False, got 1"),
        (AdaFV, {"size_attention": True}, "size_attention must be False without merge"),
        (AdaFV, {"size_attention": None}, "size_attention must be True or False"),
        (AdaFV, {"query": "all"}, "query must be one of"),
        (CDPruner, {"query": "all"}, "query must be one of"),
        (VisionZip, {"contextual": -1}, "contextual must be an int >= 0"),
        (VisionZip, {"contextual": 0.6}, r"a share in 0..0.5 \(float\), got 0.6"),
        (VisionZip, {"contextual": float("nan")}, "contextual must be"),
        (VisionZip, {"size_attention": 1}, "size_attention must be"),
        (ToMe, {"size_attention": 1}, "size_attention must be"),
    ],
)
def test_options_are_checked(method: type[Method], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        method(**({"keep": 4} | options))


@pytest.mark.parametrize("method", [AdaFV, CDPruner, DivPrune, FasterVLM, ToMe, Uniform, VisionZip])
@pytest.mark.parametrize(
    "options",
    [{"keep": 0}, {"keep": 1.5}, {"keep": True}, {"positions": "same"}, {"budget_scope": "frame"}],
)
def test_common_options_are_checked(method: type[Method], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        method(**({"keep": 4} | options))


def test_visionzip_needs_a_dominant_token() -> None:
    with pytest.raises(ValueError, match="contextual must be less than keep=4, got 4"):
        VisionZip(keep=4, contextual=4).budget(24)
    with pytest.raises(ValueError, match="contextual must be less than keep=2, got 3"):
        VisionZip(keep=0.1, contextual=3).budget(24)
    assert VisionZip(keep=1).budget(24) == 1


def test_signals_that_are_missing_are_named() -> None:
    bare = Signals(x=torch.zeros(1, 4, 2), grid=(2, 2))
    for method in (FasterVLM(2), VisionZip(2), ToMe(2), AdaFV(2)):
        with pytest.raises(ValueError, match='"encoder" in its needs'):
            method.select(bare)
    with pytest.raises(ValueError, match='"words" in its needs'):
        CDPruner(2).select(bare)
