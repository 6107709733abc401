"""The methods that act before the LLM, in a model: budgets, questions, padding, scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import (
    AdaFV,
    CDPruner,
    DivPrune,
    FasterVLM,
    Full,
    Method,
    ToMe,
    Uniform,
    VisionZip,
)

from .models import PAD, TOKENS, pixels, prompt, random_llava

METHODS: list[Method] = [
    AdaFV(6),
    AdaFV(6, merge=True, size_attention=True, positions="original"),
    CDPruner(6),
    DivPrune(6),
    FasterVLM(6),
    Full(),
    ToMe(6, size_attention=True),
    Uniform(6),
    VisionZip(6, contextual=2),
]
each = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_llava()


def batch() -> dict[str, Any]:
    """Three samples: one picture and question, the picture with another one, another picture with
    the first question behind more words; padded at the left."""
    rows = [prompt(2, 5, seed=1), prompt(2, 5, seed=2), prompt(4, 5, seed=1)]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    pictures = pixels(2)[[0, 0, 1]]
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pictures}


@torch.no_grad()
def run(model: Any, method: Method, inputs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    with patch(model, method, keep_signals=True) as handle:
        logits = model(**inputs, logits_to_keep=1).logits
        return handle.last.selection, logits


@each
def test_in_a_batch_as_alone(model: Any, method: Method) -> None:
    inputs = batch()
    together, logits = run(model, method, inputs)
    assert together.index.shape == (3, method.budget(TOKENS))
    assert logits.isfinite().all()
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        single = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        alone, expected = run(model, method, single)
        assert torch.equal(together.index[row], alone.index[0])
        torch.testing.assert_close(together.tokens[row], alone.tokens[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[row], expected[0], atol=1e-4, rtol=1e-3)


@each
def test_another_question_matters_to_those_that_ask(model: Any, method: Method) -> None:
    chosen, _ = run(model, method, batch())
    same = torch.equal(chosen.index[0], chosen.index[1])
    assert same != method.card.text


@each
def test_scores_are_there_or_refused_in_words(model: Any, method: Method) -> None:
    chosen, _ = run(model, method, batch())
    if isinstance(method, (AdaFV, FasterVLM, VisionZip)):
        assert chosen.scores.fused.shape == (3, TOKENS)
    else:
        with pytest.raises(RuntimeError, match="there are no scores"):
            _ = chosen.scores
