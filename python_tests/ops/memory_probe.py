"""Run as a script: prints, for one backend, how far each large call raised the peak of memory.

A process of its own, because the peak is kept per process. Linux only: the peak is reset through
/proc. One line of JSON: {name: {"grew": bytes, "inputs": bytes, "outputs": bytes}}.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import consensusdrop_kernels as cdrop

ops = torch.ops.cdrop
STATUS = pathlib.Path("/proc/self/status")


def resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in {STATUS}")


def size(values: object) -> int:
    tensors = values if isinstance(values, tuple | list) else [values]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def grew(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes by which the call raised the peak, and the bytes it returned."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        return torch.cuda.max_memory_allocated() - before, size(out)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = resident("VmRSS")
    out = call()
    return resident("VmHWM") - before, size(out)


def op_name(op: object) -> str:
    return str(op).removeprefix("cdrop.")


def calls(
    tokens: int, known: tuple[str, ...]
) -> dict[str, tuple[Callable[..., object], dict[str, object]]]:
    """One call of each known op over `tokens` tokens, thin enough that the map would dominate."""
    q, k = torch.randn(1, 1, tokens, 16), torch.randn(1, 1, tokens, 16)
    wide = {"x": torch.randn(1, 2880, 4096), "keep": 160}
    wide |= {"q_vis": torch.randn(1, 16, 1, 64), "k_vis": torch.randn(1, 16, 2880, 64)}
    wide |= {"q_txt": torch.randn(1, 32, 8, 128), "k_txt": torch.randn(1, 32, 2880, 128)}
    index = torch.arange(0, tokens, 2)[None].contiguous()
    thin = {"x": q[0], "metric": k[0], "index": index}
    found = {
        "square": (ops.attention_saliency, {"q": q, "k": k}),
        "causal": (ops.attention_saliency, {"q": q, "k": k, "causal": True}),
        "select": (ops.consensus_select, {"visual": q[0, ..., 0], "textual": k[0, ..., 0],
                                          "keep": tokens // 2}),
        "merge": (ops.token_merge, thin),
        "contextual": (ops.token_merge, {**thin, "index": index[:, ::2], "contextual": 64}),
        "flagship": (ops.select_merge, wide),
        "packed": (ops.attention_saliency.varlen, {
            "q": q[0].transpose(0, 1), "k": k[0].transpose(0, 1),
            "cu_seqlens": torch.tensor([0, tokens]), "max_seqlen": tokens}),
        "similarity": (ops.similarity_saliency, {"text": q[0, :, : tokens // 4], "visual": k[0]}),
        "split": (ops.adaptive_split_select, {"visual": q[0, ..., 0], "textual": k[0, ..., 0],
                                              "keep": tokens // 2}),
        "diverse": (ops.greedy_diverse_select, {"features": k[0], "keep": 8}),
    }  # fmt: skip
    return {name: call for name, call in found.items() if op_name(call[0]) in known}


def main(backend: str, tokens: int) -> None:
    out = {}
    torch.set_default_device("cuda" if backend in ("triton", "cuda") else "cpu")
    known = cdrop.backends()[backend].ops
    with cdrop.use_backend(backend):
        for name, (op, args) in calls(64, known).items():  # threads and pools, once
            if name != "flagship":  # of one size always: freed memory of it would hide scratch
                op(**args)
        for name, (op, args) in calls(tokens, known).items():
            peak, returned = grew(lambda op=op, args=args: op(**args))
            out[name] = {"grew": peak, "inputs": size(list(args.values())), "outputs": returned}
    x = torch.randn(tokens, 4)
    peak, _ = grew(lambda: (x @ x.T).softmax(1).mean(0))
    out["the map"] = {"grew": peak, "inputs": size(x), "outputs": 0}
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
