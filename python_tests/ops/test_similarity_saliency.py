"""`similarity_saliency` against its definition."""

from __future__ import annotations

import math

import pytest
import torch

import consensusdrop_kernels as cdrop

from .cases import LAYOUTS, Args, overload, random_mask, similarity_case
from .checks import assert_bitwise
from .checks_more import check_similarity

op = overload("similarity_saliency")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poison")


def check(backend, args: Args) -> torch.Tensor:
    return check_similarity(op, backend.place_all(args))


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("tokens", [1, 16, 257])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_shapes(backend, rows, tokens, reduce):
    check(backend, similarity_case(2, rows, tokens, 40, reduce=reduce))


@pytest.mark.parametrize("width", [1, 5, 64, 300, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_widths_and_dtypes(backend, width, dtype, alike):
    """Also vectors nearly alike, whose logits are all near 1 / temperature."""
    check(backend, similarity_case(1, 9, 70, width, dtype=dtype, alike=alike))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend, layout, dtype):
    check(backend, similarity_case(2, 5, 33, 72, dtype=dtype, layout=layout))


def test_a_last_stride_other_than_one_is_taken(backend):
    args = similarity_case(2, 5, 33, 16)
    strided = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in args.items()}
    assert_bitwise(check(backend, strided), check(backend, args))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 30.0])
def test_temperature(backend, temperature):
    check(backend, similarity_case(temperature=temperature))


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_masks(backend, reduce):
    args = similarity_case(4, 9, 40, reduce=reduce)
    text, visual = random_mask((4, 9), 1, 0.6), random_mask((4, 40), 2)
    text[2], visual[3] = False, False
    out = check(backend, {**args, "text_valid": text, "visual_valid": visual})
    assert not out[2:].any()


def test_what_is_masked_may_hold_anything(backend):
    text, visual = random_mask((2, 7), 1), random_mask((2, 33), 2)
    args = similarity_case(text_valid=text, visual_valid=visual)
    clean = check(backend, args)
    for poison in (math.nan, math.inf):
        args["text"] = args["text"].masked_fill(~text[:, :, None], poison)
        args["visual"] = args["visual"].masked_fill(~visual[:, :, None], poison)
        assert_bitwise(op(**backend.place_all(args)), clean)


@pytest.mark.parametrize("of_text", [1e-38, 1e-20, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("of_visual", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_directions_matter(backend, of_text, of_visual, dtype):
    """Squares of these lengths leave float32, and most products too."""
    args = similarity_case(1, 5, 33, 200)
    args["text"], args["visual"] = args["text"] * of_text, args["visual"] * of_visual
    args = {n: t.clamp(-3e38, 3e38).to(dtype) for n, t in args.items()}
    check(backend, args)


def test_lengths_mixed_in_one_sample(backend):
    args = similarity_case(1, 5, 33, 64)
    args["visual"] *= torch.logspace(-15, 15, 33)[:, None]
    args["text"] *= torch.logspace(15, -15, 5)[:, None]
    check(backend, args)


def test_zero_vectors_are_orthogonal_to_all(backend):
    args = similarity_case()
    args["text"][0, 3] = 0
    args["visual"][:, 7] = -0.0
    args["text"][1] = 0
    out = check(backend, args)
    torch.testing.assert_close(out[1], torch.full((33,), 1 / 33), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["text", "visual"])
def test_nan_spoils_its_sample_alone(backend, value, where):
    args = similarity_case(2, 20, 33)
    args[where][1, 4, 3] = value
    out = op(**backend.place_all(args))
    assert not out[0].isnan().any()
    assert out[1].isnan().all()


@pytest.mark.parametrize("batch", [0, 3])
def test_batches(backend, batch):
    check(backend, similarity_case(batch))


def test_padding_changes_nothing(backend):
    args = similarity_case(1, 7, 33)
    alone = op(**backend.place_all(args))
    longer = {n: torch.cat([t, torch.ones(1, 5, 40)], 1) for n, t in args.items()}
    longer["text_valid"] = torch.arange(12)[None] < 7
    longer["visual_valid"] = torch.arange(38)[None] < 33
    out = op(**backend.place_all(longer))
    torch.testing.assert_close(out[:, :33], alone, rtol=1e-5, atol=0)


def test_by_hand():
    """Cosines 1 and 0 at temperature 1 / ln 3: shares 3/4 and 1/4."""
    text = torch.tensor([[[2.0, 0.0]]])
    visual = torch.tensor([[[5.0, 0.0], [0.0, 0.1]]])
    out = cdrop.similarity_saliency(text, visual, temperature=1 / math.log(3))
    torch.testing.assert_close(out, torch.tensor([[0.75, 0.25]]))
    both = torch.cat([text, text.flip(2)], 1)
    for reduce, share in (("max", 0.75), ("mean", 0.5)):
        out = cdrop.similarity_saliency(
            both, visual, temperature=1 / math.log(3), reduce=reduce
        )  # fmt: skip
        torch.testing.assert_close(out, torch.full((1, 2), share))
