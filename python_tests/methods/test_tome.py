"""ToMe: worked by hand, and against the paper's steps in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from consensusdrop_kernels.methods import Signals, ToMe

from .cases import at_angles, by_scores, column, draw


def test_tome_by_hand() -> None:
    """Keys at 0, 5, 50, 80, 170, 180 degrees. Tokens 0, 2, 4 look for a partner among 1, 3, 5: 5,
    30 and 10 degrees away. For four slots the two closest pairs merge. For two, all three do, and
    of what is left, at 2.5, 65 and 175 degrees, the first is closer to the middle one."""
    signals = Signals(
        x=column(1, 3, 4, 8, 10, 12), grid=(2, 3), visual=torch.zeros(1, 6),
        metric=at_angles(0, 5, 50, 80, 170, 180),
    )  # fmt: skip
    chosen = ToMe(keep=4).select(signals)
    assert chosen.index.tolist() == [[1, 2, 3, 5]]
    assert chosen.assign.tolist() == [[0, 0, 1, 2, 3, 3]]
    assert chosen.tokens.flatten().tolist() == [2.0, 4.0, 8.0, 11.0]
    chosen = ToMe(keep=2).select(signals)
    assert chosen.index.tolist() == [[3, 5]]
    assert chosen.assign.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert chosen.size.tolist() == [[4.0, 2.0]]
    assert chosen.tokens.flatten().tolist() == [4.0, 11.0]


def matched(keys: torch.Tensor, keep: int) -> list[tuple[int, list[int]]]:
    """Bipartite soft matching by the paper's steps on `[N, F]`: each slot's token and members."""
    slots = [(i, [i]) for i in range(len(keys))]
    while len(slots) > keep:
        mean = torch.stack([keys[members].double().mean(0) for _, members in slots])
        unit = torch.nn.functional.normalize(mean, dim=1)
        edges = []
        for a in range(0, len(slots), 2):
            cosines = [(float(unit[a] @ unit[b]), b) for b in range(1, len(slots), 2)]
            edges.append((*max(cosines), a))
        edges.sort(reverse=True)
        merging = edges[: min(len(slots) // 2, len(slots) - keep)]
        for _, b, a in merging:
            slots[b] = (slots[b][0], slots[b][1] + slots[a][1])
        gone = {a for _, _, a in merging}
        slots = [slot for at, slot in enumerate(slots) if at not in gone]
    return slots


@pytest.mark.parametrize("keep", [1, 2, 5, 11, 12, 13, 22])
def test_tome_is_bipartite_soft_matching(keep: int) -> None:
    signals = by_scores(draw(3, 23, seed=keep))
    chosen = ToMe(keep=keep).select(signals)
    for row in range(3):
        want = matched(signals.metric[row], keep)
        assert chosen.index[row].tolist() == [own for own, _ in want]
        assign = chosen.assign[row].tolist()
        for slot, (_, members) in enumerate(want):
            assert [t for t in range(23) if assign[t] == slot] == sorted(members)


def test_tome_drops_what_is_like_nothing() -> None:
    """A token whose key is NaN has no partner: it is the last to go, and then dropped for good."""
    metric = at_angles(0, 5, 50, 90)
    metric[0, 2] = math.nan
    signals = Signals(column(1, 3, 4, 8), (2, 2), visual=torch.zeros(1, 4), metric=metric)
    chosen = ToMe(keep=3).select(signals)
    assert chosen.assign.tolist() == [[0, 0, 1, 2]]
    assert chosen.tokens.flatten().tolist() == [2.0, 4.0, 8.0]
    chosen = ToMe(keep=2).select(signals)
    assert chosen.assign.tolist() == [[0, 0, -1, 1]]
    assert chosen.tokens.flatten().tolist() == [2.0, 8.0]


def test_tome_merges_opposites_before_padding() -> None:
    """Four tokens at 0, 180, 10, 200 degrees and two of padding, three places: of two pairs that
    point away from each other the one 160 degrees apart is merged."""
    signals = Signals(
        x=column(1, 2, 4, 5, 9, 9), grid=(2, 3), visual=torch.zeros(1, 6),
        metric=at_angles(0, 180, 10, 200, 0, 0), valid=torch.arange(6)[None] < 4,
    )  # fmt: skip
    chosen = ToMe(keep=3).select(signals)
    assert chosen.index.tolist() == [[1, 2, 3]]
    assert chosen.assign.tolist() == [[2, 0, 1, 2, -1, -1]]
    assert chosen.tokens.flatten().tolist() == [2.0, 4.0, 3.0]
