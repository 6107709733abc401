"""`cdrop report`: what it says of results, of their age, and what it puts into a file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from benchmarks import report
from consensusdrop_kernels import cli

COMMIT = "0123456789ab"
HEADER = {
    "device": "made-up", "driver": None, "python": "3", "versions": {"torch": "0"},
    "commit": COMMIT, "date": "2001-02-03T04:05:06+00:00",
}  # fmt: skip


def op_row(contender: str, median_us: float, **more: Any) -> dict[str, Any]:
    return {
        "op": "token_merge", "shape": "B1 N8", "dtype": "float32", "contender": contender,
        "median_us": median_us, "bytes": 8000, "bandwidth_share": 0.5, "how": "CUDA graph", **more,
    }  # fmt: skip


# Made up, every figure of it: these are no measurements.
OPS = {
    "copy_bandwidth": 1e9,
    "rows": [
        op_row("cdrop", 4.0),
        op_row("plain torch", 10.0),
        {"op": "token_merge", "shape": "B9 N9", "dtype": "float32", "error": "no memory"},
        op_row("cdrop", 0.0, shape="B7 N7", error="it failed"),
        op_row("plain torch", 10.0, shape="B7 N7"),  # over nothing
        op_row("eager", 12.0, how="launched one by one"),
        {"op": "token_merge", "shape": "B6 N6", "dtype": "float32", "not_run": "out of time"},
    ],
}
PART = {"verdict": "ok", "exit_code": 0, "seconds": 1.5, "last_line": "3 passed | 1 skipped"}
LATE = {"verdict": "out of time", "exit_code": 75, "out_of_time": ["an op, B1", "an op, B2"]}
SUMMARY = {"device": "made-up", "parts": {"tests": PART | HEADER, "bench": PART | HEADER | LATE}}
TTFT = {"median": 5.0, "p20": 4.0, "p80": 6.0}
WHOLE_ROW = {
    "attention": "sdpa", "batch": 1, "name": "Full", "label": "Full", "form": "full", "keep": None,
    "method": None, "reason": "", "tokens": {"before": 9, "after": 9, "average": 9.0},
    "ttft_ms": TTFT, "samples_ms": [5.0], "of_full": None, "of_random": None,
    "of_random_processor": None, "over_ops": None, "flops_of_full": 1.0, "share_of_saving": None,
    "decode_tokens_per_s": 7.0, "peak_bytes": None, "peak_above_bytes": None, "kv_bytes": 1024,
}  # fmt: skip


WHOLE = HEADER | {"about": "no model", "dtype": "float32", "threads": 1}
MODEL = WHOLE | {"model": "made-up-model", "new_tokens": 2}
SERVED = {
    "header": MODEL | {"max_batch": 4, "requests": 3},
    "rows": [{
        "name": "Full", "label": "Full", "keep": None, "clients": 1, "requests_per_s": 6.25,
        "of_full": 1.0, "latency_ms": {"p50": 10.0, "p95": 20.0}, "mean_batch": 1.0,
        "tokens_per_s": 12.0, "reason": "",
    }],
}  # fmt: skip
CURVE = {"curve": "select_merge", "name": "cdrop", "reason": ""}
GROWTH = {
    "header": WHOLE | {"kind": "cpu"},
    "rows": [CURVE | {"tokens": 2**n, "us": 2.0**n, "peak_bytes": 2 ** (n + 20)} for n in (8, 9)],
    "slopes": [CURVE | {"largest": 512, "time": 1.25, "memory": None}],
}
COUNTERS = """"ID","Kernel Name","Grid Size","Block Size","gpu__time_duration.sum"
"","","","","ns"
"0","made_up_kernel","(4, 1, 1)","(32, 1, 1)","1500"
"""


def end_to_end() -> dict[str, Any]:
    from benchmarks.end_to_end.phases import PHASES

    row = WHOLE_ROW | {"phases_ms": dict.fromkeys(PHASES, 1.0)}
    fewer = row | {
        "name": "Random 3", "label": "Random", "form": "ops", "keep": 3, "of_full": [0.5, 0.4, 0.6]
    }  # fmt: skip
    return {"header": MODEL, "rows": [row, fewer]}


@pytest.fixture
def results(tmp_path) -> Path:
    """Results of one device, all made up, and a file that is none."""
    device = tmp_path / "results" / "made-up"
    files = {"ops": OPS, "summary": SUMMARY, "e2e/e2e": end_to_end(), "serve/serve": SERVED,
             "growth": GROWTH, "other": {"what": "this"}}  # fmt: skip
    for name, data in files.items():
        path = device / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
    (device / "ops-a.png").write_bytes(b"")
    (device / "profile").mkdir()
    (device / "profile" / "an_op.raw.csv").write_text(COUNTERS)
    return tmp_path / "results"


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository with a source and a page; `commit` makes one more commit of a change."""
    root = tmp_path / "repository"
    (root / "csrc").mkdir(parents=True)
    git(root, "init", "-q")
    commit(root, "csrc/kernel.cpp")
    return root


def git(root: Path, *arguments: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    command = ["git", "-C", str(root), *name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(root: Path, path: str) -> str:
    with (root / path).open("a") as file:
        file.write("a line\n")
    git(root, "add", path)
    git(root, "commit", "-q", "-m", "a change")
    return git(root, "rev-parse", "--short=12", "HEAD")


def test_figures_are_stale_once_a_measured_source_changed(repository):
    def age(commit: str | None) -> str:
        return report.staleness(commit, ("csrc", "gone"), repository)

    first = git(repository, "rev-parse", "--short=12", "HEAD")
    assert age(first) == ""
    commit(repository, "page.md")
    assert age(first) == ""
    second = commit(repository, "csrc/kernel.cpp")
    assert age(first).startswith("**stale**")
    assert age(second) == ""
    dirty = "measured with changes that were not committed"
    assert age(f"{second}-dirty") == dirty
    assert age(f"{first}-dirty").startswith(f"{dirty}; **stale**")
    assert age(COMMIT) == "its commit is not in this repository"
    assert age(None) == age("unknown") == "commit unknown"


def test_the_sections_of_a_folder(results):
    sections, unread = report.collect(results)
    by_name = {section.name: section for section in sections}
    kinds = ("e2e", "growth", "ops", "serve", "summary", "profile/an_op")
    assert list(by_name) == [f"made-up/{kind}" for kind in kinds]
    assert len(unread) == 1
    assert unread[0].startswith("made-up/other.json (ValueError: no benchmark here")
    ops = by_name["made-up/ops"]
    assert (ops.commit, ops.date) == (COMMIT, HEADER["date"])  # as summary.json says
    assert [path.name for path in ops.plots] == ["ops-a.png"]
    line = next(line for line in ops.body.splitlines() if "B1 N8" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "B1 N8 float32"
    assert "2.50" in cells
    assert "CUDA graph" in cells
    assert "3.00\N{DAGGER}" in cells
    assert "\n\N{DAGGER} timed otherwise than cdrop: launched one by one" in ops.body
    assert "- token_merge, B9 N9, all: no memory" in ops.body
    assert "Out of time, 1 cases:\n\n- token_merge, B6 N6" in ops.body
    verdicts = by_name["made-up/summary"].body
    assert "| bench | out of time (2 left) |" in verdicts
    assert "- out of time in `bench`: an op, B1; an op, B2" in verdicts
    assert "0.500 (0.400-0.600)" in by_name["made-up/e2e"].body
    assert "| select_merge | cdrop | 1.25 | - | 512 | - |" in by_name["made-up/growth"].body
    assert "| 1 | Full | all | 6.25 | 1.00 | 10 | 20 |" in by_name["made-up/serve"].body
    assert "| `made_up_kernel` 4 of 32 | 1 | 1.50 |" in by_name["made-up/profile/an_op"].body
    assert "3 passed \\| 1 skipped" in by_name["made-up/summary"].body
    alone, _ = report.collect(results / "made-up")
    assert [section.name for section in alone] == list(by_name)


def test_every_table_says_when_and_of_what_it_is(results):
    sections, unread = report.collect(results)
    text = report.document(sections, unread, results)
    old = "its commit is not in this repository"
    assert text.count("## made-up\n") == 1
    assert text.count(f"2001-02-03, commit {COMMIT}; {old}") == 4
    assert "\nNsight Compute; commit unknown\n" in text
    assert f"copies 1 GB/s, 2001-02-03, commit {COMMIT}; {old}" in text
    assert f"no model; float32, made-up, 1 threads; torch 0, 2001-02-03, commit {COMMIT}" in text
    assert f"2001-02-03, {COMMIT}; {old} |" in text
    assert "](made-up/ops-a.png)" in text
    assert "other.json" in text


def test_the_shipped_results_can_all_be_reported():
    sections, unread = report.collect(report.RESULTS)
    assert "cpu-epyc-zen5/select_merge" in [section.name for section in sections]
    assert "accuracy/clip-p8-spread" in [section.name for section in sections]
    assert unread == []


def test_without_results_it_says_how_to_get_some(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cdrop report: there are no results in {tmp_path}: run `make gpu`")
    assert err.count("\n") == 1


PAGE = "before\n<!-- report:made-up/ops -->\nold\n<!-- /report -->\nafter\n"


def test_between_markers_alone_a_file_is_replaced(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):
        assert cli.main(["report", str(results), "--readme", str(page)]) == 0
        start, rest = page.read_text().split("<!-- report:made-up/ops -->\n")
        table, end = rest.split("<!-- /report -->")
        assert (start, end) == ("before\n", "\nafter\n")
        assert "old" not in table
        assert "| B1 N8 float32 |" in table
        assert "](results/made-up/ops-a.png)" in table


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("nothing\n", "there is no <!-- report:NAME --> to fill"),
        (PAGE.replace("/ops", "/none"), "there are no results called made-up/none, but "),
        (PAGE.replace("<!-- /report -->", ""), "every <!-- report:NAME --> must end with"),
        (PAGE.replace("old", "<!-- report:made-up/e2e -->"), "must end with <!-- /report -->"),
    ],
)
def test_markers_that_are_wrong_leave_the_file_as_it_was(results, tmp_path, capsys, page, message):
    path = tmp_path / "page.md"
    path.write_text(page)
    assert cli.main(["report", str(results), "--readme", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert path.read_text() == page


def test_the_folder_of_the_report_need_not_be_there(results, tmp_path):
    out = tmp_path / "missing" / "folder" / "report.md"
    assert cli.main(["report", str(results), "--out", str(out)]) == 0
    assert "| B1 N8 float32 |" in out.read_text()
    assert "](../../results/made-up/ops-a.png)" in out.read_text()


@pytest.mark.parametrize(
    ("option", "path", "why"),
    [
        ("--out", "", "is a directory"),
        ("--readme", "none.md", "no such file or directory"),
        ("--out", "results/made-up/ops.json/report.md", "file exists"),
    ],
)
def test_a_file_that_cannot_be_had_is_one_sentence(results, tmp_path, capsys, option, path, why):
    where = tmp_path / path
    assert cli.main(["report", str(results), option, str(where)]) == 2
    at = where.parent if why == "file exists" else where
    assert capsys.readouterr().err == f"cdrop report: {at}: {why}\n"


def test_plots_are_drawn_where_they_are_asked_for(results, tmp_path):
    out, plots = tmp_path / "report.md", tmp_path / "plots"
    assert cli.main(["report", str(results), "--out", str(out), "--plots", str(plots)]) == 0
    drawn = sorted(str(path.relative_to(plots)) for path in plots.rglob("*.png"))
    kinds = ("e2e/phases", "e2e/ttft", "growth/growth", "ops/token_merge", "serve/serve")
    assert drawn == [f"made-up/{kind}.png" for kind in kinds]
    assert all(path.stat().st_size > 1000 for path in plots.rglob("*.png"))
    assert all(f"](plots/{path})" in out.read_text() for path in drawn)
