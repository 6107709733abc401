"""Timing a call on a GPU, or on a CPU so that the same code can be exercised without one.

GPU time comes from CUDA-graph replays over several sets of inputs that together exceed the L2
cache, as far as 16 of them can; what a call costs the host is timed apart. Nothing is timed before
its result was checked. A slow call is repeated less often: what is timed takes about a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

ROTATED_BYTES = 192 * 2**20  # past the L2 of any GPU, and past the last-level cache of most CPUs
SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """Times of one call in microseconds."""

    median_us: float
    p20_us: float
    p80_us: float
    host_us: float
    how: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rotations(bytes_per_set: int) -> int:
    """How many sets of inputs to rotate through."""
    return max(2, min(16, -(-ROTATED_BYTES // max(bytes_per_set, 1))))


def measure(call: Callable[[Any], Any], sets: Sequence[Any], repeats: int = 30) -> Timing:
    """Time `call` over the given sets of inputs, all on one device."""
    device = _device(sets[0])
    if device.type == "cpu":
        call(sets[0])
        return _on_cpu(call, sets, within(SECONDS, lambda: call(sets[-1]), repeats))
    for inputs in (*sets, *sets[:2]):
        call(inputs)
    torch.cuda.synchronize()
    host = _host_time(call, sets)
    graph = _capture(call, sets)
    replay = graph.replay if graph is not None else lambda: [call(inputs) for inputs in sets]
    times = []
    for _ in range(within(SECONDS, lambda: (replay(), torch.cuda.synchronize()), repeats)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    return _summary(times, host, "CUDA graph" if graph is not None else "launched one by one")


def within(seconds: float, call: Callable[[], Any], most: int, least: int = 3) -> int:
    """How often a call fits into so many seconds, by one call of it."""
    start = time.perf_counter()
    call()
    return max(least, min(most, int(seconds / (time.perf_counter() - start))))


def rotated(make: Callable[[], Sequence[Any]]) -> list[Sequence[Any]]:
    """Sets of inputs to rotate through; all but the first are copies of it, strides and all."""
    first = make()
    copies = rotations(sum(t.numel() * t.element_size() for t in first)) - 1
    return [first, *(_copy(first) for _ in range(copies))]


def _copy(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.clone(memory_format=torch.preserve_format) for t in tensors)


def _device(inputs: Any) -> torch.device:
    tensors = inputs if isinstance(inputs, tuple | list) else vars(inputs).values()
    return next(t.device for t in tensors if isinstance(t, torch.Tensor))


def _on_cpu(call: Callable[[Any], Any], sets: Sequence[Any], repeats: int) -> Timing:
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(sets[i % len(sets)])
        times.append((time.perf_counter() - start) * 1e6)
    return _summary(times, statistics.median(times), "wall clock")


def _host_time(call: Callable[[Any], Any], sets: Sequence[Any]) -> float:
    """Microseconds until a call returns, with the device idle before each."""
    times = []
    for i in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(sets[i % len(sets)])
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def _capture(call: Callable[[Any], Any], sets: Sequence[Any]) -> torch.cuda.CUDAGraph | None:
    """A graph of one call per set, or None where a call can't be captured (it synchronises)."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for inputs in sets:
                call(inputs)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _summary(times: list[float], host: float, how: str) -> Timing:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Timing(
        statistics.median(times), ordered[round(0.2 * last)], ordered[round(0.8 * last)], host, how
    )


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes counted."""
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda pair: pair[0].copy_(pair[1]), [(target, source)] * 2, repeats=10)
    return 2 * source.numel() * 4 / (timing.median_us * 1e-6)
