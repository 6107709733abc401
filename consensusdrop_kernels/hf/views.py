"""Whoever looks at the sequences of `generate` is shown the prompt as it was, not the shorter one.

Where `generate` would make a processor or criterion of the same kind itself, both act: the caller's
replaces it only if it is a `MaxLengthCriteria`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList


class Whole:
    """The prompt `[B, L]` as it was, in front of what follows the `K` tokens left of it."""

    def __init__(self, prompt: Tensor, kept: int) -> None:
        self.prompt = prompt
        self.kept = kept

    @property
    def dropped(self) -> int:
        """By how much sequences are shorter."""
        return self.prompt.shape[1] - self.kept

    def of(self, ids: Tensor) -> Tensor:
        """`[B * R, K + n]` to `[B * R, L + n]`."""
        prompt = self.prompt.repeat_interleave(len(ids) // len(self.prompt), 0).to(ids.device)
        return torch.cat([prompt, ids[:, self.kept :]], 1)


def show_whole(given: dict[str, Any], whole: Whole, rows: int) -> None:
    """Wrap the caller's onlookers among the arguments of `generate`, in place.

    Args:
        given: the arguments.
        whole: the prompt.
        rows: how many rows of a prompt `prefix_allowed_tokens_fn` is called for.
    """
    if given.get("logits_processor"):
        seen = [_Processor(one, whole) for one in given["logits_processor"]]
        given["logits_processor"] = LogitsProcessorList(seen)
    if given.get("stopping_criteria"):
        made = [_criterion(one, whole) for one in given["stopping_criteria"]]
        given["stopping_criteria"] = StoppingCriteriaList(made)
    if given.get("streamer") is not None:
        given["streamer"] = _Streamer(given["streamer"], whole)
    allowed = given.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        given["prefix_allowed_tokens_fn"] = _Prefix(allowed, whole, rows)


class _Processor:
    """A caller's logits processor, which sees the prompt as it was."""

    def __init__(self, one: Callable[..., Any], whole: Whole) -> None:
        self._one = one
        self._whole = whole

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return self._one(self._whole.of(input_ids), scores)


class _Criterion(_Processor):
    """A caller's stopping criterion, likewise."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._one(self._whole.of(input_ids), scores, **kwargs)


class _Prefix:
    """A caller's `prefix_allowed_tokens_fn`, likewise; `rows` rows belong to a prompt."""

    def __init__(self, one: Callable[..., Any], whole: Whole, rows: int) -> None:
        self._one = one
        self._whole = whole
        self._rows = rows

    def __call__(self, batch_id: int, ids: Tensor) -> Any:
        prompt = self._whole.prompt[batch_id // self._rows].to(ids.device)
        return self._one(batch_id, torch.cat([prompt, ids[self._whole.kept :]]))


class _Streamer:
    """A caller's streamer, whose first tokens are the prompt as it was."""

    def __init__(self, streamer: Any, whole: Whole) -> None:
        self._streamer = streamer
        self._whole: Whole | None = whole

    def put(self, value: Tensor) -> None:
        whole, self._whole = self._whole, None
        self._streamer.put(value if whole is None else whole.of(value))

    def end(self) -> None:
        self._streamer.end()


def _criterion(one: Any, whole: Whole) -> Any:
    if type(one) is MaxLengthCriteria:  # a caller's own takes the place of that of `generate`
        return MaxLengthCriteria(one.max_length - whole.dropped, one.max_position_embeddings)
    return _Criterion(one, whole)
