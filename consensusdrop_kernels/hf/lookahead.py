"""Lookahead: the first decoder layers, run for the text of a prompt alone.

Pictures stay at their input embeddings: in each layer their keys and values are that layer's norm
and projections of those. Text rows pass the layers' own `forward`, with a stand-in for the cache
that puts the keys and values of the pictures before those of the text, and a mask that says who
sees whom. What comes out is what whole layers give whose picture rows are reset after each.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..methods.parts import upload
from ..profiling import step
from .layout import Layout
from .probe import Projection, check_probe_layer, position_angles, positions_at, take_rows
from .query import padded_rows
from .sizes import FULL, SLIDING
from .tap import _UnderOwnConfig

_ATTRIBUTE = "_cdrop_ahead"
#: Attention that adds up whatever mask it is given.
_MASKED = ("sdpa", "eager")
#: Whether this thread runs text rows ahead.
_AHEAD = ContextVar("cdrop_ahead", default=False)


def check_lookahead(text: nn.Module, depth: int) -> None:
    """Raises unless the text can run through the first `depth` layers, and be probed there.

    Raises:
        ValueError: there is no such layer, or one lacks a part of its own.
        NotImplementedError: a layer of another kind than full or sliding attention.
    """
    stack: Any = text
    check_probe_layer(text, depth)
    for at in range(depth):
        check_probe_layer(text, at)
        layer = stack.layers[at]
        takes = inspect.signature(layer.forward).parameters
        names = ("attention_mask", "position_embeddings", "past_key_values")
        missing = [name for name in names if name not in takes]
        if getattr(layer.self_attn, "v_proj", None) is None:
            missing.append("v_proj")
        if not hasattr(getattr(layer.self_attn, "config", None), "_attn_implementation"):
            missing.append("attention chosen by its config")
        if missing:
            raise ValueError(
                f"layer {at} of {type(text).__name__} has no {', '.join(missing)} of its own, "
                "which the lookahead probe needs (fused or replaced?)"
            )
        kind = _kind(stack.config, at)
        if kind not in (FULL, SLIDING):
            raise NotImplementedError(
                f"the lookahead probe needs layers of {FULL} or {SLIDING}, layer {at} is of {kind}"
            )


def _kind(config: Any, layer: int) -> str:
    """The kind of a layer, as configs and dicts of masks name it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer]
    return FULL if getattr(config, "sliding_window", None) is None else SLIDING


class Lookahead:
    """The prompts of one prefill, with their text after some layers; shared by all its probes.

    Text that is to be predicted takes no part: nobody sees it, and it stays as it was.

    Args:
        text: the decoder stack.
        embeds: its input `[B, L, D]`.
        positions: `[B, L]` of the full prompt, or `[3, B, L]`, `[4, B, L]`.
        layout: where the pictures are, and which text asks.
        masks: what the stack was given as its mask: whole masks `[B, 1, L, L]`, or a dict of them,
            are kept to; of any other, `layout` knows what is padding.
    """

    def __init__(
        self, text: Any, embeds: Tensor, positions: Tensor, layout: Layout, masks: Any
    ) -> None:
        self._text = text
        self._embeds = embeds.detach()
        self._positions = positions
        self._layout = layout
        self._masks = masks
        self._words: list[Tensor] = []  # `[B, T, D]` by depth

    @step("lookahead")
    @torch.no_grad()
    def __call__(self, depth: int) -> Tensor:
        """`[B, L, D]`: `embeds`, its text as it leaves the first `depth` layers.

        Raises:
            ValueError, NotImplementedError: as `check_lookahead`.
            RuntimeError: the decoder's attention was changed since `patch`.
        """
        check_lookahead(self._text, depth)
        if depth == 0:
            return self._embeds
        rows, words = self._rows, self._words
        if not words:
            words.append(take_rows(self._embeds, rows.text))
        if len(words) <= depth:
            pictures = take_rows(self._embeds, rows.visual)
            ahead = _AHEAD.set(True)
            try:
                while len(words) <= depth:
                    words.append(self._through(len(words) - 1, words[-1], pictures))
            finally:
                _AHEAD.reset(ahead)
        evolved = words[depth].to(self._embeds).flatten(0, 1)[rows.live]
        return self._embeds.flatten(0, 1).index_copy(0, rows.target, evolved).view_as(self._embeds)

    def _through(self, layer: int, words: Tensor, pictures: Tensor) -> Tensor:
        """The text `[B, T, D]` through a layer, beside pictures `[B, V, D]` that stay out of it."""
        module, rows = self._text.layers[layer], self._rows
        where = [positions_at(self._positions, index) for index in (rows.text, rows.visual)]
        of_text, of_pictures = position_angles(self._text, layer, words, *where)
        project = Projection(self._text, layer)
        given: dict[str, Any] = {
            "attention_mask": self._mask(layer),
            "position_embeddings": of_text,
            "past_key_values": _Pictures(*project.keys_and_values(pictures, of_pictures)),
        }
        # By place and not by name as far as the cache: from transformers 5.23 on, gradient
        # checkpointing happens in `forward` and takes a cache away that has a name.
        names = list(inspect.signature(module.forward).parameters)
        before = names[1 : names.index("past_key_values") + 1]
        out = module.forward(words, *[given.pop(name, None) for name in before], **given)
        return out[0] if isinstance(out, tuple) else out

    @cached_property
    def _rows(self) -> _Rows:
        layout, device = self._layout, self._embeds.device
        text, live = padded_rows(layout.asking & ~layout.visual)
        visual, there = padded_rows(layout.valid & layout.visual)
        batch, length = layout.visual.shape
        target = (torch.arange(batch)[:, None] * length + text)[live]
        columns = torch.cat([visual, text], 1)
        width = columns.shape[1]
        parts = (
            text, visual, live.flatten().nonzero().flatten(), target, columns,
            torch.cat([there, live], 1)[:, None],
            columns[:, None] <= text[:, :, None],
            torch.eye(width, dtype=torch.bool)[width - text.shape[1] :],
        )  # fmt: skip
        return _Rows(*(upload(part, device) for part in parts))

    def _mask(self, layer: int) -> Tensor:
        """Which pictures and words each word sees in a layer, `[B, 1, T, V + T]`, as the attention
        there takes it."""
        rows, config = self._rows, self._text.config
        kind = _kind(config, layer)
        given = self._masks.get(kind) if isinstance(self._masks, dict) else self._masks
        if given is not None and not isinstance(given, Tensor):
            raise NotImplementedError(
                "attn_implementation must be sdpa, eager or a flash attention for the lookahead "
                f"probe of a model that makes whole masks, got a {type(given).__name__}"
            )
        if given is not None and given.dim() == 4 and given.shape[2] > 1:
            seen = given if given.dtype == torch.bool else given == 0
            seen = seen.to(rows.text.device).expand(len(rows.text), -1, -1, -1)
            here = rows.text[:, None, :, None].expand(-1, seen.shape[1], -1, seen.shape[3])
            seen = seen.gather(2, here)
            there = rows.columns[:, None, None].expand(-1, seen.shape[1], seen.shape[2], -1)
            seen = seen.gather(3, there)
        else:
            seen = rows.causal[:, None]
            if kind == SLIDING:
                near = rows.columns[:, None] > rows.text[:, :, None] - config.sliding_window
                seen = seen & near[:, None]
        # Padding rows see themselves, so that no row is without any key.
        seen = (seen & rows.seen[:, None]) | rows.itself
        attention = self._text.layers[layer].self_attn
        implementation = attention.config._attn_implementation
        if implementation not in _MASKED and not hasattr(attention, _ATTRIBUTE):
            raise RuntimeError(
                f"the decoder's attention must be what it was when it was patched, it is now "
                f"{implementation}: patch again"
            )
        return _additive(seen, self._embeds.dtype) if implementation == "eager" else seen


class _Rows(NamedTuple):
    """Who takes part, on the device, rows padded at the left.

    `text [B, T]` and `visual [B, V]` are places in the prompts, `columns [B, V + T]` both; `live`
    are the `T'` text rows of the `B * T` that are no padding, and `target` their places in the
    `B * L` tokens; `seen [B, 1, V + T]` which columns are no padding, `causal [B, T, V + T]` which
    do not come after a row, `itself [T, V + T]` which are the row's own.
    """

    text: Tensor
    visual: Tensor
    live: Tensor
    target: Tensor
    columns: Tensor
    seen: Tensor
    causal: Tensor
    itself: Tensor


class _Pictures:
    """Stands for a cache that holds the keys and values of pictures, `[B, Hk, V, d]`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys = keys
        self._values = values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Those and the text's, `[B, Hk, V + T, d]`."""
        return torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to logits."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)


class Masked:
    """Decoder layers whose attention takes no mask of ours (flash attention): while text runs
    ahead, in that thread, they run sdpa, or eager attention where logits are capped.

    Each gets a shallow copy of its config that names a registered stand-in, as a `Tap` does.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._attentions: list[Any] = [layer.self_attn for layer in layers]

    def install(self) -> None:
        """Point those modules at the stand-in."""
        for attention in self._attentions:
            config = attention.config
            if config._attn_implementation in _MASKED:
                continue
            # "flash" must stay part of the name where it was one.
            name = f"cdrop_ahead_{config._attn_implementation}"
            AttentionInterface.register(name, _attend)
            own = copy.copy(config)
            own._attn_implementation_internal = name
            setattr(attention, _ATTRIBUTE, config)
            attention.config = own

    def remove(self) -> None:
        """Give every module its own config back."""
        for attention in self._attentions:
            if _ATTRIBUTE in vars(attention):
                attention.config = getattr(attention, _ATTRIBUTE)
                delattr(attention, _ATTRIBUTE)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    config: Any = getattr(module, _ATTRIBUTE)
    base = config._attn_implementation
    if _AHEAD.get():
        base = "sdpa" if kwargs.get("softcap") is None else "eager"
        mask = mask if base == "sdpa" else _additive(mask, query.dtype)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
    # Flash attention reads the implementation's name from the module again.
    shown = _UnderOwnConfig(module, config) if "flash" in base else module
    return attend(shown, query, key, value, mask, *args, **kwargs)
