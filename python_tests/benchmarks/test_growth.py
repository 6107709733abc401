"""Cost growth: it runs at tiny sizes, stops where it should, and its slopes are slopes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the package

from benchmarks import growth  # noqa: E402


def test_it_runs_at_tiny_sizes(tmp_path):
    out, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    done = subprocess.run(
        [
            sys.executable, "benchmarks/growth.py", "--device", "cpu", "--out", str(out),
            "--plot", str(picture), "--tokens", "64", "128", "256",
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {"device", "driver", "versions", "commit", "date"} <= found["header"].keys()
    points = {(r["curve"], r["name"], r["tokens"]) for r in found["rows"] if r["us"] > 0}
    three = ("cdrop", "plain torch", "eager map")
    for curve in growth.CURVES:
        names = three[:2] if curve.endswith("square") else three
        assert {p for p in points if p[0] == curve} == {
            (curve, name, tokens) for name in names for tokens in (64, 128, 256)
        }
    assert len(found["slopes"]) == 8
    assert all(slope["time"] is not None for slope in found["slopes"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert growth.markdown(found).startswith("# Growth")


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_slope_is_the_power(power):
    points = [(n, 3 * n**power) for n in (2, 4, 8, 16, 32)]
    assert growth.slope(points) == pytest.approx(power)
    assert growth.slope([(1, 999.0), (2, 999.0), *points[2:]]) == pytest.approx(power)
    assert growth.slope(points[:2]) is None


def test_a_contender_stops_past_its_limit_and_says_so():
    curve = "attention_saliency, square"
    rows = list(growth.rows_of(curve, [64, 128], "cpu", torch.float32, 1e-9, 1.0))
    assert [(r["name"], r["tokens"]) for r in rows] == [("cdrop", 64), ("plain torch", 64)]
    assert all(r["reason"] == "stopped here: a call took over 1e-09 s" for r in rows)
    assert all(r["how"] == "one call" for r in rows)


def test_memory_is_a_limit_too():
    row = {"us": 1.0, "peak_bytes": 2 * 10**9}
    assert growth.over(row, 1.0, 1.0) == "stopped here: a call took over 1 GB"
    assert growth.over(row, 1.0, 2.0) == ""
    assert growth.over(row | {"peak_bytes": None}, 1.0, 1.0) == ""


def test_memory_below_what_can_be_seen_has_no_slope():
    rows = [
        {"curve": "c", "name": "n", "tokens": n, "us": float(n), "peak_bytes": 10, "reason": ""}
        for n in (2, 4, 8)
    ]
    (found,) = growth.slopes(rows, "cpu")
    assert found["time"] == pytest.approx(1)
    assert found["memory"] is None
