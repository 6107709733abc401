"""A small program for profilers and sanitizers: one op at one shape, warmed up before the capture.

    python profile_target.py --op select_merge --tokens 576 --batch 1 --calls 5
    python profile_target.py --once        # every op once, small and awkward shapes (sanitizers)

The calls to look at lie between cudaProfilerStart and cudaProfilerStop, each in an NVTX range named
`cdrop.<op>` (`nsys --capture-range=cudaProfilerApi`, `ncu --profile-from-start off`). With
`--device cpu` they are profiled by torch and its table is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import consensusdrop_kernels as cdrop

ops = torch.ops.cdrop


def calls(batch: int, tokens: int, width: int, keep: int, rows: int, device: str) -> dict[str, Any]:
    """Each op as a call without arguments, on bfloat16 data of the given size."""
    like = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(batch, tokens, width, **like)
    q_vis = torch.randn(batch, 16, 1, 64, **like)
    k_vis = torch.randn(batch, tokens + 1, 16, 64, **like).transpose(1, 2)
    q_txt = torch.randn(batch, 32, rows, 128, **like)
    k_txt = torch.randn(batch, tokens, 32, 128, **like).transpose(1, 2)
    visual, textual = torch.rand(2, batch, tokens, device=device)
    index = torch.rand(batch, tokens, device=device).topk(keep).indices.sort(dim=1).values
    valid = torch.rand(batch, tokens, device=device) < 0.9
    packed = k_vis[:, :, :tokens].transpose(1, 2).reshape(batch * tokens, 16, 64)
    ends = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
    table: dict[str, Callable[[], Any]] = {
        "attention_saliency": lambda: ops.attention_saliency(q_txt, k_txt, reduce="max"),
        "attention_saliency_square": lambda: ops.attention_saliency(k_vis, k_vis, causal=True),
        "attention_saliency.varlen": lambda: ops.attention_saliency.varlen(
            packed, packed, ends, tokens
        ),
        "similarity_saliency": lambda: ops.similarity_saliency(x[:, :rows], x),
        "adaptive_split_select": lambda: ops.adaptive_split_select(
            visual, textual, keep, valid=valid
        ),
        "greedy_diverse_select": lambda: ops.greedy_diverse_select(
            x, keep, relevance=visual, objective="dpp"
        ),
        "greedy_diverse_select_maxmin": lambda: ops.greedy_diverse_select(x, keep, valid=valid),
        "consensus_select": lambda: ops.consensus_select(visual, textual, keep, valid=valid),
        "token_merge": lambda: ops.token_merge(x, x[..., :64], index),
        "token_merge_contextual": lambda: ops.token_merge(
            x, x[..., :64], index, contextual=8, weight=visual
        ),
        "select_merge": lambda: ops.select_merge(
            x, q_vis, k_vis, q_txt, k_txt, keep=keep, prefix=1, txt_reduce="max"
        ),
        "select_merge_diverse": lambda: ops.select_merge(
            x, q_vis, k_vis, q_txt, k_txt, keep=keep, prefix=1, txt_reduce="max", diversity=0.65
        ),
    }
    if cdrop.backends()["cuda"] and device == "cuda":
        table["select_merge_cuda"] = lambda: torch.ops.cdrop_cuda.select_merge(
            x, q_vis, k_vis, q_txt, k_txt, keep=keep, prefix=1, txt_reduce="max"
        )
    return table


def capture(name: str, call: Callable[[], Any], count: int, device: str) -> None:
    """Warm up, then call so often between cudaProfilerStart and Stop, each in a range.

    On a CPU `torch.profiler` listens instead, and its table is printed.
    """
    for _ in range(3):
        call()
    if device == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(count):
                with torch.profiler.record_function(name):
                    call()
        print(profile.key_averages().table(sort_by="cpu_time_total", row_limit=25))
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(count):
        with torch.cuda.nvtx.range(name):
            call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    """Run what the options say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", default="select_merge")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    if options.once:
        for batch, tokens, width, keep, rows in ((1, 577, 1000, 64, 7), (3, 129, 72, 16, 1)):
            for call in calls(batch, tokens, width, keep, rows, options.device).values():
                call()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return
    sizes = (options.batch, options.tokens, options.width, options.keep, options.rows)
    known = calls(*sizes, options.device)
    if options.op not in known:
        parser.error(f"--op must be one of {', '.join(known)}, got {options.op}")
    capture(f"cdrop.{options.op}", known[options.op], options.calls, options.device)


if __name__ == "__main__":
    main()
