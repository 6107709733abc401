"""The peak of memory of one call above what was there before it, its outputs included.

On a GPU that is what torch's caching allocator counts (`max_memory_allocated` less
`memory_allocated`), which is exact and sees everything, as the kernels allocate through torch.

On a CPU it is how far the call raised the peak of the process's resident memory: Linux keeps that
peak (`VmHWM`) and lets a process reset it (`/proc/self/clear_refs`). torch's profiler would count
to the byte, but only what goes through torch's allocator: not a kernel's own scratch, a matrix
product's packed operands or the stack of a thread, and scratch is what this is to catch. The price:

- Pages are counted, in steps of 4 KB, by the kernel's own batched counters: differences below about
  half a MB are noise. `RESOLUTION` says so, and what is below it is no finding.
- Memory that was freed but still belongs to the process would be reused unseen; `malloc_trim` gives
  it back first. What a library keeps in use from its first call (the packing buffers of a BLAS,
  say) is not counted, as a call before the measured one has paid for it.
- A page that is allocated and never touched is not counted: it costs nothing either.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pathlib
from collections.abc import Callable
from typing import Any

import torch

RESOLUTION = {"cpu": 512 * 1024, "cuda": 512}
_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def peak_above(call: Callable[[], Any], device: str) -> int | None:
    """Bytes by which one call of `call` raises the peak of memory; call it once before.

    Returns:
        The bytes, or None where the system has no such measure.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with contextlib.suppress(OSError, AttributeError):  # a libc without it keeps less as well
            ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR.write_text("5")
            before = _resident("VmRSS")
        except OSError:
            return None
        out = call()
        peak = max(0, _resident("VmHWM") - before)
    del out  # alive until the peak was read
    return peak


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
