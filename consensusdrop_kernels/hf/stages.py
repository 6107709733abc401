"""Pruning inside the decoder: between two layers the hidden states get shorter.

Layers before and after a stage hold caches of different lengths. A hook before every layer from
the first stage on hands it mask and positions of its own length, in the prefill and in every call
after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from ..methods.base import Method, QueryRule, Selection, Signals, TextProbe, Words
from ..methods.parts import upload
from ..profiling import step
from .cache import State, add_stage
from .layout import Compacted, Group, Layout, Shortened, chosen_places, compacted, slot_counts
from .probe import Angles, Projection, row_lse, take_rows
from .query import question_rows
from .sizes import key_bias, weighted_mask
from .words import question_words


def check_stages(stages: tuple[int, ...], text: Any, least: int) -> None:
    """Raises for stages that a decoder stack can't have.

    Args:
        stages: layers before which to prune.
        text: the decoder stack.
        least: the first layer that a stage may stand before.

    Raises:
        ValueError: a layer out of range, or out of order.
        NotImplementedError: layers that see a window of the sequence, or are on several devices.
    """
    last = len(text.layers) - 1
    if list(stages) != sorted(set(stages)) or not all(least <= s <= last for s in stages):
        raise ValueError(
            f"stages must be ascending layers in {least}..{last} (before the first layer a method "
            f"prunes without a stage, and features must have been added to the early ones), got "
            f"{list(stages)}"
        )
    devices = {str(parameter.device) for parameter in text.parameters()}
    if len(devices) > 1:
        raise NotImplementedError(
            f"stages need the whole decoder on one device, this one is on {sorted(devices)}"
        )
    window = getattr(text.config, "sliding_window", None)
    every = "full_attention" if window is None else "sliding_attention"
    kinds = set(getattr(text.config, "layer_types", None) or [every])
    if kinds != {"full_attention"}:
        raise NotImplementedError(
            f"stages need layers that see the whole sequence, this decoder has {sorted(kinds)}"
        )


def check_not_recomputed(text: Any) -> None:
    """Raises NotImplementedError where a backward pass would run the layers' hooks again, long
    after the prefill: gradient checkpointing, up to transformers 5.22."""
    hooks_inside = "__call__" in vars(GradientCheckpointingLayer)
    layer = text.layers[-1]
    if hooks_inside and layer.training and getattr(layer, "gradient_checkpointing", False):
        raise NotImplementedError(
            "stages inside the decoder with gradient checkpointing need transformers >= 5.23"
        )


@dataclass
class Progress:
    """A prefill on its way through the layers.

    Attributes:
        layout: the prompts as they were.
        slots: for each group, the places of its tokens in the `B * K` tokens, `[R, S]`, ascending;
            `B * K` where a slot is unused.
        sizes: for each group `[R, S]`, how many patches each token stands for.
        live: `[B, K]` bool, or None if every place is a token.
        moved: `[B, L]`, where each text token of the prompt stands now.
        lengths: tokens of each row.
        width: `K`.
        padded: for each group, whether slots may be unused.
        weighs: whether attention goes by the sizes.
        causal: whether no visual token sees one after it.
        done: stages behind.
        encoder: for each group, what the encoder said of its tokens; None once any was dropped.
        order: `[B, K]`, the place that each token had when it entered the decoder; None before the
            first stage.
        inputs: mask and positions of the layers from the last stage on, by what they replace.
    """

    layout: Layout
    slots: list[Tensor]
    sizes: list[Tensor]
    live: Tensor | None
    moved: Tensor
    lengths: list[int]
    width: int
    padded: list[bool]
    encoder: list[Signals | None]
    weighs: bool = False
    causal: bool = True
    done: int = 0
    order: Tensor | None = None
    inputs: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def after(
        cls, layout: Layout, chosen: Sequence[Selection], short: Shortened, weighs: bool,
        signals: Sequence[Signals], whole: Sequence[bool], causal: bool = True,
    ) -> Progress:  # fmt: skip
        """Where a prefill stands when it enters the decoder; `whole` says of which groups nothing
        was dropped, and `signals` what was known of them."""
        places = [
            _in_order(where.view(selection.index.shape), selection.size.float())
            for where, selection in zip(short.slots, chosen, strict=True)
        ]
        slots, sizes = [slots for slots, _ in places], [size for _, size in places]
        width = short.embeds.shape[1]
        padded = [selection.padded for selection in chosen]
        return cls(
            layout, slots, sizes, short.mask, short.restore, list(short.lengths), width, padded,
            [one if every else None for one, every in zip(signals, whole, strict=True)], weighs,
            causal,
        )  # fmt: skip

    def bias(self, batch: int) -> Tensor | None:
        """Logarithms of the sizes of all keys `[B, K]`, or None where nobody weighs them."""
        return key_bias(self.sizes, self.slots, batch, self.width) if self.weighs else None


class StageProbe:
    """Queries and keys of the layer that is about to run, on the hidden states it will get.

    `keys` is filled with those of all tokens, for the probes of all groups of a stage.
    """

    def __init__(
        self, text: Any, layer: int, hidden: Tensor, given: dict[str, Any], progress: Progress,
        group: int, special: Tensor | None, keys: dict[bool, Tensor],
    ) -> None:  # fmt: skip
        self._hidden = hidden.detach()
        self._progress = progress
        self._number = group
        self._special = special
        self._text, self._layer, self._angles = text, layer, given["position_embeddings"]
        mask = given.get("attention_mask")
        whole = isinstance(mask, Tensor) and mask.dim() == 4
        self._mask: Tensor | None = mask if whole else None
        self._causal = progress.causal or not whole
        self._keys = keys  # with rotation and without
        self._queries: dict[Any, Tensor] = {}  # without, of each query rule

    def words(self, query: str | QueryRule) -> Words:
        """The hidden states of the question."""
        progress = self._progress
        group = progress.layout.groups[self._number]
        return question_words(query, group, self._special, self._hidden, progress.moved)

    @torch.no_grad()
    def __call__(
        self, *, layer: int, rotary: bool, context: str, query: str | QueryRule,
        lookahead: bool = False,
    ) -> TextProbe:  # fmt: skip
        """As `StaticProbe`, but always of the stage's own layer and its hidden states."""
        progress, hidden = self._progress, self._hidden
        group = progress.layout.groups[self._number]
        columns = progress.slots[self._number] % progress.width
        project = Projection(self._text, self._layer)
        k_all = self._all_keys(project, rotary)
        index = columns[:, None, :, None].expand(-1, k_all.shape[1], -1, k_all.shape[3])
        k = group.of_prompts(k_all).gather(2, index)

        if query == "visual":
            q = self._plain(project, query, take_rows(group.of_prompts(hidden), columns))
            angles = self._at(columns, group) if rotary else None
            weight = (progress.slots[self._number] < hidden.shape[0] * progress.width).float()
            asked = (True,) * len(columns)
            where, keys = columns, group.of_prompts(k_all)
            live = None if progress.live is None else group.of_prompts(progress.live)
        else:
            index, kept = question_rows(query, group, self._special, seeing=context == "all")
            where = progress.moved.gather(1, upload(index, hidden.device))
            q = self._plain(project, query, take_rows(hidden, where))
            angles = self._at(where) if rotary else None
            asked = tuple(kept.any(1).tolist())
            weight = upload(kept, hidden.device).float()
            keys, live = k_all, progress.live
        q, lse = project.rotated(q, angles), None
        if context == "all":
            seen = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
            seen = seen if live is None else live
            if not self._causal:
                seen = self._seen(where, group.own if query == "visual" else None)
                where = torch.full_like(where, keys.shape[2])
            lse = row_lse(q, keys, where, seen, project.scale)
        if query != "visual":
            q, lse = group.of_prompts(q), None if lse is None else group.of_prompts(lse)
        return TextProbe(q, k, project.scale, lse, weight, asked, self._causal)

    def _all_keys(self, project: Projection, rotary: bool) -> Tensor:
        if False not in self._keys:
            self._keys[False] = project.keys(self._hidden)
        if rotary not in self._keys:
            self._keys[rotary] = project.rotated(self._keys[False], self._at())
        return self._keys[rotary]

    def _plain(self, project: Projection, query: str | QueryRule, x: Tensor) -> Tensor:
        if query not in self._queries:
            self._queries[query] = project.queries(x)
        return self._queries[query]

    def _seen(self, where: Tensor, sample: Tensor | None) -> Tensor:
        """Which places the rows at `where [R, M]` of their samples see, `[R, M, K]` bool."""
        assert self._mask is not None
        mask = self._mask[:, 0].expand(len(self._hidden), -1, -1)
        mask = mask if sample is None else mask[sample]
        rows = mask.gather(1, where[..., None].expand(-1, -1, mask.shape[2]))
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2

    def _at(self, index: Tensor | None = None, group: Group | None = None) -> Angles:
        """The angles at `index` of every row, or of those of a group; None: at all places."""
        cos, sin = (part.expand(len(self._hidden), -1, -1) for part in self._angles)
        if group is not None:
            cos, sin = group.of_prompts(cos), group.of_prompts(sin)
        return (cos, sin) if index is None else (take_rows(cos, index), take_rows(sin, index))


@step("stage")
def advance(
    progress: Progress, hidden: Tensor, kwargs: dict[str, Any], method: Method, layer: int,
    text: Any, special: Tensor | None,
) -> tuple[Tensor, Compacted]:  # fmt: skip
    """Prune the hidden states `[B, K, D]` before a layer; brings `progress` up to date."""
    batch, length, _ = hidden.shape
    end = batch * length
    chosen: list[Selection] = []
    places: list[Tensor] = []
    stay = hidden.new_ones(batch, length, dtype=torch.bool)
    stay = stay if progress.live is None else progress.live.clone()
    flat = torch.cat([stay.flatten(), stay.new_zeros(1)])
    for slots in progress.slots:
        flat[slots.flatten()] = False
    stay = flat[:-1].view(batch, length)
    lengths = list(progress.lengths)
    keys: dict[bool, Tensor] = {}
    for number, group in enumerate(progress.layout.groups):
        slots = progress.slots[number]
        count = slots.shape[1]
        padded = progress.padded[number]
        budget = min(method.stage_budget(progress.done, group.tokens), count)
        probe = StageProbe(text, layer, hidden, kwargs, progress, number, special, keys)
        known = progress.encoder[number] or Signals(hidden, (1, count))
        signals = replace(
            known,
            x=hidden.flatten(0, 1)[slots.clamp_max(end - 1)],
            valid=slots < end if padded else None,
            size=progress.sizes[number],
            probe=probe,
            words=probe.words,
            original=group.tokens,
        )
        selection = (
            method.identity(signals)
            if budget == count
            else method.select_stage(progress.done, signals)
        )
        if budget == count and padded:
            index = torch.arange(count, device=slots.device).expand_as(slots)
            index = index.masked_fill(slots == end, -1)
            selection = Selection(signals.x, index, index, selection.size, padded=True)
        before = (slots < end).sum(1).tolist() if padded else [count] * len(slots)
        for row, old, new in zip(
            group.sample_list, before, slot_counts(selection), strict=True
        ):  # fmt: skip
            lengths[row] += new - old
        places.append(chosen_places(slots, selection, end))
        progress.sizes[number] = _joined(selection, progress.sizes[number])
        progress.padded[number] = selection.padded
        if budget < count:
            progress.encoder[number] = None
        chosen.append(selection)
    left = compacted(hidden, stay, places, lengths, chosen)
    for number, selection in enumerate(chosen):
        slots = left.slots[number].view(selection.index.shape)
        progress.slots[number], progress.sizes[number] = _in_order(slots, progress.sizes[number])
    progress.moved = left.restore.gather(1, progress.moved)
    progress.live, progress.lengths = left.mask, lengths
    progress.width = left.tokens.shape[1]
    progress.done += 1
    progress.order = (
        left.order if progress.order is None else progress.order.gather(1, left.order)
    )  # fmt: skip
    progress.inputs = {}
    cache = kwargs.get("past_key_values")
    if cache is not None:
        add_stage(cache, progress.width, left.mask, progress.bias(batch))
    return left.tokens, left


def _in_order(slots: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in the order of the prompt, whatever the order of a selection; unused slots last."""
    order = slots.argsort(dim=1)
    return slots.gather(1, order), sizes.gather(1, order)


def _joined(selection: Selection, size: Tensor) -> Tensor:
    """How many patches each slot stands for, from how many each token did."""
    slots = selection.index.shape[1]
    # One more slot takes what was dropped for good. Counts are whole, so any order sums alike.
    where = selection.assign.masked_fill(selection.assign < 0, slots)
    return size.new_zeros(len(size), slots + 1).scatter_add(1, where, size)[:, :slots]


def prefill_inputs(progress: Progress, kwargs: dict[str, Any], text: Any, tokens: Tensor) -> Any:
    """The keyword arguments of a layer behind a stage, from those it would have had."""
    assert progress.order is not None
    out = dict(kwargs)
    for name in ("attention_mask", "position_embeddings", "position_ids"):
        given = kwargs.get(name)
        key = id(given) if given is not None else hash(name)
        if key not in progress.inputs:
            # `given` is held along, so that its id stays its own.
            progress.inputs[key] = given, _shorter(name, given, progress, text, tokens)
        out[name] = progress.inputs[key][1]
    return out


def _shorter(name: str, given: Any, progress: Progress, text: Any, tokens: Tensor) -> Any:
    order = progress.order
    assert order is not None
    if name == "position_embeddings":
        return tuple(torch.take_along_dim(part, order[..., None], -2) for part in given)
    if name == "position_ids":
        if given is None:
            return None
        return torch.take_along_dim(given, order.expand(*given.shape[:-2], -1, -1), -1)
    if isinstance(given, Tensor) and given.dim() == 4:
        rows = torch.take_along_dim(given, order[:, None, :, None], 2)
        mask = torch.take_along_dim(rows, order[:, None, None, :], 3)
        mask = mask if progress.live is None else _hide(mask, progress.live)
        bias = progress.bias(len(order))
        return mask if bias is None else weighted_mask(mask, bias, tokens)
    if given is None or given.dim() == 2:
        return create_causal_mask(
            config=text.config,
            inputs_embeds=tokens,
            attention_mask=progress.live,
            past_key_values=None,
        )
    raise NotImplementedError(f"stages can't shorten a mask of type {type(given).__name__}")


def _hide(mask: Tensor, live: Tensor) -> Tensor:
    hidden = ~live[:, None, None]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def later_inputs(
    state: State, stage: int, kwargs: dict[str, Any], count: int, implementation: str
) -> Any:
    """The keyword arguments of a layer behind a stage in a call of `count` tokens that continues a
    pruned cache."""
    here = state.stages[stage]
    given = kwargs.get("attention_mask")
    if given is None and here.mask is None:
        return None
    if given is not None and not isinstance(given, Tensor):
        raise NotImplementedError(f"stages can't continue with a {type(given).__name__}")
    # The layers before the stage hold the new tokens already. Less than was kept is left where
    # drafts of assisted decoding were part of the prefill and then cut off, here as well as there.
    new = int(kwargs["past_key_values"].get_seq_length()) - state.kept
    cut = max(count - new, 0)
    kept = state.kept - cut
    if here.mask is not None:
        seen = here.mask[:, : here.kept - cut]
    else:
        assert given is not None
        seen = torch.ones(len(given), here.kept - cut, dtype=torch.bool, device=given.device)
    if given is None:
        mask = torch.cat([seen, seen.new_ones(len(seen), new + cut)], 1)
        return kwargs | {
            "attention_mask": mask if "flash" in implementation else mask[:, None, None]
        }
    if given.dim() == 2:
        return kwargs | {"attention_mask": torch.cat([seen.to(given), given[:, kept:]], 1)}
    past = seen[:, None, None].expand(-1, *given.shape[1:3], -1)
    if given.dtype != torch.bool:
        bias = seen.new_zeros(seen.shape) if here.bias is None else here.bias[:, : seen.shape[1]]
        bias = bias.to(given.dtype)[:, None, None].expand_as(past)
        past = bias.masked_fill(~past, torch.finfo(given.dtype).min)
    return kwargs | {"attention_mask": torch.cat([past, given[..., kept:]], -1)}


def layer_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Any:
    """The arguments of a decoder layer with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return (), kwargs | {"hidden_states": hidden}


def implementation_of(layer: nn.Module) -> str:
    """Which attention a decoder layer runs."""
    config: Any = getattr(layer.self_attn, "config", None)
    return getattr(config, "_attn_implementation", None) or ""
