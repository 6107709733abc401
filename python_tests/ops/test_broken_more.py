"""The test of the tests for the other ops: one plausible mistake each must be rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from . import oracle, oracle_more
from .cases import Args, diverse_case, generator, packed_case, random_mask, scores, similarity_case
from .checks_more import check_diverse, check_packed, check_similarity, check_split

Impl = Callable[..., Any]


# --- honest implementations, from the oracle ---------------------------------------------------


def packed(**args: Any) -> Tensor:
    return oracle_more.attention_saliency_varlen(**args).float()


def similarity(**args: Any) -> Tensor:
    return oracle_more.similarity_saliency(**args).float()


split = oracle_more.adaptive_split_select
diverse = oracle_more.greedy_diverse_select


# --- one mistake each --------------------------------------------------------------------------


def one_long_sequence(cu_seqlens: Tensor, **args: Any) -> Tensor:
    return packed(cu_seqlens=cu_seqlens[[0, -1]], **args)


def last_token_of_each_forgotten(cu_seqlens: Tensor, **args: Any) -> Tensor:
    out = packed(cu_seqlens=cu_seqlens, **args)
    out[cu_seqlens[1:] - 1] = 0
    return out


def divided_by_the_longest(cu_seqlens: Tensor, max_seqlen: int, **args: Any) -> Tensor:
    """The mean over max_seqlen rows instead of the sequence's own."""
    out = packed(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **args)
    lengths = cu_seqlens.diff()
    return out * (lengths / max_seqlen).repeat_interleave(lengths)


def lse_of_the_first_sequence(lse: Tensor, cu_seqlens: Tensor, **args: Any) -> Tensor:
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    here = torch.arange(lse.shape[1]) - starts
    return packed(lse=lse[:, here], cu_seqlens=cu_seqlens, **args)


def causal_over_the_pack(q: Tensor, k: Tensor, cu_seqlens: Tensor, **args: Any) -> Tensor:
    heads_first = [t.transpose(0, 1)[None] for t in (q, k)]
    return oracle.attention_saliency(*heads_first, causal=True)[0].float()


PACKED: list[tuple[Impl, Args]] = [
    (one_long_sequence, packed_case((9, 12))),
    (last_token_of_each_forgotten, packed_case((9, 12))),
    (divided_by_the_longest, packed_case((9, 12))),
    (lse_of_the_first_sequence, packed_case((9, 12), lse=torch.rand(4, 21) + 3)),
    (causal_over_the_pack, packed_case((9, 12), causal=True)),
]


def dot_products(text: Tensor, visual: Tensor, **_: Any) -> Tensor:
    return (text @ visual.transpose(1, 2) / text.shape[2] / 0.01).softmax(2).amax(1)


def softmax_over_the_text(text: Tensor, visual: Tensor, **_: Any) -> Tensor:
    cos = oracle_more.unit(text) @ oracle_more.unit(visual).transpose(1, 2)
    return (cos / 0.01).softmax(1).amax(1).float()


def multiplied_by_the_temperature(temperature: float, **args: Any) -> Tensor:
    return similarity(temperature=1 / temperature, **args)


def mean_for_max(**args: Any) -> Tensor:
    return similarity(**args, reduce="mean")


def mean_over_padding(text_valid: Tensor, **args: Any) -> Tensor:
    share = text_valid.sum(1, keepdim=True) / text_valid.shape[1]
    return similarity(text_valid=text_valid, **args) * share


def masked_tokens_in_the_softmax(visual_valid: Tensor, **args: Any) -> Tensor:
    return similarity(**args) * visual_valid


def cosines_in_bfloat16(text: Tensor, visual: Tensor, **_: Any) -> Tensor:
    cos = oracle_more.unit(text).bfloat16() @ oracle_more.unit(visual).bfloat16().transpose(1, 2)
    return (cos.float() / 0.01).softmax(2).amax(1)


SIMILARITY: list[tuple[Impl, Args]] = [
    (dot_products, similarity_case()),
    (softmax_over_the_text, similarity_case()),
    (multiplied_by_the_temperature, similarity_case(temperature=0.5)),
    (mean_for_max, similarity_case()),
    (mean_over_padding, similarity_case(text_valid=random_mask((2, 7), 1, 0.5), reduce="mean")),
    (masked_tokens_in_the_softmax, similarity_case(visual_valid=random_mask((2, 33), 1, 0.3))),
    (cosines_in_bfloat16, similarity_case()),
]


def lists_swapped(visual: Tensor, textual: Tensor, **args: Any):
    """The same tokens, but the places that went to `visual` are returned."""
    return split(textual, visual, **args)


def last_maximum(visual: Tensor, textual: Tensor, keep: int, **args: Any):
    index, other = split(textual, visual, keep, **args)
    return split(visual, textual, keep, **args)[0], keep - 2 * (keep // 4) - other


def reserved_in_the_mass(visual: Tensor, textual: Tensor, keep: int, **_: Any):
    """Prefix sums from the first token on, the reserved ones with them."""
    held = keep // 4
    rest = keep - 2 * held
    sums = [a.double().sort(1, descending=True).values.cumsum(1) for a in (textual, visual)]
    k1 = torch.arange(rest + 1)
    product = sums[0][:, held + k1 - 1] * sums[1][:, held + rest - k1 - 1]
    return split(visual, textual, keep)[0], product.argmax(1)


def keeps_duplicates(visual: Tensor, textual: Tensor, keep: int, **args: Any):
    """The freed places stay empty."""
    index, k1 = split(visual, textual, keep, **args)
    held = keep // 4
    for b in range(len(index)):
        parts = (textual[b], held + int(k1[b])), (visual[b], keep - held - int(k1[b]))
        both = sorted({i for a, n in parts for i in a.argsort(descending=True)[:n].tolist()})
        index[b] = torch.tensor(both + [-1] * (keep - len(both)))
    return index, k1


def filled_from_the_lighter_list(visual: Tensor, textual: Tensor, keep: int, **args: Any):
    """The refill goes by the other list: as if both masses were negated."""
    index, k1 = split(visual, textual, keep, **args)
    held = keep // 4
    part = sorted(
        {*textual[0].argsort(descending=True)[: held + int(k1[0])].tolist()}
        | {*visual[0].argsort(descending=True)[: keep - held - int(k1[0])].tolist()}
    )
    heavier = textual if textual[0].sum() > visual[0].sum() else visual
    lighter = visual if heavier is textual else textual
    for i in lighter[0].argsort(descending=True).tolist():
        if len(part) < keep and i not in part:
            part.append(i)
    return torch.tensor([sorted(part)]), k1


both = {"visual": scores(1, 40), "textual": scores(1, 40, seed=1) * 3, "keep": 15}
SPLIT: list[tuple[Impl, Args]] = [
    (lists_swapped, both),
    (last_maximum, {"visual": torch.ones(1, 9), "textual": torch.ones(1, 9), "keep": 3}),
    (reserved_in_the_mass, {**both, "keep": 16}),
    (keeps_duplicates, both),
    (filled_from_the_lighter_list, both),
]


def nearest_for_farthest(**args: Any) -> Tensor:
    return diverse(**{**args, "features": args["features"].abs().sqrt()})


def mean_distance(features: Tensor, keep: int, **_: Any) -> Tensor:
    """Farthest on average, not from the likest of the chosen."""
    cos = oracle_more.cosines(features[0])
    chosen = diverse(features, 1)[0].tolist()
    while len(chosen) < keep:
        far = cos[:, chosen].mean(1)
        far[chosen] = 9
        chosen.append(int(far.argmin()))
    return torch.tensor([sorted(chosen)])


def starts_at_the_first(features: Tensor, keep: int, **_: Any) -> Tensor:
    first = torch.zeros(features.shape[:2])
    first[:, 0] = 1
    return diverse(features, keep, relevance=first)


def lengths_for_cosines(features: Tensor, keep: int, **_: Any) -> Tensor:
    """A determinant of dot products: long vectors win."""
    length = features.norm(dim=2)
    return diverse(features, keep, relevance=length, objective="dpp")


def relevance_once(relevance: Tensor, **args: Any) -> Tensor:
    """r instead of r squared in the gain."""
    return diverse(**args, relevance=relevance.sqrt())


def one_cholesky_row_forgotten(features: Tensor, keep: int, **_: Any) -> Tensor:
    """Gains after the last two chosen only."""
    cos = oracle_more.cosines(features[0])
    chosen, left = [], list(range(features.shape[1]))
    while len(chosen) < keep:
        gain = oracle_more.greedy_scores(cos, None, "dpp", chosen[-2:], left)
        chosen.append(max(left, key=lambda i: (gain[i], -i)))
        left.remove(chosen[-1])
    return torch.tensor([sorted(chosen)])


def in_the_order_of_choice(**args: Any) -> Tensor:
    return diverse(**args).flip(1)


def takes_invalid_tokens(valid: Tensor, **args: Any) -> Tensor:
    return diverse(**args)


def short_of_one(keep: int, **args: Any) -> Tensor:
    return torch.nn.functional.pad(diverse(keep=keep - 1, **args), (0, 1), value=-1)


plain = diverse_case(1, 40, 8)
dpp = diverse_case(1, 40, 8, objective="dpp")
DIVERSE: list[tuple[Impl, Args]] = [
    (nearest_for_farthest, plain),
    (mean_distance, plain),
    (starts_at_the_first, plain),
    (lengths_for_cosines, dpp),
    (relevance_once, {**dpp, "relevance": torch.rand(1, 40, generator=generator(2)).pow(3)}),
    (one_cholesky_row_forgotten, dpp),
    (in_the_order_of_choice, plain),
    (takes_invalid_tokens, {**plain, "valid": random_mask((1, 40), 1, 0.5)}),
    (short_of_one, plain),
]

CHECKS = [
    (check_packed, packed, PACKED),
    (check_similarity, similarity, SIMILARITY),
    (check_split, split, SPLIT),
    (check_diverse, diverse, DIVERSE),
]
BROKEN = [
    pytest.param(check, honest, wrong, args, id=f"{wrong.__name__}-{i}")
    for check, honest, rows in CHECKS
    for i, (wrong, args) in enumerate(rows)
]


@pytest.mark.parametrize(("check", "honest", "wrong", "args"), BROKEN)
def test_one_mistake_is_seen(check, honest, wrong, args):
    check(honest, args)
    with pytest.raises(AssertionError):
        check(wrong, args)
