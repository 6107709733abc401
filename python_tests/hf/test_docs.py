"""The code on the docs' pages does what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from consensusdrop_kernels import ConsensusDrop, patch
from consensusdrop_kernels.methods.table import methods

from .models import batch, pixels, prompt, random_llava

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


@torch.no_grad()
def test_an_adapter_of_ones_own() -> None:
    """The page's adapter, on a model that the package knows too: the same choice."""
    written: dict[str, object] = {}
    define, use = blocks("adapters.md")
    exec(define, written)
    inputs = batch(prompt(2, 4, seed=1), prompt(5, 7, seed=2)) | {"pixel_values": pixels(2)}
    model = random_llava()
    given = {
        "patch": patch, "ConsensusDrop": ConsensusDrop, "model": model,
        "inputs": inputs | {"max_new_tokens": 4, "do_sample": False},
    }  # fmt: skip
    exec(use, written | given, found := dict[str, torch.Tensor]())
    with patch(model, ConsensusDrop(keep=0.25)):
        want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(found["out"], want)


@torch.no_grad()
def test_a_method_of_ones_own() -> None:
    """The page's method keeps the tokens of the largest norm, and merges the others into them."""
    written: dict[str, object] = {}
    _, define, use = blocks("methods.md")
    exec(define, written)
    inputs = batch(prompt(2, 4, seed=1), prompt(5, 7, seed=2)) | {"pixel_values": pixels(2)}
    model = random_llava()
    given = {"patch": patch, "model": model, "inputs": inputs | {"max_new_tokens": 4}}
    exec(use, written | given, found := dict[str, Any]())
    assert found["out"].shape == (2, inputs["input_ids"].shape[1] + 4)
    features = model.model.get_image_features(pixels(2), return_dict=True).pooler_output
    norms = torch.stack([image.norm(dim=1) for image in features])
    selection = found["handle"].last.selection
    assert torch.equal(selection.index, norms.topk(8).indices.sort().values)
    assert torch.equal(selection.size.sum(1), torch.full((2,), 16.0))


def test_every_method_has_a_section() -> None:
    page = (DOCS / "methods.md").read_text()
    headings = " ".join(re.findall(r"^## (.*)$", page, re.M))
    assert [row.name for row in methods() if row.name not in headings] == []


@torch.no_grad()
def test_the_first_example_of_the_methods() -> None:
    inputs = batch(prompt(2, 4, seed=1)) | {"pixel_values": pixels(1)}
    model = random_llava()
    code = blocks("methods.md")[0].replace("keep=64", "keep=6")  # of the sixteen there are
    exec(
        code, {"model": model, "inputs": inputs | {"max_new_tokens": 2}}, found := dict[str, Any]()
    )
    assert found["handle"].last.tokens_after[0] < 16


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    missing = [p.name for p in DOCS.glob("*.md") if p.name != "README.md" and p.name not in index]
    assert not missing
