"""The code on the docs' pages does what they say."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from consensusdrop_kernels import ConsensusDrop, patch

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


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    missing = [p.name for p in DOCS.glob("*.md") if p.name != "README.md" and p.name not in index]
    assert not missing
