"""Methods that prune inside the decoder, on bare tensors: schedules, worked examples, batches."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from consensusdrop_kernels.methods import (
    FastV,
    Method,
    PyramidDrop,
    Signals,
    SparseVLM,
    TextProbe,
    VisionDrop,
    Words,
)

METHODS: list[Method] = [
    VisionDrop(keep=8),
    VisionDrop(keep=8, arithmetic="released"),
    FastV(keep=6),
    PyramidDrop(keep=8),
    SparseVLM(keep=8),
    SparseVLM(keep=8, recycle=0.8, clusters=0.5),
]
NAMES = ["visiondrop", "released", "fastv", "pyramiddrop", "sparsevlm", "recycling"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (lambda: VisionDrop(keep=0), "keep must be"),
        (lambda: VisionDrop(keep=8, start=0.5), r"start must be a number in 1..inf, got 0.5"),
        (lambda: VisionDrop(keep=8, start=float("nan")), "start must be"),
        (lambda: VisionDrop(keep=8, start=4.0), r"start must be less than 4, as a share of 0.25"),
        (lambda: VisionDrop(keep=8, contextual=0.6), r"contextual must be a number in 0..0.5"),
        (lambda: VisionDrop(keep=8, stages_at=(0.5, 0.25)), "stages_at must be a tuple of asc"),
        (lambda: VisionDrop(keep=8, stages_at=(0.0, 0.5)), "stages_at must be"),
        (lambda: VisionDrop(keep=8, stages_at=[0.5]), "stages_at must be"),
        (lambda: VisionDrop(keep=8, arithmetic="paper"), "arithmetic must be one of corrected"),
        (lambda: VisionDrop(keep=8, causal_correction=1), "causal_correction must be True or"),
        (lambda: VisionDrop(keep=8, positions="same"), "positions must be"),
        (lambda: VisionDrop(keep=8, budget_scope="frame"), "budget_scope must be"),
        (lambda: FastV(keep=1.5), "keep must be"),
        (lambda: FastV(keep=8, layer=0), r"layer must be an int >= 1, got 0"),
        (lambda: FastV(keep=8, query="last"), "query must be one of"),
        (lambda: FastV(keep=8).stages(2), r"layer must be less than the decoder's 2 layers, got 2"),
        (lambda: PyramidDrop(keep=-1), "keep must be"),
        (lambda: PyramidDrop(stages_at=(1.0,)), "stages_at must be"),
        (lambda: PyramidDrop(query="last"), "query must be one of"),
        (lambda: SparseVLM(keep=8, recycle=1.5), r"recycle must be a number in 0..1, got 1.5"),
        (lambda: SparseVLM(keep=8, clusters=-0.1), "clusters must be"),
        (lambda: SparseVLM(keep=8, positions="same"), "positions must be"),
        (lambda: VisionDrop(keep=17).budget(16), r"keep must be in 1..N=16, got 17"),
        (lambda: FastV(keep=17).budget(16), r"keep must be in 1..N=16, got 17"),
        (
            lambda: PyramidDrop(keep=144).stage_budget(0, 576),
            r"keep must be more than 144 tokens of N=576, which the layers before .* got 144",
        ),
        (lambda: SparseVLM(keep=0.05).stage_budget(0, 576), "more than 36 tokens of N=576"),
    ],
)
def test_options_are_checked(method: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        method()


def totals(method: Method, tokens: int, layers: int) -> list[int]:
    fitted = method.fitted(layers)
    stages = range(len(fitted.stages(layers)))
    return [fitted.budget(tokens), *(fitted.stage_budget(stage, tokens) for stage in stages)]


@pytest.mark.parametrize(
    ("method", "tokens", "layers", "want"),
    [
        (VisionDrop(keep=32), 576, 32, [48, 35, 26, 19]),
        (VisionDrop(keep=32 / 576), 576, 32, [48, 35, 26, 19]),
        (VisionDrop(keep=32, start=3.0), 2048, 32, [96, 24, 6, 2]),
        (VisionDrop(keep=14), 16, 32, [16, 15, 13, 12]),  # no more than there are: falls slower
        (VisionDrop(keep=16), 16, 32, [16] * 4),
        (VisionDrop(keep=1.0), 16, 32, [16] * 4),
        (VisionDrop(keep=1), 16, 32, [2, 1, 1, 1]),
        (VisionDrop(keep=0.01), 16, 32, [1] * 4),
        (VisionDrop(keep=8), 16, 3, [12, 7, 5]),  # 1 + r + r^2 = 2
        (VisionDrop(keep=8), 16, 2, [12, 4]),
        (VisionDrop(keep=8), 16, 1, [8]),
        (VisionDrop(keep=8, stages_at=()), 16, 32, [8]),
        (FastV(keep=288), 576, 32, [576, 288]),
        (FastV(keep=0.5), 576, 32, [576, 288]),
        (PyramidDrop(), 576, 32, [576, 288, 144, 72]),
        (PyramidDrop(), 16, 28, [16, 8, 4, 2]),
        (PyramidDrop(keep=270), 576, 40, [576, 288, 144, 72]),
        (PyramidDrop(keep=1.0), 16, 32, [16] * 4),
        (PyramidDrop(keep=0.75), 16, 2, [16, 8]),
        (SparseVLM(keep=192), 576, 32, [576, 334, 194, 112]),
        (SparseVLM(keep=64), 576, 32, [576, 130, 29, 7]),
    ],
)
def test_schedules(method: Method, tokens: int, layers: int, want: list[int]) -> None:
    assert totals(method, tokens, layers) == want


@pytest.mark.parametrize("layers", [4, 27, 28, 32, 80])
@pytest.mark.parametrize(
    "method", [VisionDrop(keep=64), PyramidDrop(keep=300), SparseVLM(keep=192), VisionDrop(keep=1)]
)
def test_layers_see_the_budget_on_average(method: Method, layers: int) -> None:
    """Up to rounding, whatever the depth; the published totals meet theirs exactly."""
    assert method.average_tokens(576, layers) == pytest.approx(method.keep, abs=0.51)


def test_average_tokens() -> None:
    assert VisionDrop(keep=32).average_tokens(576, 32) == 32
    assert PyramidDrop().average_tokens(576, 32) == 270
    assert FastV(keep=64).average_tokens(576, 32) == (2 * 576 + 30 * 64) / 32


@pytest.mark.parametrize(
    ("layers", "want"),
    [(1, ()), (2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (28, (7, 14, 21)), (32, (8, 16, 24))],
)
def test_stages_of_shallow_and_deep_decoders(layers: int, want: tuple[int, ...]) -> None:
    for method in (VisionDrop(keep=8), PyramidDrop()):
        assert method.fitted(layers).stages(layers) == method.stages(layers) == want
    assert SparseVLM(keep=64).stages(32) == (2, 6, 15)


def test_needs() -> None:
    assert VisionDrop(keep=8).needs == {"encoder"}
    for method in (FastV(keep=8), PyramidDrop(), SparseVLM(keep=8)):
        assert method.needs == frozenset()
        assert method.budget(16) == 16
        assert method.query == ("after_image" if isinstance(method, SparseVLM) else "last_token")


def stage_signals(
    rows: int = 3, tokens: int = 16, *, seed: int = 0, causal: bool = True
) -> Signals:
    """A stage's signals of tokens that stand for one to three patches; rows know keys beside."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    x, k, flat = normal(rows, tokens, 6), normal(rows, 2, tokens, 8), normal(rows, 2, tokens, 8)
    q = {"visual": normal(rows, 4, tokens, 8), "words": normal(rows, 4, 5, 8)}
    embeds, others = normal(rows, 5, 6), normal(rows, 4, tokens)
    live = torch.ones(rows, 5, dtype=torch.bool)
    live[0, :2] = False

    def probe(*, layer: int, rotary: bool, context: str, query: str) -> TextProbe:
        last = query == "last_token"
        rows_q = q["visual" if query == "visual" else "words"][:, :, -1 if last else 0 :]
        keys = k if rotary else flat
        logits = 8**-0.5 * rows_q @ keys.repeat_interleave(2, 1).transpose(2, 3)
        lse = torch.logaddexp(logits.logsumexp(-1), others[:, :, : rows_q.shape[2]])
        weight = torch.ones(rows, tokens) if query == "visual" else live.float()
        weight = weight[:, -1:] if last else weight
        return TextProbe(
            rows_q, keys, 8**-0.5, lse if context == "all" else None, weight, (True,) * rows, causal
        )

    return Signals(
        x=x,
        grid=(1, tokens),
        size=torch.randint(1, 4, (rows, tokens), generator=draw).float(),
        probe=probe,  # type: ignore[arg-type]
        words=lambda query: Words(embeds, live, (True,) * rows),
        original=tokens,
    )


def remade(given: Signals, change: Any) -> Signals:
    """The signals with every tensor of rows changed, those of probes too."""

    def probe(**options: Any) -> TextProbe:
        assert given.probe is not None
        old = given.probe(**options)
        new = {name: None if getattr(old, name) is None else change(name, getattr(old, name),
               options["query"]) for name in ("q", "k", "lse", "weight")}  # fmt: skip
        return old._replace(**new, asked=(True,) * len(new["q"]))

    def words(query: Any) -> Words:
        assert given.words is not None
        old = given.words(query)
        embeds, valid = change("embeds", old.embeds, query), change("live", old.valid, query)
        return Words(embeds, valid, (True,) * len(embeds))

    assert given.size is not None
    x, size = change("x", given.x, None), change("size", given.size, None)
    return replace(given, x=x, size=size, probe=probe, words=words)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_permuting_the_batch_permutes_the_choice(method: Method) -> None:
    given, order = stage_signals(rows=4), torch.tensor([2, 0, 3, 1])
    moved = remade(given, lambda name, value, query: value[order])
    one, two = method.select_stage(0, given), method.select_stage(0, moved)
    assert torch.equal(one.index[order], two.index)
    assert torch.equal(one.assign[order], two.assign)
    assert torch.equal(one.tokens[order], two.tokens)
    for row in range(4):
        alone = remade(given, lambda name, value, query, at=row: value[at : at + 1])
        assert torch.equal(one.index[row : row + 1], method.select_stage(0, alone).index)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_unused_slots_change_nothing(method: Method, causal: bool) -> None:
    """Three slots behind the last, with anything in them."""
    given = stage_signals(causal=causal)

    def padded(name: str, value: Tensor, query: Any) -> Tensor:
        at = {"x": 1, "size": 1, "k": 2}.get(name)
        if query == "visual":
            at = {"q": 2, "k": 2, "lse": 2, "weight": 1}[name]
        if at is None:
            return value
        shape = list(value.shape)
        shape[at] = 3
        fill = 0.0 if name in ("weight", "size") else 7.5
        return torch.cat([value, value.new_full(shape, fill)], at)

    valid = torch.arange(19).expand(3, -1) < 16
    wide = replace(remade(given, padded), valid=valid)
    one, two = method.select_stage(0, given), method.select_stage(0, wide)
    assert not one.padded
    assert two.padded
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.assign, two.assign[:, :16])
    assert (two.assign[:, 16:] == -1).all()
    torch.testing.assert_close(one.tokens, two.tokens)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_fewer_live_tokens_than_places(method: Method) -> None:
    """All of them stay, and nothing else is there."""
    given = stage_signals()
    valid = torch.arange(16).expand(3, -1) < torch.tensor([16, 3, 1])[:, None]
    chosen = method.select_stage(0, replace(given, valid=valid))
    for row, live in enumerate((3, 1), 1):
        used = chosen.index[row][chosen.index[row] >= 0]
        assert sorted(used.tolist()) == list(range(live))
        assert (chosen.assign[row, live:] == -1).all()
        assert (chosen.assign[row, :live] >= 0).all()
    assert (chosen.index[0] >= 0).all()


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_choice_is_whole(method: Method) -> None:
    """As many slots as budgeted, each token at home in its own, what is merged a true mean."""
    given = stage_signals()
    chosen = method.select_stage(0, given)
    count = method.stage_budget(0, 16)
    assert chosen.index.shape == (3, count)
    for row in range(3):
        own = chosen.index[row].tolist()
        assert len(set(own)) == count
        assert chosen.assign[row, own].tolist() == list(range(count))
        if getattr(method, "arithmetic", None) == "released":
            continue
        assert given.size is not None
        weight = given.size[row].double()
        for slot in range(count):
            here = chosen.assign[row] == slot
            want = (weight[here, None] * given.x[row, here].double()).sum(0) / weight[here].sum()
            torch.testing.assert_close(
                chosen.tokens[row, slot].double(), want, atol=1e-6, rtol=1e-6
            )


def test_visiondrop_of_32_tokens_has_the_published_parts() -> None:
    """42 + 6, 30 + 5, 22 + 4, 16 + 3: only contextual slots take in others."""
    method, before = VisionDrop(keep=32), 576
    for stage, (dominant, contextual) in enumerate([(42, 6), (30, 5), (22, 4), (16, 3)], -1):
        given = replace(stage_signals(1, before), original=576)
        if stage < 0:
            draw = torch.Generator().manual_seed(1)
            given = replace(
                given, prefix=1, q_vis=torch.randn(1, 2, 1, 4, generator=draw),
                k_vis=torch.randn(1, 2, before + 1, 4, generator=draw),
            )  # fmt: skip
        chosen = method.select(given) if stage < 0 else method.select_stage(stage, given)
        assert chosen.index.shape == (1, dominant + contextual)
        others = torch.ones(before, dtype=torch.bool)
        others[chosen.index[0, :dominant]] = False
        assert set(chosen.assign[0, others].tolist()) == set(range(dominant, dominant + contextual))
        assert torch.equal(chosen.tokens[:, :dominant], given.x[:, chosen.index[0, :dominant]])
        before = dominant + contextual


def example(attention: list[list[float]], keys: list[list[float]], **options: Any) -> Signals:
    """Rows of weight 1 that pay a token just the attention written down, before any mask; `keys`
    are what similarity goes by."""
    logits = torch.tensor(attention).log()  # [M, N]
    count, tokens = logits.shape

    def probe(*, rotary: bool, query: str, **_: Any) -> TextProbe:
        # A query that is a unit vector reads its own coordinate of each key.
        q = torch.eye(count).view(1, 1, count, count)
        k = logits.T.contiguous() if rotary else torch.tensor(keys)
        lse = torch.zeros(1, 1, count)
        return TextProbe(q, k[None, None], 1.0, lse, torch.ones(1, count), (True,))

    return Signals(grid=(1, tokens), probe=probe, original=tokens, **options)  # type: ignore[arg-type]


# Each of eight visual rows pays token j the same: 0.2, 0.1, 0.3, ... if it can see it.
PAID = [0.2, 0.1, 0.3, 0.05, 0.25, 0.15, 0.1, 0.4]
ALIKE = [[1.0, 0], [0, 1], [5, 5], [2, 0.1], [5, 5], [1, 1], [3, 3], [1, 1.1]]
VALUES = torch.tensor([10.0, 20, 1, 4, 2, 30, 6, 3]).view(1, 8, 1)
PATCHES = torch.tensor([[1.0, 1, 1, 3, 1, 2, 2, 1]])
SIX_OF_EIGHT = {"keep": 7, "start": 1.2, "stages_at": (0.5,), "contextual": 0.5}


def test_visiondrop_by_hand() -> None:
    """Of keep 7 on average, 8 tokens enter and 6 leave: 3 dominant, 3 contextual.

    Column sums are 8 * 0.2, 7 * 0.1, 6 * 0.3, 5 * 0.05, 4 * 0.25, 3 * 0.15, 2 * 0.1, 1 * 0.4: 1.6,
    0.7, 1.8, 0.25, 1, 0.45, 0.2, 0.4. Divided by how many rows can see them, 0.4, 0.3 and 0.25 are
    largest: tokens 7, 2, 4. Left over are 0, 1, 3, 5, 6; numbers 0, 5 // 3 and 10 // 3 of these are
    references: 0, 1, 5. Token 3 (2, 0.1) is most like (1, 0), token 6 (3, 3) is like (1, 1).
    Slot of 0: one patch of 10, three of 4: 22 / 4. Slot of 5: two of 30, two of 6: 72 / 4.
    """
    given = example([PAID] * 8, ALIKE, x=VALUES, size=PATCHES)
    method = VisionDrop(**SIX_OF_EIGHT)
    assert (method.budget(8), method.stage_budget(0, 8)) == (8, 6)
    chosen = method.select_stage(0, given)
    assert chosen.index.tolist() == [[2, 4, 7, 0, 1, 5]]
    assert chosen.assign.tolist() == [[3, 4, 0, 3, 1, 5, 5, 2]]
    assert chosen.size.tolist() == [[1, 1, 1, 4, 1, 4]]
    torch.testing.assert_close(chosen.tokens.flatten(), torch.tensor([1, 2, 3, 5.5, 20, 18]))


def test_visiondrop_without_causal_correction_by_hand() -> None:
    """Column sums 1.8, 1.6 and 1 are largest: tokens 2, 0, 4. Left over are 1, 3, 5, 6, 7, the
    references 1, 3, 6; tokens 5 (1, 1) and 7 (1, 1.1) are like (3, 3). Slot of 6: two patches of
    30, two of 6, one of 3: 75 / 5."""
    given = example([PAID] * 8, ALIKE, x=VALUES, size=PATCHES)
    chosen = VisionDrop(**SIX_OF_EIGHT, causal_correction=False).select_stage(0, given)
    assert chosen.index.tolist() == [[0, 2, 4, 1, 3, 6]]
    assert chosen.assign.tolist() == [[0, 3, 1, 4, 2, 5, 5, 5]]
    torch.testing.assert_close(chosen.tokens.flatten(), torch.tensor([10.0, 1, 2, 20, 4, 15]))


def test_visiondrop_as_released_by_hand() -> None:
    """No correction: tokens 2, 0, 4 again. References are every (5 // 3 = 1)st from the start of
    1, 3, 5, 6, 7: tokens 1, 3, 5. Tokens 6 and 7 are like 5 (1, 1): 30 + (6 + 3) / 2, whatever
    they stand for; the others are alone."""
    given = example([PAID] * 8, ALIKE, x=VALUES, size=PATCHES)
    chosen = VisionDrop(**SIX_OF_EIGHT, arithmetic="released").select_stage(0, given)
    assert chosen.index.tolist() == [[0, 2, 4, 1, 3, 5]]
    assert chosen.assign.tolist() == [[0, 3, 1, 4, 2, 5, 5, 5]]
    assert chosen.size.tolist() == [[1, 1, 1, 1, 1, 3]]
    torch.testing.assert_close(chosen.tokens.flatten(), torch.tensor([10, 1, 2, 20, 4, 34.5]))


def test_visiondrop_before_the_llm_by_hand() -> None:
    """Of keep 2 on average, 3 of 6 tokens enter: 2 dominant, 1 contextual.

    The CLS row's logits over itself and the tokens are 0 and 1, 5, 2, 4, 3, 0: tokens 1 and 3. The
    first left over is the reference, 0, and takes in all others: (12 + 2 + 4 + 6) / 4.
    Released, it is 12 + (2 + 4 + 6) / 3. Its scores are the attention of that row.
    """
    logits = torch.tensor([0.0, 1, 5, 2, 4, 3, 0])
    given = Signals(
        x=torch.tensor([12.0, 7, 2, 8, 4, 6]).view(1, 6, 1), grid=(2, 3), prefix=1, scale_vis=1.0,
        q_vis=torch.ones(1, 1, 1, 1), k_vis=logits.view(1, 1, 7, 1),
    )  # fmt: skip
    method = VisionDrop(keep=2)
    assert totals(method, 6, 32) == [3, 2, 2, 1]
    chosen = method.select(given)
    assert chosen.index.tolist() == [[1, 3, 0]]
    assert chosen.assign.tolist() == [[2, 0, 2, 1, 2, 2]]
    assert chosen.tokens.flatten().tolist() == [7, 8, 6]
    released = VisionDrop(keep=2, arithmetic="released").select(given)
    assert released.tokens.flatten().tolist() == [7, 8, 16]
    torch.testing.assert_close(method.scores(given).fused[0], logits.softmax(0)[1:])


def test_fastv_by_hand() -> None:
    """The last row's attention, mean of two heads: (0.1 + 0.1) / 2, (0.5 + 0) / 2, (0.2 + 0.4) / 2,
    (0.1 + 0.3) / 2. Tokens 2 and 1 are kept; 0.4 alone, or 0.5 and 0.4, would say otherwise."""
    heads = torch.tensor([[0.1, 0.5, 0.2, 0.1], [0.1, 1e-9, 0.4, 0.3]]).log()

    def probe(*, query: str, context: str, **_: Any) -> TextProbe:
        assert (query, context) == ("last_token", "all")
        k = heads.view(1, 2, 4, 1)
        return TextProbe(
            torch.ones(1, 2, 1, 1), k, 1.0, torch.zeros(1, 2, 1), torch.ones(1, 1), (True,)
        )

    x = torch.tensor([3.0, 5, 7, 9]).view(1, 4, 1)
    given = Signals(x=x, grid=(1, 4), probe=probe, original=4)  # type: ignore[arg-type]
    chosen = FastV(keep=2).select_stage(0, given)
    assert chosen.index.tolist() == [[1, 2]]
    assert chosen.assign.tolist() == [[-1, 0, 1, -1]]
    assert chosen.tokens.flatten().tolist() == [5, 7]
    assert chosen.size.tolist() == [[1, 1]]


def test_pyramiddrop_by_hand() -> None:
    """Eight tokens, then 4, 2, 1: each time those that get most attention, in their order."""
    method, x = PyramidDrop(), torch.arange(8.0).view(1, 8, 1)
    for stage, want in enumerate([[2, 4, 6, 7], [4, 7], [7]]):
        left = x.flatten().long().tolist()
        paid = [[0.1, 0.05, 0.11, 0.06, 0.2, 0.07, 0.12, 0.3][token] for token in left]
        given = example([paid], [[1.0]] * len(left), x=x)
        x = method.select_stage(stage, replace(given, original=8)).tokens
        assert x.flatten().tolist() == want


def test_sparsevlm_by_hand() -> None:
    """Keep 6 on average: 8 tokens, then 4, of which ceil(0.25 * 0.5 * 4) = 1 is a cluster.

    All tokens are (log 3, 0), but token 5 is (0, log 3). The words (1, 0) and (0, 1) get softmax
    shares of 3/4 and 1/4, of token 5 the other way round: relevances 22/32 and 10/32. The first is
    the rater (a third word is padding). It pays most to tokens 1, 3, 4: dominant. Five are left
    over; half of them, rounded to even, are recycled: 7 and 5, the next by its attention. Token 5
    is the reference, of one patch, and 7 joins it with three. The other word would have kept 0.
    """
    paid = [0.05, 0.3, 0.02, 0.2, 0.15, 0.1, 0.01, 0.12]
    other = [0.9, *[0.01] * 7]
    x = torch.tensor([[log(3), 0]] * 8)[None]
    x[0, 5] = torch.tensor([0, log(3)])
    given = example([[0.9] * 8, paid, other], [], x=x,
                    size=torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 3]]))  # fmt: skip
    assert given.probe is not None
    probe = given.probe(layer=0, rotary=True, context="all", query="after_image")
    weight = torch.tensor([[0.0, 1, 1]])
    embeds = torch.tensor([[[90.0, 90], [1, 0], [0, 1]]])
    given = replace(
        given,
        probe=lambda **_: probe._replace(weight=weight),
        words=lambda _: Words(embeds, weight > 0, (True,)),
    )
    method = SparseVLM(keep=6, stages_at=(0.5,), recycle=0.5, clusters=0.25)
    assert method.stage_budget(0, 8) == 4
    chosen = method.select_stage(0, given)
    assert chosen.index.tolist() == [[1, 3, 4, 5]]
    assert chosen.assign.tolist() == [[-1, 0, -1, 1, 2, 3, -1, 3]]
    assert chosen.size.tolist() == [[1, 1, 1, 4]]
    torch.testing.assert_close(chosen.tokens[0, 3], torch.tensor([0.75, 0.25]) * log(3))
    plain = replace(method, recycle=0.0).select_stage(0, given)
    assert plain.index.tolist() == [[1, 3, 4, 7]]
    assert plain.assign.tolist() == [[-1, 0, -1, 1, 2, -1, -1, 3]]
    assert torch.equal(plain.tokens, x[:, plain.index[0]])


def test_words_all_alike_are_all_raters() -> None:
    """Three relevances of a third: rounding must not leave an image without raters."""
    given = stage_signals(rows=2)
    alike = torch.ones(2, 5, 6)
    given = replace(
        given, words=lambda _: Words(alike, torch.ones(2, 5, dtype=torch.bool), (True,) * 2)
    )
    chosen = SparseVLM(keep=8, recycle=0.0).select_stage(0, given)
    assert given.probe is not None
    probe = given.probe(layer=0, rotary=True, context="all", query="after_image")
    score = torch.ops.cdrop.attention_saliency(
        probe.q, probe.k, scale=probe.scale, lse=probe.lse, query_weight=probe.weight
    )
    want = score.topk(chosen.index.shape[1], dim=1).indices.sort(1).values
    assert torch.equal(chosen.index, want)


@pytest.mark.parametrize("method", [FastV(keep=6, query="after_image"), SparseVLM(keep=8)])
def test_an_image_without_a_question_is_asked_by_the_last_token(method: Method) -> None:
    given = stage_signals()
    assert given.probe is not None
    probe = given.probe

    def unasked(**options: Any) -> TextProbe:
        found = probe(**options)
        if options["query"] == "last_token":
            return found
        weight = found.weight.clone()
        weight[1] = 0
        return found._replace(weight=weight, asked=(True, False, True))

    chosen = method.select_stage(0, replace(given, probe=unasked))
    whole = method.select_stage(0, given)
    last = replace(method, query="last_token").select_stage(0, given) if isinstance(
        method, FastV) else None  # fmt: skip
    assert torch.equal(chosen.index[[0, 2]], whole.index[[0, 2]])
    if last is not None:
        assert torch.equal(chosen.index[1], last.index[1])
    else:
        found = probe(layer=0, rotary=True, context="all", query="last_token")
        score = torch.ops.cdrop.attention_saliency(
            found.q, found.k, scale=found.scale, lse=found.lse, query_weight=found.weight
        )
        assert score[1].argmax() in chosen.index[1]
