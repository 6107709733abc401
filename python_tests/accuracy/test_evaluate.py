"""`cdrop eval` from its words to its files, interrupted, and by several processes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from benchmarks.accuracy import answers, data, evaluate
from benchmarks.accuracy.models import Shape, build, processor
from consensusdrop_kernels import cli
from consensusdrop_kernels.scenes import QUESTION_TYPES

ROOT = Path(__file__).parents[2]
#: The columns that a clock fills.
TIMES = {"seconds"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained LLaVA of 16 visual tokens, which says yes or no to everything."""
    folder = tmp_path_factory.mktemp("model")
    shape = Shape("siglip", patch=28, layers=2, width=32, text_layers=4, text_width=32)
    made = build(shape, seed=11).eval()  # one whose answers vary
    words = processor(shape).tokenizer.get_vocab()
    with torch.no_grad():
        yes = made.lm_head.weight[words["yes"]].clone()
        made.lm_head.weight.zero_()
        made.lm_head.weight[words["yes"]], made.lm_head.weight[words["no"]] = -yes, yes
    made.save_pretrained(folder)
    processor(shape).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(answers, "BLOCK", 8)
        yield


def arguments(model, out, *more):
    methods = "ConsensusDrop,PyramidDrop(label='deep')"
    fixed = ["--model", model, "--out", out, "--methods", methods, "--device", "cpu"]
    return [str(a) for a in (*fixed, "--keep", "8,3", "--questions", "32", "--batch", "8", *more)]


def csv_rows(out):
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def untimed(out):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in csv_rows(out)]


def recorded(out):
    """Every record of a folder by its place, without its time."""
    lines = [
        json.loads(line)
        for path in (out / "answers").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    found = {(r["run"], r["block"]): r | {"seconds": 0, "commit": ""} for r in lines}
    assert len(found) == len(lines), "a block was answered twice"
    return found


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of an examination that nothing interrupted; beside it what was printed."""
    out = tmp_path_factory.mktemp("whole")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["eval", *arguments(model, out)]) == 0
    (out / "printed").write_text(printed.getvalue())
    return out


def test_the_rows(whole):
    table = json.loads((whole / "results.json").read_text())["rows"]
    rows = {(row["label"], row["keep"]): row for row in table}
    signals = [f"ConsensusDrop(alpha={alpha})" for alpha in ("0.0", "1.0")]
    listed = [("Full", None), *((m, k) for m in ("ConsensusDrop", "deep") for k in (8, 3))]
    assert list(rows) == listed + [(name, k) for k in (8, 3) for name in signals]
    assert [row["listed"] for row in table] == [True] * 5 + [False] * 4

    full, ours, deep = rows["Full", None], rows["ConsensusDrop", 3], rows["deep", 8]
    assert rows["deep", 3]["reason"].startswith("keep must be more than 4 tokens of N=16")
    assert "accuracy" not in rows["deep", 3]
    assert full["tokens"] | {"text": 0} == {"text": 0, "before": 16, "after": 16, "average": 16}
    assert ours["tokens"]["after"] == ours["tokens"]["average"] == 3
    assert deep["tokens"]["after"] == 16
    assert deep["tokens"]["average"] == pytest.approx(8, abs=0.3)
    assert ours["prefill_flops"] < deep["prefill_flops"] < full["prefill_flops"]
    text = full["tokens"]["text"]
    assert full["kv_bytes"] == pytest.approx(2 * 4 * 32 * 4 * (16 + text))
    assert full["kv_bytes"] - ours["kv_bytes"] == pytest.approx(2 * 4 * 32 * 4 * 13)
    assert ours["selection_flops"] > 0
    assert all(row["seconds"] > 0 for row in table if not row["reason"])


def test_accuracies_and_baselines(whole):
    table = json.loads((whole / "results.json").read_text())["rows"]
    rows = {(row["label"], row["keep"]): row for row in table if not row["reason"]}
    said = {place[0]: record for place, record in recorded(whole).items() if place[1] == 0}
    truth = [q.answer for _, q in answers.draw(data.TEST, 0, 0, 8)]
    for row in rows.values():
        value, low, high = row["accuracy"]
        assert low < value < high
        assert row["types"].keys() == set(QUESTION_TYPES)
        assert value == pytest.approx(sum(kind[0] for kind in row["types"].values()) / 8)
        first = said[row["method"] or "Full"]
        assert first["right"] == "".join(
            str(int(word == answer)) for word, answer in zip(first["words"], truth, strict=True)
        )
    for label, keep in (("ConsensusDrop", 8), ("ConsensusDrop", 3), ("deep", 8)):
        row = rows[label, keep]
        signals = [rows[f"ConsensusDrop(alpha={alpha})", keep] for alpha in ("0.0", "1.0")]
        better = max(signals, key=lambda row: row["accuracy"][0])
        assert row["baseline"] == better["label"]
        assert row["gain"][0] == pytest.approx(row["accuracy"][0] - better["accuracy"][0])
        assert 0 < row["p"] <= 1
        ratio = row["accuracy"][0] / rows["Full", None]["accuracy"][0]
        assert row["retention"][0] == pytest.approx(ratio)
    assert len({record["right"] for record in said.values()}) > 1


def test_the_files(whole, model):
    report = json.loads((whole / "results.json").read_text())
    header, rows = report["header"], report["rows"]
    assert header["model"] == str(model)
    assert (header["questions"], header["seed"], header["split"]) == (32, 0, "test")
    assert header["versions"].keys() == {"consensusdrop_kernels", "python", "torch", "transformers"}
    assert header["commits"]
    assert header["date"].startswith("20")
    flat = csv_rows(whole)
    assert len(flat) == len(rows) == 9
    assert float(flat[2]["accuracy_high"]) == rows[2]["accuracy"][2]
    assert float(flat[2]["tokens_after"]) == 3
    assert float(flat[2]["relation"]) == rows[2]["types"]["relation"][0]
    for name in ("pareto.png", "types.png"):
        with Image.open(whole / name) as picture:
            assert min(picture.size) > 400
    printed = (whole / "printed").read_text().splitlines()
    assert printed[0].split()[:3] == ["method", "keep", "tokens"]
    assert len(printed) == 1 + len(rows)
    assert printed[-1].startswith("deep at 3: keep must be more than")


@pytest.fixture
def undrawn(monkeypatch):
    """Spares the pictures, a second of every examination."""
    monkeypatch.setattr(evaluate.plots, "draw", lambda *_: None)


class Killed(BaseException):
    """As sudden as a signal: nothing in the harness handles it."""


@pytest.mark.parametrize("after", [1, 9, 25])
def test_after_a_kill_it_goes_on_to_the_same_result(
    whole, model, tmp_path, undrawn, monkeypatch, after
):
    out = tmp_path / "killed"
    answer = answers.Examiner.answer
    left = [after]

    def mortal(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return answer(*args)

    with monkeypatch.context() as context:
        context.setattr(answers.Examiner, "answer", mortal)
        with pytest.raises(Killed):
            evaluate.main(arguments(model, out))
    written = recorded(out)
    assert 0 < len(written) <= after
    assert not (out / "results.csv").exists()
    with (out / "answers" / "0.jsonl").open("a") as file:
        file.write('{"run": "Full", "blo')
    left[0] = 10**9
    asked = []
    monkeypatch.setattr(
        answers.Examiner, "answer", lambda *a: asked.append((a[1].key, a[2].number)) or answer(*a)
    )
    assert evaluate.main(arguments(model, out)) == 0
    assert not set(asked) & set(written), "what was answered is not asked again"
    assert untimed(out) == untimed(whole)


def test_more_methods_and_questions_join_a_folder(model, tmp_path, whole, undrawn, capsys):
    out = tmp_path / "more"
    few = arguments(model, out, "--methods", "ConsensusDrop", "--questions", "16")
    assert evaluate.main(few) == 0
    assert evaluate.main(arguments(model, out)) == 0
    assert untimed(out) == untimed(whole)
    for more, what in (
        (("--seed", "1"), "seed 0, not 1"), (("--batch", "4"), "batch 8, not 4"),
        (("--split", "validation"), "split 'test', not 'validation'"),
    ):  # fmt: skip
        assert evaluate.main(arguments(model, out, *more)) == 2
        assert f"holds answers of {what}" in capsys.readouterr().err


def test_two_processes_find_what_one_does(whole, model, tmp_path, undrawn, monkeypatch, capsys):
    """This process is the first of two, as torchrun would start them."""
    out = tmp_path / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "python_tests.accuracy.team", *arguments(model, out)]
    second = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | shared | {"RANK": "1", "LOCAL_RANK": "1"},
    )  # fmt: skip
    for name, value in shared.items():
        monkeypatch.setenv(name, value)
    try:
        assert evaluate.main(arguments(model, out)) == 0
        said = second.communicate(timeout=300)
    finally:
        second.kill()
        PartialState._reset_state()
    assert (second.returncode, said[0]) == (0, ""), said
    assert capsys.readouterr().out.startswith("method")
    assert untimed(out) == untimed(whole)
    assert json.loads((out / "results.json").read_text())["header"]["processes"] == 2
    one = json.loads((whole / "results.json").read_text())
    assert one["header"]["processes"] == 1
    mine, theirs = (
        {json.loads(line)["block"] for line in path.read_text().splitlines()}
        for path in sorted((out / "answers").glob("*.jsonl"))
    )
    assert (mine, theirs) == ({0, 2}, {1, 3})
    assert recorded(out) == recorded(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--questions", "12"), "--questions must be a multiple of 8 .* got 12$"),
        (("--questions", "1000000"), "up to 2048, got 1000000$"),
        (("--seed", "-1"), r"--seed must be in 0\.\.127, got -1$"),
        (("--batch", "0"), r"--batch must be in 1\.\.8, got 0$"),
        (("--keep", "8,many"), "--keep: must be counts such as 32 .* got 8,many$"),
        (("--keep", "1.5"), "--keep: must be counts"),
        (("--threads", "0"), "--threads: must be a whole number"),
        (("--methods", "Best"), "--methods must be of AdaFV, .* got Best$"),
        (("--baseline", "Best"), "--methods must be of AdaFV, .* got Best$"),
        (("--device", "meta"), "--device meta"),
        (("--model", "no/such/folder"), "can't load model no/such/folder: "),
    ],
)
def test_refusals(model, tmp_path, capsys, more, message):
    try:
        code = cli.main(["eval", *arguments(model, tmp_path / "out", *more)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.match(f"cdrop eval: .*{message}", err.strip())


def test_without_the_repository_it_says_where_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "cdrop" / "cli.py"))
    assert cli.main(["eval", "--out", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("cdrop eval: the accuracy benchmark is in the repository, not in")
    assert err.count("\n") == 1
