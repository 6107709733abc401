"""What a patched model must compute, worked out without hooks of ours, cache, padding or batch.

An unpatched copy of the model is run on each sample alone; what enters its decoder stack is caught,
shortened here by plain loops, and decoded by running the whole sequence anew for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consensusdrop_kernels.hf.adapter import find

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
    def greedy(self, sequence: Sequence, steps: int) -> tuple[list[int], Tensor]:
        """Greedy decoding: ids and logits `[steps, V]`."""
        ids, logits = [], []
        for _ in range(steps):
            logits.append(self.model.get_output_embeddings()(self.hidden(sequence)[-1]))
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
