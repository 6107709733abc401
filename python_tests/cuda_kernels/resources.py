"""What the CUDA C++ kernels in libcdrop.so use, read from their machine code. No GPU is needed.

`python -m python_tests.cuda_kernels.resources` writes the table that the docs show.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import consensusdrop_kernels
from consensusdrop_kernels import _C

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "cuda_resources.md"
LIBRARY = Path(consensusdrop_kernels.__file__).with_name("libcdrop.so")
# What the design claims the machine code holds; what it is called in SASS.
INSTRUCTIONS = {
    "cluster barriers": r"\bUCGABAR_",
    "16-byte loads": r"\bLD(?:G|S)?\.E\.128|\bLDS\.128|\bLDG\.E[.\w]*\.128",
    "tensor-core products": r"\b(?:HMMA|OMMA|QMMA)\b",
}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    kernel: str
    target: str
    registers: int
    stack: int
    local: int
    instructions: dict[str, int]


def cuobjdump() -> str:
    """The one in Triton's package: it needs no CUDA toolkit."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump")


def _dump(*options: str) -> str:
    command = [cuobjdump(), *options, str(LIBRARY)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _blocks(text: str, function: str) -> dict[tuple[str, str], str]:
    """The text of each kernel of select_merge, by kernel and target."""
    found: dict[tuple[str, str], list[str]] = {}
    target, into = "", None
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            target, into = match[1], None
        elif match := re.search(function, line):
            name = re.search(r"\d(select_merge_(?:cluster|grid))E", match[1])
            into = found.setdefault((name[1], target), []) if name else None
        elif into is not None:
            into.append(line)
    return {key: "\n".join(lines) for key, lines in found.items()}


def measure() -> list[Row]:
    """Every kernel on every architecture of the library."""
    usage = _blocks(_dump("-res-usage"), r"^ Function (\S+):")
    code = _blocks(_dump("-sass"), r"Function : (\S+)")
    rows = []
    for (kernel, target), text in sorted(usage.items()):
        if kernel.endswith("cluster") and int(re.sub(r"\D", "", target)) < 90:
            continue  # empty there: no clusters
        registers, stack, local = (
            int(re.search(rf"{name}:(\d+)", text)[1])  # type: ignore[index]
            for name in ("REG", "STACK", "LOCAL")
        )
        counts = Counter(
            {what: len(re.findall(p, code[kernel, target])) for what, p in INSTRUCTIONS.items()}
        )
        rows.append(Row(kernel, target, registers, stack, local, dict(counts)))
    return rows


def heading() -> str:
    return (
        f"Compiled by nvcc {_C.build_info()['cuda_compiler']}, without a GPU: registers per "
        "thread, bytes of stack and of local memory (spills), and how often an instruction occurs "
        "in the machine code. Shared memory is dynamic: `_C.launch_plan` tells how much a call "
        "takes. Written by `make resources`; the tests compare."
    )


def table(rows: list[Row]) -> str:
    names = " | ".join(INSTRUCTIONS)
    lines = [
        "# What the CUDA C++ kernels use",
        "",
        heading(),
        "",
        f"| kernel | target | registers | stack | local | {names} |",
        "| --- | --- |" + " --- |" * (3 + len(INSTRUCTIONS)),
    ]
    for row in rows:
        counts = " | ".join(str(row.instructions[name]) for name in INSTRUCTIONS)
        lines.append(
            f"| {row.kernel} | {row.target} | {row.registers} | {row.stack} | {row.local} | "
            f"{counts} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(measure()))
    print(TABLE.relative_to(ROOT))
