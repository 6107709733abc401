"""Time every op against its baselines on a GPU and write the rows as JSON.

    python benchmarks/gpu_ops.py --out rows.json [--only saliency] [--device cpu --small]

A row: op, shape, dtype, contender, median, p20, p80, host time, bytes (each input read and each
output written once), share of the measured copy bandwidth, and the ratio to the op in the same run.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_cases import CASES, Case
from timing import copy_bandwidth, measure, rotations
from torch import Tensor

import consensusdrop_kernels as cdrop


def _bytes(values: Any) -> int:
    values = values if isinstance(values, tuple | list) else (values,)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def check(case: Case, inputs: tuple[Tensor, ...], kernel: Callable[..., Any] | None = None) -> None:
    """The op, or another kernel of it, against its definition; a wrong one is not timed."""
    ours = (kernel or case.ours)(inputs)
    with cdrop.use_backend("reference"):
        right = case.ours(inputs)
    pairs = zip(
        ours if isinstance(ours, tuple) else (ours,),
        right if isinstance(right, tuple) else (right,),
        strict=True,
    )
    for got, want in pairs:
        if got.dtype == torch.int64:
            same = (got == want).float().mean().item()
            if same < 0.98:  # two scores closer than rounding may change places
                raise AssertionError(f"only {same:.3f} of the integers agree with the definition")
        else:
            error = ((got.double() - want.double()).norm() / want.double().norm()).item()
            if not error < case.tolerance:
                raise AssertionError(f"relative error {error:.2e} against the definition")


def time_case(case: Case, dtype: torch.dtype, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for each contender; a failure becomes a row that says so."""
    common = {"op": case.op, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
    try:
        first = case.make()
        if case.checked:
            for kernel in (case.ours, *case.others.values()):
                check(case, first, kernel)
        moved = _bytes(first) + _bytes(case.ours(first))
        sets = [first, *(case.make() for _ in range(rotations(_bytes(first)) - 1))]
        contenders = {"cdrop": case.ours} | case.others | case.baselines
        if case.compiled and "plain torch" in case.baselines:
            plain = case.baselines["plain torch"]
            contenders["torch.compile"] = torch.compile(plain, dynamic=False)
        ours_us = None
        for name, call in contenders.items():
            timing = measure(call, sets)
            ours_us = ours_us or timing.median_us
            yield common | {
                "contender": name,
                **timing.as_dict(),
                "bytes": moved,
                "bandwidth_share": moved / (timing.median_us * 1e-6) / bandwidth,
                "ratio": timing.median_us / ours_us,
            }
    except Exception as error:  # noqa: BLE001  the other cases still run
        yield common | {"error": f"{type(error).__name__}: {error}"}


def main() -> int:
    """Run the chosen cases; the exit code is the number of rows that failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", choices=tuple(CASES), action="append")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--small", action="store_true", help="one small case of each kind")
    parser.add_argument("--seconds", type=float, default=170.0, help="stop starting cases after")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    start = time.monotonic()
    bandwidth = copy_bandwidth(torch.device(options.device), 16 if options.small else 512)
    rows: list[dict[str, Any]] = []
    for kind in options.only or CASES:
        for case in CASES[kind](options.device, dtype, options.small):
            if time.monotonic() - start > options.seconds:
                rows.append({"op": case.op, "shape": case.shape, "error": "not run: out of time"})
                continue
            for row in time_case(case, dtype, bandwidth):
                rows.append(row)
                print(_line(row), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(
                json.dumps({"copy_bandwidth": bandwidth, "rows": rows}, indent=1)
            )
    return int(any("error" in row for row in rows))


def _line(row: dict[str, Any]) -> str:
    head = f"{row['op']:25} {row['shape']:25} "
    if "error" in row:
        return head + "FAILED " + row["error"]
    return head + (
        f"{row['contender']:20} {row['median_us']:10.1f} us  host {row['host_us']:7.1f} us  "
        f"{row['bandwidth_share']:6.1%} of copy  x{row['ratio']:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
