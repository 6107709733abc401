"""Compiles every Triton kernel for every target, without a GPU, and reads what each one uses.

The launchers themselves are called, on meta tensors, and what they would launch is compiled: so a
row of the table is a call of an op, and every kernel and configuration that the call takes is
checked. Calls are listed in `aot_calls.py`. The table is `docs/triton_resources.md`;

    make resources

writes it anew. Triton keeps what it compiled in `build/triton`, so that a second run is quick.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any
from unittest import mock

import torch

ROOT = pathlib.Path(__file__).parents[2]
TABLE = ROOT / "docs" / "triton_resources.md"
TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
HEADER = ("call", "kernel", "tiles", "target", "registers", "shared", "stack", "spills")


@dataclass(frozen=True, order=True)
class Row:
    """What one kernel uses on one target: registers per thread, bytes."""

    call: str
    kernel: str
    tiles: str
    target: str
    registers: int
    shared: int
    stack: int
    spills: int


def record(call: Callable[[], object]) -> list[tuple[Any, tuple, dict]]:
    """The launches of a call, `(kernel, args, options)`, none of which is made."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple, dict]] = []
    run = JITFunction.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((kernel, args, options))

    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def compile_launch(kernel: Any, args: tuple, options: dict, target: str) -> Any:
    """What `kernel[grid](*args, **options)` would have compiled on `target`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    gpu = GPUTarget(*TARGETS[target])
    backend = make_backend(gpu)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"debug": False, **options}
    if target.startswith("gfx"):  # launchers leave it out on ROCm
        options.pop("maxnreg", None)
    bound, specialization, options = binder(*args, **options)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=gpu, options=options.__dict__)


def cuda_usage(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers, shared memory known to the binary, stack, local memory."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    use = {name: int(size) for name, size in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # A spill lives on the stack; LOCAL is local memory beside it.
    return use["REG"], use["SHARED"], use["STACK"], use["LOCAL"]


def amd_usage(assembly: str) -> tuple[int, int, int, int]:
    """The same, from the metadata of the assembly."""

    def read(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    # A scalar register that has no place goes to a lane of a vector register, not to memory.
    spills = read("vgpr_spill_count")
    return (
        read("vgpr_count"),
        read("group_segment_fixed_size"),
        read("private_segment_fixed_size"),
        spills,
    )


def _tiles(kernel: Any, options: dict) -> str:
    names = [p.name for p in kernel.params if p.is_constexpr and p.name in options]
    parts = [f"{name}={options[name]}" for name in names]
    return " ".join([*parts, f"warps={options['num_warps']}"])


def _kernel_name(kernel: Any) -> str:
    return kernel.__name__.strip("_").removesuffix("_kernel")


def measure(name: str, target: str) -> list[Row]:
    """The rows of one call on one target."""
    from .aot_calls import CALLS

    rows = []
    # Launchers ask torch which kind of device they launch on.
    hip = "7.0" if target.startswith("gfx") else None
    with mock.patch.object(torch.version, "hip", hip):
        launches = record(CALLS[name])
    for kernel, args, options in launches:
        compiled = compile_launch(kernel, args, options, target)
        if target.startswith("sm"):
            registers, _, stack, spills = cuda_usage(compiled.asm["cubin"])
        else:
            registers, _, stack, spills = amd_usage(compiled.asm["amdgcn"])
        # Triton's shared memory is dynamic: the binary does not know its size.
        shared = compiled.metadata.shared
        row = Row(name, _kernel_name(kernel), _tiles(kernel, options), target,
                  registers, shared, stack, spills)  # fmt: skip
        rows.append(row)
    return rows


def _start() -> None:
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    os.environ.pop("TRITON_INTERPRET", None)


@functools.cache
def measure_all(every: int = 1, workers: int = 2) -> tuple[Row, ...]:
    """Every call on every target, or one call in `every`, in the order of the table."""
    from .aot_calls import CALLS

    jobs = [(name, target) for name in list(CALLS)[::every] for target in TARGETS]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start) as pool:
        found = pool.map(measure, *zip(*jobs, strict=True))
        return tuple(sorted(row for rows in found for row in rows))


def sources() -> str:
    """A digest of the kernels, their launchers, and the calls."""
    files = sorted((ROOT / "consensusdrop_kernels" / "triton").glob("*.py"))
    whole = hashlib.sha256()
    for file in [*files, pathlib.Path(__file__).with_name("aot_calls.py")]:
        whole.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def kept() -> tuple[str, set[tuple[str, ...]]]:
    """The header of the page that is kept, and the cells of its rows."""
    lines = TABLE.read_text().splitlines()
    rows = (line.strip("| ").split(" | ") for line in lines[6:])
    return lines[2], {tuple(row) for row in rows}


def header() -> str:
    """Which compiler and which sources a table is of."""
    import triton

    return (
        f"Compiled ahead of time by Triton {triton.__version__}, without a GPU, from sources "
        f"{sources()}: registers per thread (gfx942: vector registers, the accumulation registers "
        "among them), bytes of shared memory, of stack and of spills. Written by `make resources`; "
        "the tests compare the sources, and some of the rows."
    )


def table(rows: tuple[Row, ...]) -> str:
    """The page that is kept: a header, and a line for each row."""
    lines = [
        "# What the Triton kernels use",
        "",
        header(),
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + " --- |" * len(HEADER),
    ]
    lines += ["| " + " | ".join(map(str, astuple(row))) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(measure_all()))
    bad = [row for row in measure_all() if row.stack or row.spills]
    print(f"{len(measure_all())} rows, {len(bad)} with a stack or spills")
    sys.exit(bool(bad))
