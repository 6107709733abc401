"""The Triton `select_merge` against the oracle and against the ops it is made of."""

from __future__ import annotations

import math

import pytest
import torch
from ops.cases import generator, random_mask, select_merge_case
from ops.checks import assert_bitwise, assert_same, check_select_merge
from ops.checks_more import check_diverse_merge

from .test_consensus_select import length

__all__ = ["length"]

op = torch.ops.cdrop.select_merge
ops = torch.ops.cdrop

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("tokens", [1, 2, 31, 65])
@pytest.mark.parametrize("contextual", [0, 7])
def test_sizes(tokens, contextual):
    for keep in {1, (tokens + 3) // 4, tokens}:
        case = select_merge_case(1, tokens, keep, contextual=contextual, prefix=1, heads=2)
        check_select_merge(op, case)


@pytest.mark.parametrize("fusion", ["rank", "rrf", "sum", "zscore", "product", "max"])
def test_fusions(fusion):
    check_select_merge(op, select_merge_case(2, 60, 14, fusion=fusion, alpha=0.3, heads=2))


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("contextual", [0, 6])
def test_masked(text, contextual):
    args = select_merge_case(4, 60, 12, text=text, prefix=1, contextual=contextual, heads=2)
    valid = random_mask((4, 60), seed=5, share=0.7)
    valid[1, 7:] = False
    valid[2] = False
    valid[3, 14:] = False
    args["valid"] = valid
    clean = check_select_merge(op, args)
    assert (clean[1][2] == -1).all()
    assert not clean[0][2].any()
    args["x"] = args["x"].masked_fill(~valid[:, :, None], math.nan)
    args["k_vis"] = args["k_vis"].clone()
    args["k_vis"][:, :, 1:].masked_fill_(~valid[:, None, :, None], math.nan)
    assert_same(op(**args), clean)


@pytest.mark.parametrize("layout", ["transposed", "offset", "gapped"])
def test_layouts(layout):
    check_select_merge(
        op, select_merge_case(2, 50, 12, layout=layout, prefix=1, contextual=3, heads=2)
    )


@pytest.mark.parametrize("contextual", [0, 6])
def test_given_metric_priority_and_threshold(contextual):
    args = select_merge_case(2, 60, 12, contextual=contextual, threshold=0.1, blend=0.4, heads=2)
    args["metric"] = torch.randn(2, 60, 33, generator=generator(1))
    args["priority"] = torch.rand(2, 60, generator=generator(8))
    check_select_merge(op, {**args, "priority_keep": 3})


@pytest.mark.parametrize("contextual", [0, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_composition_of_the_parts(contextual, masked):
    args = select_merge_case(2, 90, 20, contextual=contextual, heads=2)
    valid = args["valid"] = random_mask((2, 90), seed=2) if masked else None
    tokens, index, assign, size = op(**args)
    vis = ops.attention_saliency(args["q_vis"], args["k_vis"], key_valid=valid)
    txt = ops.attention_saliency(args["q_txt"], args["k_txt"], key_valid=valid)
    kept, _ = ops.consensus_select(vis, txt, 20, valid=valid)
    parts = ops.token_merge(
        args["x"], args["k_vis"].mean(1), kept, contextual=contextual, valid=valid
    )
    assert torch.equal(index[:, :20], kept)
    assert torch.equal(assign, parts[1])
    assert torch.equal(size, parts[2])
    torch.testing.assert_close(tokens, parts[0], rtol=1e-5, atol=1e-6)


def test_no_sample_and_keep_all():
    check_select_merge(op, select_merge_case(0, 33, 9))
    args = select_merge_case(1, 20, 20, heads=2)
    tokens, index, assign, size = op(**args)
    assert_bitwise(tokens, args["x"])
    assert index.tolist() == assign.tolist() == [list(range(20))]
    assert (size == 1).all()


CASE = select_merge_case(1, 60, 12, contextual=4, prefix=1, heads=4)

#: A place in the composition, what a mistake would make of it.
MISTAKES = {
    "the prefix is taken for tokens": ("k_vis[:, :, prefix:]", "k_vis[:, :, :count]"),
    "the metric of one head": ("k_vis[:, :, prefix:]", "k_vis[:, :1, prefix:]"),
    "the text is left out": ("Choice(visual, textual,", "Choice(visual, None,"),
    "the weight of the other list": (
        "keep, alpha, fusion, valid",
        "keep, 1 - alpha, fusion, valid",
    ),
    "nothing is blended": ("blend=blend\n", "blend=0.0\n"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, broken):
    args = {**CASE, "alpha": 0.2}
    check_select_merge(op, args)
    module = broken("select_merge", *MISTAKES[name])
    with pytest.raises(AssertionError):
        check_select_merge(module.select_merge, args)


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("tokens", [1, 33, 65])
@pytest.mark.parametrize("contextual", [0, 3])
@pytest.mark.parametrize("text", [False, True])
def test_diverse(tokens, contextual, text):
    keep = (tokens + 3) // 4
    case = select_merge_case(2, tokens, keep, contextual=contextual, text=text, prefix=1, heads=2)
    check_diverse_merge(op, {**case, "diversity": 0.65})


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("fusion", ["rank", "max"])
@pytest.mark.parametrize("diversity", [0.2, 1.0])
def test_diverse_and_masked(fusion, diversity):
    case = select_merge_case(3, 40, 9, fusion=fusion, heads=2, diversity=diversity)
    case["valid"] = random_mask((3, 40), seed=5, share=0.7)
    case["valid"][1, 6:] = False
    case["valid"][2] = False
    check_diverse_merge(op, case)


def test_diverse_by_a_given_metric():
    case = select_merge_case(1, 40, 9, heads=2, diversity=0.65)
    case["metric"] = torch.randn(1, 40, 20, generator=generator(3)).bfloat16()
    check_diverse_merge(op, case)
