"""The profile scripts: what they call, what they read of it, and what they say where they can't."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.profile import ncu_summary

PROFILE = Path(__file__).parents[2] / "benchmarks" / "profile"
SCRIPTS = ("profile_ncu.sh", "profile_nsys.sh", "sanitize.sh")
TOOLS = {"profile_ncu.sh": "ncu", "profile_nsys.sh": "nsys", "sanitize.sh": "compute-sanitizer"}


def run(script, *arguments, **environment) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": sys.executable} | environment
    command = ["bash", str(PROFILE / script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def program(path: Path, text: str) -> Path:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture
def pretended(tmp_path) -> Path:
    """A Python that claims to have a GPU and profiles on the CPU what it is told to."""
    return program(
        tmp_path / "python",
        f'[ "$1" = -c ] && exit 0\ncase $1 in *profile_*) set -- "$@" --device cpu ;; esac\n'
        f'exec "{sys.executable}" "$@"\n',
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_tool_is_one_line_and_exit_code_2(script):
    tool = TOOLS[script]
    path = "/usr/bin:/bin"
    if shutil.which(tool, path=f"{path}:/usr/local/cuda/bin"):
        pytest.skip(f"{tool} is here")
    done = run(script, PATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{tool} is not on the PATH")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_a_missing_gpu_is_one_line_and_exit_code_2(script, tmp_path):
    tool = program(tmp_path / "tool", "exit 0\n")
    python = program(tmp_path / "python", "exit 1\n")
    done = run(script, NCU=str(tool), NSYS=str(tool), PYTHON=str(python))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"no GPU that the torch of {python} can use: nothing was run\n"


# As ncu writes them: a line for each launch after one of units; other lines may come first.
RAW = """==PROF== a line that is no table
"ID","Process ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","dram__bytes_read.sum",\
"dram__bytes_write.sum","launch__registers_per_thread",\
"l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",\
"sm__warps_active.avg.pct_of_peak_sustained_active","sm__maximum_warps_per_active_cycle_pct",\
"launch__shared_mem_per_block_static","launch__shared_mem_per_block_dynamic",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"
"","","","","","ns","%","byte","byte","register/thread","sector","%","%","byte","byte","","",""
"0","7","void first<int>(int, int)","(128, 1, 1)","(12, 2, 1)","4,000","50","1000000","500000",\
"40","4.1","30","50","0","2048","0.2","3.25","1.0"
"1","7","void first<int>(int, int)","(128, 1, 1)","(12, 2, 1)","2,000","70","3000000","500000",\
"40","4.1","30","50","0","2048","0.2","3.25","1.0"
"2","7","second","(64, 1, 1)","(1, 1, 1)","1000","n/a","","","32","","25","100","16","0","","",""
"""


def test_the_table_of_counters():
    lines = ncu_summary.table(ncu_summary.read(RAW.splitlines())).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in cells} - {0}) == 1
    assert cells[2] == [
        "`first<int>` 12 x 2 of 128", "2", "3.00", "60.0 %", "2.50", "-", "4.1 / -",
        "30 of 50 %", "40", "2.0", "long_scoreboard 3.2, barrier 0.2",
    ]  # fmt: skip
    assert cells[3] == [
        "`second` 1 of 64",
        "1",
        "1.00",
        "-",
        "-",
        "-",
        "- / -",
        "25 of 100 %",
        "32",
        "0.0",
        "-",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing here\n", "no line begins with"),
        (RAW.replace('"ns"', '"us"'), "times are in us: write the file with"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        ncu_summary.read(text.splitlines())


def test_ncu_is_called_as_documented_and_its_table_printed(tmp_path, pretended):
    """A stand-in for ncu notes its arguments, runs the program and hands out a table as above."""
    (tmp_path / "raw").write_text(RAW)
    ncu = program(
        tmp_path / "ncu",
        f"""if [ "$1" = --import ]; then cat "{tmp_path}/raw"; exit; fi
echo "$@" >"{tmp_path}/called"
while [ "$1" != --export ]; do shift; done
touch "$2.ncu-rep"; shift 2
"$@"
""",
    )
    options = ("--op", "consensus_select", "--tokens", "64", "--keep", "8", "--calls", "1")
    done = run(
        "profile_ncu.sh", *options, "--range", "cdrop@a", "--full", "--out", str(tmp_path / "out"),
        NCU=str(ncu), PYTHON=str(pretended),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text()
    for part in ("--profile-from-start off", "--nvtx --nvtx-include cdrop@a/", "--set full",
                 "--section WarpStateStats", ",".join(ncu_summary.METRICS)):  # fmt: skip
        assert part in called
    assert "`first<int>` 12 x 2 of 128" in done.stdout
    name = "consensus_select-tokens64-keep8-calls1"
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"{name}.{end}" for end in ("log", "md", "ncu-rep", "raw.csv")]
    assert "cdrop.consensus_select" in (tmp_path / "out" / f"{name}.log").read_text()


def test_forbidden_counters_are_one_line(tmp_path, pretended):
    ncu = program(tmp_path / "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1\n")
    done = run("profile_ncu.sh", "--out", str(tmp_path), NCU=str(ncu), PYTHON=str(pretended))
    assert done.returncode == 2
    assert done.stderr.startswith("ncu may not read the GPU's counters")
    assert done.stderr.count("\n") == 1


def test_nsys_is_called_as_documented(tmp_path, pretended):
    nsys = program(
        tmp_path / "nsys",
        f"""echo "$@" >>"{tmp_path}/called"
[ "$1" = profile ] || {{ echo "a table"; exit; }}
while [ "$1" != "{pretended}" ]; do shift; done
"$@"
""",
    )
    options = ("--op", "consensus_select", "--tokens", "64", "--keep", "8", "--calls", "1")
    done = run(
        "profile_nsys.sh", *options, "--out", str(tmp_path / "out"),
        NSYS=str(nsys), PYTHON=str(pretended),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    profile, stats, shown = (tmp_path / "called").read_text().splitlines()
    assert "--capture-range=cudaProfilerApi --capture-range-end=stop" in profile
    assert "--trace=cuda,nvtx" in profile
    for line in (stats, shown):
        assert line.startswith("stats --report cuda_gpu_kern_sum --report nvtx_gpu_proj_sum")
    assert "a table" in done.stdout
    log = tmp_path / "out" / "consensus_select-tokens64-keep8-calls1.log"
    assert "cdrop.consensus_select" in log.read_text()


def test_the_program_runs_every_op():
    command = [sys.executable, str(PROFILE / "profile_target.py"), "--once", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_model_program_shows_parts_and_steps():
    pytest.importorskip("transformers")
    environment = os.environ | {"CDROP_NVTX": "1", "PYTHONPATH": str(PROFILE.parents[1])}
    command = [sys.executable, str(PROFILE / "profile_model.py"), "--model", "tiny"]
    command += ["--keep", "49", "--calls", "2", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if line.strip()}
    for name in ("cdrop.prefill", "cdrop.encode", "cdrop.choose", "vision_tower", "language_model"):
        assert calls.get(name) == "2", name
