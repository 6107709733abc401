"""Which backends the suite runs on, and that choosing one does what it says."""

from __future__ import annotations

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


def test_the_backends_are_different_code():
    """Were `use_backend` to do nothing, every comparison of this suite would be with itself."""
    if not cdrop.backends()["cpu"].available:
        pytest.skip(cdrop.backends()["cpu"].reason)

    def inner_ops(name: str) -> int:
        args = select_merge_case(1, 33, 9)
        with cdrop.use_backend(name), torch.profiler.profile() as run:
            torch.ops.cdrop.select_merge(**args)
        return sum(event.count for event in run.key_averages() if "matmul" in event.key)

    assert inner_ops("reference") > 0
    assert inner_ops("cpu") == 0


@pytest.mark.parametrize(("value", "outcome"), [("reference", "ok"), ("nonsense", "backend must")])
def test_the_environment_chooses_too(value, outcome):
    code = (
        "import torch, consensusdrop_kernels as c;"
        "torch.ops.cdrop.consensus_select(torch.rand(1, 9), None, 3); print('ok')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CDROP_BACKEND": value},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert outcome in run.stdout + run.stderr


def test_gradients_under_a_chosen_backend(backend):
    """`use_backend` must leave the gradient formula in front of what it puts there."""
    args = backend.place_all(merge_case(1, 20, 5))
    args["x"].requires_grad_()
    torch.ops.cdrop.token_merge(**args)[0].sum().backward()
    assert args["x"].grad is not None
