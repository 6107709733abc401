"""A stable sort of many lists at once: least significant digit first, 8 bits a pass.

Three launches a pass: each tile counts its digits, one program per list turns the counts into
places, each tile moves its elements. Within a tile an element's place is the number of equal digits
before it, so the order never depends on timing and no atomics are needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
DIGITS = tl.constexpr(256)
SCAN_BLOCK = 4096


@triton.jit(do_not_specialize=["count", "tiles", "shift"])
def _radix_count_kernel(key_ptr, table_ptr, count, tiles, shift, TILE: tl.constexpr):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < count
    key = tl.load(key_ptr + row * count + at, mask=inside, other=0)
    digit = (key >> shift) & 0xFF
    counts = tl.histogram(digit, DIGITS, mask=inside)  # [DIGITS]
    # Digit by digit, and within a digit tile by tile: the order in which places are handed out.
    table = table_ptr + row * DIGITS * tiles
    tl.store(table + tl.arange(0, DIGITS) * tiles + tile, counts)


@triton.jit(do_not_specialize=["entries"])
def _radix_scan_kernel(table_ptr, entries, BLOCK: tl.constexpr):
    table = table_ptr + tl.program_id(0).to(tl.int64) * entries
    total = 0
    for start in range(0, entries, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = tl.load(table + at, mask=at < entries, other=0)
        upto = tl.cumsum(counts, 0)
        tl.store(table + at, total + upto - counts, mask=at < entries)
        total += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["count", "tiles", "shift"])
def _radix_move_kernel(
    key_ptr,
    item_ptr,
    table_ptr,
    out_key_ptr,
    out_item_ptr,
    count,
    tiles,
    shift,
    TILE: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    key_ptr += row * count
    first = tile * TILE
    own = tl.arange(0, TILE)
    inside = first + own < count
    key = tl.load(key_ptr + first + own, mask=inside, other=0)
    item = tl.load(item_ptr + row * count + first + own, mask=inside, other=0)
    digit = (key >> shift) & 0xFF
    before = tl.zeros([TILE], tl.int32)
    for start in range(0, TILE, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        near = tl.load(key_ptr + first + other, mask=first + other < count, other=0)
        same = digit[:, None] == ((near >> shift) & 0xFF)[None, :]  # [TILE, BLOCK_J]
        earlier = other[None, :] < own[:, None]
        before += tl.sum((same & earlier).to(tl.int32), 1)
    table = table_ptr + row * DIGITS * tiles
    place = tl.load(table + digit * tiles + tile, mask=inside, other=0) + before
    tl.store(out_key_ptr + row * count + place, key, mask=inside)
    tl.store(out_item_ptr + row * count + place, item, mask=inside)


def sort_pairs(key: Tensor, item: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Sorts each row by `key`, ascending as unsigned integers, equal keys as they came.

    Args:
        key: `[L, N]` int32, contiguous; only the lowest `bits` count.
        item: `[L, N]` int32, moved along with its key.

    Returns:
        Both in order. The arguments are used as workspace.
    """
    rows, count = key.shape
    tiles = triton.cdiv(count, TILE)
    entries = DIGITS.value * tiles
    table = torch.empty((rows, entries), dtype=torch.int32, device=key.device)
    to_key, to_item = torch.empty_like(key), torch.empty_like(item)
    for shift in range(0, bits, 8):
        _radix_count_kernel[(tiles, rows)](key, table, count, tiles, shift, TILE=TILE, num_warps=4)
        _radix_scan_kernel[(rows,)](table, entries, BLOCK=SCAN_BLOCK, num_warps=8)
        _radix_move_kernel[(tiles, rows)](
            key, item, table, to_key, to_item, count, tiles, shift, TILE=TILE, BLOCK_J=16,
            num_warps=8,
        )  # fmt: skip
        key, item, to_key, to_item = to_key, to_item, key, item
    return key, item
