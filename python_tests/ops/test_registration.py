"""The ops as torch sees them: schema, fake kernels, `opcheck` and `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import consensusdrop_kernels as cdrop

from .cases import (
    Args,
    diverse_case,
    merge_case,
    overload,
    packed_case,
    random_lse,
    random_mask,
    saliency_case,
    scores,
    select_merge_case,
    similarity_case,
)
from .checks import assert_same

ops = torch.ops.cdrop


def more_samples() -> dict[str, dict[str, Args]]:
    valid = random_mask((2, 30), seed=1)
    lists = {"visual": scores(2, 30), "textual": scores(2, 30, seed=1), "keep": 7}
    packed = packed_case((10, 0, 17, 3), layout="gapped", dtype=torch.bfloat16, causal=True)
    return {
        "attention_saliency.varlen": {
            "plain": packed_case((10, 20)),
            "strided": {**packed, "scale": 0.1, "reduce": "max"},
            "empty": packed_case(()),
            "padded": packed_case(
                (10, 20), lse=torch.rand(4, 30) + 3, query_weight=torch.rand(30),
            ),
        },
        "similarity_saliency": {
            "plain": similarity_case(2, 3, 30, 16),
            "strided": similarity_case(
                2, 3, 30, 16, layout="transposed", dtype=torch.bfloat16, reduce="mean"
            ),
            "empty": similarity_case(0, 3, 30, 16),
            "padded": similarity_case(
                2, 3, 30, 16, text_valid=random_mask((2, 3), 2), visual_valid=valid
            ),
        },
        "adaptive_split_select": {
            "plain": lists,
            "strided": {**lists, "visual": scores(30, 2).t(), "reserve": 0.1},
            "empty": {"visual": scores(0, 30), "textual": scores(0, 30), "keep": 7},
            "padded": {**lists, "valid": valid},
        },
        "greedy_diverse_select": {
            "plain": diverse_case(2, 30, 7),
            "strided": diverse_case(
                2, 30, 7, layout="transposed", dtype=torch.float16, objective="dpp"
            ),
            "empty": diverse_case(0, 30, 7),
            "padded": diverse_case(
                2, 30, 7, valid=valid, relevance=torch.rand(2, 30), objective="dpp"
            ),
        },
    }  # fmt: skip


MORE = more_samples()


def samples(op: str) -> dict[str, Args]:
    """Plain, strided, empty and padded calls with every optional argument used somewhere."""
    valid = random_mask((2, 30), seed=1)
    if op == "attention_saliency":
        strided = saliency_case(
            2, 4, 2, 3, 30, 24, layout="transposed", prefix=2, causal=True,
            dtype=torch.bfloat16, reduce="max",
        )  # fmt: skip
        return {
            "plain": saliency_case(2, 2, 2, 3, 30, 16),
            "strided": {**strided, "lse": random_lse(strided), "scale": 0.1},
            "expanded": saliency_case(2, 4, 2, 3, 30, 24, layout="expanded"),
            "empty": saliency_case(0, 2, 2, 3, 30, 16),
            "padded": {
                **saliency_case(2, 2, 2, 3, 30, 16),
                "key_valid": valid,
                "query_weight": torch.rand(2, 3),
            },
        }
    if op == "consensus_select":
        both = {"visual": scores(2, 30), "textual": scores(2, 30, seed=1), "keep": 7}
        return {
            "plain": both,
            "strided": {**both, "visual": scores(30, 2).t(), "fusion": "zscore", "alpha": 0.2},
            "empty": {"visual": scores(0, 30), "textual": None, "keep": 7},
            "padded": {**both, "valid": valid, "priority": torch.rand(30), "priority_keep": 2},
        }
    if op == "token_merge":
        padded = merge_case(2, 30, 7, contextual=3, weight=torch.rand(2, 30), blend=0.5)
        return {
            "plain": merge_case(2, 30, 7),
            "strided": merge_case(
                2, 30, 7, layout="transposed", dtype=torch.bfloat16, threshold=0.1
            ),
            "gapped": merge_case(2, 30, 7, layout="gapped", contextual=2),
            "empty": merge_case(0, 30, 7),
            "padded": {**padded, "valid": torch.ones(2, 30, dtype=torch.bool)},
        }
    if op in MORE:
        return MORE[op]
    return {
        "plain": select_merge_case(2, 30, 7),
        "strided": select_merge_case(
            2, 30, 7, layout="transposed", dtype=torch.float16, prefix=1, contextual=3
        ),
        "empty": select_merge_case(0, 30, 7),
        "no text": select_merge_case(2, 30, 7, text=False),
        "padded": select_merge_case(
            2, 30, 7, valid=valid, priority=torch.rand(30), priority_keep=2, contextual=3,
            metric=torch.rand(2, 30, 5), txt_weight=torch.rand(2, 5), blend=0.5,
        ),
    }  # fmt: skip


NAMES = ("attention_saliency", "consensus_select", "token_merge", "select_merge", *MORE)
SAMPLES = [pytest.param(op, kind, id=f"{op}-{kind}") for op in NAMES for kind in samples(op)]
DIFFERENTIABLE = ("token_merge", "select_merge")


def in_schema_order(op: str, args: Args) -> tuple[tuple, Args]:
    """Positional and keyword arguments, as `opcheck` wants them."""
    declared = overload(op)._schema.arguments
    first = [a.name for a in declared if not a.kwarg_only and a.name in args]
    return tuple(args[n] for n in first), {n: v for n, v in args.items() if n not in first}


def with_gradients(op: str, args: Args) -> Args:
    if op not in DIFFERENTIABLE:
        return args
    wanted = ("x", "weight") if op == "token_merge" else ("x",)
    return {
        n: v.detach().requires_grad_() if n in wanted and v is not None else v
        for n, v in args.items()
    }


@pytest.mark.parametrize(("op", "kind"), SAMPLES)
def test_opcheck(backend, op, kind):
    args = with_gradients(op, backend.place_all(samples(op)[kind]))
    positional, named = in_schema_order(op, args)
    torch.library.opcheck(overload(op), positional, named)


@pytest.mark.parametrize(("op", "kind"), SAMPLES)
def test_fake_outputs_are_like_the_real_ones(backend, op, kind):
    args = backend.place_all(samples(op)[kind])
    real = overload(op)(**args)
    with FakeTensorMode() as mode:
        fake = overload(op)(
            **{n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in args.items()}
        )
    one = isinstance(real, Tensor)
    for a, b in zip([real] if one else real, [fake] if one else fake, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert a.stride() == b.stride()
        assert a.storage_offset() == b.storage_offset()


@pytest.mark.parametrize("op", NAMES)
def test_no_output_aliases_an_input(backend, op):
    """Writing to a result must not change what went in: also with `keep = N` or no text."""
    args = backend.place_all(samples(op)["plain"])
    if op == "consensus_select":
        args["textual"] = None
    if op == "token_merge":
        args["index"] = torch.arange(30, device=backend.device).repeat(2, 1)
    if op == "select_merge":
        args["keep"] = 30
    before = {n: v.clone() for n, v in args.items() if isinstance(v, Tensor)}
    outs = overload(op)(**args)
    for out in [outs] if isinstance(outs, Tensor) else outs:
        out.fill_(7)
    for name, value in before.items():
        assert torch.equal(args[name], value), name


@pytest.mark.parametrize("op", [op for op in NAMES if op not in DIFFERENTIABLE])
def test_scores_and_choices_carry_no_gradient(backend, op):
    args = {
        n: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in backend.place_all(samples(op)["plain"]).items()
    }
    outs = overload(op)(**args)
    assert not any(t.requires_grad for t in ([outs] if isinstance(outs, Tensor) else outs))


def test_the_backends_list_every_op():
    found = cdrop.backends()
    assert set(found["reference"].ops) == set(NAMES)
    assert not found["cpu"].available or set(found["cpu"].ops) == set(NAMES)


@pytest.mark.parametrize("op", NAMES)
def test_tags(op):
    tags = overload(op).tags
    assert torch.Tag.pt2_compliant_tag in tags
    assert torch.Tag.needs_fixed_stride_order in tags


def pipeline(x: Tensor, q: Tensor, k: Tensor, *, keep: int) -> tuple[Tensor, ...]:
    """All four ops with torch code around them."""
    saliency = ops.attention_saliency(q * 1.0, k, reduce="max")
    index, score = ops.consensus_select(saliency, saliency.sqrt(), keep, fusion="sum")
    merged, _, size = ops.token_merge(x + 1, x, index, contextual=3)
    tokens, *_ = ops.select_merge(x, q, k, q, k, keep=keep, contextual=2)
    return merged * 2, size.sum(1), score + 1, tokens.relu()


def pipeline_inputs(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    args = select_merge_case(2, tokens, 4, width=16, head_dim=16)
    return tuple(args[n].to(device) for n in ("x", "q_vis", "k_vis"))


ONE_OP = {
    "attention_saliency": lambda x, q, k: ops.attention_saliency(q, k),
    "consensus_select": lambda x, q, k: ops.consensus_select(x[..., 0], None, 9)[0],
    "token_merge": lambda x, q, k: ops.token_merge(x, x, torch.arange(9).repeat(2, 1))[0],
    "select_merge": lambda x, q, k: ops.select_merge(x, q, k, q, k, keep=9, contextual=3)[0],
    "attention_saliency.varlen": lambda x, q, k: ops.attention_saliency.varlen(
        k[0].transpose(0, 1), k[0].transpose(0, 1), torch.tensor([0, k.shape[2]]), 200
    ),
    "similarity_saliency": lambda x, q, k: ops.similarity_saliency(x[:, :5], x),
    "adaptive_split_select": lambda x, q, k: ops.adaptive_split_select(x[..., 0], x[..., 1], 9)[0],
    "greedy_diverse_select": lambda x, q, k: ops.greedy_diverse_select(x, 9, objective="dpp"),
}


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("op", NAMES)
def test_compile_over_varying_lengths(op, dynamic):
    """One graph for every length, as fakes that look at no size allow; without `dynamic`, two."""
    compiles = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(ONE_OP[op], fullgraph=True, backend=compiles, dynamic=dynamic)
    for tokens in (40, 41, 57, 64, 129):
        inputs = pipeline_inputs(tokens, "cpu")
        assert_same(fast(*inputs), ONE_OP[op](*inputs))
    assert compiles.frame_count == (1 if dynamic else 2)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_of_a_pipeline(backend, dynamic):
    fast = torch.compile(pipeline, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (40, 57, 129):
        inputs = pipeline_inputs(tokens, backend.device)
        for a, b in zip(fast(*inputs, keep=9), pipeline(*inputs, keep=9), strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_with_inductor(backend):
    inputs = pipeline_inputs(40, backend.device)
    fast = torch.compile(pipeline, fullgraph=True)
    for a, b in zip(fast(*inputs, keep=9), pipeline(*inputs, keep=9), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_gradients(backend):
    def loss(x: Tensor, metric: Tensor, index: Tensor) -> Tensor:
        return ops.token_merge(x, metric, index, contextual=2)[0].square().sum()

    args = backend.place_all(merge_case(2, 30, 7))
    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = args["x"].detach().clone().requires_grad_()
        run(x, args["metric"], args["index"]).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("op", NAMES)
def test_inference_mode_and_no_grad(backend, op):
    args = backend.place_all(samples(op)["plain"])
    outs = overload(op)(**args)
    with torch.inference_mode():
        assert_same(overload(op)(**args), outs)
    with torch.no_grad():
        assert_same(overload(op)(**with_gradients(op, args)), outs)
