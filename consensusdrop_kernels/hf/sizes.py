"""Size-aware attention: a merged token is attended to as the tokens it stands for.

`log(size)` is added to the logits of its key in every layer, in the prefill and in every call after
(proportional attention, as ToMe has it inside an encoder, arXiv 2210.09461). It travels as a
floating 4-D mask, which sdpa, eager and flex attention add to their logits. Flash attention takes
no such mask: its layers run sdpa while the patch is there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Kinds of layers, as configs and dicts of masks name them.
FULL, SLIDING = "full_attention", "sliding_attention"


def key_bias(sizes: Sequence[Tensor], slots: Sequence[Tensor], batch: int, width: int) -> Tensor:
    """Logarithms of the sizes of all keys, `[B, K]` float32, 0 where a token stands for itself.

    Args:
        sizes: for each group of images `[R, S]` float32.
        slots: the place of each of them in the `B * K` keys, `B * K` where unused.
    """
    bias = torch.zeros(batch * width + 1, device=slots[0].device)
    for size, where in zip(sizes, slots, strict=True):
        bias.index_copy_(0, where.flatten(), size.float().clamp_min(1.0).log().flatten())
    return bias[:-1].view(batch, width)


def weighted_mask(
    given: Any, bias: Tensor, embeds: Tensor, text: Any = None, cache: Any = None
) -> Any:  # fmt: skip
    """A mask `[B, 1, q, kv]` in the dtype of `embeds [B, q, D]` that hides what `given` hides and
    adds the bias of the first keys, `[B, K]`. The keys behind those are new, of size 1.

    Args:
        given: a mask of any form that a decoder takes: None, `[B, kv]`, 4-D, or a dict of them.
        text: the decoder stack, where its layers may see a window of the sequence alone: then
            there is a mask for each kind of layer. None: every layer sees everything.
        cache: what `embeds` continue; None: nothing.

    Raises:
        NotImplementedError: a mask of another form.
    """
    kinds = (getattr(text.config, "layer_types", None) or [FULL]) if text is not None else [FULL]
    if SLIDING in kinds and not isinstance(given, dict):
        given = dict.fromkeys(kinds, given)
    if isinstance(given, dict):
        window = text.config.sliding_window
        return {
            kind: _weighted(
                mask, bias, embeds, *_held(cache, embeds.shape[1], kinds.index(kind)),
                window if kind == SLIDING else None,
            )
            for kind, mask in given.items() if kind in kinds
        }  # fmt: skip
    return _weighted(given, bias, embeds, *_held(cache, embeds.shape[1], 0), None)


def _held(cache: Any, count: int, layer: int) -> tuple[int, int]:
    """How many keys a layer attends to in a call of `count` tokens, and how many it no longer has:
    one that sees a window keeps no more."""
    return (count, 0) if cache is None else cache.get_mask_sizes(count, layer)


def _weighted(
    given: Any, bias: Tensor, embeds: Tensor, keys: int, gone: int, window: int | None
) -> Tensor:
    if given is not None and not isinstance(given, Tensor):
        raise NotImplementedError(
            f"size_attention can't be added to a mask of type {type(given).__name__}"
        )
    if given is not None and given.dim() == 4:
        is_bool = given.dtype == torch.bool
        hidden = ~given if is_bool else given <= torch.finfo(given.dtype).min / 2
    else:
        place = torch.arange(keys, device=embeds.device)
        row = place[keys - embeds.shape[1] :, None]
        hidden = (place > row) if window is None else (place > row) | (place <= row - window)
        hidden = hidden[None, None]
        if given is not None:
            hidden = hidden | ~given[:, None, None, gone : gone + keys].bool()
    new = gone + keys - bias.shape[1]  # less than 0 where entries were cut off
    if new != 0:
        bias = torch.nn.functional.pad(bias, (0, new))
    bias = bias.to(embeds.dtype)[:, None, None, gone:]
    return bias.masked_fill(hidden, torch.finfo(embeds.dtype).min)


class Unflashed:
    """Decoder layers that run sdpa in place of flash attention while a patch is there."""

    def __init__(self, text: Any) -> None:
        self._layers: list[nn.Module] = list(text.layers)
        self._own: list[tuple[Any, Any]] = []

    @property
    def installed(self) -> bool:
        """Whether there is any such layer now."""
        return bool(self._own)

    def install(self) -> None:
        """Give every layer that runs flash attention a config of its own that says sdpa."""
        for layer in self._layers:
            attention: Any = layer.self_attn
            config = getattr(attention, "config", None)
            if "flash" not in (getattr(config, "_attn_implementation", None) or ""):
                continue
            if not self._own:
                warnings.warn(
                    "flash attention can't weigh keys by size: with size_attention the decoder's "
                    "layers run sdpa instead", stacklevel=4,
                )  # fmt: skip
            self._own.append((attention, config))
            attention.config = copy.copy(config)
            attention.config._attn_implementation_internal = "sdpa"

    def remove(self) -> None:
        """Give every layer its own config back."""
        while self._own:
            attention, config = self._own.pop()
            attention.config = config
