"""Files and pictures of an end-to-end run: JSON, Markdown, and two plots."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.plots import _COLORS as COLORS
from benchmarks.accuracy.plots import _MARKS as MARKS

from .phases import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Results = dict[str, Any]

_FULL = "0.45"
_COLUMNS = (
    "method", "form", "keep", "tokens", "average", "TTFT ms", "p20-p80", "of Full", "FLOPs of Full",
    "share of saving", "of Random", "processor", "maps / ops", "tokens/s", "peak GiB", "KV MiB",
)  # fmt: skip


def write(out: Path, name: str, results: Results, text: str) -> list[Path]:
    """`<name>.json` and `<name>.md` in a folder."""
    paths = [out / f"{name}.json", out / f"{name}.md"]
    paths[0].write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    paths[1].write_text(text)
    return paths


def about(header: Mapping[str, Any]) -> str:
    """What the figures depend on, in one paragraph."""
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items() if v)
    where = f"{header['device']}" + (f", driver {header['driver']}" if header["driver"] else "")
    threads = f", {header['threads']} threads" if header["threads"] else ""
    return (
        f"{header['about']}; {header['dtype']}, {where}{threads}; {versions}; {header['date']}, "
        f"commit {header['commit']}"
    )


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some columns."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    made = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*made, *("| " + " | ".join(line) + " |" for line in lines)])


def markdown(results: Results) -> str:
    """The tables of an end-to-end run, one for each attention and batch size."""
    parts = [f"# End to end: {results['header']['model']}", about(results["header"])]
    for (attention, batch), rows in grouped(results["rows"], "attention", "batch").items():
        parts.append(f"## {attention}, batch {batch}")
        measured = [row for row in rows if not row["reason"]]
        if measured:
            parts.append(table(_COLUMNS, map(_cells, measured)))
            parts.append("Milliseconds by phase, medians of runs of their own:")
            names = ("method", "form", "keep", *PHASES, "all")
            parts.append(table(names, map(_phases, measured)))
        left_out = [f"- {row['name']}: {row['reason']}" for row in rows if row["reason"]]
        parts += ["Not measured:", "\n".join(left_out)] if left_out else []
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> list[str]:
    ttft, tokens = row["ttft_ms"], row["tokens"]
    return [
        row["label"], row["form"], str(row["keep"] or "all"),
        f"{tokens['before']} -> {tokens['after']}", f"{tokens['average']:.0f}",
        f"{ttft['median']:.1f}", f"{ttft['p20']:.1f}-{ttft['p80']:.1f}",
        interval(row["of_full"]), _number(row["flops_of_full"], "{:.3f}"),
        _number(row["share_of_saving"], "{:.2f}"),
        interval(row["of_random"]), interval(row["of_random_processor"]),
        interval(row["over_ops"], 2),
        _number(row["decode_tokens_per_s"], "{:.1f}"),
        _number(row["peak_bytes"], "{:.2f}", 2**30), _number(row["kv_bytes"], "{:.1f}", 2**20),
    ]  # fmt: skip


def _phases(row: Row) -> list[str]:
    spans = [row["phases_ms"][name] for name in PHASES]
    shown = [f"{span:.2f}" for span in (*spans, sum(spans))]
    return [row["label"], row["form"], str(row["keep"] or "all"), *shown]


def interval(found: Sequence[float] | None, digits: int = 3) -> str:
    """A ratio with its 95 % interval, or a dash."""
    if found is None:
        return "-"
    value, low, high = (f"{end:.{digits}f}" for end in found)
    return f"{value} ({low}-{high})"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value / unit)


def drawable() -> bool:
    """Whether there is matplotlib; figures are worth having without."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(out: Path, results: Results) -> list[Path]:
    """`ttft.png`: time to the first token against the tokens that a decoder layer sees;
    `phases.png`: where it goes."""
    rows = [row for row in results["rows"] if not row["reason"]]
    if not rows:
        return []
    title = f"{results['header']['model']}, {results['header']['device']}"
    paths = [out / "ttft.png", out / "phases.png"]
    _against_tokens(rows, title).savefig(paths[0])
    _stacked(rows, title).savefig(paths[1])
    return paths


def panels(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """So many plots side by side."""
    from matplotlib.figure import Figure

    size = (width * count + 2.5, height)
    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    figure.suptitle(title, size=11, weight="bold", x=0.01, ha="left")
    axes = [figure.add_subplot(1, count, at + 1) for at in range(count)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="0.9", linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def styles(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """A color and a mark for each label, the same in every panel."""
    labels = dict.fromkeys(row["label"] for row in rows if row["keep"])
    return {
        label: (COLORS[at % len(COLORS)], MARKS[at % len(MARKS)]) for at, label in enumerate(labels)
    }


def _against_tokens(rows: Sequence[Row], title: str) -> Figure:
    groups = grouped(rows, "attention", "batch")
    figure, axes = panels(len(groups), 4.6, 4.6, title)
    style = styles(rows)
    for axis, ((attention, batch), found) in zip(axes, groups.items(), strict=True):
        for (label, form), points in grouped(found, "label", "form").items():
            if form == "full":
                axis.axhline(
                    points[0]["ttft_ms"]["median"], color=_FULL, linewidth=1.2, label=label
                )
                continue
            points = sorted(points, key=lambda row: row["tokens"]["average"])
            times = [row["ttft_ms"] for row in points]
            middle = [t["median"] for t in times]
            color, mark = style[label]
            maps = form == "maps"
            axis.errorbar(
                [row["tokens"]["average"] for row in points], middle,
                yerr=[[t["median"] - t["p20"] for t in times],
                      [t["p80"] - t["median"] for t in times]],
                color=color, marker=mark, markersize=5, linewidth=1.4, elinewidth=0.8,
                linestyle="--" if maps else "-", markerfacecolor="white" if maps else color,
                label=f"{label}, maps" if maps else label,
            )  # fmt: skip
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("visual tokens that a decoder layer sees, on average")
        axis.set_ylabel("time to first token, ms (p20 to p80)")
        axis.set_title(f"{attention}, batch {batch}", size=10)
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _stacked(rows: Sequence[Row], title: str) -> Figure:
    groups = grouped(rows, "attention", "batch")
    most = max(map(len, groups.values()))
    figure, axes = panels(len(groups), 5.6, 1.2 + 0.27 * most, title)
    for axis, ((attention, batch), found) in zip(axes, groups.items(), strict=True):
        names = [row["name"] for row in found]
        start = [0.0] * len(found)
        for color, phase in zip(COLORS, PHASES, strict=False):
            spans = [row["phases_ms"][phase] for row in found]
            axis.barh(names, spans, 0.75, left=start, color=color, label=phase)
            start = [a + b for a, b in zip(start, spans, strict=True)]
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.set_xlabel("ms")
        axis.set_title(f"{attention}, batch {batch}", size=10)
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
