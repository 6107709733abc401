"""What a pruned KV cache must remember, and how later calls on it are corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import Shortened

_ATTRIBUTE = "_cdrop"


@dataclass(frozen=True)
class State:
    """Attached to the cache object by the prefill, constant from then on.

    Attributes:
        length: `L`, tokens of the prompt before pruning.
        kept: `K`, cache entries after the prefill.
        mask: `[B, K]` bool, or None if every entry is a token.
        removed: `[B, 1]` int64 to subtract from the prompt's positions, or None.
        last: `[B, 1]` int64, the position of the last token of the prefill.
    """

    length: int
    kept: int
    mask: Tensor | None
    removed: Tensor | None
    last: Tensor


def attach(cache: Any, length: int, short: Shortened) -> None:
    """Remember a pruned prefill on its cache."""
    state = State(length, short.embeds.shape[1], short.mask, short.removed, short.positions[:, -1:])
    setattr(cache, _ATTRIBUTE, state)


def state_of(cache: Any) -> State | None:
    """The state of a cache that holds pruned tokens; a cache that was reset has none."""
    state = getattr(cache, _ATTRIBUTE, None)
    if state is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, _ATTRIBUTE)
        return None
    return state


def continue_call(kwargs: dict[str, Any], state: State, cache: Any) -> None:
    """Correct mask and positions of a call that continues a pruned cache, in `kwargs`.

    The caller, `generate` or a hand-written loop, counts in tokens of the prompt; the cache is
    shorter. In the common case (no padding, one new token, positions given) this is a subtraction
    and no synchronisation.

    Raises:
        NotImplementedError: the tokens do not continue the cache, as when a whole new turn is
            passed with the old prompt.
    """
    ids = kwargs.get("input_ids")
    count = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
    mask = kwargs.get("attention_mask")
    positions = kwargs.get("position_ids")
    plain = state.mask is None and positions is not None and count == 1
    since = 0 if plain else int(cache.get_seq_length()) - state.kept

    if count > 1 and mask is not None and mask.dim() == 2:
        _check_continues(mask.shape[1] == state.length + since + count)
    if state.mask is None:
        kwargs["attention_mask"] = None
    else:
        kwargs["attention_mask"] = _continued_mask(state, mask, since + count)

    if positions is None:
        ahead = torch.arange(1, count + 1, device=state.last.device)
        kwargs["position_ids"] = state.last + since + ahead
        return
    if state.removed is not None:
        positions = positions - state.removed
    if count > 1:  # one token can be wrong only by its position, which generate never is
        _check_continues(bool((positions[:, :1] == state.last + since + 1).all()))
    kwargs["position_ids"] = positions


def _continued_mask(state: State, mask: Tensor | None, new: int) -> Tensor:
    assert state.mask is not None
    rows = len(state.mask)
    if mask is None:
        fresh = state.mask.new_ones(rows, new)
    else:
        fresh = mask[:, state.length :].bool()
        if mask.dim() != 2 or fresh.shape != (rows, new):
            raise NotImplementedError(
                f"attention_mask must be [{rows}, {state.length + new}], the prompt before "
                f"pruning and all tokens since, got {list(mask.shape)}"
            )
    return torch.cat([state.mask, fresh], 1)


def _check_continues(ok: bool) -> None:
    if not ok:
        raise NotImplementedError(
            "these tokens do not continue the pruned cache: generate can't reuse one for another "
            "turn, since it skips as many tokens of the prompt as the cache has entries; start the "
            "turn without past_key_values"
        )
