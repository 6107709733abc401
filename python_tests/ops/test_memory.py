"""Memory: no attention map, no unwritten element, and the same bits in every run."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

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
    similarity_case,
)
from .cases import select_merge_case as flagship
from .checks import assert_same

ops = torch.ops.cdrop
HERE = pathlib.Path(__file__)
#: What the system's allocator rounds up to, and the first touch of a thread's stack.
SLACK = 2 << 20


def big_calls() -> list[tuple[str, Args]]:
    """Calls large enough for several threads and several tiles."""
    square = saliency_case(2, 4, 2, 200, 300, 64, causal=True, dtype=torch.bfloat16)
    return [
        ("attention_saliency", saliency_case(1, 16, 16, 1, 2880, 64, prefix=1)),
        ("attention_saliency", saliency_case(2, 8, 2, 64, 577, 72, reduce="max")),
        ("attention_saliency", {**square, "lse": random_lse(square)}),
        ("attention_saliency", {**saliency_case(3, 4, 2, 90, 300, 40, layout="transposed"),
                                "key_valid": random_mask((3, 300), 1)}),
        *(
            ("consensus_select", {"visual": scores(3, 2880), "textual": scores(3, 2880, seed=1),
                                  "keep": 300, "fusion": fusion})
            for fusion in ("rank", "rrf", "sum", "zscore", "product", "max")
        ),
        ("token_merge", merge_case(3, 577, 64, 512, 128, dtype=torch.bfloat16)),
        ("token_merge", merge_case(1, 577, 64, 700, 65, contextual=40, threshold=0.1, blend=0.5)),
        ("token_merge", merge_case(2, 50, 30, contextual=40)),
        ("attention_saliency.varlen", packed_case((64, 0, 300, 64, 150), 4, 2, 72)),
        ("attention_saliency.varlen", packed_case((64,) * 9, 4, 4, 64, reduce="max")),
        ("similarity_saliency", similarity_case(2, 30, 577, 300)),
        ("similarity_saliency", similarity_case(1, 9, 577, 200, dtype=torch.bfloat16)),
        ("adaptive_split_select", {"visual": scores(3, 2880), "textual": scores(3, 2880, seed=1),
                                   "keep": 300}),
        ("greedy_diverse_select", diverse_case(2, 300, 20, 200)),
        ("greedy_diverse_select", diverse_case(2, 300, 40, 100, objective="dpp")),
        ("select_merge", flagship(3, 577, 64, width=512, prefix=1, contextual=9)),
        ("select_merge", flagship(8, 577, 70, prefix=1, diversity=0.65)),
        ("select_merge", flagship(2, 60, 30, valid=random_mask((2, 60), 1, share=0.3))),
    ]  # fmt: skip


def run(op: str, args: Args) -> tuple[Tensor, ...]:
    out = overload(op)(**args)
    return (out,) if isinstance(out, Tensor) else tuple(out)


CALLS = [pytest.param(op, args, id=f"{i}-{op}") for i, (op, args) in enumerate(big_calls())]


@pytest.mark.usefixtures("poison")
def test_the_poison_reaches_torch():
    assert torch.empty(7).isnan().all()
    assert torch.zeros(3).new_empty(5, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_the_poison_goes_away():
    """A block just freed and full of ones comes back as it was, or as something else: not NaN."""
    assert not torch.are_deterministic_algorithms_enabled()
    for _ in range(20):
        torch.ones(1000).sum()
        assert not torch.empty(1000).isnan().all()


def fills(op: str, args: Args) -> int:
    """How often `fill_` ran inside one call: each poisoned allocation shows as one."""
    with torch.profiler.profile() as profile:
        run(op, args)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::fill_")


@pytest.mark.parametrize("op", ["attention_saliency", "consensus_select", "token_merge"])
def test_the_poison_reaches_the_outputs_of_the_kernels(op, request):
    """The compiled kernels allocate through torch, where the poison is: one fill per output."""
    if not cdrop.backends()["cpu"].available:
        pytest.skip(cdrop.backends()["cpu"].reason)
    args = next(args for name, args in big_calls() if name == op)
    with cdrop.use_backend("cpu"):
        clean = fills(op, args)
        request.getfixturevalue("poison")
        assert fills(op, args) - clean == len(run(op, args))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("op", "args"), CALLS)
def test_every_element_is_written(backend, op, args):
    """Poisoned or not: the same bits."""
    args = backend.place_all(args)
    poisoned = run(op, args)
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture restores it
    assert_same(poisoned, run(op, args))


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_every_run_gives_the_same_bits(backend, op, args):
    args = backend.place_all(args)
    first = run(op, args)
    for _ in range(5):
        assert_same(run(op, args), first)


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_the_number_of_threads_changes_nothing(backend, op, args):
    """The reference is not asked: its sums are those of torch's own matrix products."""
    if backend.name == "reference":
        return
    before = torch.get_num_threads()
    args = backend.place_all(args)
    outs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(run(op, args))
    finally:
        torch.set_num_threads(before)
    assert_same(outs[1], outs[0])
    assert_same(outs[2], outs[0])


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_the_inputs_are_only_read(backend, op, args):
    args = backend.place_all(args)
    before = {n: v.clone() for n, v in args.items() if isinstance(v, Tensor)}
    run(op, args)
    assert all(torch.equal(args[n], v) for n, v in before.items())


def digest() -> str:
    """One hash over the outputs of every call, as the default backend gives them."""
    total = hashlib.sha256()
    for op, args in big_calls():
        for out in run(op, args):
            total.update(out.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


DIGEST = ["-c", f"from {__package__} import test_memory as t; print(t.digest())"]


def in_a_process(code: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *code],
        env={**os.environ, **environment},
        cwd=HERE.parents[1],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def clean_digest() -> str:
    """Of a fresh process, like the one it is compared with."""
    return in_a_process(DIGEST)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
@pytest.mark.parametrize("fill", [1, 0x55, 0x80])
def test_scratch_memory_is_written_before_it_is_read(fill, clean_digest):
    """The kernels' scratch does not come from torch. glibc can fill what it hands out: bytes of
    `fill ^ 0xFF`, as floats -1.7e38, -4e-13 and 3.4e38 (a leak of any of them shows)."""
    if not cdrop.backends()["cpu"].available:
        pytest.skip(cdrop.backends()["cpu"].reason)
    # Without the cache per thread every allocation passes through the filling code.
    tunables = f"glibc.malloc.perturb={fill}:glibc.malloc.tcache_count=0"
    assert in_a_process(DIGEST, GLIBC_TUNABLES=tunables) == clean_digest


def test_nothing_of_the_size_of_the_map_is_allocated(backend):
    """Neither of queries by keys nor of tokens by tokens; the map itself shows what that costs.

    The reference is the definition, not a kernel: it may hold the map of one head.
    """
    if backend.name == "reference":
        return
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc to reset the peak of memory")
    tokens = 8192
    line = in_a_process([str(HERE.with_name("memory_probe.py")), backend.name, str(tokens)])
    found: dict[str, Any] = json.loads(line)
    assert found.pop("the map")["grew"] >= 4 * tokens * tokens, "the measurement sees nothing"
    for name, call in found.items():
        allowed = call["outputs"] + call["inputs"] // 20 + SLACK
        assert call["grew"] <= allowed, f"{name} grew by {call['grew']}, allowed {allowed}"


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_instruction_set_passes(level):
    """The vector kernels are compiled once for each; here those that this processor would skip."""
    best = cdrop.backends()["cpu"]
    if not best.available:
        pytest.skip(best.reason)
    asked = "import consensusdrop_kernels as c; print(c.backends()['cpu'].reason)"
    found = in_a_process(["-c", asked], CDROP_CPU_CAPABILITY=level)
    if found == best.reason:
        pytest.skip(f"the suite itself ran on {level}")
    if level not in found:
        pytest.skip(f"this processor or build has no {level}")
    files = ("attention_saliency", "token_merge", "select_merge", "select_merge_diverse")
    files += ("greedy_diverse_select",)
    names = [str(HERE.with_name(f"test_{name}.py")) for name in files]
    pytest_run = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu", *names]
    assert " passed" in in_a_process(pytest_run, CDROP_CPU_CAPABILITY=level)
