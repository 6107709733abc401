"""Gradients of the two merging ops, against autograd through the weighted mean in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import oracle
from .cases import Args, generator, merge_case, random_mask, select_merge_case
from .checks import assert_bitwise, to_cpu

ops = torch.ops.cdrop
pytestmark = pytest.mark.usefixtures("poison")


def plain_mean(
    x: Tensor, weight: Tensor, owners: list[list[int]], assign: Tensor, blend: float
) -> tuple[Tensor, Tensor]:
    """Tokens and sizes as a float64 expression of `x` and `weight`; the assignment is fixed.

    The share matrix has the weight of token i in slot s, scaled by `blend` unless i owns s.
    """
    batch, count = x.shape[:2]
    slots = len(owners[0]) if owners else 0
    joined = torch.zeros(batch, slots, count, dtype=torch.float64)
    own = torch.zeros_like(joined)
    for b in range(batch):
        for i, slot in enumerate(assign[b].tolist()):
            if slot >= 0:
                (own if owners[b][slot] == i else joined)[b, slot, i] = 1.0
    pull = (own + blend * joined) * weight[:, None, :]
    total = pull.sum(2, keepdim=True)
    # A slot that nothing of weight joined is its own token, whatever that weighs.
    alone = (joined * weight[:, None, :].detach()).sum(2, keepdim=True) * blend == 0
    mean = torch.where(alone, own @ x, (pull @ x) / torch.where(alone, 1.0, total))
    return mean, ((own + joined) * weight[:, None, :]).sum(2)


def gradients(outs: tuple[Tensor, Tensor], leaves: list[Tensor], seed: int = 3) -> list[Tensor]:
    """Gradients of a fixed random functional of tokens and, where it has a gradient, size."""
    g = generator(seed)
    tokens, size = outs
    loss = (tokens * torch.randn(tokens.shape, generator=g).to(tokens)).sum()
    weigh = torch.randn(size.shape, generator=g).to(size)
    if size.requires_grad:
        loss = loss + (size * weigh).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def compare(args: Args, backend, wanted: tuple[str, ...], rtol: float = 2e-5) -> list[Tensor]:
    """Gradients of `token_merge` for `wanted`, checked."""
    device = backend.place_all(args)
    leaves = {n: device[n].detach().clone().requires_grad_() for n in wanted}
    tokens, assign, size = ops.token_merge(**{**device, **leaves})
    assert size.requires_grad == ("weight" in wanted)
    assert not assign.requires_grad
    ours = gradients((tokens, size), list(leaves.values()))
    host = to_cpu(args)
    count, extra = host["x"].shape[1], host.get("contextual", 0)
    owners = oracle.slots(host["index"], count, extra, host.get("valid"))
    weight = host.get("weight")
    weight = torch.ones(host["x"].shape[:2]) if weight is None else weight
    truth = {"x": host["x"].double(), "weight": weight.double()}
    exact = [truth[n].requires_grad_() for n in wanted]
    mean, sizes = plain_mean(
        truth["x"], truth["weight"], owners, assign.cpu(), host.get("blend", 1.0)
    )
    for name, a, b in zip(wanted, ours, gradients((mean, sizes), exact), strict=True):
        assert a.dtype == device[name].dtype
        assert a.shape == device[name].shape
        b = torch.zeros_like(truth[name]) if b is None else b
        largest = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.cpu().double(), b, rtol=rtol, atol=rtol * largest)
    return ours


def positive_weights(batch: int, count: int) -> Tensor:
    return torch.rand(batch, count, generator=generator(5)) + 0.2


@pytest.mark.parametrize("contextual", [0, 4])
@pytest.mark.parametrize("blend", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("x", "weight")], ids="-".join)
def test_gradients(backend, contextual, blend, wanted):
    args = merge_case(2, 30, 7, contextual=contextual, blend=blend)
    compare({**args, "weight": positive_weights(2, 30)}, backend, wanted)


@pytest.mark.parametrize("contextual", [0, 4])
def test_without_weights(backend, contextual):
    compare(merge_case(2, 30, 7, contextual=contextual), backend, ("x",))


@pytest.mark.parametrize("layout", ["transposed", "gapped", "offset", "expanded"])
def test_layouts(backend, layout):
    args = merge_case(2, 30, 7, layout=layout, contextual=3)
    args["metric"] = torch.randn(2, 30, 5, generator=generator(1))
    compare({**args, "weight": positive_weights(2, 30)}, backend, ("x", "weight"))


@pytest.mark.parametrize("contextual", [0, 4, 40])
def test_padding_and_tokens_dropped_for_good(backend, contextual):
    """Tokens in no slot have gradient 0, not NaN, though the empty slots hold no weight."""
    args = merge_case(3, 30, 7, contextual=contextual, threshold=0.3)
    valid = random_mask((3, 30), seed=3, share=0.7)
    valid[1, 4:] = False
    valid[2] = False
    for b in range(3):
        chosen = valid[b].nonzero()[:, 0][::3][:7]
        args["index"][b] = -1
        args["index"][b, : len(chosen)] = chosen
    args.update(valid=valid, weight=positive_weights(3, 30))
    grad_x, grad_weight = compare(args, backend, ("x", "weight"))
    assert not grad_x.cpu()[~valid].any()
    assert not grad_weight.cpu()[~valid].any()


def test_slots_of_no_weight(backend):
    """Alone or with weightless tokens, a slot passes its gradient to its own token whole."""
    args = merge_case(1, 30, 7)
    args["weight"] = torch.zeros(1, 30)
    grad = compare(args, backend, ("x",))[0].cpu()
    inside = torch.zeros(30, dtype=torch.bool)
    inside[args["index"][0]] = True
    assert grad[0, inside].all()
    assert not grad[0, ~inside].any()


def test_keep_all_passes_the_gradient_through(backend):
    args = merge_case(2, 12, 12)
    x = backend.place(args["x"]).clone().requires_grad_()
    tokens = ops.token_merge(**backend.place_all({**args, "x": x}))[0]
    upstream = torch.randn(tokens.shape, generator=generator(1)).to(tokens)
    tokens.backward(upstream)
    assert_bitwise(x.grad, upstream)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, dtype):
    """One rounding of the gradient, and one of the upstream it is made from."""
    args = merge_case(1, 40, 7, dtype=dtype, contextual=3, blend=0.5)
    compare(args, backend, ("x",), rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch(backend, batch):
    compare(merge_case(batch, 12, 5), backend, ("x",))


def test_only_what_needs_a_gradient_gets_one(backend):
    args = backend.place_all(merge_case(1, 12, 5))
    args["metric"].requires_grad_()
    tokens, _, size = ops.token_merge(**args)
    assert not tokens.requires_grad
    assert not size.requires_grad
    args["x"].requires_grad_()
    ops.token_merge(**args)[0].sum().backward()
    assert args["metric"].grad is None, "the assignment is a constant"


@pytest.mark.parametrize("contextual", [0, 4])
@pytest.mark.parametrize("blend", [0.4, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_select_merge_gradient(backend, contextual, blend, masked):
    args = select_merge_case(2, 30, 7, contextual=contextual, blend=blend, prefix=1)
    if masked:
        args["valid"] = random_mask((2, 30), seed=3)
        args["valid"][1, 5:] = False
    device = backend.place_all(args)
    x = device["x"].clone().requires_grad_()
    signals = {n: device[n].clone().requires_grad_() for n in ("q_vis", "k_vis", "q_txt", "k_txt")}
    tokens, index, assign, size = ops.select_merge(**{**device, **signals, "x": x})
    assert not any(t.requires_grad for t in (index, assign, size))
    (ours,) = gradients((tokens, size), [x])
    exact = args["x"].double().requires_grad_()
    mean, _ = plain_mean(
        exact, torch.ones(2, 30, dtype=torch.float64), index.cpu().tolist(), assign.cpu(), blend
    )
    (true,) = gradients((mean, size.cpu()), [exact])
    torch.testing.assert_close(ours.cpu().double(), true, rtol=2e-5, atol=1e-6)
    ops.select_merge(**{**device, **signals, "x": x})[0].sum().backward()
    assert all(signal.grad is None for signal in signals.values())


def test_gradients_are_the_same_in_every_run(backend):
    args = backend.place_all({**merge_case(2, 300, 9), "weight": positive_weights(2, 300)})
    first = None
    for _ in range(5):
        x, weight = (args[n].clone().requires_grad_() for n in ("x", "weight"))
        tokens, _, size = ops.token_merge(**{**args, "x": x, "weight": weight})
        grads = gradients((tokens, size), [x, weight])
        for a, b in zip(grads, first or grads, strict=True):
            assert_bitwise(a, b)
        first = grads


def test_forward_mode_is_refused(backend):
    """A tangent of 0 would be wrong in silence."""
    args = backend.place_all(merge_case(1, 20, 5))
    x, metric, index = args["x"], args["metric"], args["index"]

    def merged(a):
        return torch.ops.cdrop.token_merge(a, metric, index)[0]

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(merged, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            merged(dual)
    merged(x)
