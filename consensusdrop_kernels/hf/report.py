"""What a patch did: the last prefill in detail, all of them in sum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..methods.base import Scores, Selection
from .layout import Layout, Shortened


@dataclass(frozen=True, eq=False)
class Pruning:
    """One prefill. `R` images in `B` prompts of `L` tokens, `N` visual tokens each.

    Attributes:
        selection: what became of the visual tokens: `tokens [R, S, D]`, `index [R, S]`,
            `assign [R, N]`, `size [R, S]`.
        sample: the prompt that each image belongs to, length `R`.
        grid: height and width of the patch grid.
        tokens_before, tokens_after: visual tokens of each prompt, length `B`.
        keep_mask: `[B, L]` bool, the tokens of the prompt that the LLM saw.
    """

    selection: Selection
    sample: tuple[int, ...]
    grid: tuple[int, int]
    tokens_before: tuple[int, ...]
    tokens_after: tuple[int, ...]
    keep_mask: Tensor

    @property
    def scores(self) -> Scores:
        """`visual`, `textual` and `fused`, each `[R, N]` float32, computed when first asked for.

        Raises:
            RuntimeError: the method has none, or the patch does not keep its signals.
        """
        return self.selection.scores

    @classmethod
    def of(
        cls, selection: Selection, grid: tuple[int, int], layout: Layout, short: Shortened | None
    ) -> Pruning:
        """The report of a prefill; `short` is None where nothing was dropped."""
        before = layout.visual.sum(1).tolist()
        if short is None:
            keep = layout.valid.to(layout.sample.device)
            after = before
        else:
            keep = short.keep
            text = (layout.valid & ~layout.visual).sum(1).tolist()
            after = [n - t for n, t in zip(short.lengths, text, strict=True)]
        return cls(selection, layout.sample_list, grid, tuple(before), tuple(after), keep)


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
