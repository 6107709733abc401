"""Tables of ratios from a file of pytest-benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the package

from benchmarks import summary  # noqa: E402


def timed(test: str, group: str, contender: str, median: float, **info: Any) -> dict[str, Any]:
    return {
        "fullname": f"benchmarks/x.py::{test}[{group}-{contender}]", "group": group,
        "params": {"contender": contender}, "stats": {"median": median}, "extra_info": info,
    }  # fmt: skip


def test_a_table_for_each_op_and_ratios_to_its_first_contender():
    found = summary.tables({"benchmarks": [
        timed("test_op", "a 1", "cdrop", 2e-3, op="a", bytes=4_000_000, copy_share=0.5,
              peak_bytes=3_000_000),
        timed("test_op", "a 1", "plain torch", 6e-3, op="a", bytes=4_000_000),
        timed("test_op", "b 1", "cdrop", 2e-6, op="b", peak_bytes=None),
        timed("test_op", "b 2", "cdrop", 4e-6, op="b", peak_bytes=None),
        timed("test_op", "b 2", "random", 1e-6, op="b"),
    ]})  # fmt: skip
    assert found.splitlines() == [
        "`a`:", "",
        "| case | cdrop | GB/s | of copy | peak MB | plain torch / it |",
        "|---|---|---|---|---|---|",
        "| 1 | 2.00 ms | 2.0 | 50% | 3.0 | 3.00 |", "",
        "`b`:", "",
        "| case | cdrop | random / it |",
        "|---|---|---|",
        "| 1 | 2.0 us | - |",
        "| 2 | 4.0 us | 0.25 |",
    ]  # fmt: skip


def test_what_a_graph_took_has_columns_of_its_own():
    found = summary.tables({"benchmarks": [
        timed("test_op", "a 1", "cdrop", 2e-5, op="a", graph_us=3.25, graph_cold_us=4.5,
              graph="launched one by one"),
    ]})  # fmt: skip
    assert "| case | cdrop | graph us | cold us | how |" in found
    assert "| 1 | 20.0 us | 3.2 | 4.5 | launched one by one |" in found


def test_a_ratio_to_what_was_timed_otherwise_is_marked():
    rows = [
        {"group": "1", "name": "cdrop", "median": 1.0, "how": "CUDA graph"},
        {"group": "1", "name": "plain torch", "median": 2.0, "how": "CUDA graph"},
        {"group": "1", "name": "eager", "median": 3.0, "how": "launched one by one"},
    ]
    assert summary.markdown_table(rows).splitlines()[0::2] == [
        "| case | cdrop | how | plain torch / it | eager / it |",
        "| 1 | 1000.00 ms | CUDA graph | 2.00 | 3.00\N{DAGGER} |",
        "\N{DAGGER} timed otherwise than cdrop: launched one by one",
    ]
    assert "\N{DAGGER}" not in summary.markdown_table(rows[:2])


def test_groups_with_other_subjects_get_tables_of_their_own():
    found = summary.tables({"benchmarks": [
        timed("test_decode", "one row", "stock", 1.0),
        timed("test_decode", "one row", "patched", 2.0),
        timed("test_decode", "two rows", "stock, padded", 2.0),
        timed("test_decode", "two rows", "patched, padded", 3.0),
    ]})  # fmt: skip
    assert found.count("`test_decode`:") == 2
    assert "| case | stock | patched / it |" in found
    assert "| two rows | 2000.00 ms | 1.50 |" in found
