"""The test of the tests: one mistake in the text of the kernel must be seen by the checks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from ops.cases import Args, generator, select_merge_case
from ops.checks import check_select_merge
from ops.test_select_merge import with_lse

import consensusdrop_kernels as cdrop

from . import emulated
from .emulated import Device

pytestmark = pytest.mark.usefixtures("poison")

GRID, ROUNDS = Device(80, 3), Device(80, 2)
CLUSTER = Device(90, 7, max_cluster=4)


def equal_keys() -> Args:
    args = select_merge_case(1, 40, 9, fusion="sum")
    for name in ("k_vis", "k_txt"):
        args[name] = args[name][:, :, :1].expand_as(args[name]).contiguous()
    return args


def uneven_lse() -> Args:
    """Of rows that are very unlike, so that its size counts."""
    args = with_lse(select_merge_case(1, 200, 100, rows_vis=4), "vis")
    args["lse_vis"] += 3 * torch.randn(args["lse_vis"].shape, generator=generator(1))
    return args


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A place in the text, what a mistake makes of it, and a call that shows it."""

    right: str
    wrong: str
    device: Device
    args: Args


MISTAKES = {
    "the last tile of keys is skipped": Mistake(
        "tiles = (columns - 1) / 8;", "tiles = (columns - 1) / 8 - 1;",
        GRID, select_merge_case(1, 40, 9),
    ),
    "ties are reversed": Mistake(
        "static_cast<uint64_t>(key) << 32 | (0xffffffffu - tie);",
        "static_cast<uint64_t>(key) << 32 | tie;",
        CLUSTER, equal_keys(),
    ),
    "the prefix is not skipped": Mistake(
        "(side == 0 ? c.plan.prefix : 0);", "0;",
        CLUSTER, select_merge_case(1, 40, 9, prefix=2),
    ),
    "an lse is taken for one of base 2": Mistake(
        "logits[i] - lse * kLog2E", "logits[i] - lse",
        GRID, uneven_lse(),
    ),
    "every sample is the first": Mistake(
        "sample = first_sample + group.group();", "sample = group.group();",
        ROUNDS, select_merge_case(5, 40, 9),
    ),
    "more targets than fit are left out": Mistake(
        "base < most &&", "base < 1 &&",
        GRID,
        {**select_merge_case(1, 90, 60), "metric": torch.randn(1, 90, 200, generator=generator(1))},
    ),
    "the assignments of another rank": Mistake(
        "peer<int>(c, i / n, c.plan.at.slots_out)", "peer<int>(c, c.rank, c.plan.at.slots_out)",
        CLUSTER, select_merge_case(1, 90, 9),
    ),
    "the last piece of a list is dropped": Mistake(
        "piece <= last; ++piece", "piece < last; ++piece",
        GRID, select_merge_case(1, 90, 1, contextual=1),
    ),
    "sums before all maxima": Mistake(
        "if (here) row_maxima(c);\n    group.sync_group();", "if (here) row_maxima(c);",
        CLUSTER, select_merge_case(1, 90, 9, rows_vis=8),
    ),
    "saliencies before all factors": Mistake(
        "row_factors(c);\n  c.g.sync();", "row_factors(c);",
        GRID, select_merge_case(1, 90, 9),
    ),
    "lists before all pieces": Mistake(
        "piece_sums<T, kWide>(c, column, here);\n    c.g.sync();",
        "piece_sums<T, kWide>(c, column, here);",
        CLUSTER, select_merge_case(1, 90, 1, contextual=1),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def libraries() -> Iterator[dict[str, Future[str]]]:
    """An emulator for each mistake, compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(emulated.broken, mistake.right, mistake.wrong)
            for name, mistake in MISTAKES.items()
        }


@pytest.fixture
def _own_body() -> Iterator[None]:
    yield
    emulated.load().set_body("")


def check_in_several_orders(mistake: Mistake) -> None:
    with cdrop.use_backend("reference"):
        _, chosen, *_ = torch.ops.cdrop.select_merge(**mistake.args)
    for order in range(5):
        device = dataclasses.replace(mistake.device, order=order)
        _, index, *_ = check_select_merge(device.op, mistake.args)
        assert torch.equal(index, chosen)  # the check takes near ties in any order


@pytest.mark.usefixtures("_own_body")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, libraries):
    check_in_several_orders(MISTAKES[name])
    emulated.load().set_body(libraries[name].result())
    with pytest.raises(AssertionError):
        check_in_several_orders(MISTAKES[name])


@pytest.mark.usefixtures("_own_body")
def test_threads_that_miss_a_barrier_are_told():
    """Not a process that hangs, or ends."""
    right = "c.g.sync();  // the last tile has been read"
    emulated.load().set_body(emulated.broken(right, f"if (c.warp > 0) {right}"))
    with pytest.raises(RuntimeError, match="a barrier that not all threads reach"):
        GRID.op(**select_merge_case(1, 40, 9))


@pytest.mark.usefixtures("_own_body")
def test_a_write_past_the_end_is_told():
    more = "reset(c);\n    group.shared()[plan.shared_bytes + c.thread] = 0;\n"
    emulated.load().set_body(emulated.broken("reset(c);\n", more))
    with pytest.raises(RuntimeError, match="a write past the end of shared memory"):
        GRID.op(**select_merge_case(1, 40, 9))


def test_what_does_not_compile_is_told():
    with pytest.raises(AssertionError, match="was not declared|undeclared"):
        emulated.broken("reset(c);\n", "no_such_function(c);\n")
