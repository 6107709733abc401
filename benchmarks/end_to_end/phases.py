"""Where the time of a prefill goes: phases by hooks on modules and around what a method calls.

A prefill is a line of moments; what lies between two of them belongs to the innermost phase that is
open there, so the phases add up to the whole. Moments are CUDA events on a GPU (of the stream, gaps
included), readings of the clock elsewhere.

- `vision`: the vision tower; in a maps form with all its maps.
- `projector`: from the tower's features to the LLM's width.
- `saliency`: the question's probe, and the ops `attention_saliency` and `similarity_saliency`.
- `selection`: the rest of the choice: ranking, selecting, merging. The fused op `select_merge`
  computes the saliency from queries and keys as well, and all of it counts here.
- `llm`: the decoder and the head.
- `other`: all else: `generate` itself, masks and positions, putting the shorter prompt together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from consensusdrop_kernels.hf.adapter import find

from .clock import Moment, wait
from .contenders import Contender

PHASES = ("vision", "projector", "saliency", "selection", "llm", "other")
_SALIENCY_OPS = ("attention_saliency", "similarity_saliency")


class Timeline:
    """Moments of one prefill, each with the phase that begins there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[tuple[str, Moment]] = []
        self._open: list[str] = []

    def _mark(self, phase: str) -> None:
        self._moments.append((phase, Moment(self._device)))

    def enter(self, phase: str) -> None:
        """Open a phase inside those that are open."""
        self._open.append(phase)
        self._mark(phase)

    def leave(self) -> None:
        """Close the innermost one."""
        self._open.pop()
        self._mark(self._open[-1] if self._open else "other")

    @contextlib.contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """A phase as a context."""
        self.enter(phase)
        try:
            yield
        finally:
            self.leave()

    def run(self, call: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of a call by phase."""
        self._moments = []
        with self.span("other"):
            call()
        wait(self._device)
        found = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._moments, self._moments[1:], strict=False):
            found[phase] += 1e3 * begin.until(end)
        return found


@contextlib.contextmanager
def watched(contender: Contender, device: torch.device) -> Iterator[Timeline]:
    """A timeline that knows the phases of a contender, until the context ends."""
    line = Timeline(device)
    with contextlib.ExitStack() as stack:
        for phase, module in _modules(contender.model):
            before = module.register_forward_pre_hook(lambda *_, phase=phase: line.enter(phase))
            after = module.register_forward_hook(lambda *_: line.leave())
            stack.callback(before.remove)
            stack.callback(after.remove)
        if contender.maps is not None:
            maps, plain = contender.maps, contender.maps.span
            maps.span = line.span
            stack.callback(setattr, maps, "span", plain)
        if contender.handle is not None:
            _watch_method(contender.handle.method, line, stack)
        yield line


def _modules(model: Any) -> list[tuple[str, Any]]:
    """The modules of the phases that are whole modules; what a family has otherwise is `other`."""
    adapter = find(model.config)
    outer = model.get_submodule(adapter.outer)
    tower = getattr(outer, "vision_tower", None) or getattr(outer, "visual", None)
    projector = getattr(outer, "multi_modal_projector", None) or getattr(tower, "merger", None)
    text = model.get_submodule(adapter.text)
    known = [("vision", tower), ("projector", projector), ("llm", text), ("llm", model.lm_head)]
    return [(phase, module) for phase, module in known if module is not None]


def _watch_method(method: Any, line: Timeline, stack: contextlib.ExitStack) -> None:
    """Times what a patched model calls of its method, and what that calls."""

    def choose(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            *rest, signals = args
            if signals.probe is not None:
                signals = replace(signals, probe=_Timed(signals.probe, line))
            with line.span("selection"):
                return call(*rest, signals)

        return timed

    for name in ("select", "select_stage"):
        object.__setattr__(method, name, choose(getattr(method, name)))  # it is frozen
        stack.callback(object.__delattr__, method, name)
    for name in _SALIENCY_OPS:
        op = getattr(torch.ops.cdrop, name)
        setattr(torch.ops.cdrop, name, _Timed(op, line))
        stack.callback(setattr, torch.ops.cdrop, name, op)


class _Timed:
    """A callable whose calls, and those of its overloads, count as saliency."""

    def __init__(self, call: Any, line: Timeline) -> None:
        self._call = call
        self._line = line

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._line.span("saliency"):
            return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return _Timed(getattr(self._call, name), self._line)
