"""LLaVA 1.5, on the random model of the other tests."""

from __future__ import annotations

from typing import Any

from ..models import IMAGE, PAD, TOKENS, pixels, random_llava
from . import Family, Inputs, family, pad_left, prompt, words


def _sample(seed: int, before: int, *after: int) -> Inputs:
    ids = [1, *words(before, 2, IMAGE, seed)]
    for at, count in enumerate(after):
        ids += [IMAGE] * TOKENS + words(count, 2, IMAGE, seed + 10 * at)
    return prompt(ids) | {"pixel_values": pixels(len(after), seed)}


def _build(text: str) -> Any:
    return random_llava(text)


for _text in ("llama", "qwen3"):
    family(
        Family(
            name=f"llava-{_text}",
            build=lambda text=_text: _build(text),
            samples=lambda: [_sample(0, 3, 4), _sample(1, 1, 2, 5)],
            join=lambda samples: pad_left(samples, PAD),
        )
    )
