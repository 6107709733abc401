"""Everything a machine with a GPU should verify, in one command: `make gpu`.

    python benchmarks/gpu.py                    # build, tests, sanitize, bench: under nine minutes
    python benchmarks/gpu.py e2e [serve ...]    # each part by its name, under nine minutes each
    python benchmarks/gpu.py micro              # the parts micro-..., one for each op
    python benchmarks/gpu.py all                # every part, one after the other
    python benchmarks/gpu.py ... --device cpu   # the same code, small, where there is no GPU

Uses the Python that runs it, with its torch and triton; builds in place, installs nothing, needs no
network. A part that fails, or whose tool is missing, is reported and the next one still runs. One
that stops by itself because its time is over is "out of time": what it did not reach is named, and
what it has is written; one that has to be stopped failed. Writes
`benchmarks/results/<device>/summary.json`, where parts of earlier runs stay, and what each part
leaves beside it; `cdrop report` makes tables of that. The environment variable CDROP_COMMIT names
the commit where the sources are no git checkout.
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
#: What a command ends with that did all it could in its time, but not all there is (EX_TEMPFAIL).
OUT_OF_TIME = 75
#: The kinds of ops in `cases.py`; each is a part of its own of pytest-benchmark.
OPS = ("select_merge", "saliency", "select", "merge", "varlen", "similarity", "split", "greedy")
#: Model, batches and attention of the parts that time whole models.
WHOLE = {
    "e2e": ("llava-1.5-7b", "1,8", "sdpa"),
    "e2e-batch32": ("llava-1.5-7b", "32", "sdpa"),
    "e2e-flash": ("llava-1.5-7b", "1,8", "flash"),
    "e2e-next": ("llava-next-7b", "1", "sdpa"),
    "e2e-qwen": ("qwen2.5-vl-7b", "1", "sdpa"),
}
#: Several parts by one name; `all` is every part there is.
GROUPS = {"micro": [f"micro-{op}" for op in OPS]}


def unreached(name: str) -> str:
    """The line that says of something in a part that its time was over."""
    return f"out of time: {name}"


def needing(modules: dict[str, str], command: list[str]) -> list[str]:
    """The command, or one that says which of the modules, by the names of their packages, is
    missing."""
    for module, package in modules.items():
        if importlib.util.find_spec(module) is None:
            return ["bash", "-c", f"echo {package} is not installed; exit {MISSING}"]
    return command


def commands(device: str, out: pathlib.Path, seconds: int) -> dict[str, list[str]]:
    """The command of every part; `seconds` is what the part `bench` has."""
    python, gpu = sys.executable, device == "cuda"
    pytest = [python, "-m", "pytest", "-q"]
    spread = []
    if gpu and importlib.util.find_spec("xdist"):  # most of the time is compilation
        spread = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    ours = ["--device", device]
    small = [] if gpu else ["--small", "--dtype", "float32"]
    served = ["--model", "llava-1.5-7b", "--keep", "64,192"]
    models, tokens = ["python_tests/hf", "python_tests/methods"], []
    if not gpu:
        served = ["--model", "tiny", "--keep", "49", "--concurrency", "1,2", "--requests", "2"]
        models, tokens = ["python_tests/hf/test_signals.py"], ["--tokens", "256", "512"]
    micro = {
        f"micro-{op}": needing(
            {"pytest_benchmark": "pytest-benchmark"},
            [*pytest, "benchmarks/test_ops.py", "--benchmark-only", "--only", op, *ours, *small,
             "--seconds", str(LIMIT - 120), f"--benchmark-json={out / f'micro-{op}.json'}"],
        )
        for op in OPS
    }  # fmt: skip
    whole = {name: _whole(name, device, out) for name in WHOLE}
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
        **micro,
        "growth": [
            python, "benchmarks/growth.py", *ours, "--out", str(out / "growth.json"),
            "--plot", str(out / "growth.png"), *tokens,
        ],
        **whole,
        "serve": needing(
            {"transformers": "transformers"},
            [python, "benchmarks/serve.py", *ours, *served, "--out", str(out / "serve")],
        ),
        "hf": [*pytest, *spread, *models],
        "profile": [
            "bash", "-ec",
            "for op in select_merge attention_saliency; do "
            'bash benchmarks/profile/profile_ncu.sh --op "$op" --tokens 576 --out "$0"; done',
            str(out / "profile"),
        ],
    }  # fmt: skip


def _whole(name: str, device: str, out: pathlib.Path) -> list[str]:
    """The command of a part that times a whole model."""
    model, batches, attention = WHOLE[name]
    modules = {"transformers": "transformers"}
    if attention == "flash":
        modules |= {"flash_attn": "flash-attn"}
    size = ["--model", model, "--batch", batches, "--keep", "64,128,192", "--new-tokens", "16"]
    if device == "cpu":
        size = ["--model", "tiny", "--keep", "49", "--repeats", "2"]
    return needing(modules, [
        sys.executable, "benchmarks/e2e.py", "--device", device, *size, "--attention", attention,
        "--seconds", str(LIMIT - 60), "--out", str(out / name),
    ])  # fmt: skip


def parts(device: str, out: pathlib.Path, chosen: list[str]) -> dict[str, tuple[list[str], int]]:
    """Command and time limit in seconds of each chosen part or group of parts, of those of `SHARES`
    without a choice.

    Raises:
        ValueError: there is no such part.
    """
    seconds = LIMIT if chosen else SHARES["bench"]
    known = commands(device, out, seconds)
    groups = GROUPS | {"all": list(known)}
    unknown = set(chosen) - {*known, *groups}
    if unknown:
        names = ", ".join([*known, *groups])
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: there is {names}")
    if not chosen:
        return {name: (known[name], limit) for name, limit in SHARES.items()}
    return {part: (known[part], LIMIT) for name in chosen for part in groups.get(name, [name])}


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
    verdicts: dict[int | None, str] = {0: "ok", OUT_OF_TIME: "out of time"}
    if command[0] == "bash":
        verdicts[MISSING] = "not run"
    begin = unreached("")
    return {
        "verdict": verdicts.get(code, "failed"),
        "exit_code": code if code is not None else f"over {limit} s",
        "seconds": round(time.monotonic() - start, 1),
        "last_line": lines[-1].replace(f"{ROOT}{os.sep}", "") if lines else "",
        "out_of_time": [line.removeprefix(begin) for line in lines if line.startswith(begin)],
    }


def said(part: dict[str, Any]) -> str:
    """The verdict on a part in a few words: `failed (3)`, `out of time (12 left)`."""
    if part["verdict"] == "out of time":
        return f"out of time ({len(part['out_of_time'])} left)"
    return part["verdict"] + (f" ({part['exit_code']})" if part["verdict"] == "failed" else "")


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
        0, or 1 if a part failed, or 2 if none could be run. A part that was out of time failed in
        nothing.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "parts", nargs="*",
        help=f"{', '.join(SHARES)} (all four where none is named), micro or "
        f"{', '.join(GROUPS['micro'])}, growth, {', '.join(WHOLE)}, serve, hf, profile, or all",
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
        print(f"{name:18} {said(part):24} {part['seconds']:6.1f} s  {part['last_line']}")
    print(f"written to {out}")
    verdicts = {part["verdict"] for part in mine.values()}
    return 1 if "failed" in verdicts else 0 if verdicts & {"ok", "out of time"} else 2


if __name__ == "__main__":
    sys.exit(main())
