"""Tiny random models of every family with an adapter, and prompts for them.

A module here registers its families with `family`; the contract suite runs on each.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One model family under test.

    Attributes:
        name: what the tests call it.
        build: makes the model, with random weights large enough that every token matters.
        samples: prompts with their pictures, each a batch of one without padding: `input_ids`,
            `attention_mask`, pictures, and what else the model takes. At least two of different
            lengths, different numbers of visual tokens where the family allows it.
        join: several samples as one batch, padded at the left.
        image_ids: the placeholder ids, which must never be generated.
        spatial: positions have height and width.
        keep: a budget that prunes every image of the samples.
        beams: whether the stock model can search with beams, in this version of transformers.
    """

    name: str
    build: Callable[[], Any]
    samples: Callable[[], list[Inputs]]
    join: Callable[[list[Inputs]], Inputs]
    spatial: bool = False
    keep: int | float = 0.4
    beams: bool = True

    def model(self) -> Any:
        """A model of its own for every caller, always with the same weights."""
        if self.name not in _BUILT:
            torch.manual_seed(11)
            _BUILT[self.name] = self.build().eval()
        return copy.deepcopy(_BUILT[self.name])


FAMILIES: dict[str, Family] = {}
_BUILT: dict[str, Any] = {}


def family(made: Family) -> Family:
    """Register a family for the contract suite."""
    FAMILIES[made.name] = made
    return made


def loud(model: Any, *silent: int, scale: float = 0.3) -> Any:
    """Larger random weights, so that logits depend on every token, and no logit for the ids that
    must not be generated. Returns the model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed_tokens" not in name:
                spread = scale * (48 / weight.shape[-1]) ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[list(silent)] = 0.0
    return model


def pad_left(samples: list[Inputs], pad: int, fill: dict[str, int] | None = None) -> Inputs:
    """`input_ids` and `attention_mask` of several samples, and whatever else has their shape (its
    padding from `fill`), padded at the left; everything else concatenated in order."""
    fill = {"input_ids": pad, "attention_mask": 0} | (fill or {})
    length = max(s["input_ids"].shape[1] for s in samples)
    out: Inputs = {}
    for name in samples[0]:
        parts = [s[name] for s in samples]
        if name in fill:
            parts = [
                torch.nn.functional.pad(p, (length - p.shape[1], 0), value=fill[name])
                for p in parts
            ]
        out[name] = torch.cat(parts)
    return out


def words(count: int, low: int, high: int, seed: int) -> list[int]:
    """`count` token ids in `low..high-1`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count,), generator=generator).tolist()


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(ids: list[int]) -> Inputs:
    """`input_ids` and `attention_mask` of one prompt."""
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
