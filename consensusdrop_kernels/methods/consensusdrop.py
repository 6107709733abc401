"""ConsensusDrop: keep what the image encoder and the question agree on, merge the rest."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import FUSIONS
from ..reference import relevance_of_places
from .base import (
    CONTEXTS,
    POSITIONS,
    QUERIES,
    SCOPES,
    Card,
    Method,
    QueryRule,
    Scores,
    Selection,
    Signals,
    TextProbe,
    check_choice,
    check_count,
    check_flag,
    check_keep,
    check_range,
    keep_count,
)
from .coverage import even_priority
from .parts import below_gradients, encoder_metric, encoder_saliency, merged, warn_unasked

PROBES = ("static", "lookahead", "in_llm")
ROWS = ("max", "mean", "last")


@dataclass(frozen=True)
class ConsensusDrop(Method):
    """Training-free reduction by a consensus of encoder and question, before the LLM runs.

    The paper's (arXiv 2602.00946), as far as its abstract fixes it: two signals, the vision
    encoder's saliency and the LLM's query-aware attention; a consensus ranking of both; the top
    tokens are kept, the rest is compressed into them by encoder-guided merging; all of it before
    the LLM. Ours: every formula. Its code was not at hand, so each choice below is an option.

    1. Encoder saliency: attention of the CLS row over the patches, mean of heads, in the encoder
       layer whose features the model uses.
    2. Question saliency: attention of the question's rows over the visual tokens, by the norm and
       projections of one LLM layer.
    3. Consensus: `torch.ops.cdrop.consensus_select`, a share of the budget spread evenly over the
       picture if asked for.
    4. Merge: `torch.ops.cdrop.token_merge`, guided by the encoder keys of step 1's layer.

    Args:
        keep: tokens kept per image: a count (int) or a share in (0, 1] (float).
        alpha: weight of the question, 0..1; 0 leaves the encoder alone, and no probe is computed.
        fusion: how the two lists become one, see `consensus_select`: "rank", "rrf", "sum",
            "zscore", "product", "max".
        probe: what that layer is given. "static": the plain input embeddings, no layer runs.
            "lookahead": the layers before it run for the text rows alone, while the visual tokens
            stay as they are. "in_llm": what it really gets; then the tokens are dropped there,
            inside the decoder, and not before it, and the cache of earlier layers stays whole.
        probe_layer: LLM layer whose input norm and query/key projections are used.
        rows: over the question's rows: "max", "mean", or "last" (only the last row); None is "max"
            for the static probe and "last" for the others.
        rotary: rotate probe queries and keys by their positions, as the layer would. Without,
            the static probe need not project the keys where few rows ask.
        probe_context: softmax over the "visual" keys of the image alone, or over "all" keys a row
            sees; at `probe_layer=0` with rotary, "all" is exactly the attention the LLM computes.
        coverage: share of the kept tokens, 0..1, that go to an even spread over the patch grid (a
            farthest-point order, crop by crop), and not to the best of the consensus.
        diversity: 0 keeps the best of the consensus, however alike they are. From 0.02 to 1, tokens
            are chosen one after another as the most probable set of a determinantal point process:
            `S` the cosines of the encoder's keys, and relevance `exp(-(1 / diversity - 1) p)` for
            a token that a share `p` of all is before in the consensus. At 1 the keys alone decide.
            No more tokens differ so than the keys have channels; further places go to the best.
        contextual: extra slots per image, spread over the dropped tokens, that take the rest in
            place of the kept tokens (which then stay as they are).
        threshold: cosine below which a dropped token joins nothing; -1 merges every token.
        blend: 1 merges by the true mean, 0 leaves the kept token as it is.
        size_attention: the LLM attends to a merged token as to the tokens it stands for: the
            logarithm of its size is added to the logits of its key in every layer. Gives back what
            merging takes from counting; flash attention has no such bias, its layers run sdpa.
        positions: "compact" numbers what is left without gaps (as the research codes do),
            "original" leaves each token its own position; None is "compact", but "original" in
            models whose positions have height and width (M-RoPE).
        budget_scope: "image": the crops (or frames) of an image compete for one budget; "crop":
            each has its own.
        query: which text is the question: "after_image" (all text after the last image token),
            "all_text", "last_token", or a callable `(input_ids [B, L], visual [B, L],
            valid [B, L]) -> bool [B, L]` on CPU tensors. Text that a call wants predicted is
            left out (and not `valid`): tokens with `labels` other than -100, the last `k - 1`
            with `logits_to_keep=k`. A plain forward with neither takes all text for the prompt.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="ConsensusDrop",
        signals="encoder attention, question attention (static probe)",
        stages=("pre-LLM",),
        text=True,
        merges="yes",
        reference="arXiv 2602.00946",
    )

    keep: int | float
    alpha: float = 0.5
    fusion: str = "rank"
    probe: str = "static"
    probe_layer: int = 0
    rows: str | None = None
    rotary: bool = True
    probe_context: str = "visual"
    coverage: float = 0.0
    diversity: float = 0.65
    contextual: int = 0
    threshold: float = -1.0
    blend: float = 1.0
    positions: str | None = "original"
    budget_scope: str = "image"
    size_attention: bool = True
    query: str | QueryRule = "after_image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_range("alpha", self.alpha, 0.0, 1.0)
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("probe", self.probe, PROBES)
        check_count("probe_layer", self.probe_layer)
        if self.probe == "in_llm" and self.probe_layer < 1:
            raise ValueError(
                f"probe_layer must be >= 1 with probe='in_llm' (the tokens are dropped before that "
                f"layer), got {self.probe_layer}"
            )
        check_choice("rows", self.rows, (*ROWS, None))
        check_flag("rotary", self.rotary)
        check_flag("size_attention", self.size_attention)
        check_choice("probe_context", self.probe_context, CONTEXTS)
        check_range("coverage", self.coverage, 0.0, 1.0)
        check_range("diversity", self.diversity, 0.0, 1.0)
        if 0 < self.diversity < 0.02:
            raise ValueError(f"diversity must be 0 or in 0.02..1, got {self.diversity}")
        if self.diversity > 0 and self.coverage > 0:
            raise ValueError(
                "coverage must be 0 unless diversity is 0, which spreads tokens in its own way, "
                f"got coverage={self.coverage} with diversity={self.diversity}"
            )
        check_count("contextual", self.contextual)
        check_range("threshold", self.threshold, -1.0, 1.0)
        check_range("blend", self.blend, 0.0, 1.0)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)
        if not callable(self.query):
            check_choice("query", self.query, QUERIES)

    @property
    def needs(self) -> frozenset[str]:
        """The encoder always (it guides the merge), the text unless `alpha` is 0."""
        return frozenset({"encoder", "text"} if self.alpha > 0 else {"encoder"})

    @property
    def probed_layer(self) -> int | None:
        """`probe_layer`, unless no question is asked."""
        return self.probe_layer if self.alpha > 0 else None

    def budget(self, tokens: int) -> int:
        """Slots that enter the decoder of an image of `tokens` tokens."""
        slots = self._slots(tokens)
        return tokens if self.probe == "in_llm" else slots

    def stages(self, layers: int) -> tuple[int, ...]:
        """Before `probe_layer`, if the probe is the decoder's own attention."""
        return (self.probe_layer,) if self.probe == "in_llm" else ()

    def stage_budget(self, stage: int, tokens: int) -> int:
        """Kept and contextual slots."""
        return self._slots(tokens)

    def select_stage(self, stage: int, signals: Signals) -> Selection:
        """As `select`, of hidden states."""
        return self.select(signals)

    def _slots(self, tokens: int) -> int:
        """Kept and contextual slots of an image of `tokens` tokens."""
        keep = keep_count(self.keep, tokens)
        if keep + self.contextual > tokens:
            raise ValueError(
                f"keep + contextual must be in 1..N={tokens}, got {keep} + {self.contextual}"
            )
        return keep + self.contextual

    def select(self, signals: Signals) -> Selection:
        """One `torch.ops.cdrop.select_merge` for all images that have a question.

        Images whose prompt has no text at all go by the encoder alone, with a warning.
        """
        probe = self._probe(signals)
        if probe is None or all(probe.asked):
            return self._merge(signals, probe)
        warn_unasked(probe.asked, "the encoder")
        device = signals.x.device
        blind = torch.tensor([i for i, asks in enumerate(probe.asked) if not asks], device=device)
        keen = torch.tensor(
            [i for i, asks in enumerate(probe.asked) if asks], dtype=torch.long, device=device
        )
        parts = [self._merge(signals.rows(blind), None)]
        if len(keen):
            parts.append(self._merge(signals.rows(keen), _rows(probe, keen)))
        return _interleave(parts, torch.cat([blind, keen]))

    def _probe(self, signals: Signals) -> TextProbe | None:
        if signals.probe is None or self.alpha == 0:
            return None
        probe = signals.probe(
            layer=self.probe_layer,
            rotary=self.rotary,
            context=self.probe_context,
            query=self.query,
            lookahead=self.probe == "lookahead",
        )
        if self._asking != "last":
            return probe
        lse = None if probe.lse is None else probe.lse[:, :, -1:]
        return probe._replace(q=probe.q[:, :, -1:], lse=lse, weight=probe.weight[:, -1:])

    def _merge(self, signals: Signals, probe: TextProbe | None) -> Selection:
        if signals.visual is not None:
            return self._merge_by_parts(signals, probe)
        with below_gradients():
            tokens, index, assign, size = torch.ops.cdrop.select_merge(
                signals.x,
                signals.q_vis,
                signals.k_vis,
                None if probe is None else probe.q,
                None if probe is None else probe.k,
                keep=keep_count(self.keep, signals.x.shape[1]),
                contextual=self.contextual,
                alpha=self.alpha,
                fusion=self.fusion,
                prefix=signals.prefix,
                scale_vis=signals.scale_vis,
                lse_vis=signals.lse_vis,
                scale_txt=None if probe is None else probe.scale,
                lse_txt=None if probe is None else probe.lse,
                txt_weight=None if probe is None else probe.weight,
                txt_reduce=self._reduce,
                valid=signals.valid,
                threshold=self.threshold,
                blend=self.blend,
                diversity=self.diversity,
                **self._spread(signals),
            )
        return Selection(tokens, index, assign, size, padded=signals.valid is not None)

    def _spread(self, signals: Signals) -> dict[str, Any]:
        """The places for an even coverage, as the select ops take them."""
        keep = keep_count(self.keep, signals.x.shape[1])
        places = round(self.coverage * keep)
        if places == 0:
            return {}
        return {"priority": even_priority(signals, keep), "priority_keep": places}

    def _merge_by_parts(self, signals: Signals, probe: TextProbe | None) -> Selection:
        """The same, where the encoder's saliency comes as scores of the tokens."""
        keep = keep_count(self.keep, signals.x.shape[1])
        metric = encoder_metric(signals)
        index, fused = torch.ops.cdrop.consensus_select(
            encoder_saliency(signals),
            None if probe is None else self._textual(signals, probe),
            keep,
            alpha=self.alpha,
            fusion=self.fusion,
            valid=signals.valid,
            **self._spread(signals),
        )
        if self.diversity > 0:
            index = torch.ops.cdrop.greedy_diverse_select(
                metric.detach(), keep, objective="dpp", valid=signals.valid,
                relevance=relevance_of_places(fused, self.diversity, signals.valid),
            )  # fmt: skip
        return merged(
            signals, index, metric, contextual=self.contextual, threshold=self.threshold,
            blend=self.blend,
        )  # fmt: skip

    @property
    def _reduce(self) -> str:
        return "max" if self._asking == "max" else "mean"

    @property
    def _asking(self) -> str:
        """`rows`, as they are by default: deep in the LLM the last row holds the question."""
        return self.rows or ("max" if self.probe == "static" else "last")

    def scores(self, signals: Signals) -> Scores:
        """The two saliencies and their consensus, by the parts of the fused op.

        Raises:
            RuntimeError: the probe is the decoder's own attention, which is not kept.
        """
        if self.probe == "in_llm":
            raise RuntimeError("probe='in_llm' scores tokens inside the decoder, and keeps nothing")
        visual = encoder_saliency(signals)
        probe = self._probe(signals)
        textual = None
        if probe is not None and any(probe.asked):
            textual = self._textual(signals, probe)
        return Scores(visual, textual, self._fused(visual, textual, probe, signals))

    def _textual(self, signals: Signals, probe: TextProbe) -> Tensor:
        return torch.ops.cdrop.attention_saliency(
            probe.q,
            probe.k,
            scale=probe.scale,
            lse=probe.lse,
            key_valid=signals.valid,
            query_weight=probe.weight,
            reduce=self._reduce,
        )

    def _fused(
        self, visual: Tensor, textual: Tensor | None, probe: TextProbe | None, signals: Signals
    ) -> Tensor:
        keep = keep_count(self.keep, signals.x.shape[1])
        _, fused = torch.ops.cdrop.consensus_select(
            visual, textual, keep, alpha=self.alpha, fusion=self.fusion, valid=signals.valid
        )
        if textual is None or probe is None or all(probe.asked):
            return fused
        asked = torch.tensor(probe.asked, device=fused.device)
        return torch.where(asked[:, None], fused, visual)


def _rows(probe: TextProbe, index: Tensor) -> TextProbe:
    lse = None if probe.lse is None else probe.lse[index]
    asked = (True,) * len(index)
    return TextProbe(probe.q[index], probe.k[index], probe.scale, lse, probe.weight[index], asked)


def _interleave(parts: list[Selection], order: Tensor) -> Selection:
    """The selections of several groups of images as one, row `i` of the whole at `order[i]`."""
    back = order.argsort()
    joined: dict[str, Any] = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])[back]
        for f in fields(Selection)
        if isinstance(getattr(parts[0], f.name), Tensor)
    }
    return Selection(**joined, padded=any(part.padded for part in parts))
