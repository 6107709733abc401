"""The maps form: how research code prunes, so that a method on our ops can be timed against it.

Eager attention with `output_attentions=True` in the vision tower, and in the decoder layer whose
attention is read, the whole map of which is then made; selection and merging in plain torch.
Written as one would who knows torch well: only what the rule reads runs eager, everything is
batched, and prompts of one length are cut by slices. So it takes prompts of one length with one
picture each, at the same place, and LLaVA and LLaVA-NeXT with a CLIP tower alone.

The rules are those of `VisionZip` and `DivPrune` with default options and of `ConsensusDrop` with
those of `PLAIN`, which leave what can be read off a map: they choose the same tokens. FastV goes by
the map of the layer before the cut, as the paper does; ours asks the layer behind it, so that no
layer has to give up its map.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from benchmarks.baselines import plain_diverse, plain_merge
from consensusdrop_kernels.hf.towers import class_tokens
from consensusdrop_kernels.methods import ConsensusDrop, DivPrune, FastV, Method, VisionZip

#: Makes a context in which what runs counts as a phase, see `phases`.
Span = Callable[[str], contextlib.AbstractContextManager[Any]]


class Picture(NamedTuple):
    """What the tower says of the pictures.

    Attributes:
        x: projected tokens `[B, N, D]`, without line breaks.
        whole: features of every placeholder `[B, V, D]`.
        patches: the places of those that are patches, `[N]`; None: all are.
        saliency: attention of the class token, mean of heads, `[B, N]`; None without maps.
        keys: mean of the heads' keys `[B, N, d]`; None likewise.
    """

    x: Tensor
    whole: Tensor
    patches: Tensor | None
    saliency: Tensor | None
    keys: Tensor | None


class Chosen(NamedTuple):
    """Tokens that are left `[B, K, D]`, and the places they stand at, `[B, K]` ascending."""

    tokens: Tensor
    index: Tensor


class Maps:
    """A model whose `generate` prunes in this form.

    Args:
        model: a LLaVA or LLaVA-NeXT; its own copy, as its attention is changed.
        method: a rule of which `has_form` is true.

    Raises:
        ValueError: there is no such form of this model.
    """

    def __init__(self, model: Any, method: Method) -> None:
        config = model.config
        if not _takes(config):
            raise ValueError(
                "the maps form is written for LLaVA and LLaVA-NeXT with a CLIP tower, whose "
                "features are the patches of one layer"
            )
        eager = model.model.language_model.config._attn_implementation == "eager"
        if isinstance(method, FastV) and eager:
            raise ValueError(
                "the maps form of FastV cuts between layers that make their own masks: run it with "
                "sdpa or flash attention"
            )
        self.model = model
        self.keep = int(method.keep)
        self.span: Span = lambda phase: contextlib.nullcontext()
        self.index: Tensor | None = None  # of the last prefill, `[B, K]`
        self._rule = RULES[type(method)]
        self._text: Any = model.model.language_model
        self._encoder = type(method) in (ConsensusDrop, VisionZip)
        if self._encoder:
            model.model.vision_tower.set_attn_implementation("eager")
        if isinstance(method, FastV):
            self._cut = method.layer
            self._forward = self._text.forward
            self._text.forward = self._prefill

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """`model.generate` on what the rule leaves of the prompt."""
        with torch.no_grad():
            picture = self._encode(inputs)
            embeds = self._text.embed_tokens(inputs["input_ids"])
            self._at = self._start(inputs["input_ids"])
            end = self._at + picture.whole.shape[1]
            before, after = embeds[:, : self._at], embeds[:, end:]
            chosen = self._rule(self, picture, before, after)
            self.index = chosen.index
            short = torch.cat([before, chosen.tokens.to(before.dtype), after], 1)
        mask = torch.ones(short.shape[:2], dtype=torch.long, device=short.device)
        return self.model.generate(inputs_embeds=short, attention_mask=mask, **options)

    def _start(self, ids: Tensor) -> int:
        """The place of the picture's first token."""
        return int((ids[0] == self.model.config.image_token_id).int().argmax())

    # The tower.

    def _encode(self, inputs: Mapping[str, Tensor]) -> Picture:
        """Tower and projector; with all maps of the tower where the rule reads one."""
        outer, config = self.model.model, self.model.config
        pixels = inputs["pixel_values"]
        rows = len(pixels)
        layer = config.vision_feature_layer
        attention = outer.vision_tower.encoder.layers[layer].self_attn
        with _noting(attention.k_proj) as keys:
            out = outer.vision_tower(
                pixels.flatten(0, -4), output_hidden_states=True, output_attentions=self._encoder
            )
        features = outer.multi_modal_projector(out.hidden_states[layer][:, 1:])
        whole, patches = self._packed(features, rows, inputs, breaks=True)
        x = whole if patches is None else whole[:, patches]
        if not self._encoder:
            return Picture(x, whole, patches, None, None)
        with self.span("saliency"):
            row = out.attentions[layer][:, :, 0, 1:].float().mean(1)
            heads = keys[0][:, 1:].unflatten(-1, (-1, attention.head_dim)).float().mean(2)
            saliency, _ = self._packed(row[..., None], rows, inputs)
            metric, _ = self._packed(heads, rows, inputs)
        return Picture(x, whole, patches, saliency[..., 0], metric)

    def _packed(
        self, values: Tensor, rows: int, inputs: Mapping[str, Tensor], breaks: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Values of all tiles `[T, N, C]` as those of the pictures `[B, V, C]`, put together as the
        model does it, and which of these are patches; line breaks only if asked for."""
        if self.model.config.model_type == "llava":
            return values, None
        outer = self.model.model
        newline = outer.image_newline if breaks else None
        tiles, sizes = values.unflatten(0, (rows, -1)), inputs["image_sizes"]
        whole, _ = outer.pack_image_features(list(tiles), sizes, "default", newline)
        stacked = torch.stack(whole)
        if not breaks:
            return stacked, None
        marks = torch.zeros_like(values[: tiles.shape[1], :, :1])
        (marked,), _ = outer.pack_image_features([marks], sizes[:1], "default", marks.new_ones(1))
        return stacked, (marked[:, 0] == 0).nonzero()[:, 0]

    # The rules.

    def _consensus(self, picture: Picture, before: Tensor, after: Tensor) -> Chosen:
        """Ranks of class token and question, the best kept, the rest merged into them."""
        assert picture.saliency is not None
        assert picture.keys is not None
        with self.span("saliency"):
            asked = self._asked(picture, before, after)
        with self.span("selection"):
            index = _agreed(picture.saliency, asked, self.keep)
            return Chosen(plain_merge((picture.x, picture.keys, index)), index)

    def _asked(self, picture: Picture, before: Tensor, after: Tensor) -> Tensor:
        """What the question attends to in layer 0, read off its map: `[B, N]`, rows normalised over
        the patches, the largest of them, mean of heads."""
        embeds = torch.cat([before, picture.whole.to(before.dtype), after], 1)
        length = embeds.shape[1]
        layer = self._text.layers[0]
        places = torch.arange(length, device=embeds.device)[None]
        with _eager(layer):
            _, weights = layer.self_attn(
                layer.input_layernorm(embeds), attention_mask=_causal(embeds),
                position_embeddings=self._text.rotary_emb(embeds, places),
            )  # fmt: skip
        first, last = before.shape[1], length - after.shape[1]
        rows = weights[:, :, last:, first:last].float()
        if picture.patches is not None:
            rows = rows[..., picture.patches]
        return (rows / rows.sum(-1, keepdim=True)).amax(2).mean(1)

    def _zip(self, picture: Picture, before: Tensor, after: Tensor) -> Chosen:
        """The best by the class token, and others evenly spaced that take the rest."""
        assert picture.saliency is not None
        assert picture.keys is not None
        with self.span("selection"):
            contextual = round(VisionZip.contextual * self.keep)
            order = picture.saliency.argsort(dim=1, descending=True, stable=True)
            top = order[:, : self.keep - contextual].sort(dim=1).values
            rest = order[:, self.keep - contextual :].sort(dim=1).values
            left = rest.shape[1]
            spaced = torch.arange(contextual, device=rest.device) * left // contextual
            others = [_rows(t, rest) for t in (picture.x, picture.keys)]
            added = plain_merge((*others, spaced.expand(len(rest), -1)))
            index = torch.cat([top, rest[:, spaced]], 1)
            order = index.argsort(dim=1)
            together = torch.cat([_rows(picture.x, top), added], 1)
            return Chosen(_rows(together, order), index.gather(1, order))

    def _diverse(self, picture: Picture, before: Tensor, after: Tensor) -> Chosen:
        """Max-min distance, from the matrix of all of them."""
        with self.span("selection"):
            index = plain_diverse((picture.x,), self.keep)
            return Chosen(_rows(picture.x, index), index)

    def _whole(self, picture: Picture, before: Tensor, after: Tensor) -> Chosen:
        """All of them: FastV prunes inside the decoder."""
        every = torch.arange(picture.x.shape[1], device=picture.x.device)
        return Chosen(picture.x, every.expand(len(picture.x), -1))

    def _prefill(
        self, *, inputs_embeds: Tensor, past_key_values: Any = None, use_cache: bool | None = None,
        **given: Any,
    ) -> Any:  # fmt: skip
        """The decoder stack's forward with FastV's cut; a step after the prefill is its own."""
        stack = self._text
        if inputs_embeds.shape[1] == 1:
            return self._forward(
                inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=use_cache,
                **given,
            )  # fmt: skip
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=stack.config)
        hidden = inputs_embeds
        angles = stack.rotary_emb(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
        for at, layer in enumerate(stack.layers):
            shared = {
                "position_embeddings": angles, "past_key_values": past_key_values,
                "use_cache": use_cache,
            }  # fmt: skip
            if at != self._cut - 1:
                hidden = layer(hidden, attention_mask=None, **shared)
                continue
            with _eager(layer), _noting(layer.self_attn) as seen:
                hidden = layer(hidden, attention_mask=_causal(hidden), **shared)
            with self.span("selection"):
                hidden, angles = self._cut_after(seen[0][1], hidden, angles)
        return BaseModelOutputWithPast(stack.norm(hidden), past_key_values)

    def _cut_after(self, weights: Tensor, hidden: Tensor, angles: Any) -> tuple[Tensor, Any]:
        """Hidden states and angles of the tokens that the last row attends to most, and text."""
        assert self.index is not None
        batch, length, _ = hidden.shape
        first, last = self._at, self._at + self.index.shape[1]
        row = weights[:, :, -1, first:last].float().mean(1)
        self.index = row.topk(self.keep).indices.sort(dim=1).values
        places = torch.arange(length, device=hidden.device).expand(batch, -1)
        left = torch.cat([places[:, :first], first + self.index, places[:, last:]], 1)
        cut = tuple(_rows(part.expand(batch, -1, -1), left) for part in angles)
        return _rows(hidden, left), cut


def has_form(method: Method) -> bool:
    """Whether there is a maps form of a method with its options."""
    if type(method) not in RULES:
        return False
    kind: Any = type(method)
    options = PLAIN if kind is ConsensusDrop else {}
    return bool(method == kind(keep=method.keep, **options))


#: Options of `ConsensusDrop` by which it ranks, keeps the best and merges, and no more than that.
PLAIN: dict[str, Any] = {
    "rotary": True, "rows": "max", "diversity": 0.0, "positions": None,
    "size_attention": False,
}  # fmt: skip
RULES: dict[type[Method], Callable[..., Chosen]] = {
    ConsensusDrop: Maps._consensus,
    VisionZip: Maps._zip,
    FastV: Maps._whole,
    DivPrune: Maps._diverse,
}


def _takes(config: Any) -> bool:
    return (
        config.model_type in ("llava", "llava_next")
        and class_tokens(config) == 1
        and isinstance(config.vision_feature_layer, int)
        and config.vision_feature_select_strategy == "default"
    )


def _agreed(visual: Tensor, textual: Tensor, keep: int) -> Tensor:
    """The best by the mean of both ranks, ties to the better visual one: `[B, K]` ascending."""
    places = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)

    def rank(score: Tensor) -> Tensor:
        order = score.argsort(dim=1, descending=True, stable=True)
        return torch.empty_like(order).scatter_(1, order, places)

    one, other = rank(visual), rank(textual)
    both = (one + other) * visual.shape[1] + one
    return both.topk(keep, largest=False).indices.sort(dim=1).values


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, K, C]` of `[B, N, C]` at `index [B, K]`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _causal(hidden: Tensor) -> Tensor:
    """What eager attention adds to its logits, `[1, 1, L, L]`."""
    length = hidden.shape[1]
    lowest = torch.finfo(hidden.dtype).min
    return hidden.new_full((1, 1, length, length), lowest).triu(1)


@contextlib.contextmanager
def _eager(layer: Any) -> Iterator[None]:
    """Let one layer run eager attention, which takes its mask from whoever calls it."""
    config = layer.self_attn.config
    layer.self_attn.config = copy.copy(config)
    layer.self_attn.config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        layer.self_attn.config = config


@contextlib.contextmanager
def _noting(module: Any) -> Iterator[list[Any]]:
    """Collects what a module returns."""
    found: list[Any] = []
    handle = module.register_forward_hook(lambda _m, _i, out: found.append(out))
    try:
        yield found
    finally:
        handle.remove()
