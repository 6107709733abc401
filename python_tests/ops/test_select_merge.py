"""`select_merge`: the composition of the parts, from model signals to merged tokens."""

from __future__ import annotations

import pytest
import torch

import consensusdrop_kernels as cdrop

from .cases import LAYOUTS, Args, generator, random_mask, select_merge_case
from .checks import assert_bitwise, assert_same, check_select_merge

op = torch.ops.cdrop.select_merge
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSIONS = ("rank", "rrf", "sum", "zscore", "product", "max")

pytestmark = pytest.mark.usefixtures("poison")


def check(backend, args: Args) -> tuple[torch.Tensor, ...]:
    return tuple(t.cpu() for t in check_select_merge(backend.own(op), backend.place_all(args)))


def with_lse(args: Args, side: str) -> Args:
    """`args` with a given lse for one side, a little above that of the keys."""
    q, k = args[f"q_{side}"].float(), args[f"k_{side}"].float()
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    lse = (s * q.shape[-1] ** -0.5).logsumexp(-1)
    return {**args, f"lse_{side}": lse + torch.rand(lse.shape, generator=generator(4))}


@pytest.mark.parametrize("tokens", [1, 2, 31, 255, 256, 257, 577])
@pytest.mark.parametrize("contextual", [0, 7])
def test_sizes(backend, tokens, contextual):
    for keep in {1, (tokens + 3) // 4, max(1, tokens - 1), tokens}:
        check(backend, select_merge_case(1, tokens, keep, contextual=contextual, prefix=1))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_fusions(backend, fusion, alpha):
    check(backend, select_merge_case(2, 90, 20, fusion=fusion, alpha=alpha, prefix=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("contextual", [0, 5])
def test_layouts_and_dtypes(backend, dtype, layout, contextual):
    args = select_merge_case(
        2, 70, 15, dtype=dtype, layout=layout, contextual=contextual, prefix=1, seed=3
    )
    if layout == "expanded":  # heads may repeat, tokens and keys must differ to be told apart
        args["x"] = args["x"] + torch.arange(70)[None, :, None]
    check(backend, args)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("text", [False, True])
def test_batches(backend, batch, text):
    check(backend, select_merge_case(batch, 33, 9, text=text))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("txt_reduce", ["mean", "max"])
@pytest.mark.parametrize("rows_vis", [1, 33])
def test_heads_and_rows(backend, groups, txt_reduce, rows_vis):
    check(
        backend,
        select_merge_case(
            1, 33, 9, heads=28, groups=groups, rows_vis=rows_vis, head_dim=80,
            txt_reduce=txt_reduce,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [1, 64, 72, 96, 128])
def test_head_widths(backend, head_dim):
    check(backend, select_merge_case(1, 65, 12, head_dim=head_dim, prefix=2))


def test_each_side_has_its_own_heads_scale_and_dtype(backend):
    args = select_merge_case(1, 50, 9, scale_vis=0.3, scale_txt=0.02, prefix=4)
    g = generator(9)
    args["q_txt"] = torch.randn(1, 6, 3, 40, generator=g).half()
    args["k_txt"] = torch.randn(1, 3, 50, 40, generator=g).half()
    args["x"] = args["x"].bfloat16()
    check(backend, args)


@pytest.mark.parametrize("txt_reduce", ["mean", "max"])
def test_text_weights_and_lse(backend, txt_reduce):
    args = select_merge_case(3, 50, 9, prefix=1, txt_reduce=txt_reduce)
    args = with_lse(with_lse(args, "vis"), "txt")
    args["txt_weight"] = torch.rand(3, 5, generator=generator(2))
    args["txt_weight"][0, 1:3] = 0
    args["txt_weight"][2] = 0
    args["q_txt"][0, :, 1] = float("nan")  # weight 0: never looked at
    check(backend, args)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("contextual", [0, 6])
def test_masked(backend, text, contextual):
    args = select_merge_case(4, 60, 12, text=text, prefix=1, contextual=contextual)
    valid = random_mask((4, 60), seed=5, share=0.7)
    valid[1, 7:] = False
    valid[2] = False
    valid[3, 14:] = False
    clean = check(backend, {**args, "valid": valid})
    assert (clean[1][2] == -1).all()
    assert not clean[0][2].any()
    # Whatever the invalid tokens hold, in any of the inputs, nothing changes.
    junk = ~valid
    args["x"] = args["x"].masked_fill(junk[:, :, None], float("nan"))
    args["k_vis"] = args["k_vis"].clone()
    args["k_vis"][:, :, 1:].masked_fill_(junk[:, None, :, None], float("nan"))
    if text:
        args["k_txt"] = args["k_txt"].masked_fill(junk[:, None, :, None], float("inf"))
    assert_same(check(backend, {**args, "valid": valid}), clean)


@pytest.mark.parametrize("reserved", [0, 3, 12])
@pytest.mark.parametrize("per_sample", [False, True])
def test_priority(backend, reserved, per_sample):
    priority = torch.rand((2, 60) if per_sample else (60,), generator=generator(8))
    args = select_merge_case(2, 60, 12, priority=priority, priority_keep=reserved)
    args["valid"] = random_mask((2, 60), seed=5)
    args["valid"][1, 8:] = False
    check(backend, args)


@pytest.mark.parametrize("contextual", [0, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_metric(backend, contextual, dtype):
    args = select_merge_case(2, 60, 12, contextual=contextual, prefix=1)
    args["metric"] = torch.randn(2, 60, 33, generator=generator(1)).to(dtype)
    check(backend, args)


@pytest.mark.parametrize("contextual", [0, 6])
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threshold", [-1.0, 0.2, 2.0])
def test_blend_and_threshold(backend, contextual, blend, threshold):
    check(
        backend,
        select_merge_case(1, 60, 12, contextual=contextual, blend=blend, threshold=threshold),
    )


def test_keep_all_is_the_identity(backend):
    args = select_merge_case(2, 40, 40)
    tokens, index, assign, size = check(backend, args)
    assert_bitwise(tokens, args["x"])
    assert index.tolist() == assign.tolist() == [list(range(40))] * 2
    assert (size == 1).all()


def test_equal_keys_keep_the_first(backend):
    args = select_merge_case(1, 40, 9)
    for name in ("k_vis", "k_txt"):
        args[name] = args[name][:, :, :1].expand_as(args[name]).contiguous()
    for fusion in FUSIONS:
        _, index, assign, _ = check(backend, {**args, "fusion": fusion})
        assert index.tolist() == [list(range(9))], fusion
        assert assign.tolist() == [[*range(9), *[0] * 31]], fusion


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("contextual", [0, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_composition_of_the_parts(backend, text, contextual, masked):
    """On one backend, to the last index; the tokens within rounding."""
    args = select_merge_case(2, 200, 40, text=text, contextual=contextual, prefix=1)
    valid = random_mask((2, 200), seed=2) if masked else None
    args = backend.place_all({**args, "valid": valid})
    tokens, index, assign, size = backend.own(op)(**args)
    ops = torch.ops.cdrop
    keys = None
    if valid is not None:
        keys = torch.nn.functional.pad(args["valid"], (1, 0), value=True)
    vis = ops.attention_saliency(args["q_vis"], args["k_vis"], prefix=1, key_valid=keys)
    txt = None
    if text:
        txt = ops.attention_saliency(args["q_txt"], args["k_txt"], key_valid=args["valid"])
    kept, _ = ops.consensus_select(vis, txt, 40, valid=args["valid"])
    metric = args["k_vis"][:, :, 1:].mean(1)
    parts = ops.token_merge(
        args["x"], metric, kept, contextual=contextual, valid=args["valid"]
    )  # fmt: skip
    assert torch.equal(index[:, :40], kept)
    assert torch.equal(assign, parts[1])
    assert torch.equal(size, parts[2])
    torch.testing.assert_close(tokens, parts[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("contextual", [0, 16])
def test_a_real_size(backend, contextual):
    args = select_merge_case(
        1, 576, 64, width=512, heads=16, groups=16, rows_txt=8, prefix=1, contextual=contextual,
        dtype=torch.bfloat16, layout="transposed",
    )  # fmt: skip
    check(backend, args)


def test_the_function_is_the_op(backend):
    args = backend.place_all(select_merge_case(1, 33, 9, contextual=2))
    assert_same(cdrop.select_merge(**args), op(**args))
