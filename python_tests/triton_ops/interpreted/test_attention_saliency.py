"""The Triton kernels of `attention_saliency` against the oracle, in shapes that are awkward for
their tiles and small enough for the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from ops.cases import (
    LAYOUTS,
    Args,
    generator,
    overload,
    packed_case,
    random_lse,
    random_mask,
    saliency_case,
)
from ops.checks import assert_bitwise, check_saliency
from ops.checks_more import check_packed

op = torch.ops.cdrop.attention_saliency
packed = overload("attention_saliency.varlen")

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 255, 256, 257, 320, 577, 729])
def test_one_row(tokens):
    check_saliency(op, saliency_case(1, 2, 2, 1, tokens, 64, prefix=1))


@pytest.mark.parametrize("rows", [2, 7, 16, 17, 40, 65])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_rows_around_the_tiles(rows, reduce):
    check_saliency(op, saliency_case(1, 2, 1, rows, 67, 32, reduce=reduce))


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 129])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_square(tokens, causal, given):
    args = saliency_case(1, 2, 2, tokens, tokens, 32, causal=causal)
    if given:
        args["lse"] = random_lse(args)
    check_saliency(op, args)


@pytest.mark.parametrize("width", [1, 5, 16, 64, 72, 80, 96, 128, 256])
def test_head_widths(width):
    check_saliency(op, saliency_case(1, 2, 2, 5, 65, width))


@pytest.mark.parametrize("heads_groups", [(4, 4), (8, 2), (7, 1), (28, 4), (40, 1)])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_grouped_queries(heads_groups, rows, reduce):
    check_saliency(op, saliency_case(1, *heads_groups, rows, 33, 16, reduce=reduce))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 17])
def test_layouts(layout, rows):
    check_saliency(op, saliency_case(2, 4, 2, rows, 67, 72, layout=layout, prefix=1))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch):
    check_saliency(op, saliency_case(batch, 2, 2, 7, 33, 64, prefix=2))


@pytest.mark.parametrize(("rows", "tokens"), [(1, 3), (7, 3), (70, 3), (20, 64), (64, 130)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_causal_with_other_numbers_of_rows_and_keys(rows, tokens, reduce):
    check_saliency(op, saliency_case(1, 2, 1, rows, tokens, 16, causal=True, reduce=reduce))


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("rows", [1, 40])
def test_masked_keys_that_hold_anything(reduce, rows):
    args = saliency_case(3, 4, 4, rows, 65, 32, prefix=2, reduce=reduce)
    args["key_valid"] = random_mask((3, 67), seed=4)
    args["key_valid"][2] = False
    clean = check_saliency(op, args)
    assert not clean[2].any()
    masked = ~args["key_valid"][:, None, :, None].expand_as(args["k"])
    for value in (math.nan, math.inf, -math.inf):
        held = {**args, "k": args["k"].masked_fill(masked, value)}
        assert_bitwise(check_saliency(op, held), clean)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("rows", [9, 19, 70])
@pytest.mark.parametrize("given", [False, True])
def test_query_weights(reduce, rows, given):
    args = saliency_case(3, 4, 2, rows, 50, 32, reduce=reduce)
    weight = torch.rand(3, rows, generator=generator(3)) * 5
    weight[0, ::2] = 0
    weight[2] = 0
    args["query_weight"] = weight
    if given:
        args["lse"] = random_lse(args)
    out = check_saliency(op, args)
    assert not out[2].any()
    args["q"][0, :, ::2] = math.nan  # rows of weight 0
    assert_bitwise(check_saliency(op, args), out)


@pytest.mark.parametrize("factor", [1e-30, 1e30, 3e38])
@pytest.mark.parametrize("rows", [9, 70])
def test_the_size_of_the_weights_does_not_matter(factor, rows):
    args = saliency_case(1, 2, 2, rows, 40, 32)
    check_saliency(op, {**args, "query_weight": torch.full((1, rows), factor)})


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_dead_rows_of_a_given_lse(reduce):
    args = saliency_case(2, 2, 2, 9, 40, 64, reduce=reduce)
    args["lse"] = random_lse(args)
    args["lse"][0, :, 3] = math.inf
    args["lse"][0, 1, 5] = -math.inf
    args["lse"][1] = math.inf
    args["query_weight"] = torch.rand(2, 9, generator=generator(3))
    args["query_weight"][0, 5] = 0
    assert not check_saliency(op, args)[1].any()


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale):
    check_saliency(op, saliency_case(1, 2, 2, 5, 33, 64, scale=scale, sharp=0.3))


@pytest.mark.parametrize("sharp", [40.0, 400.0])
def test_attention_on_one_key(sharp):
    """Split over programs: each has another largest score, hundreds apart."""
    check_saliency(op, saliency_case(1, 2, 2, 1, 257, 64, sharp=sharp, scale=0.125))


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("tokens", [33, 200])
def test_nan_stays_where_it_arose(reduce, tokens):
    args = saliency_case(2, 2, 2, 5, tokens, 64, reduce=reduce)
    args["q"][0, 1, 2] = math.nan
    out = check_saliency(op, args)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()
    args = saliency_case(1, 2, 2, 5, tokens, 64, reduce=reduce)
    args["lse"] = random_lse(args)
    args["k"][0, 0, 7] = math.nan
    assert check_saliency(op, args).isnan()[0].nonzero().tolist() == [[7]]


@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_an_infinite_key(value):
    """A score of -inf is a share of 0; one of +inf leaves its row without a normaliser."""
    args = saliency_case(1, 1, 1, 3, 150, 8)
    args["q"] = args["q"].abs()
    args["k"][0, 0, 4] = value
    assert check_saliency(op, args)[0, 4] == 0


@pytest.mark.parametrize("lengths", [(), (0,), (5, 0, 0, 3), (64, 65), (130, 1, 31), (0, 70)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_lengths(lengths, reduce, causal):
    check_packed(packed, packed_case(lengths, reduce=reduce, causal=causal))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_layouts(layout):
    check_packed(packed, packed_case((20, 33, 7), 4, 2, 72, layout=layout))


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("given", [False, True])
def test_packed_lse_and_weights(reduce, given):
    weight = torch.rand(43, generator=generator(3))
    weight[10:20] = 0
    args = packed_case((10, 10, 0, 23), reduce=reduce, scale=0.2, query_weight=weight)
    if given:
        args["lse"] = torch.rand(4, 43, generator=generator(4)) + 4
    assert not check_packed(packed, args)[10:20].any()


def test_packed_sequences_do_not_mix():
    args = packed_case((9, 12, 30))
    clean = check_packed(packed, args)
    args["q"][10], args["k"][15] = math.nan, math.inf
    out = packed(**args)
    assert_bitwise(out[:9], clean[:9])
    assert_bitwise(out[21:], clean[21:])


@pytest.mark.parametrize("groups", [15, 16, 17, 33])
def test_parts_around_the_tiles(groups):
    check_saliency(op, saliency_case(2, groups, groups, 1, 70, 16))


@pytest.mark.parametrize("width", [1, 3, 4, 8, 12])
def test_strides_of_every_unit(width):
    """Rows that lie a prime number of units apart, so that no larger unit serves."""
    args = saliency_case(1, 1, 1, 2, 40, width)
    wide = torch.full((1, 1, 40, 7 * width), math.nan)
    wide[..., :width] = args["k"]
    check_saliency(op, {**args, "k": wide[..., :width]})


def test_the_same_bits_again():
    args = saliency_case(2, 8, 2, 7, 129, 64, prefix=1)
    assert_bitwise(op(**args), op(**args))


SPLIT = saliency_case(1, 2, 2, 3, 300, 32)
CAUSAL = saliency_case(1, 2, 1, 70, 70, 16, causal=True)
PREFIX = saliency_case(1, 2, 2, 3, 40, 32, prefix=3)
MASKED = saliency_case(1, 2, 2, 3, 40, 32, key_valid=random_mask((1, 40), seed=4))
WEIGHTED = saliency_case(1, 2, 2, 5, 33, 32, query_weight=torch.rand(1, 5, generator=generator(1)))
MANY_WEIGHTED = saliency_case(
    1, 2, 2, 40, 33, 32, query_weight=torch.rand(1, 40, generator=generator(1))
)
GROUPED = saliency_case(1, 8, 2, 3, 33, 32)
MAXIMUM = saliency_case(1, 8, 2, 3, 33, 32, reduce="max")
GIVEN = saliency_case(1, 2, 2, 5, 33, 32, lse=random_lse(saliency_case(1, 2, 2, 5, 33, 32)))
SHARP = saliency_case(1, 1, 1, 1, 2000, 16, sharp=8)

#: The place in the kernel, what a mistake would make of it, and a call that shows it.
MISTAKES: dict[str, tuple[str, str, Args]] = {
    "the last block of keys is skipped": (
        "range(start, end, BLOCK_N)", "range(start, end - BLOCK_N + 1, BLOCK_N)", SPLIT
    ),
    "a split is forgotten": ("(piece < splits)", "(piece < splits - 1)", SPLIT),
    "old sums are not rescaled": (
        "total * tl.exp2(_finite_or_zero(top) - shift))\n        total += tl.sum(tl.exp2(s",
        "total)\n        total += tl.sum(tl.exp2(s", SHARP,
    ),
    "splits are added as they are": ("sums * factor", "sums", SHARP),
    "a row does not see itself": ("(key[None, :] <= m", "(key[None, :] < m", CAUSAL),
    "the normaliser sees ahead": (
        "tl.where(seen[None, :] & (n[None, :] <= m[:, None] + keys - rows), s, float(\"-inf\"))",
        "tl.where(seen[None, :], s, float(\"-inf\"))", CAUSAL,
    ),
    "one tile of rows too many is skipped": (
        "// BLOCK_M * BLOCK_M\n", "// BLOCK_M * BLOCK_M + BLOCK_M\n", CAUSAL
    ),
    "the prefix is returned": ("key = n + prefix", "key = n", PREFIX),
    "masked keys are counted": ("seen &= tl.load(", "seen |= tl.load(", MASKED),
    "masked keys are returned": ("out = tl.where(seen, out, 0.0)", "out = out", MASKED),
    "rows weigh the same": ("shift - tl.log2(w)", "shift", WEIGHTED),
    "shares of another sum": ("tl.where(whole > 0.0, whole, 1.0)", "whole * 0.999", MANY_WEIGHTED),
    "the last part is left out": ("(part < parts)", "(part < parts - 1)", GROUPED),
    "a head of the next group": ("head = first_head + r", "head = first_head + 1 + r", GROUPED),
    "a sum for the maximum": ("tl.max(tl.reshape(acc", "tl.sum(tl.reshape(acc", MAXIMUM),
    "the lse is taken as base 2": (" * 1.4426950408889634", "", GIVEN),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, broken):
    right, wrong, args = MISTAKES[name]
    check_saliency(op, args)
    module = broken("attention_saliency", right, wrong)
    with pytest.raises(AssertionError):
        check_saliency(module.attention_saliency, args)
