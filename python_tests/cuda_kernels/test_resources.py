"""The machine code of the CUDA C++ kernels holds what the design says, and nothing spills."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from consensusdrop_kernels import _C

from . import resources

pytestmark = pytest.mark.skipif(
    not _C.build_info()["cuda_compiler"], reason="built without nvcc: there are no CUDA kernels"
)


@pytest.fixture(scope="module")
def rows() -> list[resources.Row]:
    return resources.measure()


def test_every_architecture_is_there(rows):
    built = {f"sm_{a.split('-')[0]}" for a in _C.build_info()["cuda_architectures"].split()}
    assert {row.target for row in rows} == built
    assert {row.target for row in rows if row.kernel == "select_merge_cluster"} == {
        target for target in built if int(target[3:].rstrip("a")) >= 90
    }


def test_nothing_spills(rows):
    assert [row for row in rows if row.stack or row.local] == []


def test_512_threads_fit(rows):
    """65536 registers a multiprocessor, given out in steps of 8 a thread."""
    assert all(-(-row.registers // 8) * 8 * 512 <= 65536 for row in rows)


def test_the_instructions_of_the_design(rows):
    for row in rows:
        assert row.instructions["16-byte loads"] > 0, row
        assert row.instructions["tensor-core products"] > 0, row
        assert (row.instructions["cluster barriers"] > 0) == row.kernel.endswith("cluster"), row


def test_the_table_is_of_these_kernels(rows):
    kept, now = resources.TABLE.read_text(), resources.table(rows)
    if kept.splitlines()[2] != now.splitlines()[2]:
        pytest.skip("the table is of another version of nvcc")
    assert kept == now, "the kernels have changed; `make resources` writes the table anew"
