"""The op microbenchmarks: their cases, their gate, and both programs that time them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the package

from benchmarks import cases, gpu, gpu_ops, memory, timing  # noqa: E402

SMALL = [case for kind in cases.CASES for case in cases.CASES[kind]("cpu", torch.float32, True)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # no part of the tests' own processes
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_op_has_a_case():
    from consensusdrop_kernels.ops import SCHEMAS

    for device in ("cpu", "cuda"):
        found, _ = cases.fitting(device, small=False)
        assert {case.op for case in found.values()} == set(SCHEMAS)
    assert {case.op for case in SMALL} == set(SCHEMAS)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_baseline_computes_the_same_thing(case):
    """All but those that choose or read without looking."""
    torch.manual_seed(0)
    inputs = case.make("cpu")
    cases.check(case, inputs)
    ours = case.ours(inputs)
    ours = ours[0] if isinstance(ours, tuple) else ours
    computing = {n: c for n, c in case.baselines.items() if n.startswith(("plain torch", "eager"))}
    assert computing
    for call in computing.values():
        torch.testing.assert_close(call(inputs), ours, rtol=2e-4, atol=1e-6)


def test_random_tokens_are_as_many_and_distinct():
    for case in SMALL:
        if "random tokens" not in case.baselines:
            continue
        inputs = case.make("cpu")
        chosen = case.baselines["random tokens"](inputs)
        keep = case.options.get("keep", chosen.shape[1])
        assert chosen.shape[:2] == (1, keep)
        if chosen.dtype == torch.int64:
            assert (chosen.diff(dim=1) > 0).all()


def test_a_wrong_kernel_is_not_timed():
    case = next(c for c in SMALL if c.op == "token_merge")
    inputs = case.make("cpu")

    def doubled(i: Any) -> Any:
        tokens, assign, size = case.ours(i)
        return tokens * 2, assign, size

    def shifted(i: Any) -> Any:
        tokens, assign, size = case.ours(i)
        return tokens, assign.roll(1, 1), size

    cases.check(case, inputs)
    with pytest.raises(AssertionError, match="relative error"):
        cases.check(case, inputs, doubled)
    with pytest.raises(AssertionError, match="integers"):
        cases.check(case, inputs, shifted)


def test_what_does_not_fit_is_left_out_and_named(monkeypatch):
    big = cases.fused("cpu", torch.float32, 32, cases.NEXT, 160)
    assert cases.too_large(big, "cpu") == "3.4 GB of inputs, over 1"
    assert cases.too_large(big, "cuda") == ""
    monkeypatch.setattr(cases, "CASES", {"select_merge": lambda *_: iter([big])})
    found, left_out = cases.fitting("cpu", True, [torch.float32])
    assert found == {}
    assert left_out == [f"{big.name}: 3.4 GB of inputs, over 1"]
    large = cases.fused("cpu", torch.float32, 8, cases.LLAVA, 64)
    assert large.left_out == ("eager maps, 24 layers: 4.1 GB of maps",)
    assert len(large.make("meta")) == large.takes


def test_rotated_sets_are_copies_in_the_same_layout():
    case = next(c for c in SMALL if c.op == "select_merge")
    first, second, *_ = timing.rotated(lambda: case.make("cpu"))
    for a, b in zip(case.own(first), case.own(second), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert a.stride(-1) == b.stride(-1) == 1
    assert first[2].stride() == second[2].stride()
    assert not first[2].is_contiguous()


def test_a_slow_call_is_repeated_less_often():
    calls = []
    assert timing.within(0.0, lambda: calls.append(1), most=50) == 3
    assert timing.within(60.0, lambda: calls.append(1), most=50) == 50
    assert len(calls) == 2


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_peak_of_memory_is_seen():
    megabyte = 2**20

    def torch_scratch() -> None:
        torch.ones(8 * megabyte).sum()

    def other_scratch() -> int:
        return sum(memoryview(b"\1" * (32 * megabyte))[::4096])

    for call in (torch_scratch, other_scratch):
        call()  # what is freed here must not hide the next
        found = memory.peak_above(call, "cpu")
        assert abs(found - 32 * megabyte) <= memory.RESOLUTION["cpu"]
    assert memory.peak_above(lambda: None, "cpu") <= memory.RESOLUTION["cpu"]


def test_gpu_ops_writes_rows(tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--small", "--dtype", "float32", "--only", "merge"]
    done = run("benchmarks/gpu_ops.py", *arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["copy_bandwidth"] > 0
    contenders = [row["contender"] for row in found["rows"]]
    assert contenders[:2] == ["cdrop", "plain torch"]
    x, metric, index = 256 * 512 * 4, 256 * 64 * 4, 32 * 8
    tokens, assign, size = 32 * 512 * 4, 256 * 8, 32 * 4
    for row in found["rows"]:
        assert row["bytes"] == x + metric + index + tokens + assign + size
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
    assert found["rows"][0]["ratio"] == 1


def test_gpu_ops_says_what_it_had_no_time_for(tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--small", "--dtype", "float32", "--seconds", "0"]
    done = run("benchmarks/gpu_ops.py", *arguments, "--only", "merge", "--out", str(out))
    assert done.returncode == gpu.OUT_OF_TIME
    case = next(c for c in SMALL if c.op == "token_merge")
    assert done.stdout.splitlines() == [
        gpu.unreached(case.name), "0 timed, 0 failed, 1 out of time",
    ]  # fmt: skip
    (row,) = json.loads(out.read_text())["rows"]
    assert row == gpu_ops.described(case) | {"not_run": "out of time"}


def test_gpu_ops_has_a_case_of_each_op_before_the_second_of_any():
    made = list(gpu_ops.in_turn(cases.CASES, "cuda", torch.bfloat16, False))
    count = len(cases.CASES)
    assert len({case.op for case in made[:count]}) == count
    every = [c for kind in cases.CASES for c in cases.CASES[kind]("cuda", torch.bfloat16, False)]
    assert sorted(case.name for case in made) == sorted(case.name for case in every)


def test_gpu_ops_goes_on_after_a_contender_that_fails():
    case = next(c for c in SMALL if c.op == "token_merge")

    def failing(inputs: Any) -> None:
        raise ValueError("no")

    broken = dataclasses.replace(case, baselines={"bad": failing, **case.baselines})
    rows = list(gpu_ops.time_case(broken, "cpu", 1e9))
    assert {row["contender"]: row["error"] for row in rows if "error" in row} == {
        "bad": "ValueError: no"
    }
    assert rows[-1]["contender"] == list(case.baselines)[-1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pytest benchmarks` leaves of two ops at tiny sizes."""
    pytest.importorskip("pytest_benchmark")
    out = tmp_path_factory.mktemp("micro") / "bench.json"
    done = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_ops.py", "--small",
        "--device", "cpu", "--dtype", "float32", "-k", "consensus_select or token_merge",
        "--benchmark-only", f"--benchmark-json={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_pytest_benchmark_times_the_same_cases(results):
    rows = json.loads(results.read_text())["benchmarks"]
    for case in (c for c in SMALL if c.op in ("consensus_select", "token_merge")):
        group = [row for row in rows if row["group"] == case.name]
        assert [row["name"] for row in group] == list(case.contenders("cpu"))
        inputs = case.make("cpu")
        moved = cases.size(inputs) + cases.size(case.ours(inputs))
        for row in group:
            info = row["extra_info"]
            assert info["bytes"] == moved
            assert info["copy_share"] > 0
            assert info["peak_bytes"] is None or info["peak_bytes"] >= 0
        assert group[0]["extra_info"]["backend"] == cases.default_backend("cpu")


def test_pytest_benchmark_says_what_it_had_no_time_for():
    pytest.importorskip("pytest_benchmark")
    small = ["benchmarks/test_ops.py", "--small", "--device", "cpu", "--only", "merge"]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *small, "--seconds", "0")
    assert done.returncode == gpu.OUT_OF_TIME, done.stdout
    case = next(c for c in SMALL if c.op == "token_merge")
    said = [line for line in done.stdout.splitlines() if line.startswith(gpu.unreached(""))]
    assert said == [gpu.unreached(case.name)]
    count = len(case.contenders("cpu", compiled=False))
    assert done.stdout.splitlines()[-1].startswith(f"{count} skipped")


def test_without_pytest_benchmark_one_line_says_what_to_do():
    done = run("-m", "pytest", "-p", "no:benchmark", "-q", "benchmarks/test_ops.py")
    assert done.returncode == 4
    assert "install pytest-benchmark, or run benchmarks/gpu_ops.py" in done.stdout + done.stderr
