"""How a call is laid out on a device: the planner's promises, over many sizes and devices."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest

from .emulated import Device, Sizes, plan

H200 = Device(90, 132, 232448, 16)
DEVICES = [
    H200,
    Device(90, 132, 232448, 8),  # as a partition or an older driver may have it
    Device(80, 108, 166912, 1),
    Device(86, 84, 101376, 1),
    Device(89, 128, 101376, 1),
    Device(100, 148, 232448, 16),
    Device(120, 170, 101376, 8),
    Device(80, 1, 166912, 1),
    Device(90, 3, 50000, 2),
]
WARPS = 16


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def random_sizes(seed: int) -> Sizes:
    """From the smallest to far more than fits."""
    r = random.Random(seed)

    def size(most: int) -> int:
        return max(1, int(most ** r.random()))

    tokens = r.choice([1, 7, 8, 9, 255, 256, 257, 576, 577, 729, 1024, 2880, size(65000)])
    text = r.random() < 0.7
    return Sizes(
        batch=r.choice([0, 1, 2, 3, 8, 32, 100, 1000]),
        tokens=tokens,
        width=r.choice([1, 7, 128, 1024, 4096, 4100, size(20000)]),
        keep=r.choice([1, tokens, size(tokens)]),
        contextual=r.choice([0, 0, 1, 16, size(1000)]),
        heads=r.choice([1, 7, 16, 28]),
        groups=1,
        rows=r.choice([1, 1, 2, 33]),
        head_dim=r.choice([1, 63, 64, 80, 128]),
        prefix=r.choice([0, 1, 5, 200]),
        heads_txt=r.choice([1, 14, 32]) if text else 0,
        groups_txt=1,
        rows_txt=r.choice([1, 7, 8, 64]),
        head_dim_txt=r.choice([64, 128]),
        metric=r.choice([1, 7, 64, 72, 128, 200, size(5000)]),
        dtype=r.choice([2, 4]),
    )


CASES = [(random_sizes(seed), DEVICES[seed % len(DEVICES)]) for seed in range(1500)]


def planned() -> list[tuple[Sizes, Device, SimpleNamespace]]:
    found = [(sizes, device, plan(sizes, device)) for sizes, device in CASES]
    return [(sizes, device, p) for sizes, device, p in found if p.path != "none"]


def test_every_refusal_has_a_reason():
    refused = {p.reason for sizes, device in CASES if (p := plan(sizes, device)).path == "none"}
    assert refused == {
        "its logits, or the keys of its tokens, don't fit the shared memory of the device"
    }
    assert len(planned()) > len(CASES) // 2
    assert all(p.reason is None for _, _, p in planned())


@pytest.mark.parametrize(
    ("change", "device", "reason"),
    [
        ({}, Device(75), "older than compute capability 8.0"),
        ({"head_dim": 129}, H200, "a head is wider than 128"),
        ({"head_dim_txt": 136}, H200, "a head is wider than 128"),
        ({"tokens": 65001}, H200, "more than 65000 tokens"),
        ({"tokens": 60000, "keep": 60000, "contextual": 6000}, H200, "more than 65000 slots"),
        ({"rows": 1 << 17}, H200, "more than 2^20 query rows"),
        ({"rows_txt": 1 << 17}, H200, "more than 2^20 query rows"),
        ({"rows_txt": 1 << 14}, H200, "don't fit the shared memory"),
    ],
)
def test_refusals(change, device, reason):
    refused = plan(dataclasses.replace(Sizes(), **change), device)
    assert refused.path == "none"
    assert reason in refused.reason


def test_absent_text_is_not_looked_at():
    sizes = Sizes(heads_txt=0, head_dim_txt=1000, rows_txt=1 << 40)
    assert plan(sizes, H200).rows == 16


def test_every_token_and_column_has_a_rank():
    for sizes, _, p in planned():
        assert p.ranks * p.tokens >= sizes.tokens
        assert p.ranks * p.prefix >= sizes.prefix
        assert p.ranks * p.columns >= sizes.width
        assert p.tokens % 8 == 0  # a tile of keys
        assert p.columns % 32 == 0
        # Blocks of columns follow each other in steps that keep the alignment of the first.
        assert p.block_columns == p.columns or p.block_columns % 8 == 0
        assert p.rows == sizes.heads * sizes.rows + sizes.heads_txt * sizes.rows_txt
        # A multiple of 8 and one: whole tiles, in rows of an odd number of words.
        assert p.visual_columns % 8 == p.textual_columns % 8 == 1
        assert p.visual_columns > p.prefix + p.tokens - 1
        assert p.textual_columns > p.tokens
        assert p.segment >= 1
        assert p.stage_targets % 8 == 0
        assert p.stage_targets >= 8
        assert p.metric_stride >= sizes.metric
        assert p.metric_stride % 8 == 4


def test_what_is_launched_fits_the_device():
    for sizes, device, p in planned():
        assert p.shared_bytes <= device.shared_bytes
        assert p.ranks >= 1
        assert 1 <= p.groups <= max(1, sizes.batch)
        if p.path == "grid":  # all blocks are there at once
            assert p.ranks * p.groups <= device.processors
            assert p.workspace_bytes == p.ranks * p.groups * p.at.peer_bytes
        else:
            assert device.capability >= 90
            assert p.groups == max(1, sizes.batch)
            assert p.ranks in (1, 2, 4, 8, 16)
            assert p.ranks <= device.max_cluster
            assert p.workspace_bytes == 0


def regions(sizes: Sizes, p: SimpleNamespace) -> dict[str, dict[str, int]]:
    """What the kernel puts into each region, in bytes: always, from the choice on, or in one phase;
    "peer" lies in an area of its own."""
    slots = sizes.keep + sizes.contextual
    mine = ceil_div(p.rows, p.ranks)
    return {
        "peer": {
            "maxima": 4 * mine,
            "sums": 8 * mine,
            "saliency": 4 * 2 * p.tokens,
            "fused": 8 * p.tokens,
            "slots_out": 4 * p.tokens,
            "metric": 4 * p.tokens * p.metric_stride,
        },
        "always": {
            "peers": p.at.peer_bytes if p.path == "cluster" else 0,
        },
        "chosen": {
            "scratch": 8 * WARPS,
            "histogram": 4 * 256,
            "own": 4 * slots,
            "slots": 2 * sizes.tokens,
        },
        "saliency": {
            "visual_logits": 4 * sizes.heads * sizes.rows * p.visual_columns,
            "textual_logits": 4 * sizes.heads_txt * sizes.rows_txt * p.textual_columns,
            "factors": 4 * p.rows,
            "head_sums": 4 * (sizes.heads + sizes.heads_txt) * p.tokens,
        },
        "choice": {"keys": 8 * sizes.tokens, "places": 4 * 2 * p.tokens},
        "nearest": {"stage": 4 * p.stage_targets * p.metric_stride, "best": 8 * p.tokens},
        "merge": {
            "order": 2 * sizes.tokens,
            "counters": 2 * WARPS * slots,
            "starts": 4 * (slots + 1),
            "fragments": 4 * 2 * ceil_div(sizes.tokens, p.segment) * p.block_columns,
        },
    }


def test_no_region_of_a_phase_overlaps_another():
    for sizes, _, p in planned():
        all_regions = regions(sizes, p)
        known = {name for phase in all_regions.values() for name in phase}
        assert known | {"peer_bytes"} == set(vars(p.at))
        for phase, its in all_regions.items():
            together = its if phase == "peer" else {**all_regions["always"], **its}
            if phase not in ("peer", "saliency"):
                together |= all_regions["chosen"]
            end = 0
            for begin, size, name in sorted(
                (getattr(p.at, n), size, n) for n, size in together.items()
            ):
                assert begin % 16 == 0, name
                assert begin >= end, f"{name} of {phase} overlaps what is before it"
                end = begin + size
            assert end <= (p.at.peer_bytes if phase == "peer" else p.shared_bytes)


def test_the_areas_of_peers_are_aligned():
    for _, _, p in planned():
        assert p.at.peer_bytes % 128 == 0  # a line of the cache is of one block
        assert p.at.peers % 128 == 0


def test_numbers_fit_their_types():
    """Offsets in shared memory and products that the kernel takes of ints."""
    for sizes, _, p in planned():
        assert all(0 <= offset < 1 << 31 for offset in vars(p.at).values())
        assert p.rows * max(p.visual_columns, p.textual_columns) < 1 << 31
        assert sizes.tokens * p.metric_stride < 1 << 31


# --- choices that were made on purpose -----------------------------------------------------------


def test_one_image_takes_the_whole_device():
    p = plan(Sizes(), H200)
    assert (p.path, p.ranks, p.groups) == ("grid", 72, 1)
    assert p.prefetch


@pytest.mark.parametrize(
    ("batch", "rows_txt", "ranks"), [(8, 8, 16), (16, 8, 8), (32, 8, 4), (64, 1, 2)]
)
def test_many_images_take_a_cluster_each(batch, rows_txt, ranks):
    """The largest that leaves no sample waiting."""
    p = plan(Sizes(batch=batch, rows_txt=rows_txt), H200)
    assert (p.path, p.ranks, p.groups) == ("cluster", ranks, batch)


@pytest.mark.parametrize("batch", [1, 3, 8, 32, 1000])
def test_devices_without_clusters_take_the_grid(batch):
    p = plan(Sizes(batch=batch), Device(80, 108, 166912, 1))
    assert p.path == "grid"
    assert p.ranks * p.groups <= 108
    # No fewer blocks than could be busy, but for those that a whole number of samples leaves.
    assert p.ranks * p.groups > 108 - p.ranks or p.ranks == 72


def test_a_sample_that_is_too_large_for_few_blocks_takes_more():
    assert plan(Sizes(batch=64, rows_txt=4), H200).ranks == 4
    assert plan(Sizes(batch=64, rows_txt=16), H200).ranks == 8
    largest = plan(Sizes(batch=64, rows_txt=64), H200)  # more than a cluster has
    assert (largest.path, largest.ranks, largest.groups) == ("grid", 24, 5)


def test_no_rank_is_without_tokens():
    for tokens in (1, 8, 9, 100):
        assert plan(Sizes(tokens=tokens, keep=1), H200).ranks <= ceil_div(tokens, 8)


def test_large_batches_fetch_nothing_early():
    """What would be thrown out of the cache again."""
    assert not plan(Sizes(batch=64), H200).prefetch
    assert not plan(Sizes(tokens=2880, width=8192), H200).prefetch
