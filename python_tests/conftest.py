"""Fixtures every test may use: a backend, poisoned memory, and a repeatable hypothesis profile."""

# ruff: noqa: E402
from __future__ import annotations

import os

# Before torch starts its threads: on shared cores, waiting threads that spin make the suite many
# times slower, because they keep out the thread they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings

import consensusdrop_kernels as cdrop
from consensusdrop_kernels.triton import interpreted

BACKENDS = ("reference", "cpu", "triton", "cuda")
GPU_BACKENDS = ("triton", "cuda")

# The same examples in every run: a failure here must be a failure for whoever looks next.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@dataclass(frozen=True)
class Backend:
    """A backend under test and the device its tensors live on."""

    name: str
    device: str

    def place(self, value: object) -> object:
        """`value` on the device, with the strides and the storage offset it had."""
        if not isinstance(value, torch.Tensor) or value.device.type in (self.device, "meta"):
            return value
        flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        moved = flat.to(self.device)
        return moved.as_strided(value.size(), value.stride(), value.storage_offset())

    def place_all(self, args: dict[str, object]) -> dict[str, object]:
        return {name: self.place(value) for name, value in args.items()}

    def own(self, op: Callable) -> Callable:
        """What runs `op` here: the op itself, but for kernels that are not behind it."""
        return op


def why_missing(name: str) -> str | None:
    """The reason a backend can't run here, or None when it can."""
    known = cdrop.backends()
    if name not in known:
        return f"backend {name} does not exist in this build"
    return None if known[name].available else f"backend {name}: {known[name].reason}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes `backend` once for each one that is here.

    The missing ones are skipped once, in `test_backends.py`, not a thousand times. A module may
    have a fixture `backend` of its own.
    """
    if "backend" in metafunc.fixturenames and not hasattr(metafunc.module, "backend"):
        here = [name for name in BACKENDS if why_missing(name) is None]
        if interpreted():  # slow, and the other backends have a run of their own
            here = ["triton"]
        marks = {name: [pytest.mark.gpu] if name in GPU_BACKENDS else [] for name in here}
        params = [pytest.param(name, marks=marks[name]) for name in here]
        metafunc.parametrize("backend", params, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A backend, with `use_backend` in force for the test, if it runs the op under test.

    That is the parameter `op`, or what the module calls so.
    """
    op = request.node.callspec.params.get("op", getattr(request.module, "op", None))
    name = str(op).removeprefix("cdrop.").removesuffix(".default")
    if op is not None and name not in cdrop.backends()[request.param].ops:
        pytest.skip(f"backend {request.param} does not run {name}")
    with cdrop.use_backend(request.param):
        on_gpu = request.param in GPU_BACKENDS and not interpreted()
        yield Backend(request.param, "cuda" if on_gpu else "cpu")


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills `torch.empty` and its kin with NaN (integers: the largest value) for one test."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    # warn_only: the tests compare against torch ops that may have no deterministic version.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(was_on, warn_only=warn_only)
