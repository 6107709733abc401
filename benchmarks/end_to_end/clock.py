"""Timing calls in turn, and how sure their ratios are."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from benchmarks.accuracy.stats import Interval

Key = TypeVar("Key", bound=Hashable)


class Samples(NamedTuple):
    """Times of one call by round, seconds: by the wall, and of the processor (all threads)."""

    wall: list[float]
    processor: list[float]


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Moment:
    """Now: as a CUDA event of the stream on a GPU, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def until(self, later: Moment) -> float:
        """Seconds to a later moment; on a GPU both must be over."""
        if self._event is None:
            return later._time - self._time
        return 1e-3 * self._event.elapsed_time(later._event)


class Steps:
    """A stopping criterion that stops nothing: it notes when each token is there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Moment] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._moments.append(Moment(self._device))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def seconds(self) -> float:
        """From the first token to the last."""
        wait(self._device)
        return self._moments[0].until(self._moments[-1])


def interleaved(
    calls: Mapping[Key, Callable[[], object]], rounds: int, device: torch.device,
    tick: Callable[[], object] = lambda: None, seed: int = 0,
    failed: Callable[[Key, Exception], object] | None = None,
) -> dict[Key, Samples]:  # fmt: skip
    """Time every call once a round, in an order drawn anew for each round, the device idle before
    and after: a slow moment of the machine, and what a call leaves in caches, hits all alike.

    Args:
        calls: what to time; run before, so that nothing is run for the first time here.
        rounds: how often.
        device: where they run.
        tick: called after each call.
        seed: of the orders.
        failed: called with what a call raises; the call has no samples then, and the others go on.
            Without it the error is the caller's.
    """
    found: dict[Key, Samples] = {key: Samples([], []) for key in calls}
    order, draw = list(calls), random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there already makes the collections between rounds no longer
    gc.disable()
    try:
        for _ in range(rounds):
            draw.shuffle(order)
            for key in tuple(order):
                try:
                    wait(device)
                    used, start = time.process_time(), time.perf_counter()
                    calls[key]()
                    wait(device)
                except Exception as error:
                    if failed is None:
                        raise
                    order.remove(key)
                    del found[key]
                    failed(key, error)
                    continue
                found[key].wall.append(time.perf_counter() - start)
                found[key].processor.append(time.process_time() - used)
                tick()
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in milliseconds."""
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8)) * 1e3
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def paired_ratio(
    ours: Sequence[float], other: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Median over rounds of the ratio of two times of one round, with a 95 % interval: rounds are
    drawn again (percentiles of the bootstrap). One round has no interval: its ends are the value.
    """
    ratio = np.asarray(ours) / np.asarray(other)
    drawn = np.random.default_rng(seed).integers(len(ratio), size=(resamples, len(ratio)))
    low, high = np.quantile(np.median(ratio[drawn], axis=1), (0.025, 0.975))
    return Interval(float(np.median(ratio)), float(low), float(high))
