"""ConsensusDrop and generation once more, without hooks, cache, padding or our ops.

Everything is done per sample, in float64 where a choice depends on it, from the weights of an
unpatched model: the oracle that the patched model is held against.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .models import IMAGE


class Sequence(NamedTuple):
    """One sample as the LLM shall see it: `embeds [K, D]`, `positions [K]`."""

    embeds: Tensor
    positions: Tensor


def encoder_scores(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """CLS attention `[R, N]` and head-mean keys `[R, N, dv]` of the layer of the features."""
    tower = model.model.vision_tower
    wanted = model.config.vision_feature_layer
    layer = tower.encoder.layers[wanted if wanted < 0 else wanted - 1]
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    before = states[wanted - 1 if wanted < 0 else wanted - 1]
    x = layer.layer_norm1(before)
    attention = layer.self_attn
    split = (*x.shape[:2], attention.num_heads, attention.head_dim)
    q = attention.q_proj(x).view(split).transpose(1, 2).double()
    k = attention.k_proj(x).view(split).transpose(1, 2).double()
    maps = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
    return maps[:, :, 0, 1:].mean(1), k[:, :, 1:].mean(1)


def image_tokens(model: Any, pixel_values: Tensor) -> Tensor:
    """Projected visual tokens `[R, N, D]`."""
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    wanted = model.config.vision_feature_layer
    return model.model.multi_modal_projector(states[wanted][:, 1:])


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of `x [H, T, d]`, pairs half a head apart."""
    half = x.shape[-1] // 2
    rate = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * rate
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def question_scores(
    model: Any, embeds: Tensor, rows: Tensor, columns: Tensor, *, layer: int = 0,
    rotary: bool = True, context: str = "visual", reduce: str = "max",
) -> Tensor:  # fmt: skip
    """Attention `[N]` of the prompt's `rows` to its `columns`; `embeds [L, D]`."""
    text = model.model.language_model
    block = text.layers[layer]
    attention = block.self_attn
    x = block.input_layernorm(embeds[None])[0]

    def heads(side: str) -> Tensor:
        flat = getattr(attention, f"{side}_proj")(x).view(len(x), -1, attention.head_dim)
        if hasattr(attention, f"{side}_norm"):
            flat = getattr(attention, f"{side}_norm")(flat)
        out = flat.transpose(0, 1).double()
        theta = text.config.rope_parameters["rope_theta"]
        return rotate(out, torch.arange(len(x)), theta) if rotary else out

    q, k = heads("q")[:, rows], heads("k")
    k = k.repeat_interleave(len(q) // len(k), 0)
    logits = q @ k.transpose(1, 2) * attention.head_dim**-0.5
    seen = torch.zeros(len(rows), len(x), dtype=torch.bool)
    if context == "visual":
        seen[:, columns] = True
    else:
        seen = torch.arange(len(x)) <= rows[:, None]
    maps = logits.masked_fill(~seen, -torch.inf).softmax(-1)[:, :, columns]  # [H, M, N]
    return maps.amax(1).mean(0) if reduce == "max" else maps.mean(1).mean(0)


def choose(visual: Tensor, textual: Tensor | None, keep: int, alpha: float) -> Tensor:
    """Rank consensus of two lists `[N]`: the kept tokens, ascending."""
    count = len(visual)

    def places(scores: Tensor) -> list[int]:
        order = sorted(range(count), key=lambda i: (-scores[i].item(), i))
        return [order.index(i) for i in range(count)]

    rv = places(visual)
    rt = rv if textual is None else places(textual)
    order = sorted(range(count), key=lambda i: ((1 - alpha) * rv[i] + alpha * rt[i], rv[i], i))
    return torch.tensor(sorted(order[:keep]))


def merge(x: Tensor, metric: Tensor, kept: Tensor) -> Tensor:
    """Every dropped token joins the most similar kept one; true means `[K, D]`."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    members = {int(i): [int(i)] for i in kept}
    for j in range(len(x)):
        if j not in members:
            best = max(kept.tolist(), key=lambda i: ((unit[i] @ unit[j]).item(), -i))
            members[best].append(j)
    return torch.stack([x[m].double().mean(0) for m in members.values()]).to(x.dtype)


def pruned(
    model: Any, ids: Tensor, images: Tensor, *, keep: int, alpha: float = 0.5,
    compact: bool = True, merging: bool = True, kept: Tensor | None = None, answer: int = 0,
    **probe: Any,
) -> Sequence:  # fmt: skip
    """A prompt `[L]` without padding, with its images `[r, 3, H, W]`, pruned.

    `kept` overrides the choice, the same for all images. The last `answer` tokens don't ask.
    """
    embeds = model.get_input_embeddings()(ids)
    places = (ids == IMAGE).nonzero().flatten()
    if not len(places):
        return Sequence(embeds, torch.arange(len(ids)))
    x = image_tokens(model, images)
    embeds = embeds.clone()
    embeds[places] = x.flatten(0, 1)
    scores, metric = encoder_scores(model, images)
    out = embeds.clone()
    left = ids != IMAGE
    rows = torch.arange(int(places[-1]) + 1, len(ids) - answer)
    for at, columns in enumerate(places.view(len(x), -1)):
        asked = question_scores(model, embeds, rows, columns, **probe) if alpha else None
        chosen = choose(scores[at], asked, keep, alpha) if kept is None else kept
        out[columns[chosen]] = merge(x[at], metric[at], chosen) if merging else x[at][chosen]
        left[columns[chosen]] = True
    positions = torch.arange(len(ids))[left]
    return Sequence(out[left], torch.arange(len(positions)) if compact else positions)


@torch.no_grad()
def greedy(model: Any, sequence: Sequence, steps: int) -> tuple[list[int], Tensor]:
    """Greedy decoding that runs the whole sequence anew for every token: ids, `[steps, V]`."""
    embeds, positions = sequence
    ids, logits = [], []
    for _ in range(steps):
        hidden = model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            use_cache=False,
        ).last_hidden_state
        logits.append(model.lm_head(hidden[0, -1]))
        ids.append(int(logits[-1].argmax()))
        word = model.get_input_embeddings()(torch.tensor(ids[-1:]))
        embeds = torch.cat([embeds, word])
        positions = torch.cat([positions, positions[-1:] + 1])
    return ids, torch.stack(logits)
