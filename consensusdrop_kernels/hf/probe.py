"""The question probe before the LLM: one layer's queries and keys on embeddings.

Static on the plain input embeddings, or on those whose text ran ahead through the layers before.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import QueryRule, TextProbe
from ..methods.parts import upload
from ..profiling import step
from .layout import Group
from .query import question_rows


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

    Calls modules (norm, projections, rotary embedding), so quantised, adapted and offloaded layers
    work; only where the keys' projection is a plain one, and it pays, its weight is read, to fold
    the queries through it.

    Args:
        text: the decoder stack.
        embeds: its input `[B, L, D]`.
        positions: `[B, L]`, of the full prompt, or `[3, B, L]`, `[4, B, L]`.
        group: where the images are.
        tokens: theirs `[R, N, D]` of `embeds`.
        special: ids that are no question, or None.
        ahead: the embeddings `[B, L, D]` whose text ran through so many layers; None if the method
            does not look ahead.
    """

    def __init__(
        self, text: nn.Module, embeds: Tensor, positions: Tensor, group: Group,
        tokens: Tensor, special: Tensor | None, ahead: Callable[[int], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._text: Any = text
        self._embeds = embeds.detach()
        self._positions = positions
        self._group = group
        self._tokens = tokens.detach()
        self._special = special
        self._ahead = ahead
        self._done: dict[Any, TextProbe] = {}

    def __call__(
        self, *, layer: int, rotary: bool, context: str, query: str | QueryRule,
        lookahead: bool = False,
    ) -> TextProbe:  # fmt: skip
        if lookahead and self._ahead is None:
            raise ValueError(
                "lookahead must be False for a method whose `probe` is not 'lookahead', got True"
            )
        key = (layer, rotary, context, query, lookahead)
        if key not in self._done:
            with torch.no_grad():
                self._done[key] = self._compute(*key)
        return self._done[key]

    @step("probe")
    def _compute(
        self, layer: int, rotary: bool, context: str, query: str | QueryRule, lookahead: bool
    ) -> TextProbe:
        place, embeds = self._group, self._embeds
        if lookahead and self._ahead is not None:
            embeds = self._ahead(layer)
        # In a causal context a row sees no image that comes after it.
        index, live = question_rows(query, place, self._special, seeing=context == "all")
        asked = tuple(any(row) for row in live.tolist())
        weight = upload(live, embeds.device).float()
        index = upload(index, embeds.device)
        positions = self._positions
        project = Projection(self._text, layer)
        alone = len(embeds) == 1 and place.own is None and self._tokens.numel() <= TOGETHER
        if rotary and context == "visual" and alone:
            where = positions_at(positions, torch.cat((index, place.columns), 1))
            angles = angles_of(self._text, layer, embeds, where)
            rows = torch.cat((take_rows(embeds, index), self._tokens), 1)
            q, k = project.pair(rows, index.shape[1], angles)
            return TextProbe(q, k, project.scale, None, weight, asked)
        at: list[Angles] = [None, None]
        if rotary:
            rows = positions_at(positions, index)
            if context == "visual":
                positions = positions_at(positions, place.columns, place.own)
            at = position_angles(self._text, layer, embeds, rows, positions)
        q = project.queries(take_rows(embeds, index), at[0])

        lse = None
        if context == "all":
            k_all = project.keys(embeds, at[1])
            # A supervised answer to an earlier question must not show in a later one's rows.
            prompt = place.layout
            seen = prompt.asking | (prompt.valid & prompt.visual)
            lse = row_lse(q, k_all, index, upload(seen, embeds.device), project.scale)
            lse = place.of_prompts(lse)
            k = _take_keys(k_all, place)
        elif not rotary and project.folds(q):
            q, k = project.folded(q, self._tokens)
        else:
            k = project.keys(self._tokens, at[1])
        return TextProbe(place.of_prompts(q), k, project.scale, lse, weight, asked)


#: By how much the keys' projection must be wider than all query rows of all heads together for
#: folding to pay: as many times fewer operations, on the CPU (see docs/probes.md).
FOLD = 3

#: Numbers in the tokens of a single prompt up to which what starts an operation costs more than
#: copies of the tokens and their keys, so that question and picture are normed and turned together.
TOGETHER = 1 << 22

#: cos and sin `[B, n, d]` of some rows, or None: they are not turned.
Angles = tuple[Tensor, Tensor] | None


def position_angles(text: Any, layer: int, like: Tensor, *positions: Tensor) -> list[Angles]:
    """The angles of several sets of rows, by one call of the model's own rotary embedding.

    Args:
        text: the decoder stack.
        layer: which layer they are for.
        like: a tensor of the dtype and device they shall have.
        positions: of each set `[B, n]`, or `[3, B, n]`, `[4, B, n]`.
    """
    where = torch.cat([each.flatten(-2) for each in positions], -1).unsqueeze(-2)
    cos, sin = angles_of(text, layer, like, where)
    shapes = [each.shape[-2:] for each in positions]
    counts = [shape.numel() for shape in shapes]
    return [
        (c.view(*shape, -1), s.view(*shape, -1))
        for c, s, shape in zip(cos.split(counts, 1), sin.split(counts, 1), shapes, strict=True)
    ]


def angles_of(text: Any, layer: int, like: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, n, d]` of positions `[B, n]`, `[3, B, n]` or `[4, B, n]`; see above."""
    if where.dim() == 3 and len(where) == 4:  # the first row only tells sequences apart
        where = where[1:]
    by_kind = _takes_kind(type(text.rotary_emb).forward)
    of_layer = (text.config.layer_types[layer],) if by_kind else ()
    cos, sin = text.rotary_emb(like, where, *of_layer)
    return cos, sin


@functools.cache
def _takes_kind(forward: Callable[..., Any]) -> bool:
    """Whether a rotary embedding has angles for each kind of layer."""
    return "layer_type" in inspect.signature(forward).parameters


def positions_at(positions: Tensor, index: Tensor, sample: Tensor | None = None) -> Tensor:
    """The positions `[R, n]` at `index [R, n]` of those of prompts `[B, L]`, or `[3, R, n]`,
    `[4, R, n]`; `sample` `[R]` says which prompts, None: all in order."""
    if sample is not None:
        positions = positions[..., sample, :]
    return positions.gather(-1, index.expand(*positions.shape[:-2], -1, -1))


class Projection:
    """A layer's norm, projections and rotation, as modules to call.

    Args:
        text: the decoder stack.
        layer: which layer.
    """

    def __init__(self, text: Any, layer: int) -> None:
        own = text.layers[layer]
        self._norm = own.input_layernorm
        self._attention = own.self_attn
        self.scale: float = self._attention.scaling

    def queries(self, x: Tensor, angles: Angles = None) -> Tensor:
        """`[B, H, M, d]` of the rows `x [B, M, D]`."""
        return self.rotated(self._heads("q", self._norm(x)), angles)

    def keys(self, x: Tensor, angles: Angles = None) -> Tensor:
        """`[R, Hk, n, d]` of the rows `x [R, n, D]`."""
        return self.rotated(self._heads("k", self._norm(x)), angles)

    def pair(self, x: Tensor, count: int, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`queries` of the first `count` rows of `x [1, M + n, D]` and `keys` of the others, in as
        few operations as it takes; angles `[1, M + n, d]`."""
        normed = self._norm(x)
        q, k = self._heads("q", normed[:, :count]), self._heads("k", normed[:, count:])
        if q.shape[1] == k.shape[1]:  # turned together
            both = self.rotated(torch.cat((q, k), 2), angles)
            return both[:, :, :count], both[:, :, count:]
        cos, sin = angles
        q = self.rotated(q, (cos[:, :count], sin[:, :count]))
        return q, self.rotated(k, (cos[:, count:], sin[:, count:]))

    def keys_and_values(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Each `[B, Hk, n, d]`, of the rows `x [B, n, D]`."""
        normed = self._norm(x)
        return self.rotated(self._heads("k", normed), angles), self._heads("v", normed)

    def folds(self, q: Tensor) -> bool:
        """Whether `folded` gives what `keys` does, and sooner, for queries `[B, H, M, d]`.

        The projection must be a plain one, with nothing else about it; `FOLD` is measured.
        """
        linear, heads, rows = self._attention.k_proj, q.shape[1], q.shape[2]
        if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
            return False
        own = "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks
        alike = linear.weight.dtype == q.dtype and linear.weight.device == q.device
        if own or not alike or getattr(self._attention, "k_norm", None) is not None:
            return False
        return q.device.type == "cpu" and FOLD * heads * rows <= linear.out_features

    def folded(self, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, H, M, D]` and one key head `[R, 1, n, D]` for `x [R, n, D]`, whose products
        are those of `q [B, H, M, d]` with the keys, up to the same bias for every key of a row."""
        batch, heads, rows, width = q.shape
        weight = self._attention.k_proj.weight.unflatten(0, (-1, width))  # [Hk, d, D]
        grouped = q.reshape(batch, len(weight), -1, width)
        keys = self._norm(x).to(q.dtype)
        return (grouped @ weight).view(batch, heads, rows, -1), keys[:, None]

    def _heads(self, side: str, normed: Tensor) -> Tensor:
        flat = getattr(self._attention, f"{side}_proj")(normed)
        heads = flat.view(*normed.shape[:2], -1, self._attention.head_dim)
        norm = getattr(self._attention, f"{side}_norm", None)
        return (heads if norm is None else norm(heads)).transpose(1, 2)

    def rotated(self, heads: Tensor, angles: Angles) -> Tensor:
        """`heads [B, H, n, d]` turned by the angles of their rows."""
        if angles is None:
            return heads
        cos, sin = (part.to(heads.device) for part in angles)
        # The model's own function: families pair the channels in different ways.
        rotate: Callable[..., Any] = sys.modules[
            type(self._attention).__module__
        ].apply_rotary_pos_emb
        whole = cos.shape[-1] == heads.shape[-1] and not torch.compiler.is_compiling()
        if whole and turns_halves(rotate):
            return turned(heads, cos, sin)
        return rotate(heads, heads[:, :0], cos, sin)[0]  # it takes keys as well: none


@functools.cache
def turns_halves(rotate: Callable[..., Any]) -> bool:
    """Whether a family's `apply_rotary_pos_emb` is `turned`, seen on numbers drawn for it."""
    draw = torch.Generator().manual_seed(0)
    heads, cos, sin = (
        torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu")
        for shape in ((2, 3, 4, 8), (2, 4, 8), (2, 4, 8))
    )
    try:
        theirs = rotate(heads, heads[:, :0], cos, sin)[0]
    except Exception:  # a kernel of one kind of device, in place of the family's own
        return False
    return bool(torch.allclose(theirs, turned(heads, cos, sin)))


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`heads [B, H, n, d]`, each channel with the one half the width away, turned by the angles
    `[B, n, d]`: what most families do, in three operations."""
    half = heads.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    out = heads * cos
    out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return out


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """The rows `[B, n, D]` at `index [B, n]` of `values [B, L, D]`."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def _take_keys(k: Tensor, group: Group) -> Tensor:
    """Keys of each image's tokens, `[R, Hk, N, d]`, of those of whole prompts `[B, Hk, L, d]`."""
    index = group.columns[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    return group.of_prompts(k).gather(2, index)


#: Logits that `row_lse` holds at once.
_LOGITS = 2**24


def row_lse(q: Tensor, k: Tensor, index: Tensor, valid: Tensor, scale: float) -> Tensor:
    """Log-sum-exp of whole causal rows, `[B, H, M]` float32, one key head at a time, and so many
    rows as make `_LOGITS` logits; `valid` is `[B, L]`, or `[B, M, L]` where rows see different
    keys."""
    batch, heads, rows, width = q.shape
    most = max(1, _LOGITS // max(1, batch * (heads // k.shape[1]) * k.shape[2]))
    if rows > most:
        each = [slice(first, first + most) for first in range(0, rows, most)]
        return torch.cat(
            [
                row_lse(
                    q[:, :, part], k, index[:, part],
                    valid if valid.dim() == 2 else valid[:, part], scale,
                )
                for part in each
            ],
            2,
        )  # fmt: skip
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
