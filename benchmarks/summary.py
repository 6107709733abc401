"""Turn benchmark rows into a Markdown table of ratios.

python benchmarks/summary.py results.json     # a file that pytest-benchmark wrote
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

SUBJECT = "select_merge"


def markdown_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line per group: the time of `select_merge` and every contender's time over it."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["name"]] = row
    others = sorted({name for group in groups.values() for name in group} - {SUBJECT})
    lines = [
        "| case | " + SUBJECT + " | GB/s | " + " | ".join(f"{n} / it" for n in others) + " |",
        "|---" * (3 + len(others)) + "|",
    ]
    for case, group in groups.items():
        if SUBJECT not in group:
            continue
        ours = group[SUBJECT]["median"]
        ratios = [f"{group[n]['median'] / ours:.2f}" if n in group else "-" for n in others]
        speed = group[SUBJECT]["bytes"] / ours / 1e9
        lines.append(f"| {case} | {ours * 1e3:.2f} ms | {speed:.1f} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of one results file."""
    with open(sys.argv[1]) as file:
        results = json.load(file)
    info = results["machine_info"]
    processor = info["cpu"].get("brand_raw", info["machine"])
    print(
        f"{processor}, {info['threads']} threads, torch {info['torch']}, {info['kernels']}; "
        f"{results['datetime'][:10]}, commit {info['build_commit']}\n"
    )
    rows = (
        {
            "group": b["group"],
            "name": b["params"]["contender"],
            "median": b["stats"]["median"],
            **b["extra_info"],
        }
        for b in results["benchmarks"]
    )
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
