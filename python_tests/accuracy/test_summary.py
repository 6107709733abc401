"""The Markdown tables of results."""

from __future__ import annotations

import json

import pytest

from benchmarks.accuracy import summary

TYPES = ("color", "count")


def row(label: str, keep: int | None, accuracy: float, **more: object) -> dict[str, object]:
    interval = [accuracy, accuracy - 0.1, accuracy + 0.1]
    plain: dict[str, object] = {
        "label": label, "keep": keep, "listed": True, "reason": None, "accuracy": interval,
        "retention": [accuracy / 0.9, 0.0, 1.0], "types": {kind: interval for kind in TYPES},
        "gain": None, "p": None, "tokens": {"average": keep or 196.0}, "prefill_flops": 2e9,
        "selection_flops": None, "kv_bytes": 2048.0,
    }  # fmt: skip
    return plain | more


ROWS = [
    row("Full", None, 0.9),
    row("A", 8, 0.5, gain=[-0.021, 0.0, 0.0], p=0.0004, selection_flops=1e6),
    row("A", 16, 0.75, gain=[0.012, 0.0, 0.0], p=0.21),
    row("B", 8, 0.0, reason="can't be had"),
    row("served as baseline", 8, 0.4, listed=False),
]


def test_a_column_for_each_budget_the_largest_first() -> None:
    assert summary.curve(ROWS[:4]) == [
        "| method | 16 | 8 |",
        "|---|---|---|",
        "| Full | 0.900 |  |",
        "| A | 0.750 (+1.2, p = 0.21) | 0.500 (-2.1, p < 0.001) |",
        "| B |  | - |",
    ]


def test_types_and_costs_at_one_budget() -> None:
    assert summary.types(ROWS[:3], 8)[2:] == [
        "| Full | 0.90 | 0.90 | 0.90 |",
        "| A | 0.50 | 0.50 | 0.50 |",
    ]
    assert summary.cost(ROWS[:4], 8)[2:] == [
        "| Full | 196.0 | 2.000 | 0.000 | 2 | 1.000 |",
        "| A | 8.0 | 2.000 | 0.001 | 2 | 0.556 |",
    ]


def test_models_stand_side_by_side() -> None:
    ours = {"header": {"model": "tiny-llava (ships with the package)"}, "rows": ROWS[:4]}
    theirs = {"header": {"model": "folder/other"}, "rows": ROWS[:2]}
    assert summary.beside([ours, theirs]) == [
        "| option | clip-p8 16 | clip-p8 8 | other 8 |",
        "|---|---|---|---|",
        "| Full | 0.900 | 0.900 | 0.900 |",
        "| A | 0.750 | 0.500 | 0.500 |",
        "| B |  | - |  |",
    ]


@pytest.mark.parametrize("extra", [[], ["--all"]])
def test_the_command(tmp_path, capsys, extra: list[str]) -> None:
    header = {
        "model": "tiny", "questions": 4, "split": "test", "seed": 0, "dtype": "float32",
        "date": "2000-01-01T00:00:00+00:00", "commits": ["abc"],
    }  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"header": header, "rows": ROWS}))
    assert summary.main([str(path), "--types", "8", *extra]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny, 4 questions of the test split (seed 0), float32, 2000-01-01, ")
    assert ("served as baseline" in said) == bool(extra)
