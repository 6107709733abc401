"""What a patched model must compute, worked out without hooks of ours, cache, padding or batch.

An unpatched copy of the model is run on each sample alone; what enters its decoder stack is caught,
shortened here by plain loops, and decoded by running the whole sequence anew for every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from consensusdrop_kernels.hf.adapter import find
from consensusdrop_kernels.methods.base import Method, Selection, Signals

from .families import Inputs


@dataclass
class Sequence:
    """What enters the decoder stack: `embeds [K, D]`, positions `[..., K]`, whole masks by kind
    (`[K, K]` bool, or None for a causal one), and features that early layers add."""

    embeds: Tensor
    positions: Tensor
    masks: dict[str, Tensor] | Tensor | None
    deepstack: list[Tensor] | None
    visual: Tensor | None
    sizes: Tensor | None = None  # how many tokens each key is attended to as, `[K]`


class Unpatched:
    """An unpatched model, looked at from inside."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text: Any = model.get_submodule(find(model.config).text)

    @torch.no_grad()
    def inputs(self, sample: Inputs) -> Sequence:
        """What enters the decoder stack on a prompt."""
        caught: dict[str, Any] = {}

        def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            caught.update(kwargs)

        hook = self.text.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            steps = {"max_new_tokens": 1, "do_sample": False}
            self.model.generate(**sample, **steps)
        finally:
            hook.remove()
        embeds = caught["inputs_embeds"][0]
        positions = caught.get("position_ids")
        if positions is None:
            positions = torch.arange(len(embeds))[None]
        positions = positions.expand(*positions.shape[:-2], 1, -1)[..., 0, :]
        visual = caught.get("visual_pos_masks")
        return Sequence(
            embeds,
            positions,
            _whole(caught.get("attention_mask"), len(embeds)),
            caught.get("deepstack_visual_embeds"),
            None if visual is None else visual[0],
        )

    @torch.no_grad()
    def hidden(self, sequence: Sequence) -> Tensor:
        """`[K, D]`, without a cache."""
        mask = sequence.masks
        if isinstance(mask, dict):
            mask = self.windowed(mask)
        if sequence.sizes is not None:
            mask = _weighed(mask, sequence.sizes)
        given: dict[str, Any] = {
            "inputs_embeds": sequence.embeds[None],
            "position_ids": sequence.positions[..., None, :],
            "use_cache": False,
        }
        if isinstance(mask, dict):
            given["attention_mask"] = {kind: self.handed(m) for kind, m in mask.items()}
        elif mask is not None:
            given["attention_mask"] = self.handed(mask)
        else:
            given["attention_mask"] = torch.ones(1, len(sequence.embeds), dtype=torch.long)
        if sequence.deepstack is not None:
            given["deepstack_visual_embeds"] = sequence.deepstack
            given["visual_pos_masks"] = sequence.visual[None]
        return self.text(**given).last_hidden_state[0]

    def handed(self, mask: Tensor) -> Tensor:
        """A whole mask as the attention in use takes it."""
        if self.text.config._attn_implementation == "eager" and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return mask[None, None]

    def windowed(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole masks, in which a layer's window counts the tokens of the sequence as it is: what
        was dropped makes room for tokens before."""
        if "sliding_attention" not in masks:
            return masks
        place = torch.arange(len(masks["sliding_attention"]))
        near = place[:, None] - place < self.text.config.sliding_window
        wide = masks["sliding_attention"] | (masks["full_attention"] & near)
        return masks | {"sliding_attention": wide}

    @torch.no_grad()
    def staged(self, sequence: Sequence, cuts: Mapping[int, Cut], since: int) -> Tensor:
        """`[K', D]`, layer by layer, of a sequence that is cut before some of them; its last
        `since` tokens came after the cuts were made."""
        hidden, where = sequence.embeds[None], sequence.positions[..., None, :]
        where = where[1:] if where.dim() == 3 and len(where) == 4 else where
        cos, sin = self.text.rotary_emb(hidden, where)
        places, sizes = torch.arange(hidden.shape[1]), sequence.sizes
        for at, layer in enumerate(self.text.layers):
            if at in cuts:
                new = torch.arange(hidden.shape[1] - since, hidden.shape[1])
                keep = torch.cat([cuts[at].left, new])
                places, hidden = places[keep], cuts[at].merged(hidden)[:, keep]
                cos, sin = cos[..., keep, :], sin[..., keep, :]
                if sizes is not None:
                    sizes = torch.cat([cuts[at].sizes.to(sizes), sizes.new_ones(len(new))])
            if isinstance(sequence.masks, Tensor):
                mask = sequence.masks[places][:, places]
            else:
                mask = torch.ones(len(places), len(places), dtype=torch.bool).tril()
            if sizes is not None:
                mask = _weighed(mask, sizes)
            given = {"attention_mask": self.handed(mask), "position_embeddings": (cos, sin)}
            hidden = layer(hidden, **given)
            if sequence.deepstack is not None and at < len(sequence.deepstack):
                assert sequence.visual is not None
                hidden[0, sequence.visual] += sequence.deepstack[at]
        return self.text.norm(hidden)[0]

    @torch.no_grad()
    def greedy(
        self, sequence: Sequence, steps: int, cuts: Mapping[int, Cut] | None = None
    ) -> tuple[list[int], Tensor]:
        """Greedy decoding: ids and logits `[steps, V]`."""
        ids, logits = [], []
        for step in range(steps):
            hidden = self.staged(sequence, cuts, step) if cuts else self.hidden(sequence)
            logits.append(self.model.get_output_embeddings()(hidden[-1]))
            ids.append(int(logits[-1].argmax()))
            sequence = self.append(sequence, ids[-1])
        return ids, torch.stack(logits)

    def append(self, sequence: Sequence, token: int) -> Sequence:
        """The sequence with one more token, which sees all before it."""
        word = self.model.get_input_embeddings()(torch.tensor([token]))
        masks = sequence.masks
        if isinstance(masks, dict):
            masks = {
                kind: _grown(mask, kind != "sliding_attention") for kind, mask in masks.items()
            }
        elif masks is not None:
            masks = _grown(masks)
        visual = sequence.visual
        return Sequence(
            torch.cat([sequence.embeds, word]),
            torch.cat([sequence.positions, sequence.positions[..., -1:] + 1], -1),
            masks,
            sequence.deepstack,
            None if visual is None else torch.cat([visual, torch.zeros(1, dtype=torch.bool)]),
            None if sequence.sizes is None else torch.cat([sequence.sizes, torch.ones(1)]),
        )


def _weighed(mask: Any, sizes: Tensor) -> Any:
    """Whole masks to add: the logarithm of each key's size where it is seen."""
    if isinstance(mask, dict):
        return {kind: _weighed(one, sizes) for kind, one in mask.items()}
    count = len(sizes)
    seen = torch.ones(count, count, dtype=torch.bool).tril() if mask is None else mask
    return sizes.log().expand(count, -1).masked_fill(~seen, torch.finfo(torch.float32).min)


def _whole(mask: Any, length: int) -> Any:
    if isinstance(mask, dict):
        return {kind: _whole(one, length) for kind, one in mask.items()}
    if mask is None or mask.dim() == 2:
        return None
    one = mask[0, 0]
    return one if one.dtype == torch.bool else one == 0


def _grown(mask: Tensor, all_seen: bool = True) -> Tensor:
    mask = torch.nn.functional.pad(mask, (0, 1), value=False)
    return torch.cat([mask, torch.full((1, mask.shape[1]), all_seen)])


@dataclass
class Choice:
    """What was kept of one image of a sample: its patches' places, and slots of them."""

    columns: Tensor
    index: Tensor
    assign: Tensor


def choices(pruning: Any, row: int, shift: int) -> list[Choice]:
    """What a prefill chose of the images of one prompt, `shift` columns of padding taken off."""
    found = []
    for image, sample in enumerate(pruning.sample):
        if sample != row:
            continue
        columns = pruning.columns[image] - shift
        index = pruning.selection.index[image]
        assign = pruning.selection.assign[image][: len(columns)]
        found.append(Choice(columns, index[index >= 0], assign))
    return found


def pruned(
    sequence: Sequence, chosen: list[Choice], placeholders: Tensor, compact: bool,
    merged: bool = True, weighed: bool = False,
) -> Sequence:  # fmt: skip
    """The sequence as a method leaves it: plain means, everything else filtered."""
    left = ~placeholders
    embeds = sequence.embeds.clone()
    sizes = torch.ones(len(embeds))
    layers = None if sequence.deepstack is None else [d.clone() for d in sequence.deepstack]
    number = None if sequence.visual is None else sequence.visual.cumsum(0) - 1
    for one in chosen:
        for slot, token in enumerate(one.index.tolist()):
            members = one.columns[one.assign == slot] if merged else one.columns[[token]]
            here = one.columns[token]
            left[here] = True
            sizes[here] = len(members)
            embeds[here] = sequence.embeds[members].double().mean(0).to(embeds.dtype)
            for layer, features in enumerate(layers or []):
                assert sequence.deepstack is not None
                assert number is not None
                mean = sequence.deepstack[layer][number[members]].double().mean(0)
                features[number[here]] = mean.to(features.dtype)
    places = left.nonzero().flatten()
    positions = sequence.positions[..., places]
    if compact:
        positions = torch.arange(len(places)) + sequence.positions[..., :1]
    masks = sequence.masks
    if isinstance(masks, dict):
        masks = {kind: None if m is None else m[places][:, places] for kind, m in masks.items()}
    elif masks is not None:
        masks = masks[places][:, places]
    visual = None
    if sequence.visual is not None:
        visual = (sequence.visual & left)[places]
        kept = (sequence.visual & left)[sequence.visual]
        layers = [features[kept] for features in layers or []]
    return Sequence(
        embeds[places], positions, masks, layers, visual, sizes[places] if weighed else None
    )  # fmt: skip


@dataclass
class Cut:
    """A stage inside the decoder, of one prompt: what is left of its `K` places and how many tokens
    each stands for, and what becomes of those that take in others: their places, weights and own
    place."""

    left: Tensor
    sizes: Tensor
    merges: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def merged(self, hidden: Tensor) -> Tensor:
        """Hidden states `[1, K, D]` with the weighted means in their places."""
        out = hidden.clone()
        for own, members, weights in self.merges:
            mean = (weights[:, None] * hidden[0, members].double()).sum(0) / weights.sum()
            out[0, own] = mean.to(out.dtype)
        return out


class Calls(list[tuple[Signals, Selection]]):
    """What a method was asked and chose, one call after another."""

    def watch(self, method: Method) -> Method:
        """The same method, its choices noted here; also where it keeps everything."""
        calls = self

        class Watched(type(method)):  # type: ignore[misc]
            def select(self, signals: Signals) -> Selection:
                return calls._noted(signals, super().select(signals))

            def identity(self, signals: Signals) -> Selection:
                return calls._noted(signals, super().identity(signals))

            def select_stage(self, stage: int, signals: Signals) -> Selection:
                return calls._noted(signals, super().select_stage(stage, signals))

        given: Any = method
        options = {f.name: getattr(method, f.name) for f in fields(given) if f.init}
        return Watched(**options)  # type: ignore[no-any-return]

    def _noted(self, signals: Signals, chosen: Selection) -> Selection:
        if self and self[-1][0] is signals:  # of a choice that begins with everything
            self.pop()
        self.append((signals, chosen))
        return chosen


@dataclass
class Image:
    """One image of a prefill: its patches' places in its prompt, and what was chosen of them before
    the decoder and at each stage: `index [S]` and `assign [N]`, tokens counted in the order of the
    prompt."""

    row: int
    columns: Tensor
    steps: list[tuple[Tensor, Tensor]]


def images(pruning: Any, calls: Calls, prompts: list[Sequence]) -> list[Image]:
    """The images of a prefill of these prompts, in order, with what the method's calls chose of
    each. A call is for several images at once, which are found there by their tokens."""
    groups = len(calls) // (1 + len(pruning.stages))
    assert groups * (1 + len(pruning.stages)) == len(calls)
    found, taken = [], set()
    longest = max(len(prompt.embeds) for prompt in prompts)
    for row, padded in zip(pruning.sample, pruning.columns, strict=True):
        columns = padded - (longest - len(prompts[row].embeds))
        own = prompts[row].embeds[columns]
        far = {
            (group, member): float((one - own).abs().max())
            for group in range(groups)
            for member, one in enumerate(calls[group][0].x)
            if one.shape == own.shape
        }
        group, member = min(far, key=far.__getitem__)
        assert far[group, member] < 1e-3
        taken.add((group, member))
        chosen = [selection for _, selection in calls[group::groups]]
        steps = [(selection.index[member], selection.assign[member]) for selection in chosen]
        found.append(Image(row, columns, [(i[i >= 0], a) for i, a in steps]))
    assert len(taken) == len(found)
    return found


def cut(
    length: int, places: list[Tensor], sizes: list[Tensor], steps: list[tuple[Tensor, Tensor]]
) -> Cut:
    """One stage of a prompt of `length` tokens: `places [n]` and `sizes [n]` of every image's
    tokens, in order, and what was chosen of them. Both are brought up to date."""
    left = torch.ones(length, dtype=torch.bool)
    for place in places:
        left[place] = False
    merges, kept = [], []
    for place, size, (index, assign) in zip(places, sizes, steps, strict=True):
        count, own, total = len(place), [], []
        for slot, token in enumerate(index.tolist()):
            if token >= count:  # an unused place, which stays one
                continue
            members = (assign[:count] == slot).nonzero().flatten()
            assert token in members
            merges.append((int(place[token]), place[members], size[members]))
            own.append(int(place[token]))
            total.append(float(size[members].sum()))
        order = torch.tensor(own).argsort()
        kept.append((torch.tensor(own)[order], torch.tensor(total).double()[order]))
        left[kept[-1][0]] = True
    moved = left.cumsum(0) - 1
    places[:] = [moved[place] for place, _ in kept]
    sizes[:] = [size for _, size in kept]
    whole = torch.ones(int(left.sum())).double()
    for place, size in zip(places, sizes, strict=True):
        whole[place] = size
    return Cut(left.nonzero().flatten(), whole, merges)


def shortened(
    sequence: Sequence, own: list[Image], stages: tuple[int, ...], placeholders: Tensor,
    compact: bool, weighed: bool = False,
) -> tuple[Sequence, dict[int, Cut], list[list[int]]]:  # fmt: skip
    """What enters the decoder of a prompt with these images, where it is cut, and how many tokens
    each image has at each step."""
    chosen = [Choice(one.columns, *one.steps[0]) for one in own]
    short = pruned(sequence, chosen, placeholders, compact, weighed=weighed)
    left = ~placeholders
    for one in chosen:
        left[one.columns[one.index]] = True
    moved = left.cumsum(0) - 1
    places, sizes = [], []
    for one in chosen:
        size = torch.stack([(one.assign == slot).sum() for slot in range(len(one.index))])
        order = one.index.argsort()
        places.append(moved[one.columns[one.index[order]]])
        sizes.append(size[order].double())
    cuts, counts = {}, [[len(place) for place in places]]
    length = int(left.sum())
    for number, layer in enumerate(stages, 1):
        cuts[layer] = cut(length, places, sizes, [one.steps[number] for one in own])
        length = len(cuts[layer].left)
        counts.append([len(place) for place in places])
    return short, cuts, counts
