"""The vocabulary between methods and models: `Signals` in, `Selection` out.

Shapes: `R` images (every image of every sample is a row of its own), `N` visual tokens per image,
`D` model width, `P` encoder rows that are no token (CLS), `M` question rows, `S` slots that
survive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

POSITIONS = (None, "compact", "original")
SCOPES = ("image", "crop")
QUERIES = ("after_image", "all_text", "last_token")
CONTEXTS = ("visual", "all")
STAGES = ("encoder", "pre-LLM", "in-LLM")
MERGES = ("yes", "no", "option")

# Which tokens ask: (input_ids [B, L], visual [B, L], valid [B, L]) -> bool [B, L], on the CPU.
QueryRule = Callable[[Tensor, Tensor, Tensor], Tensor]


class TextProbe(NamedTuple):
    """Question rows and visual keys of one LLM layer, the rows padded at the left.

    Attributes:
        q: `[R, H, M, d]`.
        k: `[R, Hk, N, d]`, the keys of the same `N` visual tokens; or `[R, 1, N, D]`, those tokens
            before the key projection, if that was folded into `q`, then `[R, H, M, D]`.
        scale: what the layer multiplies `q k` by.
        lse: `[R, H, M]` float32 over every key a row sees, or None: over the `N` keys alone.
        weight: `[R, M]` float32, 0 on padding rows.
        asked: for each image, whether its prompt has any question row; where it has none, its
            rows of `weight` are all 0.
        causal: of visual rows: whether each sees those up to itself alone.
    """

    q: Tensor
    k: Tensor
    scale: float
    lse: Tensor | None
    weight: Tensor
    asked: tuple[bool, ...]
    causal: bool = True


class ProbeFn(Protocol):
    """Computes a `TextProbe`; `layer` counts from 0, see `ConsensusDrop` for the options.

    With `lookahead` the text runs through the layers before `layer` first, without the pictures:
    for methods that say so by `probe = "lookahead"`.
    """

    def __call__(
        self, *, layer: int, rotary: bool, context: str, query: str | QueryRule,
        lookahead: bool = False,
    ) -> TextProbe: ...  # fmt: skip


class Words(NamedTuple):
    """The question as the model embeds it, rows padded at the left.

    Attributes:
        embeds: `[R, T, D]`; inside the decoder the hidden states of these tokens.
        valid: `[R, T]` bool, False on padding rows.
        asked: for each image, whether its prompt has any question row.
    """

    embeds: Tensor
    valid: Tensor
    asked: tuple[bool, ...]


#: Finds the `Words` of a query rule.
WordsFn = Callable[[str | QueryRule], Words]


@dataclass(frozen=True)
class Signals:
    """What a model offers a method about `R` images.

    Attributes:
        x: projected visual tokens, the LLM's own input, `[R, N, D]`.
        grid: height and width of the patch grid; `h * w` is not `N` where some patches are no
            tokens of their own.
        q_vis: encoder query rows that speak for the image (the CLS row; every row, without CLS),
            `[R, Hv, Mv, dv]`; None if the method does not need "encoder".
        k_vis: encoder keys of the same layer, `[R, Hv, P+N, dv]`; None likewise.
        prefix: `P`.
        scale_vis: what the encoder layer multiplies `q k` by; None is `dv ** -0.5`.
        lse_vis: `[R, Hv, Mv]` float32, log-sum-exp of the encoder's rows, where its attention
            returned it.
        valid: `[R, N]` bool, False on padding; None: all are tokens.
        visual: `[R, N]` float32, the encoder's saliency where patches are not tokens one by one;
            then `q_vis` and `k_vis` are None.
        metric: `[R, N, F]`, what to merge by, likewise.
        size: `[R, N]` float32, how many patches each token stands for; None: one.
        crops: heights and widths of the crops (or frames) that the tokens are, one after another;
            None where they are no whole grids.
        probe: computes the question's rows when called; None if the method does not need "text".
        words: finds the question's embeddings when called; None if it does not need "words".
        original: inside the decoder, how many tokens each image had before any was dropped.
    """

    x: Tensor
    grid: tuple[int, int]
    q_vis: Tensor | None = None
    k_vis: Tensor | None = None
    prefix: int = 0
    scale_vis: float | None = None
    lse_vis: Tensor | None = None
    valid: Tensor | None = None
    visual: Tensor | None = None
    metric: Tensor | None = None
    size: Tensor | None = None
    crops: tuple[tuple[int, int], ...] | None = None
    probe: ProbeFn | None = None
    words: WordsFn | None = None
    original: int | None = None

    def rows(self, index: Tensor) -> Signals:
        """The signals of some of the images, `index` int64 `[R']`, without the question."""
        picked: dict[str, Any] = {
            f.name: value[index]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **picked, probe=None, words=None)


class Scores(NamedTuple):
    """Why tokens were kept, each `[R, N]` float32, higher is better.

    `textual` is None where the method asked no question; `fused` ranks as the method ranked.
    """

    visual: Tensor
    textual: Tensor | None
    fused: Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """What became of the `N` tokens of each image.

    Attributes:
        tokens: `[R, S, D]`, merged.
        index: `[R, S]` int64, the token each slot stands at, -1 in unused slots.
        assign: `[R, N]` int64, the slot each token went to, -1 where it was dropped for good.
        size: `[R, S]` float32, how many tokens are in each slot.
        padded: whether `index` may hold -1. False spares a device synchronisation.
    """

    tokens: Tensor
    index: Tensor
    assign: Tensor
    size: Tensor
    padded: bool = False
    score_fn: Callable[[], Scores | None] | None = field(default=None, repr=False)

    @cached_property
    def scores(self) -> Scores:
        """The saliencies behind the choice, computed when first asked for.

        Raises:
            RuntimeError: the method scores nothing, or its signals were not kept.
        """
        found = None if self.score_fn is None else self.score_fn()
        if found is None:
            raise RuntimeError(
                "there are no scores: the method uses none, or its signals were not kept "
                "(patch with keep_signals=True)"
            )
        return found


class Card(NamedTuple):
    """What a method is, with its default options: its row in the table of `methods()`.

    Attributes:
        name: what it is called.
        signals: what it goes by, in a few words.
        stages: where it prunes, of `STAGES`: "encoder", by what the encoder says alone; "pre-LLM",
            by anything else there is before the LLM runs; "in-LLM", between decoder layers.
        text: whether it looks at the question.
        merges: whether what is not kept is merged, of `MERGES`; "option": by its field `merge`.
        reference: of the paper, such as "arXiv 2602.00946"; None for a control.
    """

    name: str
    signals: str
    stages: tuple[str, ...]
    text: bool
    merges: str
    reference: str | None


class Method(ABC):
    """Base of all methods: override `select`, and `needs` if it needs less than everything.

    A subclass is a frozen dataclass with at least a `keep` field. Fields of these names override
    the defaults here, which tell the model's side

    - `positions`: how to number the shorter sequence; None is the model's own way, "compact", or
      "original" where positions have height and width;
    - `query`: which rows are the question;
    - `budget_scope`: whether crops of an image compete with each other ("image") or have budgets of
      their own ("crop");
    - `blend`: how what belongs to the tokens is merged along, see `token_merge`;
    - `size_attention`: whether the LLM attends to a merged token as to those it stands for;
    - `probe`: "lookahead" for a method that asks its probe with `lookahead=True`.

    A method of this package also has a `card`.
    """

    card: ClassVar[Card]
    keep: int | float
    positions: str | None = None
    budget_scope: str = "image"
    query: str | QueryRule = "after_image"
    blend: float = 1.0
    size_attention: bool = False
    probe: str = "static"

    @property
    def needs(self) -> frozenset[str]:
        """Signals to compute: "encoder" (`q_vis`, `k_vis`), "text" (`probe`) and "words"."""
        return frozenset({"encoder", "text"})

    @property
    def probed_layer(self) -> int | None:
        """The LLM layer whose projections the method asks for, or None."""
        return None

    def budget(self, tokens: int) -> int:
        """Slots that remain of an image of `tokens` tokens.

        Raises:
            ValueError: the budget asks for more than there is.
        """
        return keep_count(self.keep, tokens)

    @abstractmethod
    def select(self, signals: Signals) -> Selection:
        """Choose and merge; called only where `budget(N) < N`."""

    def fitted(self, layers: int) -> Method:
        """The method as it runs in a decoder of `layers` layers; `patch` uses this one."""
        return self

    def average_tokens(self, tokens: int, layers: int) -> float:
        """How many of an image's `tokens` tokens a layer sees, on average over a decoder's
        `layers`: what methods that prune at different depths are compared by."""
        method = self.fitted(layers)
        at = method.stages(layers)
        left = [method.budget(tokens)]
        for stage in range(len(at)):
            left.append(min(method.stage_budget(stage, tokens), left[-1]))
        bounds = (0, *at, layers)
        held = [n * (b - a) for n, a, b in zip(left, bounds, bounds[1:], strict=False)]
        return sum(held) / layers

    def stages(self, layers: int) -> tuple[int, ...]:
        """Decoder layers, of `layers`, before which to prune again, ascending; none by default."""
        return ()

    def stage_budget(self, stage: int, tokens: int) -> int:
        """Slots that remain after stage number `stage` of an image that had `tokens` tokens."""
        raise NotImplementedError

    def select_stage(self, stage: int, signals: Signals) -> Selection:
        """Choose and merge inside the decoder.

        `x` are hidden states before the layer that is about to run, in the order of the prompt,
        `size` says what they stand for, `original` how many there were. `probe` gives that layer's
        queries and keys, whatever `layer` it is asked for; `query="visual"` asks by the visual
        tokens themselves. `words` are hidden states too. What the encoder said is there as long as
        nothing has been dropped.
        """
        raise NotImplementedError

    def scores(self, signals: Signals) -> Scores | None:
        """The saliencies `select` goes by, or None for a method without any."""
        return None

    def identity(self, signals: Signals) -> Selection:
        """The selection that keeps every token as it is."""
        rows, tokens = signals.x.shape[:2]
        every = torch.arange(tokens, device=signals.x.device).expand(rows, tokens)
        size = torch.ones(rows, tokens, device=signals.x.device)
        return Selection(signals.x, every, every, size)


def keep_count(keep: int | float, tokens: int) -> int:
    """A budget as a number of tokens: an int is the count, a float a share of `tokens`.

    A share is rounded to the nearest count and is at least one token.

    Raises:
        ValueError: more tokens than there are.
    """
    if isinstance(keep, float):
        return max(1, round(keep * tokens))
    if keep > tokens:
        raise ValueError(f"keep must be in 1..N={tokens}, got {keep}")
    return keep


def check_keep(keep: Any) -> None:
    """Raises ValueError unless `keep` is a count >= 1 or a share in (0, 1]."""
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return
    if isinstance(keep, float) and 0.0 < keep <= 1.0:
        return
    raise ValueError(f"keep must be a count >= 1 (int) or a share in (0, 1] (float), got {keep!r}")


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Raises ValueError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a number in `low..high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number in {low:g}..{high:g}, got {value!r}")
