"""Markdown tables of `results.json` files: what `docs/accuracy.md` shows.

python -m benchmarks.accuracy.summary FOLDER/results.json ... [--types 16] [--cost 32] [--beside]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def caption(header: Row) -> str:
    """What was asked of what, when, and by which commit."""
    commits = ", ".join(header["commits"])
    return (
        f"{header['model']}, {header['questions']} questions of the {header['split']} split "
        f"(seed {header['seed']}), {header['dtype']}, {header['date'][:10]}, commit {commits}"
    )


def curve(rows: Iterable[Row]) -> list[str]:
    """A row for each method, a column for each budget: accuracy, and the gain over the baseline.

    The gain is in points (hundredths), with its two-sided p.
    """
    budgets, found = _by_label(rows)
    lines = _head(["method", *(f"{budget:g}" for budget in budgets)])
    for label, cells in found.items():
        shown = [_cell(cells.get(budget)) for budget in budgets]
        if None in cells:
            shown = [_cell(cells[None])] + [""] * (len(budgets) - 1)
        lines.append(_line([label, *shown]))
    return lines


def beside(results: Sequence[Row]) -> list[str]:
    """Accuracies of the same methods on several models, a column for each budget of each."""
    columns, found = [], []
    for whole in results:
        budgets, labels = _by_label(row for row in whole["rows"] if row["listed"])
        found.append((budgets, labels))
        columns += [f"{_name(whole['header'])} {budget:g}" for budget in budgets]
    lines = _head(["option", *columns])
    for label in found[0][1]:
        cells = []
        for budgets, labels in found:
            row = labels.get(label, {})
            whole_row = row.get(None)
            shown = [whole_row if whole_row is not None else row.get(budget) for budget in budgets]
            cells += [_cell(cell, gain=False) for cell in shown]
        lines.append(_line([label, *cells]))
    return lines


def _name(header: Row) -> str:
    model = header["model"].rpartition("/")[2]
    return "clip-p8" if model.startswith("tiny-llava") else model


def types(rows: Iterable[Row], keep: float) -> list[str]:
    """Accuracy by type of question at one budget, and of all tokens."""
    chosen = [row for row in rows if row["keep"] in (keep, None) and not row["reason"]]
    kinds = list(chosen[0]["types"])
    lines = _head([f"method, {keep:g} tokens", *kinds, "all"])
    for row in chosen:
        values = [row["types"][kind][0] for kind in kinds] + [row["accuracy"][0]]
        lines.append(_line([row["label"], *(f"{value:.2f}" for value in values)]))
    return lines


def cost(rows: Iterable[Row], keep: float) -> list[str]:
    """What a question costs at one budget: tokens, operations, keys and values, share of `Full`."""
    lines = _head(
        [f"method, {keep:g} tokens", "tokens seen by a layer", "prefill GFLOP", "choice GFLOP",
         "KV KiB", "of full accuracy"]
    )  # fmt: skip
    for row in rows:
        if row["keep"] not in (keep, None) or row["reason"]:
            continue
        retention = "1" if row["retention"] is None else f"{row['retention'][0]:.3f}"
        flops, chosen = row["prefill_flops"], row["selection_flops"] or 0
        lines.append(
            _line(
                [row["label"], f"{row['tokens']['average']:.1f}",
                 "-" if flops is None else f"{flops / 1e9:.3f}", f"{chosen / 1e9:.3f}",
                 "-" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 1024:.0f}", retention]
            )
        )  # fmt: skip
    return lines


def _by_label(rows: Iterable[Row]) -> tuple[list[float], dict[str, dict[float | None, Row]]]:
    found: dict[str, dict[float | None, Row]] = {}
    for row in rows:
        found.setdefault(row["label"], {})[row["keep"]] = row
    budgets = {budget for cells in found.values() for budget in cells if budget is not None}
    return sorted(budgets, reverse=True), found


def _cell(row: Row | None, *, gain: bool = True) -> str:
    if row is None:
        return ""
    if row["reason"]:
        return "-"
    text = f"{row['accuracy'][0]:.3f}"
    if row["gain"] is None or not gain:
        return text
    p = row["p"]
    sure = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    return f"{text} ({100 * row['gain'][0]:+.1f}, {sure})"


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of each file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--types", type=float, metavar="KEEP", help="by type, at this budget")
    parser.add_argument("--cost", type=float, metavar="KEEP", help="costs, at this budget")
    parser.add_argument("--all", action="store_true", help="with rows that only served as baseline")
    parser.add_argument("--beside", action="store_true", help="one table, accuracies alone")
    options = parser.parse_args(arguments)
    if options.beside:
        files = [json.loads(path.read_text()) for path in options.results]
        print(*map(caption, (whole["header"] for whole in files)), sep="\n")
        print("", *beside(files), "", sep="\n")
        return 0
    for path in options.results:
        whole = json.loads(path.read_text())
        rows = [row for row in whole["rows"] if row["listed"] or options.all]
        print(caption(whole["header"]), "", *curve(rows), "", sep="\n")
        if options.types is not None:
            print(*types(rows, options.types), "", sep="\n")
        if options.cost is not None:
            print(*cost(rows, options.cost), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
