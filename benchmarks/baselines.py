"""What `select_merge` is measured against: the same result from plain torch, and a plain read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One benchmark case: LLaVA-like encoder keys with a CLS, and a short question."""

    batch: int
    tokens: int
    width: int
    keep: int
    encoder_heads: int = 16
    encoder_width: int = 64
    rows: int = 8
    heads: int = 32
    head_width: int = 128

    def __str__(self) -> str:
        return f"B{self.batch}-N{self.tokens}-D{self.width}-K{self.keep}"


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case, laid out as Hugging Face models produce them: projections
    `[B, rows, H * d]` viewed as `[B, H, rows, d]`."""

    x: Tensor
    q_vis: Tensor
    k_vis: Tensor
    q_txt: Tensor
    k_txt: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, self.q_vis, self.k_vis, self.q_txt, self.k_txt)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


def make_inputs(
    shape: Shape, dtype: torch.dtype, seed: int = 0, contiguous: bool = False
) -> Inputs:
    """Normal data from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def heads(rows: int, count: int, width: int) -> Tensor:
        flat = torch.randn(shape.batch, rows, count, width, generator=generator).to(dtype)
        view = flat.transpose(1, 2)
        return view.contiguous() if contiguous else view

    x = torch.randn(shape.batch, shape.tokens, shape.width, generator=generator).to(dtype)
    return Inputs(
        x,
        heads(1, shape.encoder_heads, shape.encoder_width),
        heads(shape.tokens + 1, shape.encoder_heads, shape.encoder_width),
        heads(shape.rows, shape.heads, shape.head_width),
        heads(shape.tokens, shape.heads, shape.head_width),
    )


def _saliency(q: Tensor, k: Tensor, prefix: int, reduce: str) -> Tensor:
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    p = logits.float().softmax(-1)[..., prefix:]
    return (p.mean(2) if reduce == "mean" else p.amax(2)).mean(1)


def plain_torch(i: Inputs, keep: int, merge: str = "scatter_reduce") -> tuple[Tensor, Tensor]:
    """The composition an engineer would write: few-row matmuls, softmax, top-k, gather,
    similarity matmul, argmax, and a scatter for the mean (`scatter_reduce` or `index_add`)."""
    batch, tokens, width = i.x.shape
    visual = _saliency(i.q_vis, i.k_vis, 1, "mean")
    textual = _saliency(i.q_txt, i.k_txt, 0, "max")
    place = torch.arange(tokens, dtype=torch.float32).expand(batch, tokens)

    def ranks(score: Tensor) -> Tensor:
        order = score.argsort(dim=1, descending=True, stable=True)
        return torch.empty_like(score).scatter_(1, order, place)

    score = 0.5 * ranks(visual) + 0.5 * ranks(textual)
    index = score.topk(keep, largest=False).indices.sort(dim=1).values
    kept = torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, index, True)
    dropped = (~kept).nonzero()[:, 1].view(batch, tokens - keep)

    unit = torch.nn.functional.normalize(i.k_vis[:, :, 1:].float().mean(1), dim=-1)
    rows = torch.arange(batch)[:, None]
    nearest = (unit[rows, dropped] @ unit[rows, index].transpose(1, 2)).argmax(-1)
    out = i.x.gather(1, index[:, :, None].expand(-1, -1, width)).float()
    joined = i.x.gather(1, dropped[:, :, None].expand(-1, -1, width)).float()
    if merge == "scatter_reduce":
        to = nearest[:, :, None].expand(-1, -1, width)
        out = out.scatter_reduce(1, to, joined, "mean", include_self=True)
    else:
        flat = (nearest + rows * keep).view(-1)
        count = torch.ones(batch * keep).index_add(0, flat, torch.ones(flat.numel()))
        out = out.view(-1, width).index_add(0, flat, joined.view(-1, width)) / count[:, None]
        out = out.view(batch, keep, width)
    return out.to(i.x.dtype), index


def plain_read(i: Inputs) -> None:
    """Read every byte of the inputs once, threaded and vectorised: sums over 32-bit words."""
    for t in i.tensors:
        words = t.transpose(1, 2) if t.dim() == 4 and not t.is_contiguous() else t
        words.view(torch.float32).sum()


def random_tokens(i: Inputs, keep: int) -> Tensor:
    """The floor for any method: keep tokens at random, look at nothing else."""
    batch, tokens, width = i.x.shape
    index = torch.rand(batch, tokens).topk(keep).indices.sort(dim=1).values
    return i.x.gather(1, index[:, :, None].expand(-1, -1, width))
