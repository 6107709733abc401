"""`make gpu` without a GPU: its parts one by one, what fails, and what is kept of earlier runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.cases import CASES

ROOT = Path(__file__).parents[2]
MICRO = [f"micro-{kind}" for kind in CASES]
WHOLE = ["e2e", "e2e-batch32", "e2e-flash", "e2e-next", "e2e-qwen"]
EVERY = [
    "build", "tests", "sanitize", "bench", *MICRO, "growth", *WHOLE, "serve", "hf", "profile"
]  # fmt: skip


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Runs `gpu.py --device cpu` with these commands in place of the real ones."""

    def call(commands: dict[str, tuple[list[str], int]]) -> tuple[int, dict[str, dict]]:
        monkeypatch.setattr(gpu, "parts", lambda device, out, chosen: commands)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--results", str(tmp_path)])
        code = gpu.main()
        (summary,) = tmp_path.glob("*/summary.json")
        return code, json.loads(summary.read_text())["parts"]

    return call


def python(text: str, limit: int = 20) -> tuple[list[str], int]:
    return [sys.executable, "-c", text], limit


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_a_failing_part_is_reported_and_the_next_still_runs(main):
    code, parts = main(
        {
            "build": python("print('x'); raise SystemExit(3)"),
            "tests": python("import time; time.sleep(30)", 1),
            "sanitize": (["bash", "-c", "echo no such tool; exit 2"], 20),
            "micro": python("raise SystemExit(2)"),
            "bench": python(f"print('fine: {ROOT}/benchmarks')"),
        }
    )
    assert code == 1
    verdicts = {name: part["verdict"] for name, part in parts.items()}
    assert verdicts == {
        "build": "failed", "tests": "failed", "sanitize": "not run", "micro": "failed",
        "bench": "ok",
    }  # fmt: skip
    assert parts["build"]["exit_code"] == 3
    assert parts["tests"]["exit_code"] == "over 1 s"
    assert parts["sanitize"]["last_line"] == "no such tool"
    assert parts["bench"]["last_line"] == "fine: benchmarks"  # nobody's folders in results


def test_out_of_time_is_neither_an_error_nor_a_success(main, capsys):
    late = f"print({gpu.unreached('an op, B1')!r}); print('the end'); raise SystemExit(75)"
    code, parts = main({"bench": python(late)})
    assert code == 0
    assert parts["bench"]["verdict"] == "out of time"
    assert parts["bench"]["out_of_time"] == ["an op, B1"]
    assert parts["bench"]["last_line"] == "the end"
    assert "bench              out of time (1 left)" in capsys.readouterr().out
    code, parts = main({"bench": python(late), "micro": python("raise SystemExit(1)")})
    assert code == 1
    assert parts["micro"]["out_of_time"] == []


def test_a_part_of_an_earlier_run_stays_with_its_commit_until_it_runs_again(main, monkeypatch):
    monkeypatch.setattr(gpu, "header", lambda device: {"device": "cpu", "commit": "one"})
    assert main({"build": python("print(1)"), "bench": python("print(1)")})[0] == 0
    monkeypatch.setattr(gpu, "header", lambda device: {"device": "cpu", "commit": "two"})
    code, parts = main({"bench": python("print(2)")})
    assert code == 0
    assert {name: part["commit"] for name, part in parts.items()} == {
        "build": "one",
        "bench": "two",
    }
    assert [part["last_line"] for part in parts.values()] == ["1", "2"]


def test_where_no_part_could_be_run_the_exit_code_says_so(main):
    assert main({"profile": (["bash", "-c", "exit 2"], 20)})[0] == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_parts_and_their_time(tmp_path, device):
    default = gpu.parts(device, tmp_path, [])
    assert list(default) == EVERY[:4]
    assert sum(limit for _, limit in default.values()) < 540
    assert list(gpu.parts(device, tmp_path, ["all"])) == EVERY
    assert list(gpu.parts(device, tmp_path, ["micro", "build"])) == [*MICRO, "build"]
    chosen = gpu.parts(device, tmp_path, ["serve", "bench"])
    assert list(chosen) == ["serve", "bench"]
    assert all(limit < 540 for _, limit in chosen.values())
    with pytest.raises(ValueError, match="unknown part nothing: there is build, .*, micro, all"):
        gpu.parts(device, tmp_path, ["nothing"])


@pytest.fixture
def everything(monkeypatch):
    """As if all packages were there."""
    monkeypatch.setattr(gpu, "needing", lambda modules, command: command)


def test_parts_that_measure_write_files_of_their_own_and_end_in_time(tmp_path, everything):
    """By themselves: what would be killed at its limit would leave nothing behind."""
    written = set()
    for name in ("bench", *MICRO, *WHOLE):
        command, limit = gpu.parts("cuda", tmp_path, [name])[name]
        assert float(command[command.index("--seconds") + 1]) < limit
        written |= {word for word in command if str(tmp_path) in word}
    assert len(written) == 1 + len(MICRO) + len(WHOLE)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_and_what_is_measured_of_them(tmp_path, everything, name):
    pytest.importorskip("transformers")
    from benchmarks import e2e
    from benchmarks.end_to_end.models import RANDOM

    command, _ = gpu.parts("cuda", tmp_path, [name])[name]
    args = e2e._parser("e2e").parse_args(command[2:])
    assert args.model in RANDOM
    assert (args.model, ",".join(map(str, args.batch)), *args.attention) == gpu.WHOLE[name]
    assert args.keep == (64, 128, 192)


@pytest.mark.parametrize(
    ("part", "module", "package"),
    [
        ("micro-select", "pytest_benchmark", "pytest-benchmark"),
        ("e2e-next", "transformers", "transformers"),
        ("e2e-flash", "flash_attn", "flash-attn"),
        ("serve", "transformers", "transformers"),
    ],
)
def test_a_part_without_its_package_is_not_run(tmp_path, monkeypatch, part, module, package):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name != module or None)
    command, limit = gpu.parts("cuda", tmp_path, [part])[part]
    found = gpu.run(part, command, limit, tmp_path)
    assert (found["verdict"], found["last_line"]) == ("not run", f"{package} is not installed")


@pytest.mark.parametrize("name", EVERY)
def test_the_files_a_part_names_are_there(tmp_path, everything, name):
    command, _ = gpu.parts("cuda", tmp_path, [name])[name]
    named = [word for part in command for word in part.split() if word.endswith((".py", ".sh"))]
    named += [word for word in command if word.startswith("python_tests")]
    assert [word for word in named if not (ROOT / word).exists()] == []


def test_a_part_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "sanitize", "profile", "--device", "cpu"]
    env = os.environ | {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    (path,) = tmp_path.glob("*/summary.json")
    parts = json.loads(path.read_text())["parts"]
    for tool, name in (("compute-sanitizer", "sanitize"), ("ncu", "profile")):
        here = parts[name]["last_line"]
        assert here.startswith((f"{tool} is not on the PATH", "no GPU that the torch of"))
    assert done.returncode == 2
