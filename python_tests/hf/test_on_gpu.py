"""A patched model on a GPU: the choice and the answers are those of the same model on the CPU."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
import transformers

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import ConsensusDrop, Method, Random, methods

from .models import exam, trained

DEVICE = "cuda"
KINDS = ("color", "shape", "digit", "size", "exists")
COUNT, KEEP = 16, 64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
METHODS = {row.method.__name__: row.method for row in methods()}
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def school() -> dict[str, Any]:
    """The trained model on both devices, and one left-padded batch of questions."""
    model, processor = trained()
    processor.tokenizer.padding_side = "left"
    images, prompts, _ = exam(COUNT, 5, KINDS)
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    return {"cpu": model, DEVICE: trained()[0].to(DEVICE), "inputs": inputs}


@pytest.fixture(autouse=True)
def _whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def made(name: str) -> Method:
    """A method at its own options, pruning to `KEEP` where it takes a budget."""
    kind: Any = METHODS[name]
    keeps = any(f.name == "keep" and f.init and f.default is MISSING for f in fields(kind))
    return kind(keep=KEEP) if keeps else kind()


def answered(school: dict[str, Any], device: str, method: Method, **options: Any) -> Any:
    """The words that a patched model generates `[COUNT, 2]`, and what it kept, on the CPU."""
    inputs = school["inputs"].to(device)
    with patch(school[device], method, **options) as handle, torch.no_grad():
        out = school[device].generate(**inputs, max_new_tokens=2, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].cpu(), handle.last


def same(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of rows that are equal."""
    return (one == other).all(-1).float().mean().item()


@pytest.mark.parametrize("name", METHODS)
def test_it_chooses_and_answers_as_on_the_cpu(school: dict[str, Any], name: str) -> None:
    if METHODS[name] is Random:
        pytest.skip("devices draw other random tokens")
    words, kept = answered(school, "cpu", made(name))
    words_there, kept_there = answered(school, DEVICE, made(name))
    assert kept_there.selection.index.device.type == DEVICE
    assert kept_there.tokens_after == kept.tokens_after
    assert kept_there.stages == kept.stages
    # Sums in another order may turn a near tie.
    assert (kept_there.keep_mask.cpu() == kept.keep_mask).float().mean() > 0.99
    assert same(words_there, words) > 0.9


@pytest.mark.skipif(VERSION < (5, 18), reason="transformers is too old for the native backend")
def test_the_native_backend_answers_alike(school: dict[str, Any]) -> None:
    hooks, _ = answered(school, DEVICE, ConsensusDrop(keep=KEEP, size_attention=False))
    native, _ = answered(
        school, DEVICE, ConsensusDrop(keep=KEEP, size_attention=False), backend="native"
    )
    assert torch.equal(native, hooks)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_every_attention_answers_alike_in_bfloat16(school: dict[str, Any], attention: str) -> None:
    if attention == "flash_attention_2" and not transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    words, _ = answered(school, DEVICE, ConsensusDrop(keep=KEEP))
    model = trained()[0].to(DEVICE, torch.bfloat16)
    model.set_attn_implementation(attention)
    inputs = school["inputs"].copy()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    half, _ = answered({DEVICE: model, "inputs": inputs}, DEVICE, ConsensusDrop(keep=KEEP))
    assert same(half, words) > 0.8
