"""The counters that matter, of a file that `ncu --page raw --csv --print-units base` wrote.

    python ncu_summary.py FILE.csv    # a Markdown table, one line per kernel
    python ncu_summary.py --metrics   # the counters to collect, for `ncu --metrics`

Columns: `us`, time of a launch; `DRAM`, its throughput of the peak, and `MB` read and written;
`SM`, its busiest unit's throughput of the peak; `sectors`, 32-byte sectors for a warp's request
to load and to store (4 where 32 lanes touch 128 bytes in a row; copies by the tensor memory
accelerator are not counted); `occupancy`, warps at a time and as many as the launch allows, of
all that fit; registers of a thread; shared memory of a block; the three reasons for which warps
waited most, in warps per issued instruction. Several launches of a kernel at one grid are one
line, of their medians.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

TIME = "gpu__time_duration.sum"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
MOVED = ("dram__bytes_read.sum", "dram__bytes_write.sum")
BUSY = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
SECTORS = tuple(
    f"l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_{op}.ratio" for op in ("ld", "st")
)
OCCUPANCY = (
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__maximum_warps_per_active_cycle_pct",
)
REGISTERS = "launch__registers_per_thread"
SHARED = ("launch__shared_mem_per_block_static", "launch__shared_mem_per_block_dynamic")
METRICS = (TIME, DRAM, *MOVED, BUSY, *SECTORS, *OCCUPANCY, REGISTERS, *SHARED)

_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_COLUMNS = (
    "kernel", "launches", "us", "DRAM", "MB", "SM", "sectors ld / st", "occupancy", "registers",
    "shared KB", "waits",
)  # fmt: skip
_NANOSECONDS = ("ns", "nsecond")

Counters = Mapping[str, float]


def read(lines: Iterable[str]) -> dict[tuple[str, str, str], list[Counters]]:
    """Launches by kernel, grid and block: all their counters that are numbers.

    Raises:
        ValueError: that is no such file, or its units are scaled.
    """
    rest = iter(lines)
    first = next((line for line in rest if line.startswith('"ID"')), None)
    if first is None:
        raise ValueError('no line begins with "ID": write the file with `ncu --page raw --csv`')
    rows = csv.DictReader([first, *rest])
    found: dict[tuple[str, str, str], list[Counters]] = {}
    for row in rows:
        if not row["ID"]:  # the line of units
            if row.get(TIME, "ns") not in _NANOSECONDS:
                raise ValueError(
                    f"times are in {row[TIME]}: write the file with `ncu --print-units base`"
                )
            continue
        kernel = re.sub(r"\(.*", "", row["Kernel Name"]).removeprefix("void ").strip()
        key = (kernel, row.get("Grid Size", ""), row.get("Block Size", ""))
        counters = {name: _number(text) for name, text in row.items()}
        found.setdefault(key, []).append({n: x for n, x in counters.items() if x is not None})
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def table(launches: Mapping[tuple[str, str, str], list[Counters]]) -> str:
    """A Markdown table, the kernels in the order of their first launch."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for (kernel, grid, block), several in launches.items():
        names = dict.fromkeys(name for counters in several for name in counters)
        middle = {
            name: statistics.median(counters[name] for counters in several if name in counters)
            for name in names
        }
        name = f"`{kernel}` {_size(grid)} of {_size(block)}"
        lines.append("| " + " | ".join([name, str(len(several)), *_cells(middle)]) + " |")
    return "\n".join(lines)


def _size(text: str) -> str:
    """`12 x 2` for `(12, 2, 1)`."""
    sizes = re.findall(r"\d+", text) or ["?"]
    while len(sizes) > 1 and sizes[-1] == "1":
        sizes.pop()
    return " x ".join(sizes)


def _cells(counters: Counters) -> list[str]:
    def sums(names: tuple[str, ...]) -> float | None:
        parts = [counters[name] for name in names if name in counters]
        return sum(parts) if parts else None

    stalls = {match[1]: x for name, x in counters.items() if (match := _STALL.fullmatch(name))}
    stalls.pop("selected", None)  # those that did not wait
    waits = sorted(stalls, key=lambda reason: -stalls[reason])[:3]
    return [
        _shown(counters.get(TIME), 1e-3, 2),
        _shown(counters.get(DRAM), 1, 1, " %"),
        _shown(sums(MOVED), 1e-6, 2),
        _shown(counters.get(BUSY), 1, 1, " %"),
        " / ".join(_shown(counters.get(name), 1, 1) for name in SECTORS),
        " of ".join(_shown(counters.get(name), 1, 0) for name in OCCUPANCY) + " %",
        _shown(counters.get(REGISTERS), 1, 0),
        _shown(sums(SHARED), 1e-3, 1),
        ", ".join(f"{reason} {stalls[reason]:.1f}" for reason in waits) or "-",
    ]


def _shown(value: float | None, factor: float, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}{unit}"


def main() -> int:
    """Print what the argument asks for."""
    if sys.argv[1:] == ["--metrics"]:
        print(",".join(METRICS))
        return 0
    launches = read(Path(sys.argv[1]).read_text().splitlines())
    if not launches:
        print("no kernel was profiled: is the range right?", file=sys.stderr)
        return 1
    print(table(launches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
