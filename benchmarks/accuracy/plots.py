"""Pictures of a table of results: accuracy against tokens, and by type of question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consensusdrop_kernels.scenes import QUESTION_TYPES

from .tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Told apart by those who see few colors, too (Okabe and Ito), and by their marks.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#5d6d7e")
_MARKS = "osD^vP*Xh<>"
_FULL = "0.45"
_BASELINE = "0.55"


def pareto(table: Sequence[Row], title: str) -> Figure:
    """Accuracy against the visual tokens that a decoder layer sees on average, a curve a method.

    Bands are 95 % intervals; the dashed line is the model with all its tokens.
    """
    figure, axes = _figure(8.2, 5.2, title)
    for label, number in _numbers(table).items():
        points = [row for row in _shown(table) if row["label"] == label]
        if points:
            color, mark = _COLORS[number % len(_COLORS)], _MARKS[number % len(_MARKS)]
            x, value, low, high = _curve(points)
            axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
            axes.plot(x, value, color=color, marker=mark, markersize=5, linewidth=1.6, label=label)
    label, points = _baseline(table)
    if points:
        x, value, *_ = _curve(points)
        axes.plot(x, value, color=_BASELINE, linestyle=":", linewidth=1.6, label=label)
    full = table[0]
    value, low, high = full["accuracy"]
    axes.axhspan(low, high, color=_FULL, alpha=0.08, linewidth=0)
    axes.axhline(value, color=_FULL, linestyle="--", linewidth=1.2, label=full["label"])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("visual tokens, average over the decoder's layers")
    axes.set_ylabel("accuracy, 95 % interval")
    _finish(axes)
    return figure


def by_type(table: Sequence[Row], keep: int | float, title: str) -> Figure:
    """Accuracy by type of question at one budget, a bar a method, whiskers 95 % intervals."""
    bars = [table[0], *(row for row in _shown(table) if _same(row["keep"], keep))]
    figure, axes = _figure(11.0, 4.6, title)
    width = 0.84 / len(bars)
    numbers = _numbers(table)
    for place, row in enumerate(bars):
        number = numbers.get(row["label"])
        marks = [row["types"][kind] for kind in QUESTION_TYPES] + [row["accuracy"]]
        value, low, high = np.array(marks).T
        x = np.arange(len(marks)) + (place - (len(bars) - 1) / 2) * width
        x[-1] += 0.25  # all of them, a little apart
        axes.bar(
            x, value, 0.92 * width, label=row["label"],
            color=_FULL if number is None else _COLORS[number % len(_COLORS)],
            yerr=[value - low, high - value],
            error_kw={"elinewidth": 1.0, "ecolor": "0.1", "capsize": 0},
        )  # fmt: skip
    places = [*range(len(QUESTION_TYPES)), len(QUESTION_TYPES) + 0.25]
    axes.set_xticks(places, [*QUESTION_TYPES, "all"])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy, 95 % interval")
    _finish(axes)
    return figure


def draw(folder: Path, table: Sequence[Row], keep: int | float, title: str) -> list[Path]:
    """Write both pictures, `pareto.png` and `types.png`.

    Args:
        keep: the budget of the second.
        title: of both; names model, questions and seed.
    """
    paths = [folder / "pareto.png", folder / "types.png"]
    pareto(table, title).savefig(paths[0])
    by_type(table, keep, f"{title}, keep {keep:g}").savefig(paths[1])
    return paths


def _shown(table: Sequence[Row]) -> list[Row]:
    """The rows that were asked for and could be had, without the first."""
    return [row for row in table[1:] if row["listed"] and not row["reason"]]


def _numbers(table: Sequence[Row]) -> dict[str, int]:
    """A number for each method, the same in every picture."""
    labels = dict.fromkeys(row["label"] for row in table[1:] if row["listed"])
    return {label: number for number, label in enumerate(labels)}


def _curve(points: Sequence[Row]) -> tuple[Any, ...]:
    """Tokens, and accuracies with their intervals, by rising tokens."""
    found = [(row["tokens"]["average"], *row["accuracy"]) for row in points]
    return tuple(np.array(sorted(found)).T)


def _baseline(table: Sequence[Row]) -> tuple[str, list[Row]]:
    """The curve that the first method is measured against, if no method of the list is it."""
    ours = next((row for row in _shown(table) if row["baseline"]), None)
    if ours is None:
        return "", []
    wanted = [(r["baseline"], r["keep"]) for r in _shown(table) if r["label"] == ours["label"]]
    points = [
        row
        for row in table
        if not row["listed"]
        and any(row["label"] == name and _same(row["keep"], keep) for name, keep in wanted)
    ]
    return f"baseline of {ours['label']}", points


def _same(one: Any, other: int | float) -> bool:
    """Whether two budgets are one; 1 token is not a share of 1.0."""
    return one == other and isinstance(one, float) == isinstance(other, float)


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, size=11, weight="bold", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
