"""How time and memory of the ops grow with the number of tokens, beside plain torch.

    python benchmarks/growth.py --out growth.json [--plot growth.png] [--device cpu|cuda]

Batch 1, float32 on a CPU and bfloat16 on a GPU, N = 256, 512, ..., 131072. Narrow on purpose: what
grows is to be seen, not what is wide. 4 heads of 64 throughout.

- `select_merge`: x is N x 64, 1 encoder row and N + 1 keys (a CLS), 8 question rows, keep 64.
- `attention_saliency, 8 rows`: 8 rows over N keys.
- `attention_saliency, square`: N rows over N keys. Its time is quadratic by definition; its memory
  need not be.

Contenders: the op (`cdrop`), plain torch, and `eager map`, where a layer makes the map of all its
rows (plain torch does, in the square case). Each stops, and its row says so, once a call took
longer than `--seconds` or raised the peak of memory by more than `--gigabytes`. Reported: time,
peak memory above the inputs with the outputs in it (`memory.py`), and the slope of a straight line
through log(value) over log(N) at the upper half of a contender's sizes, at least three of them (1:
linear, 2: quadratic). Memory below what can be measured (`memory.RESOLUTION`) has no part in it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.cases import OURS, Case, Model, few_rows, fused, square
from benchmarks.end_to_end import results
from benchmarks.gpu import header
from benchmarks.memory import RESOLUTION, peak_above
from benchmarks.timing import measure, rotated

HEADS, WIDTH, KEEP, ROWS = 4, 64, 64, 8
TOKENS = [2**power for power in range(8, 18)]
#: Seconds and GB of one call, past which a contender stops.
LIMITS = {"cpu": (1.0, 1.0), "cuda": (1.0, 10.0)}
#: By their names in `cases.py`.
CONTENDERS = {OURS: OURS, "plain torch": "plain torch", "eager maps, 1 layer": "eager map"}

Row = dict[str, Any]


def _narrow(device: str, dtype: torch.dtype, tokens: int) -> Case:
    model = Model(
        tokens, WIDTH, HEADS, HEADS, WIDTH, encoder_heads=HEADS, encoder_width=WIDTH,
        encoder_layers=1,
    )  # fmt: skip
    return fused(device, dtype, 1, model, min(KEEP, tokens), rows=ROWS)


CURVES: dict[str, Callable[[str, torch.dtype, int], Case]] = {
    "select_merge": _narrow,
    f"attention_saliency, {ROWS} rows": lambda device, dtype, tokens: few_rows(
        device, dtype, 1, ROWS, tokens, HEADS, HEADS, WIDTH, layers=1
    ),
    "attention_saliency, square": lambda device, dtype, tokens: square(
        device, dtype, 1, tokens, HEADS, WIDTH
    ),
}


def rows_of(
    curve: str, tokens: Iterable[int], device: str, dtype: torch.dtype, seconds: float,
    gigabytes: float,
) -> Iterator[Row]:  # fmt: skip
    """A row for each size and contender; the last of one that stops says why.

    Args:
        curve: a key of `CURVES`.
        tokens: the sizes, ascending.
        device: "cpu" or "cuda".
        dtype: of the inputs.
        seconds, gigabytes: of one call, past which a contender stops.
    """
    stopped: set[str] = set()
    for count in tokens:
        torch.manual_seed(0)
        case = CURVES[curve](device, dtype, count)
        sets = rotated(lambda case=case: case.make(device))
        calls = case.contenders(device)
        for label, name in CONTENDERS.items():
            row: Row = {"curve": curve, "name": name, "tokens": count, "reason": ""}
            if name in stopped:
                continue
            if label in calls:
                row |= point(calls[label], sets, device, seconds)
                row["reason"] = over(row, seconds, gigabytes)
            else:  # it has no such contender, or not at this size
                row["reason"] = ", ".join(w for w in case.left_out if w.startswith(label))
            if row["reason"]:
                stopped.add(name)
            if label in calls or row["reason"]:
                yield row


def over(row: Row, seconds: float, gigabytes: float) -> str:
    """Which limit a call has passed, or an empty string."""
    if row["us"] > seconds * 1e6:
        return f"stopped here: a call took over {seconds:g} s"
    if (row["peak_bytes"] or 0) > gigabytes * 1e9:
        return f"stopped here: a call took over {gigabytes:g} GB"
    return ""


def point(call: Callable[[Any], Any], sets: Sequence[Any], device: str, seconds: float) -> Row:
    """Time and memory of one call; one slower than `seconds` is timed once, its second run."""
    once(call, sets[0], device)
    second = once(call, sets[0], device)
    peak = peak_above(lambda: call(sets[0]), device)
    if second > seconds:
        return {"us": second * 1e6, "how": "one call", "peak_bytes": peak}
    timing = measure(call, sets)
    return {"us": timing.median_us, "how": timing.how, "peak_bytes": peak}


def once(call: Callable[[Any], Any], inputs: Any, device: str) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the least-squares line through log(y) over log(x), the upper half of the points; None of
    fewer than three."""
    upper = sorted(points)[-max(3, -(-len(points) // 2)) :]
    if len(upper) < 3:
        return None
    x, y = ([math.log(value) for value in axis] for axis in zip(*upper, strict=True))
    x0, y0 = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x0) * (b - y0) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x0) ** 2 for a in x)


def slopes(rows: Iterable[Row], device: str) -> list[Row]:
    """Of time and of memory, for each curve and contender."""
    found = []
    for (curve, name), some in results.grouped(rows, "curve", "name").items():
        timed = [row for row in some if "us" in row]
        seen = [r for r in timed if (r["peak_bytes"] or 0) > RESOLUTION[device]]
        found.append({
            "curve": curve, "name": name, "largest": max((r["tokens"] for r in timed), default=0),
            "time": slope([(r["tokens"], r["us"]) for r in timed]),
            "memory": slope([(r["tokens"], r["peak_bytes"]) for r in seen]),
            "reason": some[-1]["reason"],
        })  # fmt: skip
    return found


def markdown(found: results.Results) -> str:
    """Slopes, and the figures behind them."""
    columns = ("curve", "contender", "slope of time", "slope of memory", "up to N", "reason")
    lines = [
        [f["curve"], f["name"], *(_number(f[axis], ".2f") for axis in ("time", "memory")),
         str(f["largest"]), f["reason"] or "-"]
        for f in found["slopes"]
    ]  # fmt: skip
    parts = [
        "# Growth with the number of tokens", results.about(found["header"]),
        results.table(columns, lines),
    ]  # fmt: skip
    for (curve,), rows in results.grouped(found["rows"], "curve").items():
        names = list(dict.fromkeys(row["name"] for row in rows))
        at = {(row["tokens"], row["name"]): row for row in rows if "us" in row}
        sizes = sorted({tokens for tokens, _ in at})
        cells = (
            [str(tokens), *(_cell(at.get((tokens, name))) for name in names)] for tokens in sizes
        )
        parts.append(results.table((f"{curve}: N", *(f"{n}, ms (MB)" for n in names)), cells))
    return "\n\n".join(parts) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    memory = row["peak_bytes"]
    return f"{row['us'] / 1e3:.3g} ({_number(None if memory is None else memory / 1e6, '.1f')})"


def plot(path: Path, found: results.Results) -> Path:
    """Time and memory, logarithmic: a color for each curve, a line style for each contender."""
    title = f"Growth with the number of tokens, {found['header']['device']}"
    figure, panels = results.panels(2, 4.6, 4.6, title)
    floor = RESOLUTION[found["header"]["kind"]]
    styles = dict(zip(CONTENDERS.values(), ("-", "--", ":"), strict=True))
    colors = dict(zip(CURVES, results.COLORS, strict=False))
    for (curve, name), rows in results.grouped(found["rows"], "curve", "name").items():
        timed = [row for row in rows if "us" in row]
        seen = [row for row in timed if (row["peak_bytes"] or 0) > floor]
        points = (
            [(row["tokens"], row["us"] / 1e3) for row in timed],
            [(row["tokens"], row["peak_bytes"] / 1e6) for row in seen],
        )
        for panel, line in zip(panels, points, strict=True):
            panel.plot(
                [x for x, _ in line], [y for _, y in line], label=f"{curve}: {name}",
                color=colors[curve], linestyle=styles[name], marker="o", markersize=3,
            )  # fmt: skip
    labels = ("time of a call, ms", f"peak above the inputs, MB (over {floor / 1e6:.1g})")
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(lambda *_: "")
        panel.set_xlabel("tokens")
        panel.set_ylabel(label)
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path)
    return path


def draw(out: Path, found: results.Results) -> list[Path]:
    """`growth.png` in a folder."""
    return [plot(out / "growth.png", found)]


def main() -> int:
    """Measure all curves; what is there is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="a PNG of the curves")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, help="of a call, past which a contender stops")
    parser.add_argument("--gigabytes", type=float, help="of a call, past which a contender stops")
    options = parser.parse_args()
    seconds, gigabytes = LIMITS[options.device]
    seconds, gigabytes = options.seconds or seconds, options.gigabytes or gigabytes
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    found: dict[str, Any] = {
        "header": header(options.device) | {
            "about": f"batch 1, {HEADS} heads of {WIDTH}, keep {KEEP}, {ROWS} question rows",
            "kind": options.device, "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if options.device == "cpu" else None,
            "seconds": seconds, "gigabytes": gigabytes,
        },
        "rows": [],
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for curve in CURVES:
            for row in rows_of(
                curve, sorted(options.tokens), options.device, dtype, seconds, gigabytes
            ):
                found["rows"].append(row)
                print(_line(row), flush=True)
            found["slopes"] = slopes(found["rows"], options.device)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{markdown(found)}")
    written = [options.out]
    if options.plot and results.drawable():
        written.append(plot(options.plot, found))
    print(f"written to {', '.join(map(str, written))}")
    return 0


def _line(row: Row) -> str:
    figures = f"{_cell(row)} ms (MB)" if "us" in row else "not run"
    return f"{row['curve']:30} {row['name']:12} {row['tokens']:7} {figures:28} {row['reason']}"


if __name__ == "__main__":
    sys.exit(main())
