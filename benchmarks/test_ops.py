"""Every op through pytest-benchmark, beside its baselines, which share its group.

    pytest benchmarks/test_ops.py --benchmark-only [--device cpu|cuda] [--dtype float32] [--small]
        [--only saliency] [--seconds 300]
    make bench    # with the other files here, and a Markdown table of ratios at the end

Run on an otherwise idle machine. A contender is timed only after the kernels of its case agreed
with the definition of the op. Every call takes the next of 2 to 16 sets of inputs, which together
exceed the caches but where one is small (an L2 of 60 MB holds 16 of up to 4 MB), and ends when the
device is done. `extra_info` of each:

- `bytes`: each input of the op read and each output written once; `copy_share`: what part of the
  time of the call that takes at the bandwidth of a large copy, measured in the same run;
- `peak_bytes`: peak memory above the inputs, outputs included (`memory.py` says how);
- on a GPU `graph_us`, the time within a CUDA graph on the same inputs each time,
  `graph_cold_us`, on those sets in turn, `rotated_bytes`, how much that is to compare with the L2,
  `graph`, whether it could be captured, and `host_us`, what a call costs the host.
"""

from __future__ import annotations

import itertools
from functools import cache, lru_cache
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.baselines import Inputs
from benchmarks.cases import OURS, Call, Case, check, default_backend, fitting, size
from benchmarks.memory import peak_above
from benchmarks.timing import copy_bandwidth, measure, rotated, within

SECONDS = 0.2  # about, of the rounds of one contender
ROUNDS = 50
WARM = 16  # calls in a graph on the same inputs
REPLAYS = 10  # of a graph


class Prepared(NamedTuple):
    sets: list[Inputs]
    bytes: int


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender of each case that fits on the device."""
    config = metafunc.config
    device, small = config.getoption("device"), config.getoption("small")
    dtypes = [getattr(torch, name) for name in config.getoption("dtype")]
    cases, config.left_out = fitting(device, small, dtypes, config.getoption("only"))
    found = [(c, name) for c in cases.values() for name in c.contenders(device, not small)]
    metafunc.parametrize(
        ("case", "contender"), found, ids=[f"{c.name}, {name}" for c, name in found]
    )


@lru_cache(maxsize=1)
def prepared(case: Case, device: str) -> Prepared:
    """Sets of inputs, after every kernel was seen to be right on the first."""
    torch.manual_seed(0)
    sets = rotated(lambda: case.make(device))
    if case.checked:
        for kernel in case.kernels(device).values():
            check(case, sets[0], kernel)
    return Prepared(sets, size(case.own(sets[0])) + size(case.ours(sets[0])))


@cache
def bandwidth(device: str) -> float:
    return copy_bandwidth(torch.device(device), 512 if device == "cuda" else 128)


def graph_times(call: Call, sets: list[Inputs]) -> dict[str, Any]:
    """Microseconds of the call on a GPU, apart from what it costs to ask for it."""
    cold, warm = (measure(call, some, REPLAYS) for some in (sets, sets[:1] * WARM))
    return {
        "graph_us": warm.median_us,
        "graph_cold_us": cold.median_us,
        "graph": cold.how,
        "host_us": cold.host_us,
    }


@torch.no_grad()
def test_op(benchmark: Any, request: pytest.FixtureRequest, case: Case, contender: str) -> None:
    device = request.config.getoption("device")
    call = case.contenders(device)[contender]
    sets, moved = prepared(case, device)

    def run(inputs: Inputs) -> None:
        call(inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    rotation = itertools.cycle(sets)
    run(next(rotation))
    rounds = within(SECONDS, lambda: run(next(rotation)), ROUNDS)
    benchmark.group = case.name
    benchmark.name = contender
    benchmark.extra_info |= {
        "op": case.op,
        "bytes": moved,
        "peak_bytes": peak_above(lambda: call(sets[0]), device),
    }
    if contender == OURS:
        benchmark.extra_info["backend"] = default_backend(device)
    if device == "cuda":
        rotated_bytes = sum(size(case.own(inputs)) for inputs in sets)
        benchmark.extra_info |= {"rotated_bytes": rotated_bytes} | graph_times(call, sets)
    benchmark.pedantic(run, setup=lambda: ((next(rotation),), {}), rounds=rounds)
    if not benchmark.disabled:
        share = moved / benchmark.stats.stats.median / bandwidth(device)
        benchmark.extra_info["copy_share"] = share
