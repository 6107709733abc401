"""The code in README.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_op_in_a_model():
    scope: dict[str, object] = {}
    exec(BLOCKS[0], scope)
    assert scope["tokens"].shape == (2, 64, 4096)
    assert scope["index"].shape == scope["size"].shape == (2, 64)
    torch.testing.assert_close(scope["size"].sum(1), torch.full((2,), 576.0))


def test_the_patch(capsys):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from consensusdrop_kernels import data, scenes

    model = LlavaForConditionalGeneration.from_pretrained(data.tiny_llava_path())
    processor = AutoProcessor.from_pretrained(data.tiny_llava_path())
    scene, _ = scenes.load_scene("slate")
    prompt = "USER: <image> what color is the star ? ASSISTANT:"
    inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
    scope = {"model": model, "processor": processor, "inputs": inputs}
    exec(BLOCKS[1], scope)
    assert scope["out"].shape[1] > inputs["input_ids"].shape[1]
    printed = capsys.readouterr().out
    before, after = (int(n) for n in re.findall(r"\d+", printed)[:2])
    assert before - after == 196 - 49
