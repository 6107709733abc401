"""Integers that sort as scores do."""

from __future__ import annotations

import triton
import triton.language as tl

#: Below every packed key.
NO_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def ordered_bits(score):
    """int32 in the order of the float32 scores: the two zeros equal, NaN below -inf.

    All in integers, so that neither denormals nor the sign of a zero depend on the device.
    """
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(magnitude > 0x7F800000, -0x80000000, ordered)


@triton.jit
def packed_key(score, token, there):
    """int64 that is larger for a better token: by score, ties to the lower index; all distinct."""
    high = ordered_bits(score).to(tl.int64) << 32
    return tl.where(there, high | (0x7FFFFFFF - token).to(tl.int64), NO_KEY)
