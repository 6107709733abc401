"""`attention_saliency.varlen`: each packed sequence is scored as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch

import consensusdrop_kernels as cdrop

from .cases import Args, generator, overload, packed_case
from .checks import assert_bitwise
from .checks_more import check_packed

op = overload("attention_saliency.varlen")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poison")


def check(backend, args: Args) -> torch.Tensor:
    return check_packed(op, backend.place_all(args))


@pytest.mark.parametrize(
    "lengths", [(), (0,), (1,), (5, 0, 0, 3), (64, 64, 64, 64), (257, 1, 31), (0, 300), (300, 0)]
)
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_lengths(backend, lengths, reduce):
    check(backend, packed_case(lengths, reduce=reduce))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "offset", "gapped", "expanded"])
def test_layouts_and_dtypes(backend, dtype, layout):
    check(backend, packed_case((20, 33, 7), 4, 2, 72, dtype=dtype, layout=layout))


@pytest.mark.parametrize("heads_groups", [(4, 4), (7, 1), (1, 1), (28, 4)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_and_causal(backend, heads_groups, reduce, causal):
    check(backend, packed_case((40, 3, 25), *heads_groups, 64, reduce=reduce, causal=causal))


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_lse_and_weights_are_cut_along(backend, reduce):
    g = generator(3)
    weight = torch.rand(43, generator=g)
    weight[10:20] = 0  # one sequence weighs nothing
    weight[25] = 0
    args = packed_case((10, 10, 0, 23), reduce=reduce, scale=0.2, query_weight=weight)
    lse = torch.rand(43, 4, generator=g) + 4
    lse[30] = math.inf
    out = check(backend, {**args, "lse": lse.t()})
    assert not out[10:20].any()


@pytest.mark.parametrize("width", [128, 256, 300])
def test_wide_heads(backend, width):
    check(backend, packed_case((40, 25), 2, 2, width))


def test_a_spoilt_sequence_spoils_no_other(backend):
    args = packed_case((9, 12, 30))
    clean = check(backend, args)
    args["q"][10], args["k"][15] = math.nan, math.inf
    out = op(**backend.place_all(args))
    assert out[9:21].isnan().all()
    assert_bitwise(out[:9], clean[:9])
    assert_bitwise(out[21:], clean[21:])


def test_one_sequence_is_the_plain_op(backend):
    args = backend.place_all(packed_case((50,)))
    plain = torch.ops.cdrop.attention_saliency(
        args["q"].transpose(0, 1)[None], args["k"].transpose(0, 1)[None]
    )
    torch.testing.assert_close(op(**args)[None], plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_starts_of_either_width_and_any_stride(backend, kind):
    args = packed_case((9, 12, 30))
    out = op(**backend.place_all(args))
    gapped = args["cu_seqlens"].to(kind).repeat_interleave(2)[::2]
    assert_bitwise(op(**backend.place_all({**args, "cu_seqlens": gapped})), out)


def test_a_longer_maximum_changes_nothing(backend):
    args = backend.place_all(packed_case((9, 12, 30)))
    torch.testing.assert_close(op(**{**args, "max_seqlen": 77}), op(**args), rtol=1e-5, atol=0)


def test_many_windows(backend):
    check(backend, packed_case((16,) * 40, 2, 2, 80, dtype=torch.bfloat16))


def test_by_hand():
    """Width 1, q = 1: the logits are the keys. Shares 1/4, 3/4 of ln 1, ln 3; then 1 alone."""
    q = torch.ones(3, 1, 1)
    k = torch.tensor([1.0, 3.0, 7.0]).log().view(3, 1, 1)
    out = cdrop.attention_saliency_varlen(q, k, torch.tensor([0, 2, 3]), 2)
    torch.testing.assert_close(out, torch.tensor([0.25, 0.75, 1.0]))


def test_the_op_resolves_the_overload(backend):
    args = backend.place_all(packed_case())
    first = [args.pop(n) for n in ("q", "k", "cu_seqlens", "max_seqlen")]
    out = op(*first)
    assert_bitwise(torch.ops.cdrop.attention_saliency(*first), out)
    assert_bitwise(cdrop.attention_saliency_varlen(*first), out)
