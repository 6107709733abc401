"""The small functions of the fused kernel, keys.h and numbers.h, against plain Python and torch."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

from .emulated import functions

NAN_KEY, NAN_ON_TOP = 1, 0xFFFFFFFF
TINY = float(np.float32(1e-45))
SPECIAL = [
    -np.inf, np.inf, 0.0, -0.0, TINY, -TINY, 1e-40, -1e-40, 1.17549435e-38, 1.0, -1.0,
    3.4028235e38, -3.4028235e38, 0.1, 1 + 2**-23, 1 - 2**-24,
]  # fmt: skip


def call(name: str, values: np.ndarray, out: type, *more: object) -> np.ndarray:
    """An exported function over an array."""
    values = np.ascontiguousarray(values)
    result = np.empty(len(values), out)
    function = getattr(functions(), name)
    function(
        ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(len(values)), *more,
        ctypes.c_void_p(result.ctypes.data),
    )  # fmt: skip
    return result


def random_floats(count: int, seed: int = 0) -> np.ndarray:
    """Any bits but those of NaN."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    floats = bits.view(np.float32)
    return floats[~np.isnan(floats)]


# --- order keys ----------------------------------------------------------------------------------


def order_keys(values: np.ndarray, nan: int = NAN_KEY) -> np.ndarray:
    return call("cdrop_order_keys", values.astype(np.float32), np.uint32, ctypes.c_uint32(nan))


def test_order_keys_are_in_the_order_of_the_numbers():
    values = np.concatenate([np.array(SPECIAL, np.float32), random_floats(20000)])
    values = values[np.argsort(values, kind="stable")]
    keys = order_keys(values).astype(np.int64)
    assert ((values[1:] > values[:-1]) == (keys[1:] > keys[:-1])).all()
    assert ((values[1:] == values[:-1]) == (keys[1:] == keys[:-1])).all()
    assert keys.min() > NAN_KEY
    assert keys.max() < NAN_ON_TOP


def test_both_zeros_have_one_key():
    zero, minus = order_keys(np.array([0.0, -0.0]))
    assert zero == minus


@pytest.mark.parametrize("nan", [0, NAN_KEY, NAN_ON_TOP])
def test_every_nan_has_the_key_it_is_given(nan):
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    assert (order_keys(bits.view(np.float32), nan) == nan).all()


def test_keys_become_numbers_again():
    values = np.concatenate([np.array(SPECIAL, np.float32), random_floats(20000, 1)]) + np.float32(
        0
    )
    back = call("cdrop_key_values", order_keys(values), np.float32)
    assert (back.view(np.uint32) == values.view(np.uint32)).all()


def test_ranked_keys():
    """The larger key, then the smaller tie-breaker; 0 where a token may not be chosen."""
    keys = sorted({0, 1, 2, 0x7FFFFF, 0x80000000, 0xFFFFFFFF})
    ties = [0, 1, 576, 65000, 0xFFFFFFFE]
    pairs = [(key, tie) for key in keys for tie in reversed(ties)]
    ranked = [
        functions().cdrop_ranked_key(ctypes.c_uint32(k), ctypes.c_uint32(t)) for k, t in pairs
    ]
    assert ranked[: len(ties)] == [0] * len(ties)
    assert ranked[len(ties) :] == sorted(set(ranked[len(ties) :]))


# --- selection -----------------------------------------------------------------------------------


def threshold(keys: list[int], wanted: int) -> tuple[int, int]:
    array = np.array(keys, np.uint64)
    passes = ctypes.c_int32()
    found = functions().cdrop_threshold(
        ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(len(array)), ctypes.c_uint32(wanted),
        ctypes.byref(passes),
    )  # fmt: skip
    return found, passes.value


def key_sets() -> dict[str, list[int]]:
    r = random.Random(0)
    top = 1 << 64
    return {
        "random": [r.getrandbits(64) for _ in range(500)],
        "two": [top - 1, 1],
        "neighbours": [(1 << 63) + i for i in range(300)],
        "around a digit": [*range(250, 262), *range(65530, 65542)],
        "around the middle": [(1 << 63) + i for i in range(-5, 5)],
        "one far away": [top - 1, *range(1, 400)],
        "one far below": [1, *range(top - 400, top)],
        "powers of two": [1 << i for i in range(64)],
        "nearly all bits": [top - 1 - (1 << i) for i in range(64)],
        "ties of a score": [(0xBF800000 << 32) | (0xFFFFFFFF - i) for i in range(600)],
        "two scores": [
            (score << 32) | (0xFFFFFFFF - i) for score in (1, 0xFF800000) for i in range(200)
        ],
        "last digit": [(7 << 8) + i for i in range(256)],
        "every second": [2 * i + (1 << 40) for i in range(256)],
    }


@pytest.mark.parametrize("name", key_sets())
def test_the_radix_search_wants_exactly_the_largest(name):
    keys = key_sets()[name]
    random.Random(1).shuffle(keys)
    descending = sorted(keys, reverse=True)
    for wanted in range(1, len(keys)):
        least, passes = threshold(keys, wanted)
        assert descending[wanted] < least <= descending[wanted - 1]
        assert passes <= 8


def test_the_radix_search_on_small_random_sets():
    r = random.Random(2)
    for _ in range(3000):
        bits = r.choice([3, 9, 17, 33, 64])
        base = r.getrandbits(64) >> bits << bits
        keys = list({base | r.getrandbits(bits) for _ in range(8)} | {base})
        if len(keys) < 2:
            continue
        wanted = r.randint(1, len(keys) - 1)
        least, _ = threshold(keys, wanted)
        assert sum(key >= least for key in keys) == wanted


# --- sums, slots ---------------------------------------------------------------------------------


def test_fixed_point():
    """To 2^-40 there, and from there to the nearest float."""
    floats = np.random.default_rng(0).random(10000).astype(np.float32) * np.float32(600)
    floats = np.concatenate(
        [floats, np.array([0, 1, 2**-40, 2**-41, 2**-42, 65000, 1e6], np.float32)]
    )
    fixed = call("cdrop_to_fixed", floats, np.uint64)
    assert fixed.tolist() == [int(float(v) * 2**40 + 0.5) for v in floats]
    back = call("cdrop_from_fixed", fixed, np.float32)
    assert (np.abs(back.astype(float) - floats) <= 2.0**-41).all()
    exact = floats >= 2.0**-16  # all their bits are there
    assert (back[exact] == floats[exact]).all()


def test_contextual_slots():
    """Number floor(c R / C) of R dropped tokens is that of slot c; each its own where R < C."""
    sizes = [(r, c) for r in range(61) for c in range(1, 61)]
    sizes += [(2816, 64), (64999, 1), (64999, 64999), (65000, 63), (511, 512), (40000, 39999)]
    for dropped, contextual in sizes:
        found = np.full(dropped, -7, np.int32)
        functions().cdrop_contextual_slots(
            ctypes.c_int64(dropped), ctypes.c_int64(contextual), ctypes.c_void_p(found.ctypes.data)
        )
        references = (
            {number: number for number in range(dropped)}
            if dropped < contextual
            else {c * dropped // contextual: c for c in range(contextual)}
        )
        assert found.tolist() == [references.get(number, -1) for number in range(dropped)]


# --- 16-bit numbers ------------------------------------------------------------------------------


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    bfloat16 = ctypes.c_bool(dtype == torch.bfloat16)
    return call("cdrop_from_bits", bits, np.float32, bfloat16)


def to_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    bfloat16 = ctypes.c_bool(dtype == torch.bfloat16)
    return call("cdrop_to_bits", values, np.uint16, bfloat16)


def bits_of_torch(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
ALL = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


@HALVES
def test_all_16_bit_numbers_widen_exactly(dtype):
    torchs = torch.from_numpy(ALL.view(np.int16)).view(dtype).float().numpy()
    ours = from_bits(ALL, dtype)
    number = ~np.isnan(torchs)
    assert (ours.view(np.uint32)[number] == torchs.view(np.uint32)[number]).all()
    assert np.isnan(ours[~number]).all()
    back = to_bits(ours, dtype)
    assert (back[number] == ALL[number]).all()


@HALVES
def test_rounding_is_that_of_torch(dtype):
    """At, below and above every half way between two neighbours, and of random numbers."""
    exact = from_bits(ALL, dtype)
    exact = np.sort(exact[np.isfinite(exact)]).astype(np.float64)
    middle = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    values = np.concatenate(
        [
            middle,
            np.nextafter(middle, np.float32(np.inf)),
            np.nextafter(middle, np.float32(-np.inf)),
            random_floats(200000),
            (random_floats(100000, 1).view(np.uint32) >> 4).view(np.float32),
            np.random.default_rng(1).standard_normal(100000).astype(np.float32),
            np.array([*SPECIAL, 65504, 65519.99, 65520, 65536, 3.39e38, 6e-8, 2.98e-8], np.float32),
        ]
    )
    values = values[~np.isnan(values)]
    assert (to_bits(values, dtype) == bits_of_torch(values, dtype)).all()


@HALVES
def test_nan_stays_nan(dtype):
    """Also those whose only bits are lost."""
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32)
    assert np.isnan(from_bits(to_bits(bits.view(np.float32), dtype), dtype)).all()
