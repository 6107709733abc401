"""A trained model answers right on a fraction of its visual tokens, and better than by chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import ConsensusDrop, Method, Random

from .models import exam, trained

KINDS = ("color", "shape", "digit", "size", "exists")
COUNT = 60


@pytest.fixture(scope="module")
def school() -> dict[str, Any]:
    model, processor = trained()
    processor.tokenizer.padding_side = "left"
    images, prompts, answers = exam(COUNT, 5, KINDS)
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    return {"model": model, "processor": processor, "inputs": inputs, "answers": answers}


def marks(school: dict[str, Any], method: Method | None) -> float:
    """Share of right answers, all questions in one left-padded batch."""
    model, inputs = school["model"], school["inputs"]

    def answer() -> list[str]:
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return school["processor"].batch_decode(new, skip_special_tokens=True)

    if method is None:
        words = answer()
    else:
        with patch(model, method):
            words = answer()
    right = [w.strip() == a for w, a in zip(words, school["answers"], strict=True)]
    return sum(right) / len(right)


def test_accuracy_on_a_quarter_and_on_a_sixth(school: dict[str, Any]) -> None:
    every = marks(school, None)
    quarter = marks(school, ConsensusDrop(keep=0.25))
    few = marks(school, ConsensusDrop(keep=32))
    chance = max(marks(school, Random(keep=32, seed=seed)) for seed in range(2))
    assert every > 0.93
    assert quarter > 0.95 * every
    assert few > chance


@torch.no_grad()
def test_another_question_keeps_other_patches(school: dict[str, Any]) -> None:
    model, processor = school["model"], school["processor"]
    (image,), _, _ = exam(1, 9, ("color",))
    prompts = [
        "USER: <image> what color is the leftmost object ? ASSISTANT:",
        "USER: <image> how many objects are there ? ASSISTANT:",
    ]
    inputs = processor(text=prompts, images=[image, image], padding=True, return_tensors="pt")
    with patch(model, ConsensusDrop(keep=32), processor=processor) as handle:
        model(**inputs)
    one, two = (set(row) for row in handle.last.selection.index.tolist())
    assert one != two
    visual = handle.last.scores.visual
    torch.testing.assert_close(visual[0], visual[1])


def test_bfloat16_keeps_nearly_the_same_answers(school: dict[str, Any]) -> None:
    full = marks(school, ConsensusDrop(keep=49))
    school["model"].to(torch.bfloat16)
    school["inputs"]["pixel_values"] = school["inputs"]["pixel_values"].to(torch.bfloat16)
    try:
        assert abs(marks(school, ConsensusDrop(keep=49)) - full) <= 0.07
    finally:
        school["model"].to(torch.float32)
        school["inputs"]["pixel_values"] = school["inputs"]["pixel_values"].float()
