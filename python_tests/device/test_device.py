"""What only a GPU can show: graphs, streams, determinism between blocks, no synchronisation.

The numbers themselves are checked by `python_tests/ops`, which runs on every backend there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import consensusdrop_kernels as cdrop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
ops = torch.ops.cdrop
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    k_vis = randn(3, 577, 16, 64).transpose(1, 2)
    k_txt = randn(3, 576, 8, 80).transpose(1, 2)
    return randn(3, 576, 1000), randn(3, 16, 1, 64), k_vis, randn(3, 32, 7, 80), k_txt


def saliency(i: tuple[torch.Tensor, ...]) -> Any:
    return ops.attention_saliency(i[3], i[4], reduce="max")


def square(i: tuple[torch.Tensor, ...]) -> Any:
    return ops.attention_saliency(i[2], i[2], causal=True)


def select(i: tuple[torch.Tensor, ...]) -> Any:
    return ops.consensus_select(i[0][..., 0].float(), i[0][..., 1].float(), 64)


def merge(i: tuple[torch.Tensor, ...]) -> Any:
    index = torch.arange(0, 576, 9, device="cuda").expand(3, -1)
    return ops.token_merge(i[0], i[0][..., :64], index, contextual=8)


def packed(i: tuple[torch.Tensor, ...]) -> Any:
    rows = i[4].transpose(1, 2).reshape(3 * 576, 8, 80)
    ends = torch.arange(0, 3 * 576 + 1, 64, dtype=torch.int32, device="cuda")
    return ops.attention_saliency.varlen(rows, rows, ends, 64)


def similarity(i: tuple[torch.Tensor, ...]) -> Any:
    return ops.similarity_saliency(i[0][:, :20], i[0])


def split(i: tuple[torch.Tensor, ...]) -> Any:
    return ops.adaptive_split_select(i[0][..., 0].float(), i[0][..., 1].float(), 64)


def diverse(i: tuple[torch.Tensor, ...]) -> Any:
    return ops.greedy_diverse_select(i[0][..., :200], 48)


def probable(i: tuple[torch.Tensor, ...]) -> Any:
    worth = i[0][..., 0].float().abs()
    return ops.greedy_diverse_select(i[0][..., :200], 48, relevance=worth, objective="dpp")


def long_select(i: tuple[torch.Tensor, ...]) -> Any:
    scores = i[0].float().flatten(1)[:, :9000]
    return ops.consensus_select(scores, scores.flip(1), 1000)


def fused(i: tuple[torch.Tensor, ...]) -> Any:
    return ops.select_merge(*i, keep=64, prefix=1)


def fused_diverse(i: tuple[torch.Tensor, ...]) -> Any:
    return ops.select_merge(*i, keep=64, prefix=1, diversity=0.65)


CALLS = pytest.mark.parametrize(
    "call",
    [
        saliency,
        square,
        packed,
        similarity,
        select,
        long_select,
        split,
        diverse,
        probable,
        merge,
        fused,
        fused_diverse,
    ],
)


def flat(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request):
    if not cdrop.backends()[request.param]:
        pytest.skip(cdrop.backends()[request.param].reason)
    call = request.node.callspec.params.get("call")
    if request.param == "cuda" and call is not fused:
        pytest.skip("in CUDA C++ there is select_merge alone, without diversity")
    with cdrop.use_backend(request.param):
        yield request.param


@CALLS
@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_runs_give_the_same_bits(gpu_backend, call: Callable[..., Any], dtype):
    inputs = make(dtype, 0)
    first = call(inputs)
    for _ in range(19):
        assert_same(call(inputs), first)


@CALLS
def test_a_captured_graph_computes_on_new_inputs(gpu_backend, call: Callable[..., Any]):
    held = tuple(t.clone(memory_format=torch.preserve_format) for t in make(torch.bfloat16, 1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled outside the capture
        call(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(held)
    for seed in (2, 3):
        fresh = make(torch.bfloat16, seed)
        for to, source in zip(held, fresh, strict=True):
            to.copy_(source)
        graph.replay()
        assert_same(captured, call(fresh))


@CALLS
def test_two_streams_at_once(gpu_backend, call: Callable[..., Any]):
    sets = [make(torch.bfloat16, seed) for seed in (4, 5)]
    want = [call(inputs) for inputs in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    for _ in range(5):
        got = []
        for stream, inputs in zip(streams, sets, strict=True):
            with torch.cuda.stream(stream):
                got.append(call(inputs))
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)


@CALLS
def test_no_call_waits_for_the_device(gpu_backend, call: Callable[..., Any]):
    inputs = make(torch.bfloat16, 6)
    call(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_values_are_checked_only_on_request(gpu_backend, monkeypatch):
    x = torch.randn(1, 8, 4, device="cuda")
    twice = torch.tensor([[1, 1]], device="cuda")
    ops.token_merge(x, x, twice)
    monkeypatch.setenv("CDROP_CHECK", "1")
    with pytest.raises(RuntimeError, match="index must name each token once"):
        ops.token_merge(x, x, twice)
