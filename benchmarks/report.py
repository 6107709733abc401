"""Tables and plots of what lies in `benchmarks/results`, as Markdown.

    cdrop report                                  # all devices, to the screen
    cdrop report benchmarks/results/h200 --out report.md --plots plots
    cdrop report --readme README.md               # in place, between markers

Reads what `make gpu`, `make bench`, `cdrop bench`, `benchmarks/serve.py` and `benchmarks/growth.py`
write. Every table says on which device, when and at which commit it was measured, and is marked as
stale if the sources it measures changed since. In a file, the lines between

    <!-- report:NAME -->
    <!-- /report -->

become the table of that name; a report lists the names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consensusdrop_kernels.cli import Parser

from .gpu import said
from .profile import ncu_summary as counters
from .summary import markdown_table, tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "cdrop"  # the op among its contenders
_PACKAGE = "consensusdrop_kernels"
#: What the figures of an op depend on, and what those of a patched model depend on beside it.
KERNELS = (
    "csrc", "CMakeLists.txt", f"{_PACKAGE}/triton", f"{_PACKAGE}/ops.py", f"{_PACKAGE}/reference.py"
)  # fmt: skip
MODELS = (*KERNELS, f"{_PACKAGE}/hf", f"{_PACKAGE}/methods")
#: What a test says depends on all of it.
EVERYTHING = ("csrc", "CMakeLists.txt", _PACKAGE)

Data = Mapping[str, Any]


class ReportError(Exception):
    """What can't be reported, in a sentence for the user."""


@dataclass(frozen=True)
class Section:
    """One file of results.

    Args:
        name: what a marker calls it: the device's folder and the file, `h200/e2e`.
        title: its heading.
        body: tables.
        about: what it depends on beside commit and date.
        date: when it was measured, ISO 8601.
        commit: of the sources, as `git describe` or `git rev-parse` write it; None if unknown.
        sources: paths whose change makes it stale; none where the rows say it themselves.
        plots: files of its pictures.
        draw: draws them anew in a folder, and says which files they are.
    """

    name: str
    title: str
    body: str
    about: str = ""
    date: str = ""
    commit: str | None = None
    sources: tuple[str, ...] = ()
    plots: tuple[Path, ...] = ()
    draw: Callable[[Path], Sequence[Path]] | None = None


# --- how old a figure is ------------------------------------------------------------------------


def staleness(commit: str | None, sources: Sequence[str], root: Path = ROOT) -> str:
    """Why figures of a commit are not those of HEAD, in words; nothing if they are.

    Args:
        commit: as `git describe --dirty` writes it; None if unknown.
        sources: paths that the figures depend on.
        root: the repository.
    """
    if not commit or commit == "unknown":
        return "commit unknown"
    clean = commit.removesuffix("-dirty")
    found = ["measured with changes that were not committed"] if clean != commit else []
    if _git(root, "rev-parse", "--verify", "--quiet", f"{clean}^{{commit}}"):
        found.append("its commit is not in this repository")
    elif _git(root, "diff", "--quiet", clean, "HEAD", "--", *sources):
        found.append("**stale**: the measured sources changed since")
    return "; ".join(found)


def _git(root: Path, *arguments: str) -> int:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True).returncode


def caption(section: Section, root: Path = ROOT) -> str:
    """What the figures depend on, and whether they are still those of the sources."""
    if not section.sources:
        return section.about
    commit = f"commit {section.commit}" if section.commit else ""
    old = staleness(section.commit, section.sources, root)
    parts = [section.about, section.date[:10], commit]
    return "; ".join([", ".join(filter(None, parts)), *filter(None, [old])])


# --- one reader for each kind of file -----------------------------------------------------------


def _summary(data: Data) -> Section:
    lines = ["| part | verdict | seconds | measured | last line |", "|---|---|---|---|---|"]
    late = []
    for name, part in data["parts"].items():
        old = staleness(part.get("commit"), EVERYTHING)
        when = f"{part.get('date', '')[:10]}, {part.get('commit')}{'; ' if old else ''}{old}"
        last = part["last_line"].replace("|", "\\|")
        lines.append(f"| {name} | {said(part)} | {part['seconds']} | {when} | {last} |")
        if part.get("out_of_time"):
            late.append(f"- out of time in `{name}`: {'; '.join(part['out_of_time'])}")
    return Section("", "make gpu", "\n".join([*lines, *([""] if late else []), *late]))


def _ops(data: Data) -> Section:
    rows = [_contender(row) for row in data["rows"] if "contender" in row and "error" not in row]
    cases = {(row["op"], row["group"]) for row in rows if row["name"] == OURS}
    good = [row for row in rows if (row["op"], row["group"]) in cases]  # others have no ratio
    parts = [f"`{op}`:\n\n{markdown_table(rows)}" for op, rows in _grouped(good, "op").items()]
    bad = [
        f"- {row['op']}, {row['shape']}, {row.get('contender', 'all')}: {row['error']}"
        for row in data["rows"] if "error" in row
    ]  # fmt: skip
    parts += ["Not measured:", "\n".join(bad)] if bad else []
    late = [f"- {row['op']}, {row['shape']}" for row in data["rows"] if "not_run" in row]
    parts += [f"Out of time, {len(late)} cases:", "\n".join(late)] if late else []
    return Section(
        "", "Ops", "\n\n".join(parts), f"copies {data['copy_bandwidth'] / 1e9:.0f} GB/s",
        sources=KERNELS, draw=lambda folder: _draw_ratios(folder, good),
    )  # fmt: skip


def _contender(row: Data) -> dict[str, Any]:
    """A row of `gpu_ops.py` as `summary.py` takes it."""
    return {
        "op": row["op"], "group": f"{row['shape']} {row['dtype']}", "name": row["contender"],
        "median": row["median_us"] * 1e-6, "bytes": row["bytes"],
        "copy_share": row["bandwidth_share"], "how": row["how"],
    }  # fmt: skip


def _draw_ratios(folder: Path, rows: Iterable[Data]) -> list[Path]:
    """A picture for each op: every contender's time over that of the op, a line for each case."""
    from .end_to_end.results import COLORS, MARKS, panels

    paths = []
    for op, some in _grouped(rows, "op").items():
        cases = _grouped(some, "group")
        ours = {case: _time(found, OURS) for case, found in cases.items()}
        figure, (axis,) = panels(1, 6.0, 1.4 + 0.28 * len(cases), op)
        for at, (name, found) in enumerate(_grouped(some, "name").items()):
            points = [(row["median"] / ours[row["group"]], row["group"]) for row in found]
            x, y = zip(*points, strict=True)
            style = {"color": COLORS[at % len(COLORS)], "marker": MARKS[at % len(MARKS)]}
            axis.plot(x, y, linestyle="", markersize=5, label=name, **style)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.margins(y=0.2)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.set_xlabel(f"time over that of {op}")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        paths.append(folder / f"{op}.png")
        figure.savefig(paths[-1])
    return paths


def _time(rows: Iterable[Data], name: str) -> float:
    return next(row["median"] for row in rows if row["name"] == name)


def _growth(data: Data) -> Section:
    from . import growth

    return _own(data, "Growth with the number of tokens", growth.markdown, growth.draw, KERNELS)


def _end_to_end(data: Data) -> Section:
    from .end_to_end import results

    title = f"End to end: {data['header']['model']}"
    return _own(data, title, results.markdown, results.draw, MODELS)


def _served(data: Data) -> Section:
    from . import serve

    title = f"Served load: {data['header']['model']}"
    return _own(data, title, serve.markdown, serve.draw, MODELS)


def _own(
    data: Data, title: str, markdown: Callable[[Any], str],
    draw: Callable[[Path, Any], Sequence[Path]], sources: tuple[str, ...],
) -> Section:  # fmt: skip
    """Results by the table of the benchmark itself, which begins with a heading and a paragraph
    that ends in date and commit."""
    _, about, body = markdown(data).split("\n\n", 2)
    return Section(
        "", title, body.strip(), about.rsplit("; ", 1)[0], sources=sources,
        draw=lambda folder: draw(folder, data),
    )  # fmt: skip


def _accuracy(data: Data) -> Section:
    from .accuracy import summary

    header, rows = data["header"], [row for row in data["rows"] if row["listed"]]
    about, _, _ = summary.caption(header).partition(f", {header['date'][:10]}")
    return Section(
        "", "Accuracy by budget", "\n".join(summary.curve(rows)), about,
        commit=header["commits"][-1], sources=MODELS,
    )  # fmt: skip


def _pytest_benchmark(data: Data) -> Section:
    info = data["machine_info"]
    device = info.get("gpu") or info["cpu"].get("brand_raw") or info["machine"]
    about = f"{device}, {info['threads']} threads, torch {info['torch']}, {info['kernels']}"
    commit = data["commit_info"]
    known = commit["id"][:12] if commit["id"] != "unversioned" else info["build_commit"]
    rows = [
        {"group": b["group"], "name": b["name"], "median": b["stats"]["median"], **b["extra_info"]}
        for b in data["benchmarks"] if "op" in b["extra_info"]
    ]  # fmt: skip
    return Section(
        "", "Microbenchmarks", tables(data), about, data["datetime"],
        known + "-dirty" * bool(commit.get("dirty")), KERNELS,
        draw=(lambda folder: _draw_ratios(folder, rows)) if rows else None,
    )  # fmt: skip


#: By the name of the file; others have names of their own, and are known by what is in them.
READERS: dict[str, Callable[[Data], Section]] = {
    "summary": _summary,
    "ops": _ops,
    "growth": _growth,
    "e2e": _end_to_end,
    "serve": _served,
}
_OTHERS = {"machine_info": _pytest_benchmark, "header": _accuracy}
#: The part of `make gpu` that writes a file which does not say itself when it was written.
_PARTS = {"ops": "bench"}


def _grouped(rows: Iterable[Data], key: str) -> dict[Any, list[Data]]:
    found: dict[Any, list[Data]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


# --- a folder of results ------------------------------------------------------------------------


def collect(folder: Path) -> tuple[list[Section], list[str]]:
    """The sections of a folder of results, of one device or of several, and what is no result.

    Raises:
        ReportError: there is nothing to report.
    """
    sections, unread = [], []
    # A device's folder has files itself, `benchmarks/results` has folders of devices.
    top = folder.parent if any(folder.glob("*.json")) else folder
    for path in sorted(folder.rglob("*.json")):
        try:
            sections.append(_read(path, _name(path, top)))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            unread.append(f"{path.relative_to(top)} ({type(error).__name__}: {error})")
    for path in sorted(folder.rglob("profile/*.raw.csv")):
        sections.append(_profile(path, _name(path, top)))
    if not sections:
        raise ReportError(f"there are no results in {folder}: run `make gpu` or `make bench` first")
    return sections, unread


def _name(path: Path, top: Path) -> str:
    """`h200/ops`; `h200/e2e` for `h200/e2e/e2e.json`."""
    *folders, last = path.relative_to(top).parts
    stem = last.removesuffix(path.suffix).removesuffix(".raw")
    return "/".join([*folders, stem] if folders[-1:] != [stem] else folders)


def _read(path: Path, name: str) -> Section:
    data = json.loads(path.read_text())
    others = (reader for key, reader in _OTHERS.items() if key in data)
    reader = READERS.get(path.stem) or next(others, None)
    if reader is None:
        raise ValueError("no benchmark here writes such a file")
    section = reader(data)
    header = data.get("header") or _part(path.parent, _PARTS.get(path.stem, ""))
    shared = (path.parent / "summary.json").exists()  # then pictures are called like the file
    return replace(
        section,
        name=name,
        date=section.date or header.get("date", ""),
        commit=section.commit or header.get("commit"),
        plots=tuple(sorted(path.parent.glob(f"{path.stem}*.png" if shared else "*.png"))),
    )


def _profile(path: Path, name: str) -> Section:
    part = _part(path.parents[1], "profile")
    body = counters.table(counters.read(path.read_text().splitlines()))
    return Section(
        name, f"Counters of {name.rsplit('/', 1)[-1]}", body, "Nsight Compute",
        part.get("date", ""), part.get("commit"), KERNELS,
    )  # fmt: skip


def _part(folder: Path, name: str) -> Data:
    """What `summary.json` says of a part of `make gpu`."""
    try:
        found: Data = json.loads((folder / "summary.json").read_text())["parts"][name]
    except (OSError, ValueError, KeyError):
        return {}
    return found


def drawn(section: Section, plots: Path) -> Section:
    """The section with its pictures drawn anew, in a folder of its own; others stay."""
    if section.draw is None:
        return section
    folder = plots / section.name
    folder.mkdir(parents=True, exist_ok=True)
    return replace(section, plots=tuple(section.draw(folder)))


# --- Markdown -----------------------------------------------------------------------------------


def text_of(section: Section, beside: Path) -> str:
    """Caption, tables and pictures, which are linked from the folder `beside`."""
    pictures = [
        f"![{section.title}, {path.stem}]({os.path.relpath(path, beside)})"
        for path in section.plots
    ]
    body = re.sub(r"^#+ ", "#### ", section.body, flags=re.MULTILINE)
    return "\n\n".join(filter(None, [caption(section), body, *pictures]))


def document(sections: Sequence[Section], unread: Sequence[str], beside: Path) -> str:
    """All sections by device, each under its name."""
    lines = ["# Benchmark results"]
    device = None
    for section in sections:
        if (here := section.name.split("/")[0]) != device:
            device = here
            lines.append(f"## {device}")
        lines += [f"### {section.title} (`{section.name}`)", text_of(section, beside)]
    if unread:
        lines.append("Files that are no results known here:\n\n- " + "\n- ".join(unread))
    return "\n\n".join(lines) + "\n"


_MARKED = re.compile(r"(<!-- report:(\S+) -->\n)(.*?)(<!-- (/?)report(?::\S+)? -->)", re.DOTALL)


def filled(text: str, sections: Sequence[Section], beside: Path) -> str:
    """`text` with the table of each name between its markers.

    Raises:
        ReportError: it has no markers, one without its end, or one of a name that is not known.
    """
    known = {section.name: section for section in sections}

    def fill(match: re.Match[str]) -> str:
        start, name, _, end, closes = match.groups()
        if not closes:
            raise ReportError(f"<!-- report:{name} --> must end with <!-- /report -->")
        if name not in known:
            raise ReportError(f"there are no results called {name}, but {', '.join(known)}")
        return f"{start}\n{text_of(known[name], beside)}\n\n{end}"

    made, count = _MARKED.subn(fill, text)
    if count < text.count("<!-- report:"):
        raise ReportError("every <!-- report:NAME --> must end with <!-- /report -->, on its line")
    if not count:
        raise ReportError("there is no <!-- report:NAME --> to fill")
    return made


# --- the command line ---------------------------------------------------------------------------


def _parser(program: str) -> argparse.ArgumentParser:
    parser = Parser(prog=program, description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=RESULTS,
        help="results of one device or of several (default benchmarks/results)")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="write the report there, not to the screen")
    add("--readme", type=Path, metavar="FILE", help="fill the marked places of this file instead")
    add("--plots", type=Path, metavar="FOLDER", help="draw the plots anew, there")
    return parser


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def main(arguments: Sequence[str] | None = None, program: str = "cdrop report") -> int:
    """Report what the command line asks for.

    Returns:
        0, or 2 after a sentence on stderr that says what can't be done.
    """
    args = _parser(program).parse_args(arguments)
    try:
        sections, unread = collect(args.folder.resolve())
        if args.plots:
            sections = [drawn(section, args.plots.resolve()) for section in sections]
        beside = (args.readme or args.out or Path("report.md")).resolve().parent
        if args.readme:
            text = filled(args.readme.read_text(), sections, beside)
            args.readme.write_text(text)
            return 0
        text = document(sections, unread, beside)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text)
        else:
            print(text, end="")
    except (ReportError, OSError, ImportError) as error:
        print(f"{program}: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
