"""What several methods do with signals: score, pick, merge; each a call or two of an op."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..reference import contextual_slots
from .base import QueryRule, Selection, Signals, Words


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for what runs there."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def encoder_saliency(signals: Signals) -> Tensor:
    """How much the encoder attends to each token, `[R, N]` float32.

    Raises:
        ValueError: the signals hold nothing of the encoder.
    """
    if signals.visual is not None:
        return signals.visual
    if signals.q_vis is None or signals.k_vis is None:
        raise ValueError('the method must name "encoder" in its needs')
    key_valid = signals.valid
    if key_valid is not None and signals.prefix:
        key_valid = torch.nn.functional.pad(key_valid, (signals.prefix, 0), value=True)
    return torch.ops.cdrop.attention_saliency(
        signals.q_vis,
        signals.k_vis,
        scale=signals.scale_vis,
        lse=signals.lse_vis,
        key_valid=key_valid,
        prefix=signals.prefix,
    )


def encoder_metric(signals: Signals) -> Tensor:
    """What to merge by: the encoder's keys of the tokens, mean of heads, `[R, N, F]`.

    Raises:
        ValueError: the signals hold nothing of the encoder.
    """
    if signals.metric is not None:
        return signals.metric
    if signals.k_vis is None:
        raise ValueError('the method must name "encoder" in its needs')
    # The sum of half-precision keys loses what tells them apart.
    return signals.k_vis[:, :, signals.prefix :].mean(1, dtype=torch.float32)


def most_attended(signals: Signals, keep: int) -> tuple[Tensor, Tensor]:
    """The tokens that the encoder attends to most: `index [R, keep]` as the select ops return it,
    and what it goes by, `[R, N]` float32, -inf on padding.

    Raises:
        ValueError: the signals hold nothing of the encoder.
    """
    index, score = torch.ops.cdrop.consensus_select(
        encoder_saliency(signals), None, keep, valid=signals.valid
    )
    return index, score


def question_words(signals: Signals, query: str | QueryRule) -> Words:
    """The question's embeddings.

    Raises:
        ValueError: the signals hold none.
    """
    if signals.words is None:
        raise ValueError('the method must name "words" in its needs')
    return signals.words(query)


def warn_unasked(asked: Sequence[bool], instead: str) -> None:
    """Warns the caller of `select` if an image has no question; `instead` is what it goes by."""
    if not all(asked):
        warnings.warn(f"a prompt has no text: its image goes by {instead} alone", stacklevel=3)


def below_gradients() -> AbstractContextManager[None]:
    """For a call of a merging op: where no gradient is wanted, straight to its kernel. The gradient
    of such an op is Python, and a call would pass through that first."""
    wanted = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if wanted or torch.compiler.is_compiling():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def picked(signals: Signals, index: Tensor) -> Selection:
    """The tokens at `index [R, K]` (ascending, -1 where unused) as they are, the rest dropped."""
    rows, tokens, width = signals.x.shape
    here = index.clamp_min(0)
    used = index >= 0
    # One more place takes the unused slots.
    assign = torch.full((rows, tokens + 1), -1, device=index.device)
    slot = torch.arange(index.shape[1], device=index.device).expand_as(index)
    assign = assign.scatter(1, index.masked_fill(~used, tokens), slot)[:, :tokens]
    kept = signals.x.gather(1, here[..., None].expand(-1, -1, width))
    padded = signals.valid is not None
    if padded:
        kept = kept * used[..., None]
    return Selection(kept, index, assign, used.float(), padded)


def merged(
    signals: Signals, index: Tensor, metric: Tensor, *, contextual: int = 0,
    threshold: float = -1.0, blend: float = 1.0,
) -> Selection:  # fmt: skip
    """The tokens at `index [R, K]`, the rest merged by `metric [R, N, F]` as `token_merge` does;
    tokens that stand for several count as many."""
    with below_gradients():
        tokens, assign, size = torch.ops.cdrop.token_merge(
            signals.x, metric, index, contextual=contextual, weight=signals.size,
            valid=signals.valid, threshold=threshold, blend=blend,
        )  # fmt: skip
    if contextual > 0:
        references = contextual_slots(assign >= index.shape[1], contextual)
        index = torch.cat([index, references], 1)
    return Selection(tokens, index, assign, size, padded=signals.valid is not None)
