"""What every op demands of its arguments, and the sentences that say so.

The fake kernels, the plain-torch definitions and the Python-launched backends all call these; the
C++ binding repeats them with the same words (a test compares the two), so that its hot path never
enters Python. Errors are `RuntimeError`, as from every torch op: one sentence that names the
argument, what it must be, and what it is.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FUSIONS = ("rank", "rrf", "sum", "zscore", "product", "max")
REDUCES = ("mean", "max")
OBJECTIVES = ("maxmin", "dpp")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(str(int(n)) for n in t.shape) + "]"


def _layout(**sizes: int | None) -> str:
    """`[B=2, Hk, d=64]`: names, with the sizes that are fixed. `PN` reads `P+N`."""
    names = (n.replace("PN", "P+N") + ("" if s is None else f"={int(s)}") for n, s in sizes.items())
    return "[" + ", ".join(names) + "]"


def _check(ok: bool, argument: str, must: str | Callable[[], str], got: Callable[[], Any]) -> None:
    """The texts are made only when they are needed: printing a size would make `torch.compile`
    compile for that size alone."""
    if not ok:
        text = must if isinstance(must, str) else must()
        raise RuntimeError(f"{argument} must {text}, got {got()}")


def _check_float(t: Tensor, name: str, rank: int, layout: str | Callable[[], str]) -> None:
    _check(t.dtype in FLOATS, name, "be float32, float16 or bfloat16", lambda: _name(t.dtype))
    _check_shape(t, name, t.dim() == rank, layout)


def _check_shape(t: Tensor, name: str, ok: bool, layout: str | Callable[[], str]) -> None:
    _check(
        ok,
        name,
        lambda: f"be {layout if isinstance(layout, str) else layout()}",
        lambda: _shape(t),
    )


def _check_device(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    must = f"be on the device of {like_name} ({like.device})"
    _check(t.device == like.device, name, must, lambda: t.device)


def _check_like(
    t: Tensor, name: str, dtype: torch.dtype, like: Tensor, like_name: str, **want: int
) -> None:
    """An auxiliary tensor: one dtype, one exact shape, the device of a main one."""
    _check(t.dtype == dtype, name, f"be {_name(dtype)}", lambda: _name(t.dtype))
    _check_shape(t, name, _has_shape(t, *want.values()), lambda: _layout(**want))
    _check_device(t, name, like, like_name)


def _has_shape(t: Tensor, *want: int) -> bool:
    return t.dim() == len(want) and all(a == b for a, b in zip(t.shape, want, strict=True))


def _check_unit_stride(t: Tensor, name: str) -> None:
    if t.shape[-1] > 1 and t.numel() > 0:
        _check(t.stride(-1) == 1, name, "have a last stride of 1", lambda: t.stride(-1))


def _check_number(value: float, name: str) -> None:
    _check(math.isfinite(value), name, "be finite", lambda: f"{value:g}")


def _check_unit(value: float, name: str) -> None:
    _check(0.0 <= value <= 1.0, name, "be in 0..1", lambda: f"{value:g}")


def _check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    _check(value in choices, name, f"be one of {', '.join(choices)}", lambda: f'"{value}"')


def has_values(t: Tensor) -> bool:
    """Whether the op may look at the values of `t`: on the CPU always, elsewhere it would
    synchronise, so only under `CDROP_CHECK=1`; never for a fake or meta tensor."""
    if t.is_meta or isinstance(t, torch._subclasses.FakeTensor):
        return False
    return t.device.type == "cpu" or os.environ.get("CDROP_CHECK") == "1"


def _check_weight_values(w: Tensor, name: str) -> None:
    if not has_values(w):
        return
    bad = ~(w >= 0) | torch.isinf(w)
    _check(not bad.any(), name, "be finite and >= 0", lambda: f"{w[bad][0].item():g}")


def attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    key_valid: Tensor | None = None,
    query_weight: Tensor | None = None,
    prefix: int = 0,
    reduce: str = "mean",
    names: dict[str, str] | None = None,
) -> None:
    """Checks of `attention_saliency`; `names` renames its arguments for `select_merge`."""
    say = {n: n for n in ("q", "k", "scale", "lse", "key_valid", "query_weight", "reduce")}
    say |= names or {}
    qn, kn = say["q"], say["k"]
    _check_float(q, qn, 4, "[B, Hq, M, d]")
    _check_float(k, kn, 4, "[B, Hk, P+N, d]")
    _check(
        k.dtype == q.dtype, kn, f"have the dtype of {qn} ({_name(q.dtype)})", lambda: _name(k.dtype)
    )
    _check_device(k, kn, q, qn)
    batch, heads, rows, width = q.shape
    some = heads >= 1 and rows >= 1 and width >= 1
    _check(some, qn, "have at least one head, one row and one column", lambda: _shape(q))
    ok = k.shape[0] == batch and k.shape[3] == width and k.shape[1] >= 1
    _check_shape(k, kn, ok, lambda: _layout(B=batch, Hk=None, PN=None, d=width))
    _check(
        heads % k.shape[1] == 0,
        f"the heads of {qn}",
        lambda: f"be a multiple of the heads of {kn} ({int(k.shape[1])})",
        lambda: int(heads),
    )
    keys = k.shape[2]
    _check(0 <= prefix < keys, "prefix", lambda: f"be in 0..P+N-1={int(keys) - 1}", lambda: prefix)
    _check_unit_stride(q, qn)
    _check_unit_stride(k, kn)
    if scale is not None:
        _check_number(scale, say["scale"])
    _check_choice(reduce, say["reduce"], REDUCES)
    if lse is not None:
        _check_like(lse, say["lse"], torch.float32, q, qn, B=batch, Hq=heads, M=rows)
    if key_valid is not None:
        _check_like(key_valid, say["key_valid"], torch.bool, q, qn, B=batch, PN=keys)
    if query_weight is not None:
        _check_like(query_weight, say["query_weight"], torch.float32, q, qn, B=batch, M=rows)
        _check_weight_values(query_weight, say["query_weight"])


def packed_attention(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    query_weight: Tensor | None = None,
    reduce: str = "mean",
) -> None:
    """Checks of `attention_saliency.varlen`, values included where `has_values` allows."""
    _check_float(q, "q", 3, "[T, Hq, d]")
    _check_float(k, "k", 3, "[T, Hk, d]")
    _check(
        k.dtype == q.dtype, "k", f"have the dtype of q ({_name(q.dtype)})", lambda: _name(k.dtype)
    )
    _check_device(k, "k", q, "q")
    total, heads, width = q.shape
    some = heads >= 1 and width >= 1
    _check(some, "q", "have at least one head and one column", lambda: _shape(q))
    ok = k.shape[0] == total and k.shape[2] == width and k.shape[1] >= 1
    _check_shape(k, "k", ok, lambda: _layout(T=total, Hk=None, d=width))
    _check(
        heads % k.shape[1] == 0,
        "the heads of q",
        lambda: f"be a multiple of the heads of k ({int(k.shape[1])})",
        lambda: int(heads),
    )
    _check_unit_stride(q, "q")
    _check_unit_stride(k, "k")
    is_int = cu_seqlens.dtype in (torch.int32, torch.int64)
    _check(is_int, "cu_seqlens", "be int32 or int64", lambda: _name(cu_seqlens.dtype))
    ok = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1
    _check_shape(cu_seqlens, "cu_seqlens", ok, "[S+1]")
    _check_device(cu_seqlens, "cu_seqlens", q, "q")
    _check(max_seqlen >= 0, "max_seqlen", "be >= 0", lambda: max_seqlen)
    if scale is not None:
        _check_number(scale, "scale")
    _check_choice(reduce, "reduce", REDUCES)
    if lse is not None:
        _check_like(lse, "lse", torch.float32, q, "q", Hq=heads, T=total)
    if query_weight is not None:
        _check_like(query_weight, "query_weight", torch.float32, q, "q", T=total)
        _check_weight_values(query_weight, "query_weight")
    if has_values(cu_seqlens):
        _cu_seqlens_values(cu_seqlens.tolist(), int(total), max_seqlen)


def _cu_seqlens_values(starts: list[int], total: int, max_seqlen: int) -> None:
    _check(starts[0] == 0, "cu_seqlens", "start at 0", lambda: starts[0])
    down = [f"{b} after {a}" for a, b in itertools.pairwise(starts) if b < a]
    _check(not down, "cu_seqlens", "not decrease", lambda: down[0])
    _check(starts[-1] == total, "cu_seqlens", f"end at T={total}", lambda: starts[-1])
    longest = max((b - a for a, b in itertools.pairwise(starts)), default=0)
    must = f"be at least the longest sequence ({longest})"
    _check(longest <= max_seqlen, "max_seqlen", must, lambda: max_seqlen)


def similarity(
    text: Tensor,
    visual: Tensor,
    *,
    temperature: float = 0.01,
    text_valid: Tensor | None = None,
    visual_valid: Tensor | None = None,
    reduce: str = "max",
) -> None:
    """Checks of `similarity_saliency`."""
    _check_float(text, "text", 3, "[B, T, D]")
    _check_float(visual, "visual", 3, "[B, N, D]")
    must = f"have the dtype of text ({_name(text.dtype)})"
    _check(visual.dtype == text.dtype, "visual", must, lambda: _name(visual.dtype))
    _check_device(visual, "visual", text, "text")
    batch, rows, width = text.shape
    some = rows >= 1 and width >= 1
    _check(some, "text", "have at least one row and one column", lambda: _shape(text))
    tokens = visual.shape[1]
    ok = visual.shape[0] == batch and tokens >= 1 and visual.shape[2] == width
    _check_shape(visual, "visual", ok, lambda: _layout(B=batch, N=None, D=width))
    warm = math.isfinite(temperature) and temperature > 0
    _check(warm, "temperature", "be finite and > 0", lambda: f"{temperature:g}")
    _check_choice(reduce, "reduce", REDUCES)
    if text_valid is not None:
        _check_like(text_valid, "text_valid", torch.bool, text, "text", B=batch, T=rows)
    if visual_valid is not None:
        _check_like(visual_valid, "visual_valid", torch.bool, text, "text", B=batch, N=tokens)


def _keep(keep: int, tokens: int) -> None:
    _check(1 <= keep <= tokens, "keep", lambda: f"be in 1..N={int(tokens)}", lambda: keep)


def selection(
    batch: int,
    tokens: int,
    like: Tensor,
    like_name: str,
    *,
    keep: int,
    alpha: float,
    fusion: str,
    valid: Tensor | None,
    priority: Tensor | None,
    priority_keep: int,
) -> None:
    """Checks of the choice that `consensus_select` and `select_merge` share."""
    _keep(keep, tokens)
    _check_unit(alpha, "alpha")
    _check_choice(fusion, "fusion", FUSIONS)
    if valid is not None:
        _check_like(valid, "valid", torch.bool, like, like_name, B=batch, N=tokens)
    must = f"be in 0..keep={keep}"
    _check(0 <= priority_keep <= keep, "priority_keep", must, lambda: priority_keep)
    given = priority_keep == 0 or priority is not None
    _check(given, "priority", f"be given with priority_keep={priority_keep}", lambda: "None")
    if priority is not None:
        _check(
            priority.dtype == torch.float32, "priority", "be float32", lambda: _name(priority.dtype)
        )
        _check_shape(
            priority,
            "priority",
            _has_shape(priority, tokens) or _has_shape(priority, batch, tokens),
            lambda: f"{_layout(N=tokens)} or {_layout(B=batch, N=tokens)}",
        )
        _check_device(priority, "priority", like, like_name)


def scores(visual: Tensor, textual: Tensor | None) -> None:
    """Checks of the score lists of `consensus_select`."""
    _check(visual.dtype == torch.float32, "visual", "be float32", lambda: _name(visual.dtype))
    _check_shape(visual, "visual", visual.dim() == 2, "[B, N]")
    if textual is not None:
        batch, tokens = visual.shape
        _check_like(textual, "textual", torch.float32, visual, "visual", B=batch, N=tokens)


def split(
    visual: Tensor, textual: Tensor, keep: int, *, reserve: float, valid: Tensor | None
) -> None:
    """Checks of `adaptive_split_select`."""
    scores(visual, textual)
    batch, tokens = visual.shape
    _keep(keep, tokens)
    half = 0.0 <= reserve <= 0.5  # two lists reserve that share each
    _check(half, "reserve", "be in 0..0.5", lambda: f"{reserve:g}")
    if valid is not None:
        _check_like(valid, "valid", torch.bool, visual, "visual", B=batch, N=tokens)


def diverse(
    features: Tensor, keep: int, *, relevance: Tensor | None, objective: str, valid: Tensor | None
) -> None:
    """Checks of `greedy_diverse_select`, values included where `has_values` allows."""
    _check_float(features, "features", 3, "[B, N, F]")
    batch, tokens, width = features.shape
    _check(width >= 1, "features", "have at least one column", lambda: _shape(features))
    _keep(keep, tokens)
    _check_choice(objective, "objective", OBJECTIVES)
    if relevance is not None:
        _check_like(relevance, "relevance", torch.float32, features, "features", B=batch, N=tokens)
        if objective == "dpp" and has_values(relevance):
            bad = (relevance < 0) | torch.isinf(relevance)
            must = "be finite and >= 0 with dpp"
            _check(not bad.any(), "relevance", must, lambda: f"{relevance[bad][0].item():g}")
    if valid is not None:
        _check_like(valid, "valid", torch.bool, features, "features", B=batch, N=tokens)


def merge_metric(x: Tensor, metric: Tensor) -> None:
    """Checks of the tokens and of the vectors that say which are alike."""
    _check_float(x, "x", 3, "[B, N, D]")
    batch, tokens = x.shape[:2]

    def layout() -> str:
        return _layout(B=batch, N=tokens, F=None)

    _check_float(metric, "metric", 3, layout)
    ok = metric.shape[0] == batch and metric.shape[1] == tokens and metric.shape[2] >= 1
    _check_shape(metric, "metric", ok, layout)
    _check_device(metric, "metric", x, "x")


def merge_options(contextual: int, threshold: float, blend: float) -> None:
    """Checks of the numbers that `token_merge` and `select_merge` share."""
    _check(0 <= contextual < 2**31, "contextual", f"be in 0..{2**31 - 1}", lambda: contextual)
    _check(not math.isnan(threshold), "threshold", "be a number", lambda: "nan")
    _check_unit(blend, "blend")


def merge(
    x: Tensor,
    metric: Tensor,
    index: Tensor,
    *,
    contextual: int,
    weight: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    blend: float,
) -> None:
    """Checks of `token_merge`, values included where `has_values` allows."""
    merge_metric(x, metric)
    batch, tokens = x.shape[:2]
    _check(index.dtype == torch.int64, "index", "be int64", lambda: _name(index.dtype))
    ok = index.dim() == 2 and index.shape[0] == batch and 1 <= index.shape[1] <= tokens
    _check_shape(
        index, "index", ok, lambda: f"{_layout(B=batch, K=None)} with K in 1..N={int(tokens)}"
    )
    _check_device(index, "index", x, "x")
    merge_options(contextual, threshold, blend)
    if weight is not None:
        _check_like(weight, "weight", torch.float32, x, "x", B=batch, N=tokens)
        _check_weight_values(weight, "weight")
    if valid is not None:
        _check_like(valid, "valid", torch.bool, x, "x", B=batch, N=tokens)
    if has_values(index):
        _merge_index_values(index, tokens, valid)


def _merge_index_values(index: Tensor, tokens: int, valid: Tensor | None) -> None:
    bad = (index < -1) | (index >= tokens)
    must = f"be in 0..N-1={tokens - 1}, or -1 for an empty slot"
    _check(not bad.any(), "index", must, lambda: index[bad][0].item())
    ordered = index.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _check(
        not twice.any(),
        "index",
        "name each token once",
        lambda: f"token {ordered[:, 1:][twice][0].item()} twice",
    )
    if valid is not None:
        unfit = (index >= 0) & ~valid.gather(1, index.clamp_min(0))
        _check(
            not unfit.any(),
            "index",
            "name valid tokens only",
            lambda: f"token {index[unfit][0].item()}, which is not",
        )


def fused(
    x: Tensor,
    q_vis: Tensor,
    k_vis: Tensor,
    q_txt: Tensor | None,
    k_txt: Tensor | None,
    *,
    keep: int,
    contextual: int,
    alpha: float,
    fusion: str,
    prefix: int,
    scale_vis: float | None,
    scale_txt: float | None,
    lse_vis: Tensor | None,
    lse_txt: Tensor | None,
    txt_weight: Tensor | None,
    txt_reduce: str,
    metric: Tensor | None,
    valid: Tensor | None,
    priority: Tensor | None,
    priority_keep: int,
    threshold: float,
    blend: float,
    diversity: float,
) -> None:
    """Checks of `select_merge`."""
    _check_float(x, "x", 3, "[B, N, D]")
    batch, tokens = x.shape[:2]
    _check_device(q_vis, "q_vis", x, "x")
    names = {"q": "q_vis", "k": "k_vis", "scale": "scale_vis", "lse": "lse_vis"}
    attention(q_vis, k_vis, scale=scale_vis, lse=lse_vis, prefix=prefix, names=names)
    _check_keys_fit(k_vis, "k_vis", batch, tokens + prefix, "P+N")
    _check(q_txt is not None or k_txt is None, "q_txt", "be given with k_txt", lambda: "None")
    _check(k_txt is not None or q_txt is None, "k_txt", "be given with q_txt", lambda: "None")
    if q_txt is None or k_txt is None:
        for name, tensor in (("lse_txt", lse_txt), ("txt_weight", txt_weight)):
            _check(tensor is None, name, "be None without q_txt", lambda: "a tensor")
        _check_choice(txt_reduce, "txt_reduce", REDUCES)
    else:
        _check_device(q_txt, "q_txt", x, "x")
        names = {"q": "q_txt", "k": "k_txt", "scale": "scale_txt", "lse": "lse_txt"}
        names |= {"query_weight": "txt_weight", "reduce": "txt_reduce"}
        attention(
            q_txt, k_txt, scale=scale_txt, lse=lse_txt, query_weight=txt_weight,
            reduce=txt_reduce, names=names,
        )  # fmt: skip
        _check_keys_fit(k_txt, "k_txt", batch, tokens, "N")
    if metric is not None:
        merge_metric(x, metric)
    selection(
        batch, tokens, x, "x", keep=keep, alpha=alpha, fusion=fusion, valid=valid,
        priority=priority, priority_keep=priority_keep,
    )  # fmt: skip
    merge_options(contextual, threshold, blend)
    known = diversity == 0 or 0.02 <= diversity <= 1
    _check(known, "diversity", "be 0 or in 0.02..1", lambda: f"{diversity:g}")
    _check(
        diversity == 0 or priority_keep == 0,
        "priority_keep",
        "be 0 unless diversity is 0, which spreads tokens in its own way",
        lambda: priority_keep,
    )


def _check_keys_fit(k: Tensor, name: str, batch: int, keys: int, keys_name: str) -> None:
    """The keys of `select_merge` belong to the tokens of `x`."""
    ok = k.shape[0] == batch and k.shape[2] == keys
    _check(
        ok,
        name,
        lambda: f"be [B={int(batch)}, Hk, {keys_name}={int(keys)}, d] to match x",
        lambda: _shape(k),
    )
