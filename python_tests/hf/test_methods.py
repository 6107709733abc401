"""Every method in every family: what it chose is what the model computed, and depends on nothing
but the prompt it was chosen for."""

from __future__ import annotations

import functools
from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import AdaFV, ConsensusDrop, Method, methods

from .contract import Calls, Image, Sequence, Unpatched, images, shortened
from .families import FAMILIES, Family, Inputs
from .test_contract import placeholders

STEPS = 3
GREEDY: dict[str, Any] = {
    "max_new_tokens": STEPS, "do_sample": False, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip
#: Every method as it comes, and options that change what is asked of a model.
METHODS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    row.method.__name__: (row.method, {}) for row in methods()
} | {
    "ahead": (
        ConsensusDrop,
        {"probe": "lookahead", "probe_layer": 1, "diversity": 0.0, "coverage": 0.5},
    ),
    "plain": (ConsensusDrop, {"diversity": 0.0, "size_attention": False, "positions": None}),
    "in_llm": (ConsensusDrop, {"probe": "in_llm", "rotary": False}),
    "folded": (ConsensusDrop, {"rotary": False, "rows": "last", "contextual": 1}),
    "sizes": (AdaFV, {"merge": True, "size_attention": True, "query": "all_text"}),
}


@functools.cache
def model(name: str) -> Any:
    """One for all tests, which patch it and take the patch off again."""
    return FAMILIES[name].model()


@functools.cache
def prompts(name: str) -> tuple[list[Inputs], list[Sequence]]:
    """Two prompts of different lengths, and what enters the decoder of each."""
    samples = FAMILIES[name].samples()
    samples = [samples[0], samples[-1]]
    plain = Unpatched(model(name))
    return samples, [plain.inputs(sample) for sample in samples]


def first_stage(name: str) -> int:
    vision = getattr(model(name).config, "vision_config", None)
    return max(1, len(getattr(vision, "deepstack_visual_indexes", None) or ()))


def made(method: str, name: str) -> Method:
    """A method that prunes each image of the prompts, its stages as many as a small decoder has."""
    layers, first = len(Unpatched(model(name)).text.layers), first_stage(name)
    kind, given = METHODS[method]
    options = dict(given)
    if options.get("probe") == "in_llm":
        options["probe_layer"] = first
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    keep = FAMILIES[name].keep
    if "stages_at" in known:
        options["stages_at"] = tuple(layer / layers for layer in range(first, layers))
        keep = max(keep, first / layers + 0.1)
    if known["keep"].init and (known["keep"].default is MISSING or "stages_at" in known):
        options["keep"] = keep
    return kind(**options)


def prefill(name: str, method: Method, samples: list[Inputs], steps: dict[str, Any]) -> Any:
    """`generate` of a batch: its output, the handle, and the images with what was chosen of them,
    all under the prompt they belong to."""
    every, sequences = prompts(name)
    rows = [next(i for i, one in enumerate(every) if one is sample) for sample in samples]
    calls = Calls()
    with patch(model(name), calls.watch(method)) as handle:
        out = model(name).generate(**FAMILIES[name].join(samples), **steps)
    found = images(handle.last, calls, [sequences[row] for row in rows])
    return out, handle, {
        row: [one for one in found if one.row == at] for at, row in enumerate(rows)
    }  # fmt: skip


def same(one: list[Image], other: list[Image]) -> bool:
    """Whether the same was chosen of the same images. Slots may be listed in any order, and unused
    ones anywhere."""
    return len(one) == len(other) and all(
        torch.equal(a.columns, b.columns)
        and len(a.steps) == len(b.steps)
        and all(_homes(*x) == _homes(*y) for x, y in zip(a.steps, b.steps, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def _homes(index: torch.Tensor, assign: torch.Tensor) -> list[int]:
    """The token at whose place each token is, -1 where it is nowhere."""
    homes = [-1 if slot < 0 else int(index[slot]) for slot in assign.tolist()]
    while homes and homes[-1] < 0:
        homes.pop()
    return homes


def whole_view(name: str) -> bool:
    """Whether every layer of the decoder sees the whole sequence."""
    kinds = getattr(Unpatched(model(name)).text.config, "layer_types", None)
    return set(kinds or ["full_attention"]) == {"full_attention"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method_name", METHODS)
@torch.no_grad()
def test_a_batch_is_what_each_prompt_is_alone(method_name: str, name: str) -> None:
    method, family, layers = (
        made(method_name, name),
        FAMILIES[name],
        Unpatched(model(name)).text.layers,
    )
    if not whole_view(name) and method.stages(len(layers)):
        with pytest.raises(NotImplementedError, match="layers that see the whole sequence"):
            patch(model(name), method)
        return
    samples, sequences = prompts(name)
    out, handle, chosen = prefill(name, method, samples, GREEDY)
    check_decoding(family, out, handle, chosen, sequences, samples)
    one = {"max_new_tokens": 1, "do_sample": False}
    _, _, turned = prefill(name, method, samples[::-1], one)
    for row, sample in enumerate(samples):
        assert same(chosen[row], turned[row]), "the order of prompts"
        _, _, alone = prefill(name, method, [sample], one)
        assert same(chosen[row], alone[row]), "padding, or the other prompt"


def check_decoding(
    family: Family, out: Any, handle: Any, chosen: dict[int, list[Image]],
    sequences: list[Sequence], samples: list[Inputs],
) -> None:  # fmt: skip
    """Tokens, logits, budgets, and what the cache holds, against a loop over the layers."""
    method, plain = handle.method, Unpatched(model(family.name))
    stages = method.stages(len(plain.text.layers))
    pruned = handle.stats.tokens_after < handle.stats.tokens_before
    compact = method.positions != "original" and not family.spatial
    length = max(sample["input_ids"].shape[1] for sample in samples)
    held = []
    for row, sequence in enumerate(sequences):
        assert chosen[row], "every prompt has images"
        here = placeholders(family, samples[row]["input_ids"][0])
        counts = [[len(image.columns) for image in chosen[row]]]
        short, cuts = sequence, {}
        if pruned or stages:
            short, cuts, counts = shortened(
                sequence, chosen[row], stages, here, compact, method.size_attention
            )
        for image, *left in zip(chosen[row], *counts, strict=True):
            tokens = len(image.columns)
            budgets = [method.budget(tokens)]
            for stage in range(len(stages)):
                budgets.append(min(method.stage_budget(stage, tokens), budgets[-1]))
            assert left == budgets
        ids, logits = plain.greedy(short, STEPS, cuts)
        got = torch.stack(out.logits, 1)[row]
        torch.testing.assert_close(got, logits, atol=2e-4, rtol=1e-4)
        assert out.sequences[row, length:].tolist() == ids
        left = [handle.last.tokens_after[row], *(stage[row] for stage in handle.last.stages)]
        if pruned or stages:
            assert left == [sum(count) for count in counts]
        held.append([int((~here).sum()) + count for count in left])
    cache = out.past_key_values
    bounds = (0, *stages, len(plain.text.layers))
    for step, want in enumerate(map(max, zip(*held, strict=True))):
        for layer in range(bounds[step], bounds[step + 1]):
            if whole_view(family.name):
                assert cache.layers[layer].keys.shape[2] == want + STEPS - 1
