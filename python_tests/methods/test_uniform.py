"""Uniform: places worked by hand, and how evenly they lie."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consensusdrop_kernels.methods import Signals, Uniform

from .cases import draw


def test_uniform_by_hand() -> None:
    """Four of 4x4: rows and columns 1 and 3. Of two crops of 2x2, two each, side by side. Two for
    five crops of one token: .4 .8 1.2 1.6 2 come to 0 1 1 2 2. Of 5 tokens that are no grid, the
    middle ones of 5 / 2: 1 and 3."""
    one = Uniform(keep=4).select(Signals(x=torch.arange(32.0).view(2, 16, 1), grid=(4, 4)))
    assert one.index.tolist() == [[5, 7, 13, 15]] * 2
    assert one.tokens[1].flatten().tolist() == [21.0, 23.0, 29.0, 31.0]
    crops = Signals(x=torch.zeros(1, 8, 1), grid=(4, 2), crops=((2, 2), (2, 2)))
    assert Uniform(keep=4).select(crops).index.tolist() == [[2, 3, 6, 7]]
    frames = Signals(x=torch.zeros(1, 5, 1), grid=(5, 1), crops=((1, 1),) * 5)
    assert Uniform(keep=2).select(frames).index.tolist() == [[1, 3]]
    line = Signals(x=torch.zeros(1, 5, 1), grid=(2, 4))
    assert Uniform(keep=2).select(line).index.tolist() == [[1, 3]]


def test_uniform_refuses_padding() -> None:
    signals = replace(draw(), valid=torch.ones(3, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="Uniform takes images of equal token counts only"):
        Uniform(keep=4).select(signals)


@given(
    data=st.data(),
    grids=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
)
def test_uniform_spreads_over_crops(data: Any, grids: list[tuple[int, int]]) -> None:
    """Distinct places in order, as many in each crop as its size deserves, to one."""
    total = sum(h * w for h, w in grids)
    keep = data.draw(st.integers(1, total))
    signals = Signals(x=torch.zeros(1, total, 1), grid=(total, 1), crops=tuple(grids))
    places = Uniform(keep=keep).select(signals).index[0].tolist()
    assert places == sorted(set(places))
    assert len(places) == keep
    first = 0
    for height, width in grids:
        end = first + height * width
        inside = sum(first <= place < end for place in places)
        assert abs(inside - keep * (end - first) / total) <= 1
        first = end
    assert places[-1] < total


@pytest.mark.parametrize("keep", [9, 24, 36, 48, 64, 100, 144, 288])
def test_uniform_leaves_no_hole(keep: int) -> None:
    """No cell of a 24 x 24 grid is farther from a kept one than rows and columns are apart."""
    signals = Signals(x=torch.zeros(1, 576, 1), grid=(24, 24))
    place = Uniform(keep=keep).select(signals).index[0]
    cell = torch.arange(576)
    down = (cell[:, None] // 24 - place // 24).abs()
    across = (cell[:, None] % 24 - place % 24).abs()
    nearest = torch.maximum(down, across).amin(1)
    assert nearest.max() <= 24 / math.sqrt(keep)
