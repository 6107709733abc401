"""Time every op against its baselines on a GPU and write the rows as JSON.

    python benchmarks/gpu_ops.py --out rows.json [--only saliency] [--device cpu --small]

A row: op, shape, dtype, contender, median, p20, p80, host time, bytes (each input read and each
output written once), share of the measured copy bandwidth, and the ratio to the op in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timing import copy_bandwidth, measure, rotations
from torch import Tensor

import consensusdrop_kernels as cdrop

ops = torch.ops.cdrop


@dataclass(frozen=True)
class Case:
    """One op at one shape: how to make its inputs, the op, what it is compared with."""

    op: str
    shape: str
    make: Callable[[], tuple[Tensor, ...]]
    ours: Callable[[tuple[Tensor, ...]], Any]
    baselines: dict[str, Callable[[tuple[Tensor, ...]], Any]]
    compiled: bool = False  # time torch.compile of the first baseline too: takes seconds to build


def _randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def _heads_first(batch: int, rows: int, heads: int, width: int, **kw: Any) -> Tensor:
    return _randn(batch, rows, heads, width, **kw).transpose(1, 2)


def plain_saliency(inputs: tuple[Tensor, ...]) -> Tensor:
    """Few-row logits, softmax, mean over rows and heads."""
    q, k = inputs
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return logits.float().softmax(-1).mean((1, 2))


def _flash_colreduce() -> dict[str, Callable[[tuple[Tensor, ...]], Any]]:
    if importlib.util.find_spec("flash_colreduce") is None:
        return {}
    from flash_colreduce import flash_colreduce

    return {"flash-colreduce": lambda i: flash_colreduce(i[0], i[1], reduction="mean").mean(1)}


def saliency_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Few rows over many keys, and square."""
    kw = {"dtype": dtype, "device": device}
    few = [(b, m, n) for n in (576, 2880, 16384) for m in (1, 8, 64) for b in (1, 4, 16)]
    for b, m, n in few[:2] if small else few:
        yield Case(
            "attention_saliency",
            f"B{b} M{m} N{n} H32 d128",
            lambda b=b, m=m, n=n: (
                _heads_first(b, m, 32, 128, **kw),
                _heads_first(b, n, 32, 128, **kw),
            ),
            lambda i: ops.attention_saliency(*i),
            {"plain torch": plain_saliency} | _flash_colreduce(),
            compiled=b == 1 and n == 576,
        )
    for n in (128,) if small else (576, 1024, 4096, 16384):
        # The map of 16384 tokens would take 17 GB in float32: no plain baseline there.
        plain = {"plain torch": plain_saliency} if n <= 4096 else {}
        yield Case(
            "attention_saliency",
            f"square B1 N{n} H16 d64",
            lambda n=n: (_heads_first(1, n, 16, 64, **kw), _heads_first(1, n, 16, 64, **kw)),
            lambda i: ops.attention_saliency(*i),
            plain | _flash_colreduce(),
        )


def plain_select(inputs: tuple[Tensor, ...], keep: int) -> Tensor:
    """Mean of the two ranks, by two sorts and a top-k."""
    visual, textual = inputs
    place = torch.arange(visual.shape[1], device=visual.device, dtype=torch.float32)
    place = place.expand_as(visual)

    def rank(a: Tensor) -> Tensor:
        order = a.argsort(dim=1, descending=True, stable=True)
        return torch.empty_like(a).scatter_(1, order, place)

    score = 0.5 * rank(visual) + 0.5 * rank(textual)
    return score.topk(keep, largest=False).indices.sort(dim=1).values


def select_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """One sample and many, up to past the one-program limit."""
    del dtype  # scores are float32
    shapes = [(b, n) for n in (576, 2880, 8192, 32768) for b in (1, 16)]
    for b, n in shapes[:1] if small else shapes:
        keep = n // 9
        yield Case(
            "consensus_select",
            f"B{b} N{n} K{keep}",
            lambda b=b, n=n: (
                torch.rand(b, n, device=device),
                torch.rand(b, n, device=device),
            ),
            lambda i, keep=keep: ops.consensus_select(*i, keep),
            {"plain torch": lambda i, keep=keep: plain_select(i, keep)},
            compiled=b == 1 and n == 576,
        )


def plain_merge(inputs: tuple[Tensor, ...]) -> Tensor:
    """Similarity of every token to the kept ones, argmax, `index_add`."""
    x, metric, index = inputs
    batch, _, width = x.shape
    keep = index.shape[1]
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    slot = unit.new_zeros(()).long() + torch.arange(keep, device=x.device).expand(batch, keep)
    there = unit.gather(1, index[:, :, None].expand(-1, -1, unit.shape[2]))
    nearest = (unit @ there.transpose(1, 2)).argmax(-1).scatter(1, index, slot)
    flat = (nearest + keep * torch.arange(batch, device=x.device)[:, None]).flatten()
    total = torch.zeros(batch * keep, width, device=x.device)
    total = total.index_add(0, flat, x.float().flatten(0, 1))
    count = torch.zeros(batch * keep, device=x.device)
    count = count.index_add(0, flat, torch.ones_like(flat, dtype=torch.float32))
    return (total / count[:, None]).view(batch, keep, width).to(x.dtype)


MERGE_SHAPES = [
    (1, 576, 4096, 64),
    (32, 576, 4096, 64),
    (8, 576, 4096, 128),
    (1, 2880, 4096, 320),
    (1, 16384, 3584, 1024),
]


def _some_tokens(batch: int, tokens: int, keep: int, device: str) -> Tensor:
    return torch.rand(batch, tokens, device=device).topk(keep).indices.sort(dim=1).values


def merge_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """LLaVA-1.5, a batch of it, LLaVA-NeXT and a video."""
    kw = {"dtype": dtype, "device": device}
    for b, n, d, k in [(1, 256, 512, 32)] if small else MERGE_SHAPES:
        yield Case(
            "token_merge",
            f"B{b} N{n} D{d} K{k}",
            lambda b=b, n=n, d=d, k=k: (
                _randn(b, n, d, **kw),
                _randn(b, n, 64, **kw),
                _some_tokens(b, n, k, device),
            ),
            lambda i: ops.token_merge(*i),
            {"plain torch": plain_merge},
            compiled=b == 1 and n == 576,
        )


def plain_select_merge(inputs: tuple[Tensor, ...], keep: int) -> Tensor:
    """The whole reduction, composed of the parts above."""
    x, q_vis, k_vis, q_txt, k_txt = inputs
    index = plain_select(
        (plain_saliency((q_vis, k_vis))[:, 1:], plain_saliency((q_txt, k_txt))), keep
    )
    return plain_merge((x, k_vis[:, :, 1:].float().mean(1), index))


def random_tokens(inputs: tuple[Tensor, ...], keep: int) -> Tensor:
    """The floor: keep tokens at random."""
    x = inputs[0]
    index = _some_tokens(x.shape[0], x.shape[1], keep, x.device.type)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def select_merge_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The flagship, with 16 encoder heads of 64 and 8 question rows of 32 heads of 128."""
    kw = {"dtype": dtype, "device": device}
    for b, n, d, k in [(1, 256, 512, 32)] if small else MERGE_SHAPES:
        yield Case(
            "select_merge",
            f"B{b} N{n} D{d} K{k}",
            lambda b=b, n=n, d=d: (
                _randn(b, n, d, **kw),
                _heads_first(b, 1, 16, 64, **kw),
                _heads_first(b, n + 1, 16, 64, **kw),
                _heads_first(b, 8, 32, 128, **kw),
                _heads_first(b, n, 32, 128, **kw),
            ),
            lambda i, k=k: ops.select_merge(*i, keep=k, prefix=1),
            {
                "plain torch": lambda i, k=k: plain_select_merge(i, k),
                "random tokens": lambda i, k=k: random_tokens(i, k),
            },
            compiled=b == 1 and n == 576,
        )


CASES = {
    "saliency": saliency_cases,
    "select": select_cases,
    "merge": merge_cases,
    "select_merge": select_merge_cases,
}


def _bytes(values: Any) -> int:
    values = values if isinstance(values, tuple | list) else (values,)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def check(case: Case, inputs: tuple[Tensor, ...]) -> None:
    """The op against its definition; a wrong kernel is not timed."""
    ours = case.ours(inputs)
    with cdrop.use_backend("reference"):
        right = case.ours(inputs)
    pairs = zip(
        ours if isinstance(ours, tuple) else (ours,),
        right if isinstance(right, tuple) else (right,),
        strict=True,
    )
    for got, want in pairs:
        if got.dtype == torch.int64:
            same = (got == want).float().mean().item()
            if same < 0.98:  # two scores closer than rounding may change places
                raise AssertionError(f"only {same:.3f} of the integers agree with the definition")
        else:
            error = ((got.double() - want.double()).norm() / want.double().norm()).item()
            if not error < 0.05:  # a token more or less in a slot moves it that far
                raise AssertionError(f"relative error {error:.2e} against the definition")


def time_case(case: Case, dtype: torch.dtype, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for each contender; a failure becomes a row that says so."""
    common = {"op": case.op, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
    try:
        first = case.make()
        if "N16384 H16" not in case.shape:  # its definition holds a map of 1 GB per head
            check(case, first)
        moved = _bytes(first) + _bytes(case.ours(first))
        sets = [first, *(case.make() for _ in range(rotations(_bytes(first)) - 1))]
        contenders = {"cdrop": case.ours} | case.baselines
        if case.compiled and "plain torch" in case.baselines:
            plain = case.baselines["plain torch"]
            contenders["torch.compile"] = torch.compile(plain, dynamic=False)
        ours_us = None
        for name, call in contenders.items():
            timing = measure(call, sets)
            ours_us = ours_us or timing.median_us
            yield common | {
                "contender": name,
                **timing.as_dict(),
                "bytes": moved,
                "bandwidth_share": moved / (timing.median_us * 1e-6) / bandwidth,
                "ratio": timing.median_us / ours_us,
            }
    except Exception as error:  # noqa: BLE001  the other cases still run
        yield common | {"error": f"{type(error).__name__}: {error}"}


def main() -> int:
    """Run the chosen cases; the exit code is the number of rows that failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", choices=tuple(CASES), action="append")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--small", action="store_true", help="one small case of each kind")
    parser.add_argument("--seconds", type=float, default=170.0, help="stop starting cases after")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    start = time.monotonic()
    bandwidth = copy_bandwidth(torch.device(options.device), 16 if options.small else 512)
    rows: list[dict[str, Any]] = []
    for kind in options.only or CASES:
        for case in CASES[kind](options.device, dtype, options.small):
            if time.monotonic() - start > options.seconds:
                rows.append({"op": case.op, "shape": case.shape, "error": "not run: out of time"})
                continue
            for row in time_case(case, dtype, bandwidth):
                rows.append(row)
                print(_line(row), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(
                json.dumps({"copy_bandwidth": bandwidth, "rows": rows}, indent=1)
            )
    return int(any("error" in row for row in rows))


def _line(row: dict[str, Any]) -> str:
    head = f"{row['op']:20} {row['shape']:28} "
    if "error" in row:
        return head + "FAILED " + row["error"]
    return head + (
        f"{row['contender']:16} {row['median_us']:10.1f} us  host {row['host_us']:7.1f} us  "
        f"{row['bandwidth_share']:6.1%} of copy  x{row['ratio']:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
