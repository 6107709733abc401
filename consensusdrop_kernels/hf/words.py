"""The question's own embeddings, for methods that compare words with pictures."""

from __future__ import annotations

from torch import Tensor

from ..methods.base import QueryRule, Words
from ..methods.parts import upload
from .layout import Group
from .query import question_rows


def question_words(
    rule: str | QueryRule, group: Group, special: Tensor | None, embeds: Tensor,
    moved: Tensor | None = None,
) -> Words:  # fmt: skip
    """The question of each image of a group.

    Args:
        rule: which tokens ask.
        group: the images.
        special: ids that are no question, or None.
        embeds: `[B, K, D]`, the rows of the prompts.
        moved: `[B, L]`, where each token of the prompt stands in them; None: where it was.
    """
    index, live = question_rows(rule, group, special)
    asked = tuple(live.any(1).tolist())
    where = upload(index, embeds.device)
    where = where if moved is None else moved.gather(1, where)
    words = embeds.gather(1, where[..., None].expand(-1, -1, embeds.shape[2]))
    return Words(group.of_prompts(words), upload(live, embeds.device), asked)
