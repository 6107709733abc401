"""Which backends the suite runs on, and that choosing one does what it says."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch

import consensusdrop_kernels as cdrop

from .cases import merge_case, saliency_case, select_merge_case
from .checks import assert_same

NAMES = ("cuda", "triton", "cpu", "reference")


@pytest.mark.parametrize("name", NAMES)
def test_is_here(name):
    """One skip with its reason for each backend that no test of this run has seen."""
    found = cdrop.backends()[name]
    if not found.available:
        assert found.reason
        pytest.skip(f"{name}: {found.reason}")
    with cdrop.use_backend(name):
        pass


def test_the_reference_is_always_here():
    assert tuple(cdrop.backends()) == NAMES
    assert cdrop.backends()["reference"].available


@pytest.mark.parametrize("name", ["", "CPU", "numpy"])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(RuntimeError, match="backend must be one of"), cdrop.use_backend(name):
        pass


def test_a_missing_backend_is_refused_with_its_reason():
    missing = [name for name in NAMES if not cdrop.backends()[name].available]
    if not missing:
        pytest.skip("every backend is here")
    for name in missing:
        with pytest.raises(RuntimeError) as error, cdrop.use_backend(name):
            pass
        assert cdrop.backends()[name].reason in str(error.value)


def test_the_choice_ends_with_the_context():
    """Left in any way, the default is back: same bits as before."""
    args = saliency_case(1, 2, 2, 5, 33, 64)
    before = torch.ops.cdrop.attention_saliency(**args)
    with pytest.raises(ValueError, match="out"), cdrop.use_backend("reference"):
        raise ValueError("out")
    with cdrop.use_backend("reference"), cdrop.use_backend("reference"):
        pass
    assert_same(torch.ops.cdrop.attention_saliency(**args), before)


MATMULS = """
import torch, consensusdrop_kernels as c
x, k = torch.randn(1, 33, 4), torch.randn(1, 33, 4)
def matmuls():
    with torch.profiler.profile() as run:
        torch.ops.cdrop.token_merge(x, k, torch.arange(9)[None])
    return sum(e.count for e in run.key_averages() if "matmul" in e.key or "bmm" in e.key)
"""


def said(code: str, **environment: str) -> tuple[list[int], str]:
    """The numbers that the code printed, and what it complained of."""
    run = subprocess.run(
        [sys.executable, "-c", MATMULS + code],
        env={**os.environ, **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return [int(line) for line in run.stdout.split()], run.stderr


@pytest.fixture
def compiled():
    if not cdrop.backends()["cpu"].available:
        pytest.skip(cdrop.backends()["cpu"].reason)


@pytest.mark.usefixtures("compiled")
def test_the_backends_are_different_code():
    """Were `use_backend` to do nothing, every comparison of this suite would be with itself."""

    def inner_ops(*names: str) -> int:
        args = select_merge_case(1, 33, 9)
        with contextlib.ExitStack() as entered:
            for name in names:
                entered.enter_context(cdrop.use_backend(name))
            with torch.profiler.profile() as run:
                torch.ops.cdrop.select_merge(**args)
        return sum(event.count for event in run.key_averages() if "matmul" in event.key)

    assert inner_ops("reference") > 0
    assert inner_ops("cpu") == 0
    assert inner_ops("reference", "cpu") == 0, "the inner choice counts"
    assert inner_ops("cpu", "reference") > 0
    assert inner_ops("reference", "cpu", "reference") > 0


@pytest.mark.usefixtures("compiled")
def test_an_outer_choice_comes_back():
    code = "with c.use_backend('reference'):\n with c.use_backend('cpu'): pass\n print(matmuls())"
    (count,), _ = said(code)
    assert count > 0


@pytest.mark.usefixtures("compiled")
def test_the_environment_chooses_too():
    code = "print(matmuls())\nwith c.use_backend('cpu'): print(matmuls())\nprint(matmuls())"
    (by_default, forced, again), _ = said(code, CDROP_BACKEND="reference")
    assert by_default > 0
    assert forced == 0
    assert again == by_default
    assert said("print(matmuls())", CDROP_BACKEND="cpu")[0] == [0]


@pytest.mark.parametrize("value", ["nonsense", "cuda"])
def test_the_environment_is_refused_with_a_reason(value):
    if value in cdrop.backends() and cdrop.backends()[value].available:
        pytest.skip(f"{value} is here")
    assert "RuntimeError: backend" in said("", CDROP_BACKEND=value)[1]


def test_gradients_under_a_chosen_backend(backend):
    """`use_backend` must leave the gradient formula in front of what it puts there."""
    args = backend.place_all(merge_case(1, 20, 5))
    args["x"].requires_grad_()
    torch.ops.cdrop.token_merge(**args)[0].sum().backward()
    assert args["x"].grad is not None
