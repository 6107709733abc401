"""Every Triton kernel compiles for every target, without a spill or a stack, as the table says."""

from __future__ import annotations

from dataclasses import astuple
from importlib.metadata import version
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from . import aot, aot_calls

#: Compiled again in every run, one call in so many; `make resources` compiles all, some minutes.
EVERY = 12


def test_the_table_is_of_these_kernels():
    """Another version of Triton may use other registers; then nothing is compared."""
    found, rows = aot.kept()
    if f"Triton {version('triton')}," not in found:
        pytest.skip("the table is of another version of Triton")
    assert found == aot.header(), "the kernels have changed; `make resources` writes the table anew"
    assert {(row[0], row[3]) for row in rows} == {
        (call, target) for call in aot_calls.CALLS for target in aot.TARGETS
    }
    assert {tuple(map(str, astuple(row))) for row in aot.measure_all(EVERY)} == {
        row for row in rows if row[0] in list(aot_calls.CALLS)[::EVERY]
    }


def test_nothing_spills():
    bad = [row for row in aot.kept()[1] if row[-2:] != ("0", "0")]
    bad += [row for row in aot.measure_all(EVERY) if row.stack or row.spills]
    assert not bad, "\n".join(map(str, bad))


def test_what_spills_is_seen():
    """A kernel that needs more registers than it may have: the numbers read must say so."""
    launches = aot.record(aot_calls.CALLS["attention_saliency: square, d 128, causal"])
    kernel, args, options = launches[-2]
    assert "columns" in kernel.__name__
    compiled = aot.compile_launch(kernel, args, {**options, "maxnreg": 64}, "sm90")
    _, _, stack, _ = aot.cuda_usage(compiled.asm["cubin"])
    assert stack > 0


@pytest.mark.parametrize("heads_first", [True, False])
def test_heads_that_are_no_multiple_of_32_bytes_are_read_16_bytes_at_a_time(heads_first):
    from consensusdrop_kernels.triton.attention_saliency import attention_saliency

    def call() -> object:
        q, k = (aot_calls.meta(1, 16, m, 72, dtype=aot_calls.F16) for m in (1, 729))
        if not heads_first:
            k = aot_calls.meta(1, 729, 16, 72, dtype=aot_calls.F16).transpose(1, 2)
        return attention_saliency(q, k)

    for launch in aot.record(call)[:2]:
        text = aot.compile_launch(*launch, "sm90").asm["ptx"]
        assert "ld.global.v4" in text
        assert "ld.global.b16" not in text


def test_no_kernel_knows_a_length_or_a_stride():
    """Calls that differ in lengths and layouts alone launch the kernels that are there already."""
    from consensusdrop_kernels.triton.attention_saliency import attention_saliency

    def keys(tokens: int, *, heads_first: bool) -> set[str]:
        q = aot_calls.meta(1, 16, 1, 72, dtype=aot_calls.F16)
        shape = (1, 16, tokens, 72) if heads_first else (1, tokens, 16, 72)
        k = aot_calls.meta(*shape, dtype=aot_calls.F16)
        k = k if heads_first else k.transpose(1, 2)
        launches = aot.record(lambda: attention_saliency(q, k))
        return {aot.compile_launch(*launch, "sm90").hash for launch in launches}

    assert (
        keys(729, heads_first=True) == keys(1000, heads_first=False) == keys(512, heads_first=True)
    )


def test_a_long_packed_sequence_costs_no_memory_in_the_short_ones():
    from consensusdrop_kernels.triton.attention_saliency import attention_saliency_varlen

    made = []
    empty = torch.empty

    def note(*args, **options):
        made.append(empty(*args, **options))
        return made[-1]

    q, starts = aot_calls.meta(20000, 4, 64), aot_calls.meta(1001, dtype=torch.int32)
    with mock.patch.object(torch, "empty", note):
        aot.record(lambda: attention_saliency_varlen(q, q, starts, 16384))
    assert max(t.numel() for t in made) <= 4 * 20000
