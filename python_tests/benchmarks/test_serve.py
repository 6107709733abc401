"""The load generator: batches, what counts, and what it reports."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import serve
from benchmarks.accuracy.runs import parse_methods
from benchmarks.end_to_end import models


@pytest.fixture(scope="module")
def tiny() -> models.Subject:
    return models.Subject("tiny", "cpu")


class Slow:
    """Answers a batch in a hundredth of a second, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def generate(self, inputs, tokens):
        time.sleep(0.01)
        if self.error:
            raise self.error


def test_waiting_requests_run_together_up_to_a_limit(tiny):
    options = serve.Options((), requests=4, max_batch=3)
    prompts = [tiny.request(at) for at in range(4)]
    found, batches = serve.load(tiny, Slow(), 6, options, prompts)
    assert len(found) == 6 * 4
    assert max(batches) == 3
    assert sum(batches) == len(found)  # the first request of each client is not among them
    latencies = [one.back - one.sent for one in found]
    assert min(latencies) >= 0.01
    assert sorted(latencies)[12] >= 0.02  # half of six that take turns in two batches wait for one


def test_one_client_never_shares_a_batch(tiny):
    options = serve.Options((), requests=3)
    found, batches = serve.load(tiny, Slow(), 1, options, [tiny.request(0)])
    assert batches == [1, 1, 1]
    assert all(a.back <= b.sent for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("clients", [1, 3])
def test_an_error_reaches_whoever_waits(tiny, clients):
    broken = Slow(ValueError("too long"))
    with pytest.raises(RuntimeError, match="a request failed: too long"):
        serve.load(tiny, broken, clients, serve.Options(()), [tiny.request(0)])


def test_the_program_writes_its_rows(tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = (
        "--model tiny --keep 16 --concurrency 1,2 --requests 1 --new-tokens 2 --device cpu "
        f"--threads 1 --out {tmp_path}"
    )
    try:
        assert serve.main(arguments.split()) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "serve.json").read_text())["rows"]
    names = ["Full", "Random 16", "ConsensusDrop 16"]
    assert [(row["clients"], row["name"]) for row in rows] == [
        (n, x) for n in (1, 2) for x in names
    ]
    for row in rows:
        assert row["requests_per_s"] > 0
        assert row["tokens_per_s"] == 2 * row["requests_per_s"]
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"]
        assert 1 <= row["mean_batch"] <= row["clients"]
    assert rows[0]["of_full"] == rows[3]["of_full"] == 1
    assert "| 2 | ConsensusDrop | 16 |" in capsys.readouterr().out
    assert {path.name for path in Path(tmp_path).iterdir()} == {
        "serve.json",
        "serve.md",
        "serve.png",
    }


def test_a_method_that_can_t_run_has_a_reason(tiny):
    options = serve.Options(tuple(parse_methods("PyramidDrop")), (8,), (1,), 1, 1, 1)
    rows = serve.run(tiny, options)["rows"]
    assert not rows[0]["reason"]
    assert "before the first stage" in rows[1]["reason"]
    assert rows[1]["requests_per_s"] is None


def test_what_was_found_is_handed_over_after_each_number_of_clients(tiny):
    saved: list[int] = []
    options = serve.Options(tuple(parse_methods("Random")), (8,), (1, 2), 1, 2, 1)
    serve.run(tiny, options, lambda found: saved.append(len(found["rows"])))
    assert saved == [2, 4]
