"""ConsensusDrop's even coverage, and what its probes ask the model for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consensusdrop_kernels.methods import ConsensusDrop, Signals
from consensusdrop_kernels.methods.coverage import even_priority, farthest_points

from .test_methods import signals


def test_farthest_points_by_hand() -> None:
    """A row of seven cells, 0..6; in half cells: centres at 0 2 .. 12, borders at -1 and 13.

    A cell's mirror image is twice as far as the border above it, 2 half cells, whatever its column:
    all begin alike, and stay so, as no cell is nearer to another one. From the mirror images beyond
    both ends the middle, 3, is farthest. Then 1 and 5 are 4 half cells from it and 6 from those
    images, the others 2 from one or the other: 1 and 5, and the rest by index.

    Of three by three cells the middle, 4, is 6 from its mirror images and all others 2: first the
    middle, then by index.
    """
    assert farthest_points(1, 7, 7).tolist() == [3, 1, 5, 0, 2, 4, 6]
    assert farthest_points(7, 1, 7).tolist() == [3, 1, 5, 0, 2, 4, 6]
    assert farthest_points(3, 3, 9).tolist() == [4, 0, 1, 2, 3, 5, 6, 7, 8]


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_every_beginning_is_spread(height: int, width: int, data: Any) -> None:
    """Distinct cells, and none nearer to an earlier one than the one before it was to those."""
    count = data.draw(st.integers(1, height * width))
    order = farthest_points(height, width, count)
    assert len(set(order.tolist())) == count
    cells = torch.stack([order // width, order % width], 1).double()
    gaps = [torch.cdist(cells[i : i + 1], cells[:i]).min() for i in range(1, count)]
    rims = torch.stack(
        [
            cells[:, 0] + 0.5,
            height - 0.5 - cells[:, 0],
            cells[:, 1] + 0.5,
            width - 0.5 - cells[:, 1],
        ]
    ).amin(0)
    reach = [min(float(gap), float(2 * rim)) for gap, rim in zip(gaps, rims[1:], strict=True)]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(reach, reach[1:], strict=False))
    whole = farthest_points(height, width, height * width)
    assert torch.equal(whole[:count], order)


@pytest.mark.parametrize(("height", "width"), [(1, 48), (2, 24), (3, 24), (6, 40), (40, 6)])
@pytest.mark.parametrize("count", [2, 4, 7])
def test_a_strip_is_covered_from_end_to_end(height: int, width: int, count: int) -> None:
    """No cell is farther along the strip from those that come first than a few could be apart."""
    order, long = farthest_points(height, width, count), max(height, width)
    place = order % width if width == long else order // width
    gaps = (torch.arange(long)[:, None] - place).abs().amin(1)
    assert gaps.max() <= 1.1 * long / count


def test_crops_take_turns_by_their_sizes() -> None:
    """Of 4 x 4 and 2 x 4 cells, six places: four and two."""
    here = Signals(x=torch.zeros(1, 24, 2), grid=(4, 4), crops=((4, 4), (2, 4)))
    first = even_priority(here, 6).topk(6).indices
    assert (first < 16).sum() == 4
    assert torch.equal(first[first < 16].sort().values, farthest_points(4, 4, 4).sort().values)
    ragged = Signals(x=torch.zeros(1, 23, 2), grid=(4, 4))
    order = even_priority(ragged, 23).argsort(descending=True)
    assert torch.equal(order, farthest_points(1, 23, 23))


@pytest.mark.parametrize("coverage", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("parts", [False, True])
def test_a_share_of_the_places_is_spread_evenly(coverage: float, parts: bool) -> None:
    """The consensus chooses the rest; both ways in which an encoder speaks."""
    given = signals(rows=3, tokens=24)
    if parts:
        given = replace(
            given, visual=torch.rand(3, 24), metric=torch.randn(3, 24, 5), q_vis=None, k_vis=None
        )
    method = ConsensusDrop(keep=8, coverage=coverage, diversity=0.0, fusion="zscore")  # no ties
    best = method.scores(given).fused.argsort(dim=1, descending=True, stable=True)
    order = farthest_points(3, 8, 8).tolist()
    chosen = method.select(given)
    for row in range(3):
        spread = round(8 * coverage)
        kept = best[row, : 8 - spread].tolist()
        kept += [place for place in order if place not in kept][:spread]
        assert sorted(kept) == chosen.index[row].tolist()
    assert torch.equal(chosen.size.sum(1), torch.full((3,), 24.0))


@pytest.mark.parametrize(("probe", "ahead"), [("static", False), ("lookahead", True)])
def test_what_the_probe_is_asked_for(probe: str, ahead: bool) -> None:
    given, asked = signals(), []
    answer = given.probe

    def note(**options: Any) -> Any:
        asked.append(options)
        return answer(**options)

    ConsensusDrop(keep=4, probe=probe, probe_layer=3).select(replace(given, probe=note))
    assert asked[0]["lookahead"] is ahead
    assert asked[0]["layer"] == 3


def test_the_decoders_own_probe_drops_inside() -> None:
    method = ConsensusDrop(keep=4, contextual=2, probe="in_llm", probe_layer=2)
    assert method.budget(12) == 12
    assert method.stages(8) == (2,)
    assert method.stage_budget(0, 12) == 6
    given = signals()
    before = replace(method, probe="static", rows="last").select(given)
    inside = method.select_stage(0, given)
    assert torch.equal(before.index, inside.index)
    assert torch.equal(before.tokens, inside.tokens)
    with pytest.raises(RuntimeError, match="inside the decoder"):
        method.scores(given)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"probe": "deep"}, "probe must be one of static, lookahead, in_llm"),
        ({"probe": "in_llm"}, "probe_layer must be >= 1 with probe='in_llm'"),
        ({"coverage": 1.5}, "coverage must be a number in 0..1, got 1.5"),
        ({"diversity": -0.1}, "diversity must be a number in 0..1, got -0.1"),
        ({"diversity": 0.01}, "diversity must be 0 or in 0.02..1, got 0.01"),
        ({"diversity": 0.5, "coverage": 0.5}, "coverage must be 0 unless diversity is 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ConsensusDrop(**({"keep": 4} | options))


def most_probable(features: torch.Tensor, relevance: torch.Tensor, keep: int) -> list[int]:
    """Token after token, that which makes the determinant of `diag(r) S diag(r)` largest."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    kernel = relevance.double()[:, None] * (unit @ unit.T) * relevance.double()
    kept: list[int] = []
    for _ in range(keep):
        rest = [i for i in range(len(kernel)) if i not in kept]
        kept.append(max(rest, key=lambda i: float(kernel[[*kept, i]][:, [*kept, i]].det())))
    return sorted(kept)


@pytest.mark.parametrize("diversity", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("parts", [False, True])
def test_a_diverse_choice_is_the_most_probable_set(diversity: float, parts: bool) -> None:
    """Places in the consensus 0, 1, ... of 12 tokens; both ways in which an encoder speaks."""
    given = signals(rows=3)
    given = replace(given, k_vis=torch.randn(3, 2, 13, 8), q_vis=torch.randn(3, 2, 1, 8))
    metric = given.k_vis[:, :, 1:].mean(1)
    if parts:
        metric = torch.randn(3, 12, 7)
        given = replace(given, visual=torch.rand(3, 12), metric=metric, q_vis=None, k_vis=None)
    method = ConsensusDrop(keep=5, diversity=diversity, fusion="zscore")
    chosen = method.select(given)
    place = method.scores(given).fused.argsort(dim=1, descending=True).argsort(dim=1)
    relevance = (-(1 / diversity - 1) * place / 12).exp()
    for row in range(3):
        assert chosen.index[row].tolist() == most_probable(metric[row], relevance[row], 5)
    assert torch.equal(chosen.size.sum(1), torch.full((3,), 12.0))


def test_a_diverse_choice_by_hand() -> None:
    """Keys (1, 0), (1, 0), (0, 1), (0, -1); consensus 0, 1, 2, 3. After token 0 its twin 1 adds
    nothing to the determinant; 2 and 3 add alike by their keys, and 2 comes first in the consensus.
    The best two of the consensus would be 0 and 1."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    given = Signals(
        x=torch.eye(4)[None],
        grid=(2, 2),
        visual=torch.tensor([[4.0, 3.0, 2.0, 1.0]]),
        metric=keys[None],
    )
    method = ConsensusDrop(keep=2, alpha=0.0, diversity=0.5)
    assert method.select(given).index.tolist() == [[0, 2]]
    assert method.select(given).assign.tolist() == [[0, 0, 1, 0]]
    assert replace(method, diversity=0.0).select(given).index.tolist() == [[0, 1]]


def test_padding_does_not_change_a_diverse_choice() -> None:
    given = replace(signals(rows=1), visual=torch.rand(1, 12), metric=torch.randn(1, 12, 9))
    method = ConsensusDrop(keep=4, alpha=0.0, diversity=0.3)
    want = method.select(given)
    x = torch.cat([given.x, torch.randn(1, 5, 6)], 1)
    longer = replace(
        given, x=x, visual=torch.cat([given.visual, torch.full((1, 5), 9.0)], 1),
        metric=torch.randn(1, 17, 9).index_copy(1, torch.arange(12), given.metric),
        valid=torch.arange(17)[None] < 12,
    )  # fmt: skip
    got = method.select(longer)
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.assign[:, :12], want.assign)
