"""Everything a machine with a GPU should verify, in one command: `make gpu`.

    python benchmarks/gpu.py [build] [tests] [sanitize] [bench] [--device cpu]

Uses the Python that runs it, with its torch and triton; builds in place, installs nothing, needs no
network. A part that fails is reported and the next one still runs. Writes
`benchmarks/results/<device>/summary.json` and what each part leaves beside it. The whole run stays
under nine minutes: each part has a share of them, and all of them when it runs alone.
`--device cpu` runs the same code where there is no GPU, to see that it works.
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
        "commit": _output(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


#: Seconds of each part in a whole run.
SHARES = {"build": 90, "tests": 210, "sanitize": 90, "bench": 140}


def parts(device: str, out: pathlib.Path, chosen: list[str]) -> dict[str, tuple[list[str], int]]:
    """Command and time limit in seconds of each chosen part, of all where none is named."""
    python = sys.executable
    limits = {chosen[0]: sum(SHARES.values())} if len(chosen) == 1 else SHARES
    backends = "triton or cuda" if device == "cuda" else "cpu"
    small = ["--small", "--dtype", "float32"] if device == "cpu" else []
    spread = []
    if device == "cuda" and importlib.util.find_spec("xdist"):  # most of the time is compilation
        spread = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    commands = {
        "build": [python, "setup.py", "build_ext", "--inplace"],
        "tests": [
            python, "-m", "pytest", "-q", *spread, "--maxfail", "50", "-k", backends,
            "python_tests/ops", "python_tests/device",
        ],
        "sanitize": ["bash", "benchmarks/profile/sanitize.sh"],
        "bench": [
            python, "benchmarks/gpu_ops.py", "--device", device, *small,
            "--seconds", str(limits.get("bench", 0) - 20), "--out", str(out / "ops.json"),
        ],
    }  # fmt: skip
    return {name: (commands[name], limits[name]) for name in chosen or commands}


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
    return {
        "ok": code == 0,
        "exit_code": code if code is not None else f"over {limit} s",
        "seconds": round(time.monotonic() - start, 1),
        "last_line": lines[-1] if lines else "",
    }


def main() -> int:
    """Run the parts named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="build, tests, sanitize, bench (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no GPU that torch can use: try --device cpu", file=sys.stderr)
            return 2
    out = options.results.resolve() / device_name(options.device)
    out.mkdir(parents=True, exist_ok=True)
    unknown = set(options.parts) - set(SHARES)
    if unknown:
        print(f"unknown part {', '.join(sorted(unknown))}: there is {', '.join(SHARES)}",
              file=sys.stderr)  # fmt: skip
        return 2
    summary: dict[str, Any] = header(options.device) | {"parts": {}}
    for name, (command, limit) in parts(options.device, out, options.parts).items():
        summary["parts"][name] = run(name, command, limit, out)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name, part in summary["parts"].items():
        verdict = "ok" if part["ok"] else f"FAILED ({part['exit_code']})"
        print(f"{name:10} {verdict:16} {part['seconds']:6.1f} s  {part['last_line']}")
    print(f"written to {out}")
    return int(not all(part["ok"] for part in summary["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
