"""Everything a machine with a GPU should verify, in one command: `make gpu`.

    python benchmarks/gpu.py                    # build, tests, sanitize, bench: under nine minutes
    python benchmarks/gpu.py e2e [serve ...]    # each part by its name, under nine minutes each
    python benchmarks/gpu.py all                # every part, one after the other
    python benchmarks/gpu.py ... --device cpu   # the same code, small, where there is no GPU

Uses the Python that runs it, with its torch and triton; builds in place, installs nothing, needs no
network. A part that fails, or whose tool is missing, is reported and the next one still runs.
Writes `benchmarks/results/<device>/summary.json`, where parts of earlier runs stay, and what each
part leaves beside it; `cdrop report` makes tables of that. The environment variable CDROP_COMMIT
names the commit where the sources are no git checkout.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-colreduce")


def device_name(device: str) -> str:
    """A folder's name for the device: `h200`, `cpu-x86_64`."""
    if device == "cpu":
        return "cpu-" + platform.machine()
    import torch

    name = torch.cuda.get_device_name().lower()
    return re.sub(r"[^a-z0-9]+", "-", name.replace("nvidia", "").replace("amd", "")).strip("-")


def header(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device_name(device),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output(["git", "describe", "--always", "--dirty", "--abbrev=12"])
        or os.environ.get("CDROP_COMMIT"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


#: Parts of a run that names none, and the seconds each has.
SHARES = {"build": 90, "tests": 210, "sanitize": 90, "bench": 140}
#: The seconds of a part that is named.
LIMIT = 530
#: What a command that begins with bash ends with where a tool is missing.
MISSING = 2


def commands(device: str, out: pathlib.Path, seconds: int) -> dict[str, list[str]]:
    """The command of every part; `seconds` is what the part `bench` has."""
    python, gpu = sys.executable, device == "cuda"
    pytest = [python, "-m", "pytest", "-q"]
    spread = []
    if gpu and importlib.util.find_spec("xdist"):  # most of the time is compilation
        spread = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    ours = ["--device", device]
    small = [] if gpu else ["--small", "--dtype", "float32"]
    model = ["--model", "llava-1.5-7b", "--keep", "64,192"]
    batches = ["--batch", "1,8", "--new-tokens", "16"] if gpu else []
    models = ["python_tests/hf", "python_tests/methods"]
    rounds, load, tokens = [], [], []
    if not gpu:
        model, rounds = ["--model", "tiny", "--keep", "49"], ["--repeats", "2"]
        load, tokens = ["--concurrency", "1,2", "--requests", "2"], ["--tokens", "256", "512"]
        models = ["python_tests/hf/test_signals.py"]
    micro = [*pytest, "benchmarks", "--benchmark-only", *ours, *small,
             f"--benchmark-json={out / 'micro.json'}"]  # fmt: skip
    if importlib.util.find_spec("pytest_benchmark") is None:
        micro = ["bash", "-c", f"echo pytest-benchmark is not installed; exit {MISSING}"]
    return {
        "build": [python, "setup.py", "build_ext", "--inplace"],
        "tests": [
            *pytest, *spread, "--maxfail", "50", "-k", "triton or cuda" if gpu else "cpu",
            "python_tests/ops", "python_tests/device",
        ],
        "sanitize": ["bash", "benchmarks/profile/sanitize.sh"],
        "bench": [
            python, "benchmarks/gpu_ops.py", *ours, *small,
            "--seconds", str(seconds - 20), "--out", str(out / "ops.json"),
        ],
        "micro": micro,
        "growth": [
            python, "benchmarks/growth.py", *ours, "--out", str(out / "growth.json"),
            "--plot", str(out / "growth.png"), *tokens,
        ],
        "e2e": [python, "benchmarks/e2e.py", *ours, *model, *batches, *rounds,
                "--out", str(out / "e2e")],
        "serve": [
            python, "benchmarks/serve.py", *ours, *model, *load, "--out", str(out / "serve"),
        ],
        "hf": [*pytest, *spread, *models],
        "profile": [
            "bash", "-ec",
            "for op in select_merge attention_saliency; do "
            'bash benchmarks/profile/profile_ncu.sh --op "$op" --tokens 576 --out "$0"; done',
            str(out / "profile"),
        ],
    }  # fmt: skip


def parts(device: str, out: pathlib.Path, chosen: list[str]) -> dict[str, tuple[list[str], int]]:
    """Command and time limit in seconds of each chosen part, of those of `SHARES` without a choice.

    Raises:
        ValueError: there is no such part.
    """
    seconds = LIMIT if chosen else SHARES["bench"]
    known = commands(device, out, seconds)
    unknown = set(chosen) - {*known, "all"}
    if unknown:
        raise ValueError(
            f"unknown part {', '.join(sorted(unknown))}: there is {', '.join(known)}, all"
        )
    if not chosen:
        return {name: (known[name], limit) for name, limit in SHARES.items()}
    return {name: (known[name], LIMIT) for name in (known if "all" in chosen else chosen)}


def run(name: str, command: list[str], limit: int, out: pathlib.Path) -> dict[str, Any]:
    """Run one part; its output goes to the screen and to a file."""
    print(f"=== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    tools = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "PATH": tools,  # cmake and ninja stand beside the Python that has them
    }
    log = out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = None
    lines = log.read_text(errors="replace").rstrip().splitlines()
    print("\n".join(lines[-25:]), flush=True)
    not_run = code == MISSING and command[0] == "bash"
    return {
        "verdict": "ok" if code == 0 else "not run" if not_run else "failed",
        "exit_code": code if code is not None else f"over {limit} s",
        "seconds": round(time.monotonic() - start, 1),
        "last_line": lines[-1].replace(f"{ROOT}{os.sep}", "") if lines else "",
    }


def _earlier(path: pathlib.Path) -> dict[str, Any]:
    """The parts that a summary holds already."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())["parts"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


def main() -> int:
    """Run the parts named on the command line.

    Returns:
        0, or 1 if a part failed, or 2 if none could be run.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "parts", nargs="*",
        help="build, tests, sanitize, bench (all four where none is named), micro, growth, e2e, "
        "serve, hf, profile, or all",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no GPU that torch can use: try --device cpu", file=sys.stderr)
            return 2
    out = options.results.resolve() / device_name(options.device)
    try:
        chosen = parts(options.device, out, options.parts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    about = header(options.device)
    every, mine = _earlier(path), {}
    for name, (command, limit) in chosen.items():
        mine[name] = every[name] = run(name, command, limit, out) | about
        path.write_text(json.dumps({"device": about["device"], "parts": every}, indent=1) + "\n")
    for name, part in mine.items():
        verdict = part["verdict"] + (f" ({part['exit_code']})" if part["exit_code"] else "")
        print(f"{name:10} {verdict:18} {part['seconds']:6.1f} s  {part['last_line']}")
    print(f"written to {out}")
    verdicts = {part["verdict"] for part in mine.values()}
    return 1 if "failed" in verdicts else 0 if "ok" in verdicts else 2


if __name__ == "__main__":
    sys.exit(main())
