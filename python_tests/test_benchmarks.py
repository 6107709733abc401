"""The GPU benchmarks' code, exercised on the CPU so that it works on the day there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True)


def test_rows_hold_what_they_should(tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--small", "--dtype", "float32", "--only", "merge"]
    done = run("gpu_ops.py", *arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["copy_bandwidth"] > 0
    assert [row["contender"] for row in found["rows"]] == ["cdrop", "plain torch"]
    x, metric, index = 256 * 512 * 4, 256 * 64 * 4, 32 * 8
    tokens, assign, size = 32 * 512 * 4, 256 * 8, 32 * 4
    for row in found["rows"]:
        assert row["bytes"] == x + metric + index + tokens + assign + size
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
    assert found["rows"][0]["ratio"] == 1


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_cases
    import gpu_ops

    case = next(gpu_cases.merge_cases("cpu", torch.float32, small=True))
    inputs = case.make()
    gpu_ops.check(case, inputs)
    calls = iter(range(2))

    def wrong_the_first_time(i):
        tokens, assign, size = case.ours(i)
        return (tokens * 2 if next(calls) == 0 else tokens), assign, size

    broken = gpu_cases.Case("token_merge", "", case.make, wrong_the_first_time, {})
    with pytest.raises(AssertionError, match="relative error"):
        gpu_ops.check(broken, inputs)


@pytest.mark.parametrize(
    "kind", ["saliency", "select", "merge", "varlen", "similarity", "split", "greedy"]
)
def test_a_baseline_computes_the_same_thing(monkeypatch, kind):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_cases

    torch.manual_seed(0)
    case = next(gpu_cases.CASES[kind]("cpu", torch.float32, small=True))
    inputs = case.make()
    ours = case.ours(inputs)
    ours = ours[0] if isinstance(ours, tuple) else ours
    plain = next(call for name, call in case.baselines.items() if name.startswith("plain"))
    torch.testing.assert_close(plain(inputs), ours, rtol=2e-4, atol=1e-6)


def test_the_profile_target_runs_every_op():
    done = run("profile/profile_target.py", "--once", "--device", "cpu")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run("gpu.py")
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_a_failing_part_is_reported_and_the_next_still_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    commands = {
        "build": ([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 20),
        "tests": ([sys.executable, "-c", "import time; time.sleep(30)"], 1),
        "bench": ([sys.executable, "-c", "print('fine')"], 20),
    }
    monkeypatch.setattr(gpu, "parts", lambda device, out, chosen: commands)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--results", str(tmp_path)])
    assert gpu.main() == 1
    (summary,) = tmp_path.glob("*/summary.json")
    parts = json.loads(summary.read_text())["parts"]
    assert [part["ok"] for part in parts.values()] == [False, False, True]
    assert parts["build"]["exit_code"] == 3
    assert parts["tests"]["exit_code"] == "over 1 s"
    assert parts["bench"]["last_line"] == "fine"
