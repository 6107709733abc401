"""What it costs to ask the question, before the LLM runs: the probes of one image of 576 tokens.

A decoder with random weights; 40 tokens of text around the image, the last of which ask. Each call
ends with the saliency of every token; `random` ends with the tokens it keeps, and `one layer` is
the whole prompt through one decoder layer, which every method before the LLM saves having run.
Run with `make bench`, on an otherwise idle machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from consensusdrop_kernels import Random
from consensusdrop_kernels.hf import probe as probes
from consensusdrop_kernels.hf.layout import Layout, Place
from consensusdrop_kernels.hf.lookahead import Lookahead
from consensusdrop_kernels.methods import Signals

TOKENS, BEFORE, TEXT, KEEP = 576, 8, 40, 64


class Shape(NamedTuple):
    """Of a decoder layer: widths of the model and of its MLP, heads of queries and of keys."""

    model: int
    inner: int
    heads: int
    key_heads: int

    def __str__(self) -> str:
        return f"D={self.model}, {self.heads} heads over {self.key_heads}"


SHAPES = [
    Shape(1024, 2816, 16, 16),
    Shape(3584, 18944, 28, 4),  # as in Qwen2.5-VL-7B
    Shape(4096, 11008, 32, 32),  # as in LLaVA-1.5-7B
]
CONTENDERS = (
    "random", "folded", "static", "static, rotary", "lookahead 1", "lookahead 2", "one layer",
)  # fmt: skip


class Prompt(NamedTuple):
    text: Any
    layout: Layout
    embeds: Tensor
    positions: Tensor


@cache
def prompt(shape: Shape) -> Prompt:
    """One layer in all three places: it is never run twice on the same rows."""
    torch.manual_seed(0)
    text = LlamaModel(
        LlamaConfig(
            vocab_size=8, hidden_size=shape.model, intermediate_size=shape.inner,
            num_hidden_layers=1, num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
        )
    ).eval()  # fmt: skip
    text.layers.extend([text.layers[0]] * 2)
    length = TOKENS + TEXT
    columns = torch.arange(BEFORE, BEFORE + TOKENS)
    every = torch.ones(1, length, dtype=torch.bool)
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[0, columns] = True
    ids = torch.ones(1, length, dtype=torch.long)
    places = (Place(0, columns, (24, 24)),)
    layout = Layout(ids, visual, every, every, ~every, places, torch.device("cpu"))
    return Prompt(text, layout, torch.randn(1, length, shape.model), torch.arange(length)[None])


def saliency(shape: Shape, rows: int, rotary: bool, depth: int = 0) -> Tensor:
    """Of the image's tokens `[1, N]`, asked by the last `rows`; nothing is kept between calls."""
    text, layout, embeds, positions = prompt(shape)

    def last(ids: Tensor, visual: Tensor, valid: Tensor) -> Tensor:
        return valid & (torch.arange(valid.shape[1]) >= valid.shape[1] - rows)

    ahead = Lookahead(text, embeds, positions, layout, None) if depth else None
    group = layout.groups[0]
    ask = probes.StaticProbe(text, embeds, positions, group, group.take(embeds), None, ahead)
    found = ask(layer=depth, rotary=rotary, context="visual", query=last, lookahead=depth > 0)
    return torch.ops.cdrop.attention_saliency(
        found.q, found.k, scale=found.scale, query_weight=found.weight, reduce="max"
    )


def call(contender: str, shape: Shape, rows: int) -> Callable[[], object]:
    text, layout, embeds, positions = prompt(shape)
    if contender == "random":
        method, x = Random(keep=KEEP), layout.groups[0].take(embeds)
        return lambda: method.select(Signals(x, (24, 24)))
    if contender == "one layer":
        angles = text.rotary_emb(embeds, positions)
        return lambda: text.layers[0](embeds, position_embeddings=angles)
    if contender.startswith("lookahead"):
        return lambda: saliency(shape, rows, rotary=True, depth=int(contender[-1]))
    return lambda: saliency(shape, rows, rotary=contender == "static, rotary")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_probe(benchmark, monkeypatch, shape: Shape, rows: int, contender: str) -> None:
    if contender in ("folded", "static"):
        monkeypatch.setattr(probes, "FOLD", 0)
        folded = saliency(shape, rows, rotary=False)
        monkeypatch.setattr(probes, "FOLD", float("inf"))
        torch.testing.assert_close(saliency(shape, rows, rotary=False), folded)
        monkeypatch.setattr(probes, "FOLD", 0 if contender == "folded" else float("inf"))
    run = call(contender, shape, rows)
    benchmark.group = f"probe, {rows} of {TEXT} rows ask {TOKENS} tokens, {shape}"
    benchmark.name = contender
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
