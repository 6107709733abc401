"""`select_merge`: two saliencies, their consensus and the merge, with nothing else in between.

After the saliencies six launches up to `ONE_PROGRAM` tokens: unit vectors of the metric (the head
mean of the keys is taken while they are read), places in both lists, choice, most similar slots,
lists, means. The choice leaves what the merge needs, so that no launch looks at the indices again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ._scores import Choice
from .attention_saliency import attention_saliency
from .consensus_select import ONE_PROGRAM, choose, choose_long
from .token_merge import empty_places, merge, place, unit_vectors


def _saliencies(
    q_vis: Tensor,
    k_vis: Tensor,
    q_txt: Tensor | None,
    k_txt: Tensor | None,
    *,
    prefix: int,
    scale_vis: float | None,
    scale_txt: float | None,
    lse_vis: Tensor | None,
    lse_txt: Tensor | None,
    txt_weight: Tensor | None,
    txt_reduce: str,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Both score lists `[B, N]`, over the keys that `valid` leaves."""
    key_valid = valid
    if valid is not None and prefix > 0:
        key_valid = torch.nn.functional.pad(valid, (prefix, 0), value=True)
    visual = attention_saliency(
        q_vis, k_vis, scale=scale_vis, lse=lse_vis, key_valid=key_valid, prefix=prefix
    )
    if q_txt is None or k_txt is None:
        return visual, None
    return visual, attention_saliency(
        q_txt, k_txt, scale=scale_txt, lse=lse_txt, key_valid=valid, query_weight=txt_weight,
        reduce=txt_reduce,
    )  # fmt: skip


def select_merge(
    x: Tensor,
    q_vis: Tensor,
    k_vis: Tensor,
    q_txt: Tensor | None = None,
    k_txt: Tensor | None = None,
    *,
    keep: int,
    contextual: int = 0,
    alpha: float = 0.5,
    fusion: str = "rank",
    prefix: int = 0,
    scale_vis: float | None = None,
    scale_txt: float | None = None,
    lse_vis: Tensor | None = None,
    lse_txt: Tensor | None = None,
    txt_weight: Tensor | None = None,
    txt_reduce: str = "mean",
    metric: Tensor | None = None,
    valid: Tensor | None = None,
    priority: Tensor | None = None,
    priority_keep: int = 0,
    threshold: float = -1.0,
    blend: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op; see `consensusdrop_kernels.select_merge`."""
    _checks.fused(
        x, q_vis, k_vis, q_txt, k_txt, keep=keep, contextual=contextual, alpha=alpha, fusion=fusion,
        prefix=prefix, scale_vis=scale_vis, scale_txt=scale_txt, lse_vis=lse_vis, lse_txt=lse_txt,
        txt_weight=txt_weight, txt_reduce=txt_reduce, metric=metric, valid=valid, priority=priority,
        priority_keep=priority_keep, threshold=threshold, blend=blend,
    )  # fmt: skip
    batch, count, width = x.shape
    places, own = empty_places(x, keep, contextual)
    if batch == 0:
        size = torch.empty(own.shape, dtype=torch.float32, device=x.device)
        return x.new_empty((0, own.shape[1], width)), own, places.assign, size
    one_program = count <= ONE_PROGRAM
    heads = k_vis[:, :, prefix:] if metric is None else metric.unsqueeze(1)
    unit = unit_vectors(heads, None if one_program else places.assign)
    visual, textual = _saliencies(
        q_vis, k_vis, q_txt, k_txt, prefix=prefix, scale_vis=scale_vis, scale_txt=scale_txt,
        lse_vis=lse_vis, lse_txt=lse_txt, txt_weight=txt_weight, txt_reduce=txt_reduce, valid=valid,
    )  # fmt: skip
    choice = Choice(visual, textual, keep, alpha, fusion, valid, priority, priority_keep)
    if one_program:
        choose(choice, own, None, places)
    else:
        index = torch.empty((batch, keep), dtype=torch.int64, device=x.device)
        choose_long(choice, index, torch.empty_like(visual))
        place(index, valid, places, own)
    tokens, size = merge(
        x, unit, places, own, keep=keep, weight=None, threshold=threshold, blend=blend
    )
    return tokens, own, places.assign, size
