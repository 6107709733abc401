"""Time every op against its baselines on a GPU and write the rows as JSON.

    python benchmarks/gpu_ops.py --out rows.json [--only saliency] [--device cpu --small]

The cases are those of `pytest benchmarks` (`cases.py`); this needs no pytest. A row: op, shape,
dtype, contender, median, p20, p80, host time, bytes (each input read and each output written once),
share of the measured copy bandwidth, how it was timed (in a CUDA graph where that can be captured),
and the ratio to the op in the same run. The definition of an op is checked against, not timed. The
ops take turns, so that little time has some cases of each; what it does not reach is `not_run`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import torch

from benchmarks.cases import CASES, OURS, Case, check, size, too_large
from benchmarks.gpu import OUT_OF_TIME, unreached
from benchmarks.timing import copy_bandwidth, measure, rotated


def in_turn(kinds: Iterable[str], device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The first case of each kind, then the second of each, and so on."""
    rounds = itertools.zip_longest(*(CASES[kind](device, dtype, small) for kind in kinds))
    return (case for cases in rounds for case in cases if case is not None)


def described(case: Case) -> dict[str, Any]:
    """What all rows of a case share."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"op": case.op, "shape": case.shape, "dtype": dtype}


def time_case(case: Case, device: str, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for each contender; a failure becomes a row that says so."""
    common = described(case)
    kernels = case.kernels(device)
    try:
        torch.manual_seed(0)
        sets = rotated(lambda: case.make(device))
        if case.checked:
            for kernel in kernels.values():
                check(case, sets[0], kernel)
        moved = size(case.own(sets[0])) + size(case.ours(sets[0]))
    except Exception as error:  # noqa: BLE001  the other cases still run
        yield common | {"error": f"{type(error).__name__}: {error}"}
        return
    ours_us = None
    for name, call in case.contenders(device).items():
        if name == f"{OURS} reference":
            continue
        try:
            timing = measure(call, sets)
        except Exception as error:  # noqa: BLE001  the other contenders still run
            yield common | {"contender": name, "error": f"{type(error).__name__}: {error}"}
            continue
        ours_us = ours_us or timing.median_us
        yield common | {
            "contender": name,
            **timing.as_dict(),
            "bytes": moved,
            "bandwidth_share": moved / (timing.median_us * 1e-6) / bandwidth,
            "ratio": timing.median_us / ours_us,
        }


def main() -> int:
    """Run the chosen cases.

    Returns:
        1 if a row failed, `OUT_OF_TIME` if none did but some case was not reached, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", choices=tuple(CASES), action="append")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--small", action="store_true", help="one small case of each kind")
    parser.add_argument("--seconds", type=float, default=170.0, help="stop starting cases after")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    start = time.monotonic()
    bandwidth = copy_bandwidth(torch.device(options.device), 16 if options.small else 512)
    rows: list[dict[str, Any]] = []
    late: list[str] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for case in in_turn(options.only or CASES, options.device, dtype, options.small):
        why = too_large(case, options.device)
        for what in (why,) if why else case.left_out:
            print(f"{case.op:25} {case.shape:25} left out, {what}", flush=True)
        if why:
            continue
        if time.monotonic() - start > options.seconds:
            late.append(case.name)
            rows.append(described(case) | {"not_run": "out of time"})
        else:
            for row in time_case(case, options.device, bandwidth):
                rows.append(row)
                print(_line(row), flush=True)
        options.out.write_text(json.dumps({"copy_bandwidth": bandwidth, "rows": rows}, indent=1))
    failed = sum("error" in row for row in rows)
    for name in late:
        print(unreached(name))
    print(f"{len(rows) - failed - len(late)} timed, {failed} failed, {len(late)} out of time")
    return 1 if failed else OUT_OF_TIME if late else 0


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
