"""When the Triton kernels can be chosen, and that they cost nothing until then."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import consensusdrop_kernels as cdrop
from consensusdrop_kernels import triton as triton_ops

CALL = """
import torch, consensusdrop_kernels
q, k = torch.rand(1, 2, 3, 16), torch.rand(1, 2, 20, 16)
out = torch.ops.cdrop.attention_saliency(q, k)
print("sum", round(float(out.sum()), 4))
"""


def run(code: str, **environment: str) -> str:
    kept = {n: v for n, v in os.environ.items() if n not in ("CDROP_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_interpreter_runs_on_the_cpu():
    pytest.importorskip("triton")
    assert "sum 1.0" in run(CALL, CDROP_BACKEND="triton", TRITON_INTERPRET="1")


def test_cpu_tensors_are_refused_without_the_interpreter():
    """With a GPU the op refuses them; without one the backend is not here at all."""
    said = run(CALL, CDROP_BACKEND="triton")
    assert "sum" not in said.splitlines()[-1]
    if torch.cuda.is_available():
        assert "must be one that runs attention_saliency on cpu tensors, got 'triton'" in said
    else:
        assert "backend 'triton' can't be used here" in said


def test_the_default_on_the_cpu_stays_compiled():
    assert "sum 1.0" in run(CALL, TRITON_INTERPRET="1")


def test_importing_the_package_imports_no_triton():
    code = (
        "import sys, torch; before = set(sys.modules); import consensusdrop_kernels as c;"
        "c.backends(); new = set(sys.modules) - before;"
        "print('new', sorted(m for m in new if m.split('.')[0] == 'triton'))"
    )
    assert "new []" in run(code)


@pytest.mark.parametrize("op", triton_ops.OPS)
def test_the_dispatcher_holds_a_kernel_for_gpus(op):
    if not triton_ops.installed():
        pytest.skip("triton is not installed")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cdrop::{op}", "CUDA")
    assert op in cdrop.backends()["reference"].ops
