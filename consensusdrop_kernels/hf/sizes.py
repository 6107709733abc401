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


def key_bias(sizes: Sequence[Tensor], slots: Sequence[Tensor], batch: int, width: int) -> Tensor:
    """Logarithms of the sizes of all keys, `[B, K]` float32, 0 where a token stands for itself.

    Args:
        sizes: for each group of images `[R, S]` float32.
        slots: the place of each of them in the `B * K` keys, `B * K` where unused.
    """
    bias = torch.zeros(batch * width + 1, device=slots[0].device)
    for size, where in zip(sizes, slots, strict=True):
        bias = bias.index_copy(0, where.flatten(), size.float().clamp_min(1.0).log().flatten())
    return bias[:-1].view(batch, width)


def weighted_mask(given: Any, bias: Tensor, embeds: Tensor) -> Any:
    """A mask `[B, 1, q, kv]` in the dtype of `embeds [B, q, D]` that hides what `given` hides and
    adds the bias of the first keys, `[B, K]`. The keys behind those are new, of size 1.

    `given` is a mask of any form that a decoder takes: None, `[B, kv]`, 4-D, or a dict of them.

    Raises:
        NotImplementedError: a mask of another form.
    """
    if isinstance(given, dict):
        return {kind: weighted_mask(mask, bias, embeds) for kind, mask in given.items()}
    if given is not None and not isinstance(given, Tensor):
        raise NotImplementedError(
            f"size_attention can't be added to a mask of type {type(given).__name__}"
        )
    count = embeds.shape[1]
    if given is not None and given.dim() == 4:
        seen = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
        keys = seen.shape[-1]
    else:
        keys = count + bias.shape[1] if given is None else given.shape[1]
        if given is None and count == bias.shape[1]:
            keys = count  # the prefill: the bias is that of the rows themselves
        place = torch.arange(keys, device=embeds.device)
        seen = (place <= place[keys - count :, None])[None, None]
        if given is not None:
            seen = seen & given[:, None, None, :].bool()
    whole = torch.nn.functional.pad(bias, (0, keys - bias.shape[1])).to(embeds.dtype)
    return whole[:, None, None, :].masked_fill(~seen, torch.finfo(embeds.dtype).min)


class Unflashed:
    """Decoder layers that run sdpa in place of flash attention while a patch is there."""

    def __init__(self, text: Any) -> None:
        self._layers: list[nn.Module] = list(text.layers)
        self._own: list[tuple[Any, Any]] = []

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
