"""What a pruned KV cache must remember, and how later calls on it are corrected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .._checks import has_values
from .inputs import is_static, token_count
from .layout import Shortened

_ATTRIBUTE = "_cdrop"


@dataclass(frozen=True)
class StageState:
    """What the layers from a stage on hold: `kept` entries after the prefill, `mask` and `bias` as
    in `State`."""

    kept: int
    mask: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True)
class State:
    """Attached to the cache object by the prefill; its rows go where those of the cache go.

    Attributes:
        length: `L`, tokens of the prompt before pruning.
        kept: `K`, cache entries after the prefill.
        mask: `[B, K]` bool, or None if every entry is a token, and every one since.
        removed: `[B, 1]` int64 to subtract from the prompt's positions, or None.
        stages: what the layers from each stage inside the decoder on hold.
        bias: `[B, K]` float32, the logarithm of how many tokens each entry stands for, or None
            where attention does not weigh them.
        last: `[B, 1]` int64, the position of the last token of the prefill; with height and width
            `[3, B, 1]` or `[4, B, 1]`.
        top: with height and width `[B, 1]` int64, the largest position of the prompt.
    """

    length: int
    kept: int
    mask: Tensor | None
    removed: Tensor | None
    last: Tensor
    top: Tensor | None = None
    stages: tuple[StageState, ...] = ()
    bias: Tensor | None = None


def add_stage(cache: Any, kept: int, mask: Tensor | None, bias: Tensor | None = None) -> None:
    """Remember on a pruned cache that the layers from here on hold fewer entries."""
    state: State = getattr(cache, _ATTRIBUTE)
    setattr(cache, _ATTRIBUTE, replace(state, stages=(*state.stages, StageState(kept, mask, bias))))


def weigh(cache: Any, bias: Tensor) -> None:
    """Remember on a pruned cache how many tokens its entries stand for."""
    setattr(cache, _ATTRIBUTE, replace(getattr(cache, _ATTRIBUTE), bias=bias))


def attach(cache: Any, length: int, short: Shortened) -> None:
    """Remember a pruned prefill on its cache."""
    state = State(
        length, short.embeds.shape[1], short.mask, short.removed, short.positions[..., -1:],
        short.top,
    )  # fmt: skip
    setattr(cache, _ATTRIBUTE, state)
    if not isinstance(cache, _Following):
        kind: Any = type(cache)
        cache.__class__ = _following(kind)


def state_of(cache: Any) -> State | None:
    """The state of a cache that holds pruned tokens; a cache that was reset has none.

    A static cache counts its tokens on the device, so it is not asked: its `reset` drops the state.
    """
    state = getattr(cache, _ATTRIBUTE, None)
    if state is not None and not is_static(cache) and int(cache.get_seq_length()) == 0:
        delattr(cache, _ATTRIBUTE)
        return None
    return state


class _Following(Cache):
    """What a pruned cache can do beside its own class: take the state with it when rows move.

    A class and no methods on the instance: those would hold the cache, and so its memory, in a
    reference cycle, and a deep copy would go on moving the original.
    """

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        _move_rows(self, lambda t: t.index_select(-2, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        _move_rows(self, lambda t: t.repeat_interleave(repeats, -2))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        _move_rows(self, lambda t: t[..., indices.to(t.device), :])

    def reset(self) -> None:
        super().reset()
        vars(self).pop(_ATTRIBUTE, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _following(kind: Any) -> Any:
    return type(kind.__name__, (_Following, kind), {"__module__": kind.__module__})


def _blank(kind: Any) -> Any:
    """A pruned cache of some class, still empty: for copies and pickles."""
    pruned = _following(kind)
    return pruned.__new__(pruned)


def _move_rows(cache: Any, move: Callable[[Tensor], Tensor]) -> None:
    state: State | None = getattr(cache, _ATTRIBUTE, None)
    if state is None:
        return

    def maybe(t: Tensor | None) -> Tensor | None:
        return None if t is None else move(t)

    moved: dict[str, Any] = {
        name: maybe(getattr(state, name)) for name in ("mask", "removed", "last", "top", "bias")
    }
    moved["stages"] = tuple(
        replace(stage, mask=maybe(stage.mask), bias=maybe(stage.bias)) for stage in state.stages
    )
    setattr(cache, _ATTRIBUTE, replace(state, **moved))


def continue_call(kwargs: dict[str, Any], state: State, cache: Any) -> None:
    """Correct mask and positions of a call that continues a pruned cache, in `kwargs`.

    The caller, `generate` or a hand-written loop, counts in tokens of the prompt; the cache is
    shorter. In the common case (no padding, one new token, positions given) this is a subtraction
    and no synchronisation. There the mask is not looked at: the one token counts as seen.

    Raises:
        NotImplementedError: the tokens do not continue the cache, as when a whole new turn is
            passed with the old prompt, or positions count the entries of the cache. Of one token
            on a GPU this is seen only under `CDROP_CHECK=1`.
    """
    count = token_count(kwargs)
    mask = kwargs.get("attention_mask")
    positions = kwargs.get("position_ids")
    checked = positions is not None and (count > 1 or _may_look(positions))
    plain = state.mask is None and positions is not None and count == 1
    since = 0 if plain and not checked else int(cache.get_seq_length()) - state.kept
    # Less than 0 where drafts of assisted decoding were part of the prefill and then cut off.
    _check_continues(since >= 0 or state.mask is None)

    fresh = _fresh(mask, state, since, count)
    if count > 1 and state.mask is None and fresh is not None and not bool(fresh.all()):
        # From here on the cache has an entry that is no token.
        everything = torch.ones(len(fresh), state.kept, dtype=torch.bool, device=fresh.device)
        state = replace(state, mask=everything)
        setattr(cache, _ATTRIBUTE, state)
    kwargs["attention_mask"] = _continued_mask(state, fresh, since + count)

    if state.removed is not None and positions is not None:
        positions = positions - state.removed
    if positions is None or checked:
        steps = since + torch.arange(1, count + 1, device=state.last.device)
        if positions is not None:
            _check_continues(_follow(positions, state, steps, fresh))
        elif state.top is None:
            positions = state.last + steps
        else:
            positions = (state.top + steps).expand(3, -1, -1)
    kwargs["position_ids"] = positions


def _may_look(t: Tensor) -> bool:
    return has_values(t) and not torch.compiler.is_compiling()


def _fresh(mask: Any, state: State, since: int, count: int) -> Tensor | None:
    """The caller's mask of all tokens since the prompt, `[B, since + count]`, if there is one."""
    if mask is None:
        return None
    rows, length = state.last.shape[-2], state.length + since + count
    if isinstance(mask, Tensor) and mask.shape == (rows, length):
        return mask[:, state.length :].bool() if since >= 0 else None
    if count == 1 and state.mask is None:
        return None  # a static cache's whole mask; nothing in it is hidden
    if count > 1 and mask.dim() == 2:
        _check_continues(False)
    raise NotImplementedError(
        f"attention_mask must be [{rows}, {length}], the prompt before pruning and all tokens "
        f"since, got {list(mask.shape)}"
    )


def _continued_mask(state: State, fresh: Tensor | None, new: int) -> Tensor | None:
    if state.mask is None:
        return None
    if fresh is None:
        fresh = state.mask.new_ones(len(state.mask), new)
    return torch.cat([state.mask, fresh], 1)


def _follow(positions: Tensor, state: State, steps: Tensor, fresh: Tensor | None) -> bool:
    """Whether positions go on from the prompt's last, by slots or by tokens that are no padding.

    With time, height and width, `generate` counts on from the last token, the model itself from the
    largest position. Where the caller masks a token out, any position will do.
    """
    last = state.last
    good = _alike(positions, last + steps)
    if state.top is not None:
        good = good | _alike(positions, state.top + steps)
    last = last[-1] if last.dim() == 3 else last
    positions = positions[-1] if positions.dim() == 3 else positions
    if fresh is not None:
        count = positions.shape[1]
        by_mask = last + fresh.cumsum(1)[:, -count:]
        good = good | (positions == by_mask) | ~fresh[:, -count:]
    return bool(good.all())


def _alike(positions: Tensor, wanted: Tensor) -> Tensor:
    """Where positions are those wanted, `[B, n]`; the first of four rows says nothing of places."""
    positions = positions[-3:] if positions.dim() == 3 else positions
    good = positions == (wanted[-3:] if wanted.dim() == 3 else wanted)
    return good.all(0) if good.dim() == 3 else good


def _check_continues(ok: bool) -> None:
    if not ok:
        raise NotImplementedError(
            "these tokens do not continue the pruned cache: mask and positions must count the "
            "prompt before pruning and all tokens since (leave position_ids out to have them "
            "counted; for generate, pad prompts at the left). generate can't reuse such a cache "
            "for another turn, since it skips as many tokens of the prompt as the cache has "
            "entries: start the turn without past_key_values"
        )
