"""An order of the patches in which every beginning is spread evenly over the picture."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .base import Signals


def even_priority(signals: Signals, count: int) -> Tensor:
    """`[N]` float32 on the device of the tokens, higher is earlier in the order.

    In each crop (or frame) by `farthest_points`, ties to the lower index; crops take turns by their
    sizes. Only the first `count` tokens are ordered so. Tokens that are no whole grids count as one
    row.
    """
    tokens = signals.x.shape[1]
    grids = signals.crops or (signals.grid,)
    if sum(height * width for height, width in grids) != tokens:
        grids = ((1, tokens),)
    return _priority(grids, count, signals.x.device)


@lru_cache(maxsize=64)
def _priority(grids: tuple[tuple[int, int], ...], count: int, device: torch.device) -> Tensor:
    total = sum(height * width for height, width in grids)
    with torch.inference_mode(False):  # it outlives the call
        parts = []
        for height, width in grids:
            cells = height * width
            # Turns by size: of the first `count`, no crop has more than its share and one.
            share = min(cells, count * cells // total + 2)
            turn = torch.full((cells,), 2.0)
            order = farthest_points(height, width, share)
            turn[order] = (torch.arange(share) + 0.5) / cells
            parts.append(turn)
        return -torch.cat(parts).to(device)


def farthest_points(height: int, width: int, count: int) -> Tensor:
    """The first `count` cells of a grid in farthest-point order, int64 on the CPU.

    Each next cell is the one farthest from those before it and from their like beyond the border:
    a cell counts as near to its own mirror image there, or half of the cells would lie on the rim.
    Of equals, as in a strip, where the long borders are near to every cell, it is the one farthest
    from those before it and from the mirror images beyond the short borders alone.
    """
    cell = torch.arange(height * width)
    # Twice the coordinates, so that the borders, half a cell away, are whole numbers too.
    row, column = 2 * (cell // width), 2 * (cell % width)
    above, beside = (row + 1, 2 * height - 1 - row), (column + 1, 2 * width - 1 - column)
    ends = above if height > width else beside if width > height else above + beside
    nearest = (2 * torch.stack(above + beside).amin(0)) ** 2
    along = (2 * torch.stack(ends).amin(0)) ** 2
    most = (4 * max(height, width)) ** 2
    order: list[int] = []
    while len(order) < count:
        order.append(int((nearest * (most + 1) + along).argmax()))
        last = order[-1]
        away = (row - row[last]) ** 2 + (column - column[last]) ** 2
        nearest, along = torch.minimum(nearest, away), torch.minimum(along, away)
        nearest[last] = -1
    return torch.tensor(order)
