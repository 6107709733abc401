"""What every op demands of its arguments, and the sentences that say so.

The fake kernels, the plain-torch definitions and the Python-launched backends all call these; the
C++ binding repeats them with the same words (a test compares the two), so that its hot path never
enters Python. Errors are `RuntimeError`, as from every torch op: one sentence that names the
argument, what it must be, and what it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FUSIONS = ("rank", "rrf", "sum", "zscore", "product", "max")
REDUCES = ("mean", "max")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(str(int(n)) for n in t.shape) + "]"


def _check(ok: bool, argument: str, must: str, got: object) -> None:
    if not ok:
        raise RuntimeError(f"{argument} must {must}, got {got}")


def _check_float(t: Tensor, name: str, rank: int, layout: str) -> None:
    _check(t.dtype in FLOATS, name, "be float32, float16 or bfloat16", _name(t.dtype))
    _check(t.dim() == rank, name, f"be {layout}", _shape(t))


def _check_device(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    _check(
        t.device == like.device, name, f"be on the device of {like_name} ({like.device})", t.device
    )


def _check_like(t: Tensor, name: str, dtype: torch.dtype, want: Sequence[int], layout: str) -> None:
    """An auxiliary tensor: one dtype, one exact shape."""
    _check(t.dtype == dtype, name, f"be {_name(dtype)}", _name(t.dtype))
    ok = t.dim() == len(want) and all(a == b for a, b in zip(t.shape, want, strict=True))
    _check(ok, name, f"be {layout}", _shape(t))


def _check_unit_stride(t: Tensor, name: str) -> None:
    if t.shape[-1] > 1 and t.numel() > 0:
        _check(t.stride(-1) == 1, name, "have a last stride of 1", t.stride(-1))


def _check_number(value: float, name: str) -> None:
    _check(math.isfinite(value), name, "be finite", f"{value:g}")


def _check_unit(value: float, name: str) -> None:
    _check(0.0 <= value <= 1.0, name, "be in 0..1", f"{value:g}")


def _check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    _check(value in choices, name, f"be one of {', '.join(choices)}", f'"{value}"')


def has_values(t: Tensor) -> bool:
    """Whether the op may look at the values of `t`: on the CPU always, elsewhere it would
    synchronise, so only under `CDROP_CHECK=1`; never for a fake or meta tensor."""
    import os

    if t.is_meta or isinstance(t, torch._subclasses.FakeTensor):
        return False
    return t.device.type == "cpu" or os.environ.get("CDROP_CHECK") == "1"


def _check_weight_values(w: Tensor | None, name: str) -> None:
    if w is None or not has_values(w):
        return
    bad = ~(w >= 0) | torch.isinf(w)
    if bad.any():
        _check(False, name, "be finite and >= 0", f"{w[bad][0].item():g}")


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
    _check_float(q, say["q"], 4, "[B, Hq, M, d]")
    _check_float(k, say["k"], 4, "[B, Hk, P+N, d]")
    _check(
        k.dtype == q.dtype,
        say["k"],
        f"have the dtype of {say['q']} ({_name(q.dtype)})",
        _name(k.dtype),
    )
    _check_device(k, say["k"], q, say["q"])
    batch, heads, rows, width = q.shape
    _check(
        heads >= 1 and rows >= 1 and width >= 1,
        say["q"],
        "have at least one head, one row and one column",
        _shape(q),
    )
    ok = k.shape[0] == batch and k.shape[3] == width and k.shape[1] >= 1
    layout = f"be [B={int(batch)}, Hk, P+N, d={int(width)}]"
    _check(ok, say["k"], layout, _shape(k))
    _check(
        heads % k.shape[1] == 0,
        f"the heads of {say['q']}",
        f"be a multiple of the heads of {say['k']} ({int(k.shape[1])})",
        int(heads),
    )
    keys = k.shape[2]
    _check(0 <= prefix < keys, "prefix", f"be in 0..P+N-1={int(keys) - 1}", prefix)
    _check_unit_stride(q, say["q"])
    _check_unit_stride(k, say["k"])
    if scale is not None:
        _check_number(scale, say["scale"])
    _check_choice(reduce, say["reduce"], REDUCES)
    if lse is not None:
        want = f"[B={int(batch)}, Hq={int(heads)}, M={int(rows)}]"
        _check_like(lse, say["lse"], torch.float32, (batch, heads, rows), want)
        _check_device(lse, say["lse"], q, say["q"])
    if key_valid is not None:
        want = f"[B={int(batch)}, P+N={int(keys)}]"
        _check_like(key_valid, say["key_valid"], torch.bool, (batch, keys), want)
        _check_device(key_valid, say["key_valid"], q, say["q"])
    if query_weight is not None:
        want = f"[B={int(batch)}, M={int(rows)}]"
        _check_like(query_weight, say["query_weight"], torch.float32, (batch, rows), want)
        _check_device(query_weight, say["query_weight"], q, say["q"])
        _check_weight_values(query_weight, say["query_weight"])


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
    _check(1 <= keep <= tokens, "keep", f"be in 1..N={int(tokens)}", keep)
    _check_unit(alpha, "alpha")
    _check_choice(fusion, "fusion", FUSIONS)
    if valid is not None:
        want = f"[B={int(batch)}, N={int(tokens)}]"
        _check_like(valid, "valid", torch.bool, (batch, tokens), want)
        _check_device(valid, "valid", like, like_name)
    _check(0 <= priority_keep <= keep, "priority_keep", f"be in 0..keep={keep}", priority_keep)
    if priority_keep > 0:
        _check(
            priority is not None, "priority", f"be given with priority_keep={priority_keep}", "None"
        )
    if priority is not None:
        shape = (tokens,) if priority.dim() == 1 else (batch, tokens)
        want = f"[N={int(tokens)}] or [B={int(batch)}, N={int(tokens)}]"
        _check_like(priority, "priority", torch.float32, shape, want)
        _check_device(priority, "priority", like, like_name)


def scores(visual: Tensor, textual: Tensor | None) -> None:
    """Checks of the score lists of `consensus_select`."""
    _check(visual.dtype == torch.float32, "visual", "be float32", _name(visual.dtype))
    _check(visual.dim() == 2, "visual", "be [B, N]", _shape(visual))
    if textual is not None:
        batch, tokens = visual.shape
        want = f"[B={int(batch)}, N={int(tokens)}]"
        _check_like(textual, "textual", torch.float32, (batch, tokens), want)
        _check_device(textual, "textual", visual, "visual")


def merge_metric(x: Tensor, metric: Tensor) -> None:
    """Checks of the tokens and of the vectors that say which are alike."""
    _check_float(x, "x", 3, "[B, N, D]")
    batch, tokens = x.shape[:2]
    _check_float(metric, "metric", 3, f"[B={int(batch)}, N={int(tokens)}, F]")
    ok = metric.shape[0] == batch and metric.shape[1] == tokens and metric.shape[2] >= 1
    _check(ok, "metric", f"be [B={int(batch)}, N={int(tokens)}, F]", _shape(metric))
    _check_device(metric, "metric", x, "x")


def merge_options(contextual: int, threshold: float, blend: float) -> None:
    """Checks of the numbers that `token_merge` and `select_merge` share."""
    _check(contextual >= 0, "contextual", "be >= 0", contextual)
    _check(not math.isnan(threshold), "threshold", "be a number", "nan")
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
    _check(index.dtype == torch.int64, "index", "be int64", _name(index.dtype))
    ok = index.dim() == 2 and index.shape[0] == batch and 1 <= index.shape[1] <= tokens
    _check(ok, "index", f"be [B={int(batch)}, K] with K in 1..N={int(tokens)}", _shape(index))
    _check_device(index, "index", x, "x")
    merge_options(contextual, threshold, blend)
    want = f"[B={int(batch)}, N={int(tokens)}]"
    if weight is not None:
        _check_like(weight, "weight", torch.float32, (batch, tokens), want)
        _check_device(weight, "weight", x, "x")
        _check_weight_values(weight, "weight")
    if valid is not None:
        _check_like(valid, "valid", torch.bool, (batch, tokens), want)
        _check_device(valid, "valid", x, "x")
    if has_values(index):
        _merge_index_values(index, tokens, valid)


def _merge_index_values(index: Tensor, tokens: int, valid: Tensor | None) -> None:
    bad = (index < -1) | (index >= tokens)
    if bad.any():
        _check(
            False,
            "index",
            f"be in 0..N-1={tokens - 1}, or -1 for an empty slot",
            index[bad][0].item(),
        )
    ordered = index.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        token = ordered[:, 1:][twice][0].item()
        _check(False, "index", "name each token once", f"token {token} twice")
    if valid is not None:
        unfit = (index >= 0) & ~valid.gather(1, index.clamp_min(0))
        if unfit.any():
            token = index[unfit][0].item()
            _check(False, "index", "name valid tokens only", f"token {token}, which is not")


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
) -> None:
    """Checks of `select_merge`."""
    _check_float(x, "x", 3, "[B, N, D]")
    batch, tokens = x.shape[:2]
    _check_device(q_vis, "q_vis", x, "x")
    attention(
        q_vis,
        k_vis,
        scale=scale_vis,
        lse=lse_vis,
        prefix=prefix,
        names={"q": "q_vis", "k": "k_vis", "scale": "scale_vis", "lse": "lse_vis"},
    )
    _check_keys_fit(k_vis, "k_vis", batch, tokens + prefix, f"P+N={int(tokens + prefix)}")
    given = {"q_txt": q_txt, "k_txt": k_txt}
    for name, other in (("q_txt", "k_txt"), ("k_txt", "q_txt")):
        if given[name] is None and given[other] is not None:
            _check(False, name, f"be given with {other}", "None")
    if q_txt is None or k_txt is None:
        for name, tensor in (("lse_txt", lse_txt), ("txt_weight", txt_weight)):
            _check(tensor is None, name, "be None without q_txt", "a tensor")
        _check_choice(txt_reduce, "txt_reduce", REDUCES)
    else:
        _check_device(q_txt, "q_txt", x, "x")
        names = {"q": "q_txt", "k": "k_txt", "scale": "scale_txt", "lse": "lse_txt"}
        names |= {"query_weight": "txt_weight", "reduce": "txt_reduce"}
        attention(
            q_txt,
            k_txt,
            scale=scale_txt,
            lse=lse_txt,
            query_weight=txt_weight,
            reduce=txt_reduce,
            names=names,
        )
        _check_keys_fit(k_txt, "k_txt", batch, tokens, f"N={int(tokens)}")
    if metric is not None:
        merge_metric(x, metric)
    selection(
        batch,
        tokens,
        x,
        "x",
        keep=keep,
        alpha=alpha,
        fusion=fusion,
        valid=valid,
        priority=priority,
        priority_keep=priority_keep,
    )
    merge_options(contextual, threshold, blend)


def _check_keys_fit(k: Tensor, name: str, batch: int, keys: int, keys_name: str) -> None:
    """The keys of `select_merge` belong to the tokens of `x`."""
    ok = k.shape[0] == batch and k.shape[2] == keys
    _check(ok, name, f"be [B={int(batch)}, Hk, {keys_name}, d] to match x", _shape(k))
