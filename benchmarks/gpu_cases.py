"""What `gpu_ops.py` times: every op at the shapes its users have, and what it is compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import consensusdrop_kernels as cdrop

ops = torch.ops.cdrop
NEAR_TIES = 0.05  # where a near tie may move a token to another slot


@dataclass(frozen=True)
class Case:
    """One op at one shape: how to make its inputs, the op, what it is compared with."""

    op: str
    shape: str
    make: Callable[[], tuple[Tensor, ...]]
    ours: Callable[[tuple[Tensor, ...]], Any]
    baselines: dict[str, Callable[[tuple[Tensor, ...]], Any]]
    # The same op by other kernels of ours, checked as it is.
    others: dict[str, Callable[[tuple[Tensor, ...]], Any]] = field(default_factory=dict)
    compiled: bool = False  # time torch.compile of the first baseline too: takes seconds to build
    tolerance: float = 1e-3  # relative, of floating outputs, against the definition
    checked: bool = True  # off where the definition would hold a map of many gigabytes


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

    # Its own output, one row a head: the mean over heads, which the op makes, is not counted.
    return {"flash-colreduce": lambda i: flash_colreduce(i[0], i[1], reduction="mean")}


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
            compiled=n == 1024,
            checked=n <= 4096,
        )


def varlen_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Qwen2.5-VL's encoder: windows of 64 patches, and whole images; 16 heads of 80."""
    for count, length in [(4, 64)] if small else [(64, 64), (256, 64), (4, 1024), (4, 4096)]:

        def make(count: int = count, length: int = length) -> tuple[Tensor, ...]:
            q, k = (_randn(count * length, 16, 80, dtype=dtype, device=device) for _ in range(2))
            ends = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
            return q, k, ends

        def batched(i: tuple[Tensor, ...], count: int = count, length: int = length) -> Tensor:
            q, k = (t.view(count, length, 16, 80).transpose(1, 2) for t in i[:2])
            return plain_saliency((q, k)).flatten()

        yield Case(
            "attention_saliency.varlen",
            f"{count} of {length} H16 d80",
            make,
            lambda i, length=length: ops.attention_saliency.varlen(*i, length),
            {"plain torch, batched": batched},
        )


def plain_similarity(inputs: tuple[Tensor, ...]) -> Tensor:
    """Unit vectors, one matmul, softmax over the tokens, maximum over the text."""
    text, visual = (torch.nn.functional.normalize(t.float(), dim=-1) for t in inputs)
    return ((text @ visual.transpose(1, 2)) / 0.01).softmax(-1).amax(1)


def similarity_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Text embeddings of the language model against projected image tokens."""
    kw = {"dtype": dtype, "device": device}
    shapes = [(1, 20, 576, 4096), (16, 20, 576, 4096), (1, 20, 2880, 4096)]
    for b, t, n, d in [(1, 5, 128, 256)] if small else shapes:
        yield Case(
            "similarity_saliency",
            f"B{b} T{t} N{n} D{d}",
            lambda b=b, t=t, n=n, d=d: (_randn(b, t, d, **kw), _randn(b, n, d, **kw)),
            lambda i: ops.similarity_saliency(*i),
            {"plain torch": plain_similarity},
            compiled=b == 1 and n == 576,
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


def plain_split(inputs: tuple[Tensor, ...], keep: int, reserve: float = 0.25) -> Tensor:
    """The split by two sorts and two prefix sums; a freed place goes to the textual list."""
    (visual, textual), held = inputs, int(reserve * keep)
    rest = keep - 2 * held
    order_v, order_t = (a.argsort(dim=1, descending=True, stable=True) for a in (visual, textual))

    def mass(a: Tensor, order: Tensor) -> Tensor:
        sums = a.gather(1, order)[:, held : held + rest].double().cumsum(1)
        return torch.nn.functional.pad(sums, (1, 0))

    split = (mass(textual, order_t) * mass(visual, order_v).flip(1)).argmax(1, keepdim=True)
    place = torch.arange(visual.shape[1], device=visual.device).expand_as(order_v)
    rank_v, rank_t = (torch.empty_like(o).scatter_(1, o, place) for o in (order_v, order_t))
    first = (rank_v < held + rest - split) | (rank_t < held + split)
    best = torch.where(first, -1, rank_t)
    return best.topk(keep, largest=False).indices.sort(dim=1).values


def split_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """AdaFV's rule at the sizes of LLaVA-1.5, NeXT and a long video."""
    del dtype  # scores are float32
    shapes = [(1, 576), (16, 576), (1, 2880), (1, 32768)]
    for b, n in shapes[:1] if small else shapes:
        keep = n // 9
        yield Case(
            "adaptive_split_select",
            f"B{b} N{n} K{keep}",
            lambda b=b, n=n: (torch.rand(b, n, device=device), torch.rand(b, n, device=device)),
            lambda i, keep=keep: ops.adaptive_split_select(*i, keep),
            {"plain torch": lambda i, keep=keep: plain_split(i, keep)},
        )


def plain_diverse(inputs: tuple[Tensor, ...], keep: int) -> Tensor:
    """All cosines, then a loop that takes the token farthest from those taken."""
    unit = torch.nn.functional.normalize(inputs[0].float(), dim=-1)
    away = 1 - unit @ unit.transpose(1, 2)
    itself = torch.eye(away.shape[1], dtype=torch.bool, device=away.device)
    taken = [away.masked_fill(itself, torch.inf).amin(2).argmax(1, keepdim=True)]
    nearest = torch.full_like(away[:, 0], torch.inf)
    rows = torch.arange(len(away), device=away.device)
    for _ in range(keep - 1):
        nearest = torch.minimum(nearest, away[rows, taken[-1][:, 0]])
        nearest.scatter_(1, taken[-1], -torch.inf)
        taken.append(nearest.argmax(1, keepdim=True))
    return torch.cat(taken, 1).sort(1).values


def greedy_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """DivPrune's choice over the encoder's features."""
    shapes = [(1, 576, 64), (16, 576, 64), (1, 2880, 160)]
    for b, n, k in [(1, 128, 8)] if small else shapes:
        yield Case(
            "greedy_diverse_select",
            f"B{b} N{n} F1024 K{k}",
            lambda b=b, n=n: (_randn(b, n, 1024, dtype=dtype, device=device),),
            lambda i, k=k: ops.greedy_diverse_select(*i, k),
            {"plain torch": lambda i, k=k: plain_diverse(i, k)},
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
            tolerance=NEAR_TIES,
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


def _one_launch(keep: int) -> dict[str, Callable[[tuple[Tensor, ...]], Any]]:
    """The CUDA C++ kernel beside whatever is the default."""
    if not cdrop.backends()["cuda"]:
        return {}
    kernel = torch.ops.cdrop_cuda.select_merge
    return {"CUDA C++": lambda i: kernel(*i, keep=keep, prefix=1)}


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
            others=_one_launch(k),
            compiled=b == 1 and n == 576,
            tolerance=NEAR_TIES,
        )


CASES = {
    "select_merge": select_merge_cases,
    "saliency": saliency_cases,
    "select": select_cases,
    "merge": merge_cases,
    "varlen": varlen_cases,
    "similarity": similarity_cases,
    "split": split_cases,
    "greedy": greedy_cases,
}
