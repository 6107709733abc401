"""Turn what pytest-benchmark wrote into Markdown tables of ratios.

python benchmarks/summary.py results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def markdown_table(rows: Iterable[Row]) -> str:
    """One line per group: the time of its first contender, and the others' times over it.

    Args:
        rows: `group`, `name` of the contender, `median` in seconds; `bytes` moved, `copy_share`,
            `peak_bytes`, `graph_us` and `graph_cold_us`, `how` the median was timed and by what
            `graph` those two were, where they are known. The first contender of the first group is
            the one that the others are divided by; a group without it has no line. Ratios to what
            was timed otherwise are marked.
    """
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["name"]] = row
    if not groups:
        return ""
    subject = next(iter(next(iter(groups.values()))))
    lines = {case: group for case, group in groups.items() if subject in group}
    others = list(dict.fromkeys(name for group in lines.values() for name in group))[1:]
    figures = {
        title: [figure(group[subject]) for group in lines.values()]
        for title, figure in _FIGURES.items()
    }
    shown = {title: cells for title, cells in figures.items() if any(c != "-" for c in cells)}
    header = ["case", subject, *shown, *(f"{name} / it" for name in others)]
    out = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for at, (case, group) in enumerate(lines.items()):
        ours = group[subject]
        ratios = [_ratio(group[n], ours) if n in group else "-" for n in others]
        figures_here = (column[at] for column in shown.values())
        cells = [case, _duration(ours["median"]), *figures_here, *ratios]
        out.append("| " + " | ".join(cells) + " |")
    otherwise = {
        row["how"]: None for group in lines.values() for row in group.values()
        if _otherwise(row, group[subject])
    }  # fmt: skip
    if otherwise:
        out += ["", f"{_MARK} timed otherwise than {subject}: {', '.join(otherwise)}"]
    return "\n".join(out)


_MARK = "\N{DAGGER}"


def _otherwise(row: Row, ours: Row) -> bool:
    return row.get("how") != ours.get("how")


def _ratio(row: Row, ours: Row) -> str:
    return f"{row['median'] / ours['median']:.2f}" + _MARK * _otherwise(row, ours)


def _speed(row: Row) -> str:
    return f"{row['bytes'] / row['median'] / 1e9:.1f}" if "bytes" in row else "-"


def _share(row: Row) -> str:
    return f"{row['copy_share']:.0%}" if "copy_share" in row else "-"


def _peak(row: Row) -> str:
    return "-" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.1f}"


def _graph(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.1f}" if key in row else "-"


def _how(row: Row) -> str:
    """Of the median, or where that is of calls as they are, of the two columns before."""
    return row.get("how") or row.get("graph") or "-"


_FIGURES = {
    "GB/s": _speed, "of copy": _share, "peak MB": _peak,
    "graph us": _graph("graph_us"), "cold us": _graph("graph_cold_us"), "how": _how,
}  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def tables(results: Mapping[str, Any]) -> str:
    """A table for each op, or for each test function that times something else.

    Args:
        results: a file that pytest-benchmark wrote.
    """
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    subjects: dict[str, str] = {}
    for b in results["benchmarks"]:
        name = b["params"]["contender"]
        subject = subjects.setdefault(b["group"], name)
        title = b["extra_info"].get("op") or b["fullname"].split("::")[1].split("[")[0]
        group = b["group"].removeprefix(f"{title} ")
        row = {"group": group, "name": name, "median": b["stats"]["median"], **b["extra_info"]}
        kinds.setdefault((title, subject), []).append(row)
    return "\n\n".join(
        f"`{title}`:\n\n{markdown_table(rows)}" for (title, _), rows in kinds.items()
    )


def main() -> None:
    """Print the tables of one results file."""
    with open(sys.argv[1]) as file:
        results = json.load(file)
    info = results["machine_info"]
    device = info.get("gpu") or info["cpu"].get("brand_raw", info["machine"])
    print(
        f"{device}, {info['threads']} threads, torch {info['torch']}, {info['kernels']}; "
        f"{results['datetime'][:10]}, commit {info['build_commit']}\n"
    )
    print(tables(results))


if __name__ == "__main__":
    main()
