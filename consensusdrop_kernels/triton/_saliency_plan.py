"""How `attention_saliency` cuts its work: tiles, and what a call is to its launches."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Programs that one multiprocessor should be given before the work is split no further.
PROGRAMS_PER_CORE = 2


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up. Triton's own serves kernels too, at 1.5 us a call on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is not less than `n >= 1`."""
    return 1 << (n - 1).bit_length()


class Tiles(NamedTuple):
    """How one launch cuts its work; `heads * block_m` rows by `block_n` keys."""

    heads: int
    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int

    def registers(self) -> dict[str, int]:
        """A limit that blocks of 64 keys never need: without one, ptxas spills a register or two
        of these kernels to keep more of them resident than there are programs."""
        return {"maxnreg": 128} if self.block_n == 64 and torch.version.hip is None else {}


def tiles(rows: int, group: int, width: int, dtype: torch.dtype) -> Tiles:
    """The tiles of both launches that multiply, from the shape alone.

    Three heights serve all row counts, so that a prompt of another length is no new kernel: one
    row, up to 16, and more. Heads fill the tile up to 64 rows. Few rows leave the tensor cores
    idle whatever is done, so their blocks of keys are small, for more programs; many rows share a
    block of 128 keys. Float32 is multiplied without tensor cores, from registers, in short chunks.
    """
    block_m = 1 if rows == 1 else 16 if rows <= 16 else 64
    padded = max(16, power_of_two(width))
    if dtype == torch.float32:
        block_m = min(block_m, 16)
        heads = min(power_of_two(group), 16 // block_m)
        return Tiles(heads, 16 // heads, 64, 16, 8, 1)
    heads = min(power_of_two(group), 64 // block_m)
    block_m = max(block_m, 16 // heads)
    warps = 8 if heads * block_m == 64 else 4
    if padded > 256:  # whole vectors would not fit in shared memory
        return Tiles(heads, block_m, 64, 64, warps, 2)
    if rows <= 64 or padded > 128:
        return Tiles(heads, block_m, 64, padded, warps, 2)
    return Tiles(heads, block_m, 128, padded, warps, 3 if padded <= 64 else 2)


def in_units(strides: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], int]:
    """The strides counted in the largest unit they share, 16 bytes at most, and its elements.

    Triton tells multiples of 16 elements from all other strides, and loads 2 bytes at a time where
    one is of the others: each head of 72, say, where 8 elements would do for the widest loads. The
    unit is a constant of the kernel, so no stride need be, and lengths never make another kernel.
    """
    unit = math.gcd(*strides, 16 // dtype.itemsize)
    return tuple(s // unit for s in strides), unit


@functools.cache
def wanted_programs(device: torch.device) -> int:
    """Programs that fill the device."""
    # Interpreted, few, but enough to split the work; meta tensors stand for a large GPU.
    cores = 8 if device.type == "cpu" else 132
    if device.type == "cuda":
        cores = torch.cuda.get_device_properties(device).multi_processor_count
    return cores * PROGRAMS_PER_CORE


class Problem(NamedTuple):
    """One call, padded or packed: packed sequences have a batch stride of 0, `cu` says where each
    begins, and `rows` and `keys` are the longest there may be."""

    q: Tensor
    k: Tensor
    strides: tuple[int, ...]  # in units
    unit: int
    batch: int
    heads: int
    key_heads: int
    rows: int
    keys: int
    tokens: int
    prefix: int
    key_valid: Tensor | None
    cu: Tensor | None
    scale2: float
    causal: bool

    @property
    def cu_stride(self) -> int:
        return 0 if self.cu is None else self.cu.stride(0)
