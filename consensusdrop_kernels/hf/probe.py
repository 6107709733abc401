"""The static question probe: one LLM layer's queries and keys on the plain input embeddings."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import QueryRule, TextProbe
from .layout import Group
from .query import padded_rows, question_mask


def check_probe_layer(text: nn.Module, layer: int) -> None:
    """Raises ValueError unless that layer has the parts a probe calls."""
    layers: Any = text.layers
    if layer >= len(layers):
        raise ValueError(f"probe_layer must be in 0..{len(layers) - 1}, got {layer}")
    attention = getattr(layers[layer], "self_attn", None)
    missing = [n for n in ("q_proj", "k_proj") if not hasattr(attention, n)]
    norm = getattr(layers[layer], "input_layernorm", None)
    if norm is None or isinstance(norm, nn.Identity):
        missing.append("input_layernorm")
    if missing:
        raise ValueError(
            f"layer {layer} of {type(text).__name__} has no {', '.join(missing)} of its own, "
            "which the question probe calls (fused or replaced?)"
        )


class StaticProbe:
    """Computes the question's rows of a prefill, once per set of options.

    Only calls modules (norm, projections, rotary embedding) and never reads weights, so quantised,
    adapted and offloaded layers work.

    Args:
        text: the decoder stack.
        embeds: its input `[B, L, D]`.
        positions: `[B, L]`, of the full prompt, or `[3, B, L]`, `[4, B, L]`.
        group: where the images are.
        special: ids that are no question, or None.
    """

    def __init__(
        self, text: nn.Module, embeds: Tensor, positions: Tensor, group: Group,
        special: Tensor | None,
    ) -> None:  # fmt: skip
        self._text: Any = text
        self._embeds = embeds.detach()
        self._positions = positions
        self._group = group
        self._special = special
        self._done: dict[Any, TextProbe] = {}

    def __call__(
        self, *, layer: int, rotary: bool, context: str, query: str | QueryRule,
        lookahead: bool = False,
    ) -> TextProbe:  # fmt: skip
        key = (layer, rotary, context, query)
        if key not in self._done:
            with torch.no_grad():
                self._done[key] = self._compute(*key)
        return self._done[key]

    def _compute(self, layer: int, rotary: bool, context: str, query: str | QueryRule) -> TextProbe:
        place, embeds = self._group, self._embeds
        prompt = place.layout
        mask = question_mask(query, prompt.ids, prompt.visual, prompt.asking, self._special)
        here = torch.zeros(len(mask), dtype=torch.bool)
        here[list(place.sample_list)] = True
        index, live = padded_rows(mask & here[:, None])
        weight = live[list(place.sample_list)]
        if context == "all":  # a row sees no image that comes after it
            weight &= index[list(place.sample_list)] >= torch.tensor(place.end_list)[:, None]
        index = index.to(embeds.device)
        angles = position_angles(self._text, layer, self._positions) if rotary else None
        project = Projection(self._text, layer, angles)
        q = project.queries(_take(embeds, index), index)

        lse = None
        if context == "all":
            k_all = project.keys(embeds, None)
            # A supervised answer to an earlier question must not show in a later one's rows.
            seen = prompt.asking | (prompt.valid & prompt.visual)
            lse = row_lse(q, k_all, index, seen.to(embeds.device), project.scale)
            lse = lse[place.sample]
            k = _take_keys(k_all, place)
        else:
            k = project.keys(place.take(embeds), place.columns, place.sample)
        asked = tuple(weight.any(1).tolist())
        weight = weight.to(embeds.device).float()
        return TextProbe(q[place.sample], k, project.scale, lse, weight, asked)


#: cos and sin of the rows at `index` of their samples: `(x, index, sample) -> (cos, sin)`.
Angles = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def position_angles(text: Any, layer: int, positions: Tensor) -> Angles:
    """Angles at the positions of a prompt, by the model's own rotary embedding."""

    def angles(x: Tensor, index: Tensor | None, sample: Tensor | None) -> tuple[Tensor, Tensor]:
        where = positions if sample is None else positions[..., sample, :]
        if index is not None:
            where = where.gather(-1, index.expand(*where.shape[:-2], -1, -1))
        if where.dim() == 3 and len(where) == 4:  # the first row only tells sequences apart
            where = where[1:]
        rotary = text.rotary_emb
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return rotary(x, where, text.config.layer_types[layer])
        return rotary(x, where)

    return angles


class Projection:
    """A layer's norm, projections and rotation, as modules to call.

    Args:
        text: the decoder stack.
        layer: which layer.
        angles: of the rotary embedding, or None for none.
    """

    def __init__(self, text: Any, layer: int, angles: Angles | None) -> None:
        self._norm = text.layers[layer].input_layernorm
        self._attention = text.layers[layer].self_attn
        self._angles = angles
        self.scale: float = self._attention.scaling

    def queries(self, x: Tensor, index: Tensor, sample: Tensor | None = None) -> Tensor:
        """`[B, H, M, d]` of the rows `x [B, M, D]` that stand at `index [B, M]`."""
        return self._project("q", x, index, sample)

    def keys(self, x: Tensor, index: Tensor | None, sample: Tensor | None = None) -> Tensor:
        """`[R, Hk, n, d]` of `x [R, n, D]`, standing at `index [R, n]` of its sample."""
        return self._project("k", x, index, sample)

    def _project(self, side: str, x: Tensor, index: Tensor | None, sample: Tensor | None) -> Tensor:
        attention = self._attention
        flat = getattr(attention, f"{side}_proj")(self._norm(x))
        heads = flat.view(*x.shape[:2], -1, attention.head_dim)
        norm = getattr(attention, f"{side}_norm", None)
        heads = (heads if norm is None else norm(heads)).transpose(1, 2)
        if self._angles is None:
            return heads
        cos, sin = self._angles(x, index, sample)
        # The model's own function: families pair the channels in different ways.
        rotate: Callable[..., Any] = sys.modules[
            type(self._attention).__module__
        ].apply_rotary_pos_emb
        return rotate(heads, heads, cos, sin)[0]


def _take(embeds: Tensor, index: Tensor) -> Tensor:
    return embeds.gather(1, index[:, :, None].expand(-1, -1, embeds.shape[2]))


def _take_keys(k: Tensor, group: Group) -> Tensor:
    """Keys of each image's tokens, `[R, Hk, N, d]`, of those of whole prompts `[B, Hk, L, d]`."""
    index = group.columns[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    return k[group.sample].gather(2, index)


def row_lse(q: Tensor, k: Tensor, index: Tensor, valid: Tensor, scale: float) -> Tensor:
    """Log-sum-exp of whole causal rows, `[B, H, M]` float32, one key head at a time; `valid` is
    `[B, L]`, or `[B, M, L]` where rows see different keys."""
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    column = torch.arange(k.shape[2], device=k.device)
    seen = column <= index[:, :, None]  # [B, M, L]
    seen = seen & (valid if valid.dim() == 3 else valid[:, None])
    grouped = q.float().view(batch, groups, -1, rows, width)
    with torch.autocast(q.device.type, enabled=False):  # it would make float32 matmuls half again
        parts = [
            (scale * grouped[:, g] @ k[:, g, None].float().transpose(2, 3))
            .masked_fill(~seen[:, None], -torch.inf)
            .logsumexp(-1)
            for g in range(groups)
        ]
    return torch.stack(parts, 1).view(batch, heads, rows)
