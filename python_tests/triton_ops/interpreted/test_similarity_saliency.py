"""The Triton kernels of `similarity_saliency` against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from ops.cases import LAYOUTS, Args, random_mask, similarity_case
from ops.checks import assert_bitwise
from ops.checks_more import check_similarity

op = torch.ops.cdrop.similarity_saliency

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("tokens", [1, 64, 257])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_shapes(rows, tokens, reduce):
    check_similarity(op, similarity_case(1, rows, tokens, 40, reduce=reduce))


@pytest.mark.parametrize("width", [1, 5, 64, 300])
@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_widths(width, alike):
    check_similarity(op, similarity_case(1, 9, 70, width, alike=alike))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check_similarity(op, similarity_case(2, 5, 33, 72, layout=layout))


def test_a_last_stride_other_than_one_is_taken():
    args = similarity_case(2, 5, 33, 16)
    strided = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in args.items()}
    assert_bitwise(check_similarity(op, strided), check_similarity(op, args))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 30.0])
def test_temperature(temperature):
    check_similarity(op, similarity_case(temperature=temperature))


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_what_is_masked_may_hold_anything(reduce):
    text, visual = random_mask((4, 9), 1, 0.6), random_mask((4, 70), 2)
    text[2], visual[3] = False, False
    args = similarity_case(4, 9, 70, text_valid=text, visual_valid=visual, reduce=reduce)
    clean = check_similarity(op, args)
    assert not clean[2:].any()
    for poison in (math.nan, math.inf):
        args["text"] = args["text"].masked_fill(~text[:, :, None], poison)
        args["visual"] = args["visual"].masked_fill(~visual[:, :, None], poison)
        assert_bitwise(op(**args), clean)


@pytest.mark.parametrize("of_text", [1e-38, 1.0, 1e38])
@pytest.mark.parametrize("of_visual", [1e-38, 1e-20, 1e20, 1e38])
def test_only_directions_matter(of_text, of_visual):
    args = similarity_case(1, 5, 33, 200)
    args["text"], args["visual"] = args["text"] * of_text, args["visual"] * of_visual
    check_similarity(op, {n: t.clamp(-3e38, 3e38) for n, t in args.items()})


def test_lengths_mixed_in_one_sample():
    args = similarity_case(1, 5, 33, 64)
    args["visual"] *= torch.logspace(-15, 15, 33)[:, None]
    args["text"] *= torch.logspace(15, -15, 5)[:, None]
    check_similarity(op, args)


def test_zero_vectors_are_orthogonal_to_all():
    args = similarity_case()
    args["text"][0, 3] = 0
    args["visual"][:, 7] = -0.0
    args["text"][1] = 0
    out = check_similarity(op, args)
    torch.testing.assert_close(out[1], torch.full((33,), 1 / 33), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["text", "visual"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_nan_spoils_its_sample_alone(value, where, reduce):
    args = similarity_case(2, 20, 130, reduce=reduce)
    args[where][1, 4, 3] = value
    out = op(**args)
    assert not out[0].isnan().any()
    assert out[1].isnan().all()


@pytest.mark.parametrize("batch", [0, 3])
def test_batches(batch):
    check_similarity(op, similarity_case(batch))


PLAIN = similarity_case(1, 20, 300)
MEAN = similarity_case(1, 20, 70, reduce="mean", text_valid=random_mask((1, 20), 1, 0.5))
MASKED = similarity_case(
    1, 7, 70, temperature=1.0, visual_valid=random_mask((1, 70), 1, 0.3)
)  # fmt: skip
LONG = {n: t * 1e25 for n, t in similarity_case(1, 7, 70).items()}

#: The place in the kernels, what a mistake would make of it, and a call that shows it.
MISTAKES: dict[str, tuple[str, str, Args]] = {
    "a split is forgotten": ("whole += tl.load(sum_ptr + line + piece, mask=here",
                             "whole += tl.load(sum_ptr + line, mask=here", PLAIN),
    "splits are added as they are": (" * tl.exp2(part - shift)", "", PLAIN),
    "old sums are not rescaled": ("total * tl.exp2(top - shift)", "total",
                                  similarity_case(40, 7, 300)),
    "masked tokens are in the softmax": ("tl.where(there[None, :], s, float(\"-inf\"))",
                                         "tl.where(there[None, :], s, 0.0)", MASKED),
    "the mean is over padding": ("total / tl.maximum(live, 1)", "total / count", MEAN),
    "the last rows are left out": ("range(0, count, BLOCK_T)", "range(0, count - 8, BLOCK_T)",
                                   similarity_case(1, 36, 33)),
    "nothing is scaled": ("SCALE=x.dtype != torch.float16", "SCALE=False", LONG),
    "lengths are not divided out": ("1.0 / (length * power.to(tl.float64))",
                                    "0.1 / power.to(tl.float64)", PLAIN),
    "exponentials to the base e": ("LOG2E / temperature", "1.0 / temperature", PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, broken):
    right, wrong, args = MISTAKES[name]
    check_similarity(op, args)
    module = broken("similarity_saliency", right, wrong)
    with pytest.raises(AssertionError):
        check_similarity(module.similarity_saliency, args)
