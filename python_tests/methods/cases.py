"""Signals drawn at random, for tests of methods without a model."""

from __future__ import annotations

from dataclasses import replace

import torch

from consensusdrop_kernels.methods import Signals, TextProbe, Words
from consensusdrop_kernels.methods.parts import encoder_metric, encoder_saliency


def draw(rows: int = 3, tokens: int = 24, *, words: int = 4, seed: int = 0) -> Signals:
    """Signals of an encoder with a CLS token, and of a question of `words` words; the LLM's layers
    say the same whatever they are asked."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    asked = Words(normal(rows, words, 6), torch.ones(rows, words, dtype=torch.bool), (True,) * rows)
    signals = Signals(
        x=normal(rows, tokens, 6),
        grid=(3, tokens // 3),
        q_vis=normal(rows, 2, 1, 8),
        k_vis=normal(rows, 2, tokens + 1, 8),
        prefix=1,
        words=lambda _: asked,
    )
    q, k = normal(rows, 2, words, 8), normal(rows, 2, tokens, 8)
    probe = TextProbe(q, k, 8**-0.5, None, torch.ones(rows, words), (True,) * rows)
    return replace(signals, probe=lambda **_: probe)


def rows_of(signals: Signals, rows: list[int]) -> Signals:
    """Some of the images, their questions too."""
    index = torch.tensor(rows, dtype=torch.long)
    assert signals.words is not None
    words = signals.words("after_image")
    own = Words(words.embeds[index], words.valid[index], tuple(words.asked[i] for i in rows))
    return replace(signals.rows(index), words=lambda _: own)


def tokens_of(signals: Signals, chosen: torch.Tensor) -> Signals:
    """The same images with only some of their tokens, `chosen` int64 `[n]`."""
    assert signals.k_vis is not None
    keys = torch.cat([signals.k_vis[:, :, :1], signals.k_vis[:, :, 1:][:, :, chosen]], 2)
    return replace(signals, x=signals.x[:, chosen], k_vis=keys, grid=(1, len(chosen)))


def by_scores(signals: Signals) -> Signals:
    """The same, where the encoder comes as scores and a metric."""
    return replace(
        signals,
        visual=encoder_saliency(signals),
        metric=encoder_metric(signals),
        q_vis=None,
        k_vis=None,
        prefix=0,
    )


def column(*values: float) -> torch.Tensor:
    """Tokens of width 1, `[1, N, 1]`."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1)


def at_angles(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, `[1, N, 2]`."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)[None]
