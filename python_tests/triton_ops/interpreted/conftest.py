"""Tests of the kernels in Triton's interpreter: float32, in a process of their own.

`make test-triton` sets `TRITON_INTERPRET=1`, which must be there before Triton is imported; in any
other run these files are not collected.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

import consensusdrop_kernels as cdrop
from consensusdrop_kernels import triton as triton_ops

if not triton_ops.interpreted():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """Every op on its Triton kernels."""
    with cdrop.use_backend("triton"):
        yield


@pytest.fixture
def broken(tmp_path: pathlib.Path) -> Callable[[str, str, str], ModuleType]:
    """`broken(module, right, wrong)`: a module of the package with one place of its text
    replaced."""

    def load(module: str, right: str, wrong: str) -> ModuleType:
        from consensusdrop_kernels.triton import _interpreter

        _interpreter.prepare()
        text = pathlib.Path(triton_ops.__file__).with_name(f"{module}.py").read_text()
        assert text.count(right) == 1, f"{right!r} is there {text.count(right)} times"
        path = tmp_path / f"{module}.py"
        path.write_text(text.replace(right, wrong))
        # Named as one of the package, for its relative imports.
        spec = importlib.util.spec_from_file_location(f"{triton_ops.__name__}._{module}", path)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    return load
