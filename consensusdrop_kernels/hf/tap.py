"""Reads the final queries and keys of one attention module, whatever attention runs there.

The module gets a shallow copy of its config that names a registered pass-through; every other
module keeps the config it has, so masks and kernels stay what they were and nothing runs eager.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .calls import Calls

_ATTRIBUTE = "_cdrop_tap"


class Tapped(NamedTuple):
    """One attention call: `q [B, H, T, d]`, `k [B, Hk, T, d]`, the factor on `q k`, and the natural
    log-sum-exp of the rows `[B, H, T]` float32 if the attention returned one (flex does)."""

    q: Tensor
    k: Tensor
    scale: float | None
    lse: Tensor | None = None


class Tap:
    """Records what an attention module hands to its attention function, per thread.

    Args:
        attention: a transformers attention module that goes through `AttentionInterface`.

    Raises:
        ValueError: it is no such module.
    """

    def __init__(self, attention: nn.Module) -> None:
        if not hasattr(getattr(attention, "config", None), "_attn_implementation"):
            raise ValueError(
                f"{type(attention).__name__} does not choose its attention by its config, so its "
                "queries and keys can't be read"
            )
        self._attention = attention
        self.config: Any = None  # the module's own, which the model may still change
        self._calls = Calls()

    def install(self) -> None:
        """Point the module at the pass-through."""
        self.config = self._attention.config
        # One stateless entry per implementation stays registered for good: a deep copy of a
        # patched model goes on using it. "flash" must stay part of the name where it was one.
        name = f"cdrop_tap_{self.config._attn_implementation}"
        AttentionInterface.register(name, _pass_through)
        tapped = copy.copy(self.config)
        tapped._attn_implementation_internal = name
        setattr(self._attention, _ATTRIBUTE, self)
        self._attention.config = tapped

    def remove(self) -> None:
        """Give the module its own config back; nothing to do if it was never taken."""
        if vars(self._attention).get(_ATTRIBUTE) is self:
            self._attention.config = self.config
            delattr(self._attention, _ATTRIBUTE)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Tapped]]:
        """Record the calls that this thread makes inside, into the list it yields."""
        tapped: list[Tapped] = []
        self._calls.local.tapped = tapped
        try:
            yield tapped
        finally:
            self._calls.local.tapped = None

    def record(self, query: Tensor, key: Tensor, scale: float | None, returned: Any) -> None:
        """Keep one call and what it returned, if this thread is recording."""
        tapped = getattr(self._calls.local, "tapped", None)
        if tapped is not None:
            lse = _row_lse(returned, query)
            tapped.append(Tapped(query.detach(), key.detach(), scale, lse))


def _pass_through(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    tap: Tap = getattr(module, _ATTRIBUTE)
    base = tap.config._attn_implementation
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
    # Flash attention reads the implementation's name from the module again.
    shown = _UnderOwnConfig(module, tap.config) if "flash" in base else module
    returned = attend(shown, query, key, value, *args, **kwargs)
    tap.record(query, key, kwargs.get("scaling"), returned)
    return returned


def _row_lse(returned: Any, query: Tensor) -> Tensor | None:
    """The log-sum-exp beside an attention's output: one float32 per row, where eager attention has
    its whole map. In half precision it would blur the scores, and is not taken."""
    beside = returned[1] if isinstance(returned, tuple) and len(returned) > 1 else None
    if not isinstance(beside, Tensor) or beside.dtype != torch.float32:
        return None
    return beside.detach() if beside.shape == query.shape[:3] else None


class _UnderOwnConfig:
    """A module as seen with another config. The module itself is left alone: other threads may be
    in it at the same time."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
