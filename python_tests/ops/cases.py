"""Inputs: seeded tensors in the layouts that the ops must take as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Args = dict[str, Any]


def overload(name: str) -> torch._ops.OpOverload:
    """An op of `torch.ops.cdrop`: `token_merge`, say, or `attention_saliency.varlen`."""
    op, _, kind = name.partition(".")
    return getattr(getattr(torch.ops.cdrop, op), kind or "default")


LAYOUTS = ("contiguous", "transposed", "offset", "gapped", "expanded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of `tensor` in another memory layout; the last stride stays 1.

    `expanded` repeats the first slice along dimension 1 with stride 0, so it changes the values.
    """
    shape = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":  # [B, rows, H, d] in memory, or [rows, B, D]
        a, b = (1, 2) if tensor.ndim == 4 else (0, 1)
        return tensor.transpose(a, b).contiguous().transpose(a, b)
    if layout == "offset":  # one element in: no vector load is aligned
        flat = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)
        flat[1:] = tensor.reshape(-1)
        return flat[1:].view(shape)
    if layout == "gapped":  # odd row stride, NaN between the rows
        wide = torch.full((*shape[:-1], shape[-1] + 3), float("nan"), dtype=tensor.dtype)
        wide[..., 1 : shape[-1] + 1] = tensor
        return wide[..., 1 : shape[-1] + 1]
    assert layout == "expanded"
    return tensor[:, :1].contiguous().expand(shape)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saliency_case(
    batch: int = 1,
    heads: int = 4,
    groups: int = 4,
    rows: int = 7,
    tokens: int = 33,
    width: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    sharp: float = 1.5,
    **more: Any,
) -> Args:
    """Keyword arguments of `attention_saliency`; `sharp` sets how peaked the attention is."""
    g = generator(seed)
    keys = tokens + more.get("prefix", 0)
    q = torch.randn(batch, heads, rows, width, generator=g) * sharp
    k = torch.randn(batch, groups, keys, width, generator=g)
    return {"q": laid_out(q.to(dtype), layout), "k": laid_out(k.to(dtype), layout), **more}


def random_lse(args: Args, seed: int = 1) -> Tensor:
    """An lse somewhat above that of the keys given, as if the layer had seen more keys."""
    q, k = args["q"].float(), args["k"].float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    whole = torch.logsumexp(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return whole + torch.rand(whole.shape, generator=generator(seed))


def random_mask(shape: tuple[int, ...], seed: int, share: float = 0.8) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) < share


def scores(batch: int, tokens: int, *, seed: int = 0, positive: bool = True) -> Tensor:
    """`[B, N]` scores without ties, of the size that a saliency has."""
    g = generator(seed)
    out = torch.randn(batch, tokens, generator=g)
    return out.exp() / tokens if positive else out


def ascending_choice(batch: int, tokens: int, keep: int, seed: int = 0) -> Tensor:
    """`[B, K]` distinct indices in raster order."""
    g = generator(seed)
    rows = [torch.randperm(tokens, generator=g)[:keep].sort().values for _ in range(batch)]
    return torch.stack(rows) if rows else torch.zeros(0, keep, dtype=torch.int64)


def merge_case(
    batch: int = 1,
    tokens: int = 33,
    keep: int = 9,
    width: int = 40,
    features: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    **more: Any,
) -> Args:
    """Keyword arguments of `token_merge`."""
    g = generator(seed)
    x = torch.randn(batch, tokens, width, generator=g)
    metric = torch.randn(batch, tokens, features, generator=g)
    return {
        "x": laid_out(x.to(dtype), layout),
        "metric": laid_out(metric.to(dtype), layout),
        "index": ascending_choice(batch, tokens, keep, seed),
        **more,
    }


def select_merge_case(
    batch: int = 1,
    tokens: int = 33,
    keep: int = 9,
    *,
    width: int = 48,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 64,
    rows_vis: int = 1,
    rows_txt: int = 5,
    text: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    **more: Any,
) -> Args:
    """Keyword arguments of `select_merge`; the text side is grouped-query, the encoder is not."""
    g = generator(seed)

    def draw(*shape: int) -> Tensor:
        return laid_out(torch.randn(*shape, generator=g).to(dtype), layout)

    keys = tokens + more.get("prefix", 0)
    out: Args = {
        "x": draw(batch, tokens, width),
        "q_vis": draw(batch, heads, rows_vis, head_dim),
        "k_vis": draw(batch, heads, keys, head_dim),
    }
    if text:
        out["q_txt"] = draw(batch, heads, rows_txt, head_dim)
        out["k_txt"] = draw(batch, groups, tokens, head_dim)
    return {**out, "keep": keep, **more}


def packed_case(
    lengths: tuple[int, ...] = (7, 0, 33, 1),
    heads: int = 4,
    groups: int = 2,
    width: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    **more: Any,
) -> Args:
    """Arguments of `attention_saliency.varlen`, in the order of the schema."""
    g = generator(seed)
    total = sum(lengths)
    q = torch.randn(total, heads, width, generator=g) * 1.5
    k = torch.randn(total, groups, width, generator=g)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "q": laid_out(q.to(dtype), layout),
        "k": laid_out(k.to(dtype), layout),
        "cu_seqlens": ends,
        "max_seqlen": max(lengths, default=0),
        **more,
    }


def similarity_case(
    batch: int = 2,
    rows: int = 7,
    tokens: int = 33,
    width: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    alike: float = 0.0,
    **more: Any,
) -> Args:
    """Arguments of `similarity_saliency`; `alike` draws all vectors towards one direction."""
    g = generator(seed)
    common = torch.randn(width, generator=g) * alike
    text = torch.randn(batch, rows, width, generator=g) + common
    visual = torch.randn(batch, tokens, width, generator=g) + common
    return {
        "text": laid_out(text.to(dtype), layout),
        "visual": laid_out(visual.to(dtype), layout),
        **more,
    }


def diverse_case(
    batch: int = 2,
    tokens: int = 33,
    keep: int = 9,
    width: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    **more: Any,
) -> Args:
    """Arguments of `greedy_diverse_select`."""
    features = torch.randn(batch, tokens, width, generator=generator(seed))
    return {"features": laid_out(features.to(dtype), layout), "keep": keep, **more}
