"""Rows of results from what was answered, and the files and lines they are written to."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from consensusdrop_kernels.scenes import QUESTION_TYPES

from .answers import Answers, kinds
from .runs import Plan, Run
from .stats import Interval, compare, share

Row = dict[str, Any]


def rows(plan: Plan, answers: Mapping[str, Answers], reasons: Mapping[str, str]) -> list[Row]:
    """A row for every run of a plan, in its order; an `Interval` is a value with its 95 %.

    - `label`, `keep`, `method` (all options); `listed`: False if it serves as a baseline alone;
      `reason`: why there is nothing else in the row;
    - `accuracy`, and by type in `types`; `retention`: the accuracy over that of all tokens;
    - `baseline`: label of the row it is measured against, `gain` of accuracy over it, and `p`;
    - `tokens`, means of a question: of `text`, visual ones `before` and `after` the choice (those
      that enter the decoder), and their `average` over its layers;
    - `prefill_flops` without, and `selection_flops` of the choice; `kv_bytes`; `seconds` of a
      question in `generate`, as one of a batch.

    Args:
        plan: the runs.
        answers: by `Run.key`, all to the same questions; without those that could not be had.
        reasons: by `Run.key`, why those could not.
    """
    full = answers[plan.runs[0].key]
    made = []
    for at, run in enumerate(plan.runs):
        row: Row = {
            "label": run.label,
            "keep": run.keep,
            "method": None if run.method is None else repr(run.method),
            "listed": at not in plan.extra,
            "reason": run.reason or reasons.get(run.key),
        }
        if not row["reason"]:
            found = answers[run.key]
            rival = _rival(plan, answers, at)
            row |= _marks(found, full) | _against(rival, found) | _cost(found)
        made.append(row)
    return made


def _rival(plan: Plan, answers: Mapping[str, Answers], at: int) -> tuple[Run, Answers] | None:
    """The better of a run's baselines, unless that is the run itself."""
    known = [plan.runs[i] for i in plan.against.get(at, ())]
    found = [(run, answers[run.key]) for run in known if not run.reason and run.key in answers]
    best = max(found, key=lambda pair: sum(pair[1].right), default=None)
    return None if best is None or best[0].key == plan.runs[at].key else best


def _marks(found: Answers, full: Answers) -> Row:
    right, asked = np.array(found.right), kinds(len(found.right))
    return {
        "accuracy": share(right),
        "retention": compare(right, np.array(full.right), asked).ratio,
        "types": {kind: share(right[asked == kind]) for kind in QUESTION_TYPES},
    }


def _against(rival: tuple[Run, Answers] | None, found: Answers) -> Row:
    if rival is None:
        return {"baseline": None, "gain": None, "p": None}
    run, other = rival
    pair = np.array(found.right), np.array(other.right)
    difference, p, _ = compare(*pair, kinds(len(found.right)))
    return {"baseline": run.label, "gain": difference, "p": p}


def _cost(found: Answers) -> Row:
    count = len(found.right)
    mean = {name: total / count for name, total in found.sums.items()}
    return {
        "tokens": {name: mean[name] for name in ("text", "before", "after", "average")},
        "prefill_flops": mean.get("flops"),
        "selection_flops": found.selection,
        "kv_bytes": mean.get("kv_bytes"),
        "seconds": found.seconds / count,
    }


def write(folder: Path, header: Mapping[str, Any], table: Sequence[Row]) -> None:
    """`results.json`, header and rows, and `results.csv`, the rows alone."""
    whole = {"header": dict(header), "rows": list(table)}
    (folder / "results.json").write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    flat = [_flat(row) for row in table]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Row) -> Row:
    """One level: `accuracy`, `accuracy_low`, `accuracy_high`; `tokens_before`; types by name."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, Interval):
            flat |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        elif isinstance(value, dict):
            prefix = "" if name == "types" else f"{name}_"
            flat |= {f"{prefix}{key}": part for key, part in _flat(value).items()}
        else:
            flat[name] = value
    return flat


_COLUMNS = ("method", "keep", "tokens", "accuracy", "of full", "gain", "p", "GFLOP", "KV", "ms")


def lines(table: Sequence[Row]) -> list[str]:
    """The table to print, one row a line; nothing without rows."""
    if not table:
        return []
    cells = [_COLUMNS, *(_cells(row) for row in table if not row["reason"])]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    shown = []
    for row in cells:
        name, *rest = (cell.rjust(width) for cell, width in zip(row, wide, strict=True))
        shown.append("  ".join([row[0].ljust(wide[0]), *rest]).rstrip())
    no = (f"{row['label']} at {row['keep']}: {row['reason']}" for row in table if row["reason"])
    return [*shown, *no]


def _cells(row: Row) -> tuple[str, ...]:
    value, low, high = row["accuracy"]
    gain, p, flops = row["gain"], row["p"], row["prefill_flops"]
    chosen = row["selection_flops"] or 0
    return (
        row["label"],
        "all" if row["keep"] is None else f"{row['keep']:g}",
        f"{row['tokens']['average']:.1f}",
        f"{value:.3f} ({low:.3f}-{high:.3f})",
        "-" if row["retention"] is None else f"{row['retention'].value:.3f}",
        "-" if gain is None else f"{gain.value:+.3f}",
        "-" if p is None else f"{p:.4f}",
        "-" if flops is None else f"{flops / 1e9:.3f} + {chosen / 1e9:.3f}",
        "-" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 1024:.0f} KiB",
        f"{1000 * row['seconds']:.1f}",
    )
