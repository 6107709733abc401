"""Ranges around a patched model's steps: none unless asked for, and then each step once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from consensusdrop_kernels import profiling

pytest.importorskip("transformers")
pytest.importorskip("PIL")

#: Prints how often each range of ours shows in two prefills of three tokens each.
PROGRAM = """
import collections, sys
import torch

torch.set_num_threads(1)
torch.cuda.nvtx.range = torch.profiler.record_function  # whatever torch was built for

from PIL import Image
from consensusdrop_kernels import demo, methods, patch, scenes

scene, _ = scenes.load_scene("slate")
assistant = demo.Assistant(device="cpu")
asked = assistant.ask(Image.fromarray(scene.image), "what digit is on the circle ?")
method = eval(sys.argv[1], vars(methods))
with patch(assistant.model, method), torch.profiler.profile() as profile:
    for _ in range(2):
        assistant.model.generate(**asked.inputs, max_new_tokens=3, min_new_tokens=3)
names = [event.name for event in profile.events() if event.name.startswith("cdrop.")]
print(sorted(collections.Counter(names).items()))
"""


def ranges(method: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "CDROP_NVTX"} | environment
    command = [sys.executable, "-c", PROGRAM, method]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_off_it_wraps_nothing(monkeypatch):
    monkeypatch.setattr(profiling, "ENABLED", False)

    def function():
        return 1

    assert profiling.step("name")(function) is function
    assert ranges("ConsensusDrop(keep=49)") == "[]"


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("ConsensusDrop(keep=49, probe='lookahead')",
         ["choose", "encode", "lookahead", "probe", "shorten"]),
        ("FastV(keep=49)", ["choose", "encode", "shorten", "stage"]),
    ],
)  # fmt: skip
def test_on_every_step_of_a_prefill_is_a_range(method, steps):
    assert ranges(method, CDROP_NVTX="1") == str([(f"cdrop.{step}", 2) for step in steps])


def test_on_a_function_keeps_its_name_and_errors_close_the_range(monkeypatch):
    opened = []

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            opened.append(self.name)

        def __exit__(self, *error):
            opened.append(f"end of {self.name}")

    monkeypatch.setattr(profiling, "ENABLED", True)
    monkeypatch.setattr(profiling, "span", Range)

    @profiling.step("fails")
    def function(x: int) -> int:
        """What it does."""
        raise KeyError(x)

    assert (function.__name__, function.__doc__) == ("function", "What it does.")
    with pytest.raises(KeyError):
        function(3)
    assert opened == ["cdrop.fails", "end of cdrop.fails"]
