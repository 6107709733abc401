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
