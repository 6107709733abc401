"""What a patch did: the last prefill in detail, all of them in sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..methods.base import Scores, Selection
from .layout import Layout, Shortened


@dataclass(frozen=True, eq=False)
class Pruning:
    """One prefill. `R` images in `B` prompts of `L` tokens, `N` visual tokens each.

    Where images have different sizes, `N` and `S` are those of the largest, and the others padded.

    Attributes:
        selection: what became of the visual tokens: `tokens [R, S, D]`, `index [R, S]`,
            `assign [R, N]`, `size [R, S]`; -1 on padding.
        sample: the prompt that each image belongs to, length `R`.
        grids: height and width of the patch grid of each image.
        columns: the places of each image's tokens in its prompt, int64 `[N_i]` on the CPU.
        tokens_before, tokens_after: visual tokens of each prompt, length `B`.
        keep_mask: `[B, L]` bool, the tokens of the prompt that the LLM saw.
        stages: visual tokens of each prompt after each stage inside the decoder.
    """

    selection: Selection
    sample: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    columns: tuple[Tensor, ...]
    tokens_before: tuple[int, ...]
    tokens_after: tuple[int, ...]
    keep_mask: Tensor
    stages: tuple[tuple[int, ...], ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """The grid that all images have.

        Raises:
            ValueError: they have several.
        """
        if len(set(self.grids)) != 1:
            raise ValueError(f"the images have grids of their own, see grids: {self.grids}")
        return self.grids[0]

    @property
    def scores(self) -> Scores:
        """`visual`, `textual` and `fused`, each `[R, N]` float32, computed when first asked for.

        Raises:
            RuntimeError: the method has none, or the patch does not keep its signals.
        """
        return self.selection.scores

    @classmethod
    def of(cls, chosen: Sequence[Selection], layout: Layout, short: Shortened | None) -> Pruning:
        """The report of a prefill; `short` is None where nothing was dropped."""
        before = layout.visual.sum(1).tolist()
        if short is None:
            keep = layout.valid.to(layout.device)
            after = before
        else:
            keep = short.keep
            text = layout.text.sum(1).tolist()
            after = [n - t for n, t in zip(short.lengths, text, strict=True)]
        order = [i for group in layout.groups for i in group.members]
        return cls(
            _join(chosen, order),
            tuple(place.row for place in layout.places),
            tuple(place.grid for place in layout.places),
            tuple(place.columns for place in layout.places),
            tuple(before),
            tuple(after),
            keep,
        )


def _join(chosen: Sequence[Selection], order: list[int]) -> Selection:
    """The selections of several groups as one, that of image `order[i]` the i-th of them."""
    if len(chosen) == 1 and order == sorted(order):
        return chosen[0]
    slots = max(s.index.shape[1] for s in chosen)
    tokens = max(s.assign.shape[1] for s in chosen)
    back = torch.tensor(order).argsort()

    def join(parts: list[Tensor], width: int, fill: float) -> Tensor:
        padded = [_padded(part, width, fill) for part in parts]
        return torch.cat(padded)[back.to(padded[0].device)]

    def scores() -> Scores:
        found = [s.scores for s in chosen]
        asked = all(f.textual is not None for f in found)
        return Scores(
            join([f.visual for f in found], tokens, -torch.inf),
            join([f.textual for f in found if f.textual is not None], tokens, -torch.inf)
            if asked
            else None,
            join([f.fused for f in found], tokens, -torch.inf),
        )

    return Selection(
        join([s.tokens for s in chosen], slots, 0.0),
        join([s.index for s in chosen], slots, -1),
        join([s.assign for s in chosen], tokens, -1),
        join([s.size for s in chosen], slots, 0.0),
        padded=True,
        score_fn=scores if all(s.score_fn is not None for s in chosen) else None,
    )


def _padded(part: Tensor, width: int, fill: float) -> Tensor:
    missing = width - part.shape[1]
    if missing == 0:
        return part
    pad = part.new_full((part.shape[0], missing, *part.shape[2:]), fill)
    return torch.cat([part, pad], 1)


@dataclass(frozen=True)
class Stats:
    """Sums over all prefills since `patch`.

    Attributes:
        prefills: how many.
        tokens_before, tokens_after: visual tokens.
        kv_bytes_before, kv_bytes_after: keys and values that prefills put into caches, padding
            included; calls without a cache count nothing.
    """

    prefills: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    kv_bytes_before: int = 0
    kv_bytes_after: int = 0

    @property
    def kv_bytes_saved(self) -> int:
        """Cache bytes that were not needed."""
        return self.kv_bytes_before - self.kv_bytes_after

    def with_less(self, kv_bytes: int) -> Stats:
        """With fewer bytes in the caches of layers behind a stage."""
        return replace(self, kv_bytes_after=self.kv_bytes_after - kv_bytes)

    def plus(self, pruning: Pruning, kv_bytes: int, rows: int, length: int, width: int) -> Stats:
        """With one more prefill of `rows` prompts, `length` tokens before and `width` after, each
        of `kv_bytes` bytes."""
        return Stats(
            self.prefills + 1,
            self.tokens_before + sum(pruning.tokens_before),
            self.tokens_after + sum(pruning.tokens_after),
            self.kv_bytes_before + kv_bytes * rows * length,
            self.kv_bytes_after + kv_bytes * rows * width,
        )
