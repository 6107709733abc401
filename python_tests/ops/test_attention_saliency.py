"""`attention_saliency` against its definition, in every shape, layout and corner of values."""

from __future__ import annotations

import math

import pytest
import torch

import consensusdrop_kernels as cdrop

from .cases import LAYOUTS, Args, generator, random_lse, random_mask, saliency_case
from .checks import assert_bitwise, check_saliency

op = torch.ops.cdrop.attention_saliency
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poison")


def check(backend, args: Args) -> torch.Tensor:
    return check_saliency(op, backend.place_all(args))


@pytest.mark.parametrize("tokens", [1, 2, 15, 31, 255, 256, 257, 576, 577, 729, 1024, 2880, 5000])
def test_one_row_over_many_keys(backend, tokens):
    check(backend, saliency_case(1, 4, 4, 1, tokens, 64, prefix=1))


@pytest.mark.parametrize("tokens", [1, 7, 65, 257, 320, 576])
@pytest.mark.parametrize("causal", [False, True])
def test_square(backend, tokens, causal):
    check(backend, saliency_case(1, 2, 2, tokens, tokens, 64, causal=causal))


@pytest.mark.parametrize("width", [1, 5, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_widths_and_dtypes(backend, width, dtype):
    check(backend, saliency_case(2, 4, 4, 7, 65, width, dtype=dtype))


@pytest.mark.parametrize("heads_groups", [(4, 4), (8, 2), (7, 1), (28, 4)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_grouped_queries(backend, heads_groups, reduce):
    check(backend, saliency_case(1, *heads_groups, 7, 129, 64, reduce=reduce))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 64])
def test_layouts(backend, layout, dtype, rows):
    check(backend, saliency_case(2, 4, 2, rows, 67, 72, dtype=dtype, layout=layout, prefix=1))


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("heads_groups", [(16, 16), (32, 16), (18, 18)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_many_heads_of_few_rows_far_apart(backend, rows, heads_groups, reduce):
    """Projections as models lay them out: a key's heads side by side, its rows kilobytes apart."""
    case = saliency_case(1, *heads_groups, rows, 577, 64, layout="transposed", reduce=reduce)
    check(backend, case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_the_result(backend, layout):
    """The same values in other memory: at most the order of the sums may differ."""
    args = backend.place_all(saliency_case(2, 4, 2, 7, 67, 72, layout=layout))
    packed = {name: args[name].contiguous() for name in ("q", "k")}
    torch.testing.assert_close(op(**args), op(**packed), rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_batches(backend, batch, rows):
    check(backend, saliency_case(batch, 2, 2, rows, 33, 64, prefix=2))


@pytest.mark.parametrize("prefix", [0, 1, 5, 33])
def test_prefix_takes_part_in_the_softmax(backend, prefix):
    check(backend, saliency_case(1, 2, 2, 3, 20, 32, prefix=prefix))


@pytest.mark.parametrize("rows", [1, 7, 64, 70])
@pytest.mark.parametrize("tokens", [3, 64, 130])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_causal_is_aligned_at_the_bottom_right(backend, rows, tokens, reduce):
    """With more rows than keys the first rows see nothing at all and give nothing."""
    check(backend, saliency_case(1, 2, 1, rows, tokens, 32, causal=True, reduce=reduce))


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_lse(backend, reduce, causal, dtype):
    args = saliency_case(2, 4, 2, 37, 60, 64, dtype=dtype, prefix=3, reduce=reduce, causal=causal)
    args["lse"] = random_lse(args)
    check(backend, args)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_dead_rows_of_a_given_lse_contribute_nothing(backend, reduce):
    args = saliency_case(2, 2, 2, 9, 40, 64, reduce=reduce)
    args["lse"] = random_lse(args)
    args["lse"][0, :, 3] = math.inf
    args["lse"][0, 1, 5] = -math.inf
    args["lse"][1] = math.inf  # a whole sample
    out = check(backend, args)
    assert not out[1].any()


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.125, -0.3])
def test_scale(backend, scale):
    check(backend, saliency_case(1, 2, 2, 5, 33, 64, scale=scale, sharp=0.3))


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("rows", [1, 40])
def test_masked_keys(backend, reduce, rows):
    args = saliency_case(3, 4, 4, rows, 65, 64, prefix=2, reduce=reduce)
    args["key_valid"] = random_mask((3, 67), seed=4)
    args["key_valid"][2] = False
    out = check(backend, args)
    assert not out[2].any()


def test_a_masked_key_may_hold_anything(backend):
    args = saliency_case(1, 2, 2, 7, 40, 64)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 10:13] = False
    clean = check(backend, {**args, "key_valid": mask})
    for poison in (math.nan, math.inf, -math.inf):
        args["k"] = args["k"].clone()
        args["k"][:, :, 10:13] = poison
        assert_bitwise(check(backend, {**args, "key_valid": mask}), clean)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_query_weights(backend, reduce):
    args = saliency_case(3, 4, 2, 19, 50, 64, reduce=reduce)
    weight = torch.rand(3, 19, generator=generator(3)) * 5
    weight[0, ::2] = 0
    weight[2] = 0
    args["query_weight"] = weight
    out = check(backend, args)
    assert not out[2].any()


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_rows_of_weight_zero_are_not_even_read(backend, reduce):
    args = saliency_case(1, 2, 2, 9, 40, 64, reduce=reduce)
    args["query_weight"] = torch.ones(1, 9)
    args["query_weight"][0, 4:6] = 0
    clean = check(backend, args)
    args["q"] = args["q"].clone()
    args["q"][:, :, 4:6] = math.nan
    assert_bitwise(check(backend, args), clean)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_size_of_the_weights_does_not_matter(backend, factor):
    args = saliency_case(1, 2, 2, 9, 40, 64)
    check(backend, {**args, "query_weight": torch.full((1, 9), factor)})


def test_all_keys_equal_share_alike(backend):
    args = saliency_case(1, 4, 4, 5, 77, 64, prefix=3)
    args["k"] = args["k"][:, :, :1].expand_as(args["k"]).contiguous()
    out = check(backend, args)
    torch.testing.assert_close(out, torch.full_like(out, 1 / 80), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-40, 1e-20, 0.0])
def test_tiny_values(backend, size):
    args = saliency_case(1, 2, 2, 5, 33, 64)
    check(backend, {"q": args["q"] * size, "k": args["k"]})


@pytest.mark.parametrize("sharp", [40.0, 400.0])
def test_attention_on_one_key(backend, sharp):
    """Scores of hundreds: the exponential must be taken of the difference, not of the score."""
    check(backend, saliency_case(1, 2, 2, 1, 65, 64, sharp=sharp, scale=0.125))


@pytest.mark.parametrize("given", [False, True])
def test_nan_stays_where_it_arose(backend, given):
    """A NaN query row spoils its sample, no other; a NaN key with lse given, only its column."""
    args = saliency_case(2, 2, 2, 5, 33, 64)
    args["lse"] = random_lse(args) if given else None
    args["q"][0, 1, 2] = math.nan
    out = check(backend, args)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_nan_key_under_a_given_lse(backend):
    args = saliency_case(1, 2, 2, 5, 33, 64)
    args["lse"] = random_lse(args)
    args["k"][0, 0, 7] = math.nan
    out = check(backend, args)
    assert out.isnan()[0].nonzero().tolist() == [[7]]


def test_one_key_of_minus_infinity(backend):
    """A score of -inf is a share of 0, not a NaN."""
    args = saliency_case(1, 1, 1, 3, 20, 8)
    args["q"] = args["q"].abs()
    args["k"][0, 0, 4] = -math.inf
    out = check(backend, args)
    assert out[0, 4] == 0


@pytest.mark.parametrize("rows", [64, 5000])
def test_a_language_model_prefill(backend, rows):
    """Grouped queries, bfloat16, strided, causal: the shape the op was made for."""
    if rows == 5000:
        args = saliency_case(1, 2, 1, 300, 5000, 64, dtype=torch.bfloat16, layout="transposed")
    else:
        args = saliency_case(1, 28, 4, rows, 729, 128, dtype=torch.bfloat16, layout="transposed")
    args.update(causal=True, prefix=0)
    check(backend, args)


def test_the_function_is_the_op(backend):
    args = backend.place_all(saliency_case(1, 2, 2, 5, 33, 64, prefix=2))
    assert_bitwise(cdrop.attention_saliency(**args), op(**args))
