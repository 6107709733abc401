"""Builds and drives the emulator: the body of the fused CUDA kernel, on the CPU.

g++ compiles it on first use into `build/cuda_kernels`, under a name that holds a hash of all that
went into it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from consensusdrop_kernels.ops import SCHEMAS

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build" / "cuda_kernels"
TORCH = pathlib.Path(torch.__file__).resolve().parent

FLAGS = (
    "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread",
    "-U_FORTIFY_SOURCE",  # whose longjmp refuses to change stacks
    "-Wall", "-Wextra", "-Werror",
)  # fmt: skip
WITH_TORCH = (
    "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(TORCH / "include"),
)  # fmt: skip
LINK_TORCH = (f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")

_library = torch.library.Library("cdrop_emulated", "DEF")
_library.define("select_merge" + SCHEMAS["select_merge"])
_library.define(
    "set_device(int capability, int processors, int shared_bytes, int max_cluster, int order) -> ()"
)
_library.define("set_body(str library) -> ()")
_library.define("last_plan() -> str")


# --- compiling -----------------------------------------------------------------------------------


def headers(folder: pathlib.Path = CSRC) -> dict[str, str]:
    """The text of every header in a folder, by its path in it."""
    found = sorted(folder.rglob("*.h"))
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(
    name: str,
    sources: Sequence[pathlib.Path],
    flags: Sequence[str],
    link: Sequence[str] = (),
    include: dict[str, str] | None = None,
) -> pathlib.Path:
    """A library of the sources; `include` are headers that take the place of those in csrc.

    Any number of processes may ask for the same one at once.
    """
    include = headers() if include is None else include
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    made_of = [name, version.stdout, torch.__version__, *FLAGS, *flags, *link, json.dumps(include)]
    made_of += [str(path) + path.read_text() for path in sources]
    made_of += [json.dumps(headers(HERE))]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    library = OUTPUT / f"{name}-{digest}.so"
    if library.exists():
        return library
    OUTPUT.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(dir=OUTPUT, prefix=f"{name}-"))
    try:
        for path, text in include.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(text)
        _compile(work, sources, flags, link)
        os.replace(work / "library.so", library)
    finally:
        shutil.rmtree(work)
    return library


def _compile(
    work: pathlib.Path, sources: Sequence[pathlib.Path], flags: Sequence[str], link: Sequence[str]
) -> None:
    """Each source by itself, several at a time, then all together."""

    def run(*arguments: str) -> None:
        command = [compiler(), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

    def compile_one(source: pathlib.Path) -> str:
        out = str(work / f"{source.stem}.o")
        run(*FLAGS, f"-I{work}", f"-I{HERE}", *flags, "-c", str(source), "-o", out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    run("-shared", "-pthread", *objects, "-o", str(work / "library.so"), *link)


@functools.cache
def load() -> Any:
    """`torch.ops.cdrop_emulated`, with the library behind it loaded."""
    sources = [
        HERE / "emulator_binding.cpp", CSRC / "binding_fused.cpp", HERE / "emulator.cpp",
        CSRC / "kernels/cuda/plan.cpp",
    ]  # fmt: skip
    torch.ops.load_library(str(build("emulator", sources, ("-O2", *WITH_TORCH), LINK_TORCH)))
    return torch.ops.cdrop_emulated


def broken(right: str, wrong: str) -> str:
    """An emulator of the kernel with one place of its text replaced, for `set_body`."""
    include = headers()
    found = [path for path, text in include.items() if right in text]
    count = sum(include[path].count(right) for path in found)
    assert count == 1, f"{right!r} is there {count} times"
    include[found[0]] = include[found[0]].replace(right, wrong)
    return str(build("broken", [HERE / "emulator.cpp"], ("-O1", "-w"), include=include))


# --- the op on a device --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """What the planner knows of a device; `order` is that of the threads, 0 for their own."""

    capability: int = 90
    processors: int = 132
    shared_bytes: int = 232448
    max_cluster: int = 16
    order: int = 0

    def __str__(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))

    def op(self, **args: Any) -> tuple[torch.Tensor, ...]:
        """`select_merge` on it."""
        ops = load()
        ops.set_device(*dataclasses.astuple(self))
        return ops.select_merge(**args)


@dataclasses.dataclass(frozen=True)
class Ran:
    path: str
    ranks: int
    samples: int
    shared_bytes: int


def last() -> Ran:
    """How the last call was laid out."""
    path, *numbers = load().last_plan().split()
    return Ran(path, *map(int, numbers))


# --- host functions ------------------------------------------------------------------------------


@functools.cache
def functions() -> ctypes.CDLL:
    """What `functions.cpp` exports."""
    sources = [HERE / "functions.cpp", CSRC / "kernels/cuda/plan.cpp"]
    library = ctypes.CDLL(str(build("functions", sources, ("-O1",))))
    library.cdrop_plan.restype = ctypes.c_char_p
    library.cdrop_ranked_key.restype = ctypes.c_uint64
    library.cdrop_threshold.restype = ctypes.c_uint64
    return library


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a call, those of LLaVA-1.5 at batch 1 if not given; no text without a head."""

    batch: int = 1
    tokens: int = 576
    width: int = 4096
    keep: int = 64
    contextual: int = 0
    heads: int = 16
    groups: int = 16
    rows: int = 1
    head_dim: int = 64
    prefix: int = 1
    heads_txt: int = 32
    groups_txt: int = 32
    rows_txt: int = 8
    head_dim_txt: int = 128
    metric: int = 64
    dtype: int = 2  # bytes of an element


def plan(sizes: Sizes, device: Device) -> SimpleNamespace:
    """The plan of a call, by the names of plan.h."""

    def array(values: Sizes | Device) -> ctypes.Array[ctypes.c_int64]:
        numbers = dataclasses.astuple(values)
        return (ctypes.c_int64 * len(numbers))(*numbers)

    text = functions().cdrop_plan(array(sizes), array(device))
    return json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
