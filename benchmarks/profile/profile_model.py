"""A small program for profilers: the prefill of a patched model, warmed up before the capture.

    python profile_model.py --model mid --method 'ConsensusDrop(alpha=0.3)' --keep 64 --calls 3

`--model`: those of `benchmarks/e2e.py` (`mid`, `llava-1.5-7b`, ... with random weights made on the
device; `tiny`, the trained one; a Hugging Face id or folder). Each prefill is an NVTX range
`cdrop.prefill`, in it the model's own parts (`vision_tower`, `language_model`, `lm_head`, ...) and,
with CDROP_NVTX=1, the steps of the patch (`cdrop.encode`, `cdrop.choose`, ...). With `--device cpu`
they are profiled by torch and its table is printed.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from profile_target import capture

from benchmarks.accuracy.runs import parse_methods
from benchmarks.end_to_end.models import Subject
from consensusdrop_kernels import patch
from consensusdrop_kernels.hf.adapter import find
from consensusdrop_kernels.profiling import span


def mark_parts(model: Any) -> None:
    """Make every call of the model's parts a range of their name.

    After `patch`, so that what the patch does before a part is no part of its range.
    """
    outer = model.get_submodule(find(model.config).outer)
    parts = dict(model.named_children()) | dict(outer.named_children())
    for name, part in parts.items():
        if part is outer:
            continue
        ranges: list[Any] = []
        part.register_forward_pre_hook(functools.partial(_begin, name, ranges))
        part.register_forward_hook(functools.partial(_end, ranges), always_call=True)


def _begin(name: str, ranges: list[Any], *rest: Any) -> None:
    ranges.append(span(name))
    ranges[-1].__enter__()


def _end(ranges: list[Any], *rest: Any) -> None:
    ranges.pop().__exit__(None, None, None)


def main() -> None:
    """Run what the options say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mid")
    parser.add_argument("--method", default="ConsensusDrop", help="Full: without a patch")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    subject = Subject(options.model, options.device)
    run = parse_methods(options.method)[0].at(options.keep)
    if run.reason:
        parser.error(run.reason)
    if run.method is not None:
        patch(subject.model, run.method)
    mark_parts(subject.model)
    inputs = subject.batch(options.batch)

    @torch.no_grad()
    def prefill() -> None:
        subject.model.generate(**inputs, max_new_tokens=1)

    capture("cdrop.prefill", prefill, options.calls, options.device)


if __name__ == "__main__":
    main()
