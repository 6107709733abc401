"""What is measured against what: the stock model, methods on our ops, and their maps form.

Each has a model of its own with the weights of all, so that nothing is patched or unpatched between
two calls that are compared.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.flops import layer_tokens
from benchmarks.accuracy.runs import FULL, Spec
from consensusdrop_kernels import Handle, patch
from consensusdrop_kernels.demo import DemoError, first_sentence
from consensusdrop_kernels.methods import Full, Method

from .maps import Maps, has_form
from .models import Subject

#: How a row prunes: not at all, by our ops, or as research code does.
FORMS = ("full", "ops", "maps")


@dataclass(frozen=True)
class Counts:
    """Visual tokens of a prompt.

    Attributes:
        before: in the prompt, line breaks included.
        after: that enter the decoder.
        stages, at: left after each stage inside it, and the layers before which these are.
        layers: of the decoder.
    """

    before: int
    after: int
    stages: tuple[int, ...]
    at: tuple[int, ...]
    layers: int

    def seen(self, text: int = 0) -> list[int]:
        """Tokens that each layer sees, beside so many of text."""
        return layer_tokens(text, self.after, self.stages, self.at, self.layers)

    @property
    def average(self) -> float:
        """Visual tokens that a layer sees on average."""
        return sum(self.seen()) / self.layers


@dataclass
class Contender:
    """One row: a way to run a model.

    Args:
        label: of the method.
        form: one of `FORMS`.
        keep: the budget; None for all tokens.
        method: None for all tokens.
        model: its own.
        handle: of the patch, if it is one.
        maps: the maps form, if it is that.
        reason: why it can't run; the rest is missing then.
    """

    label: str
    form: str
    keep: int | None
    method: Method | None
    model: Any = None
    handle: Handle | None = None
    maps: Maps | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """As rows are named."""
        form = ", maps" if self.form == "maps" else ""
        return self.label + form if self.keep is None else f"{self.label}{form} {self.keep}"

    def generate(self, inputs: Mapping[str, Tensor], tokens: int, **options: Any) -> Any:
        """So many tokens, greedily, of every prompt; `options` go to `generate`."""
        run = self.model.generate if self.maps is None else self.maps.generate
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers")
            return run(
                **({"inputs": inputs} if self.maps else inputs), max_new_tokens=tokens,
                return_dict_in_generate=True, **options,
            )  # fmt: skip

    def counts(self, subject: Subject) -> Counts:
        """What the last prefill kept, checked against the budget.

        Raises:
            DemoError: it is not what the method promises.
        """
        config = self.model.config
        layers = config.get_text_config().num_hidden_layers
        placeholders = int((subject.request()["input_ids"] == config.image_token_id).sum())
        if self.handle is None and self.maps is None:
            return Counts(placeholders, placeholders, (), (), layers)
        assert self.method is not None
        method = self.method.fitted(layers)
        at = method.stages(layers)
        wanted = [min(method.budget(subject.patches), subject.patches)]
        for stage in range(len(at)):
            wanted.append(min(wanted[-1], method.stage_budget(stage, subject.patches)))
        if any(found != wanted for found in self._found(wanted)):
            raise DemoError(
                f"{self.name} kept {self._found(wanted)[0]} visual tokens, not {wanted}: no time "
                "is taken of what is wrong"
            )
        return Counts(placeholders, wanted[0], tuple(wanted[1:]), at, layers)

    def _found(self, wanted: Sequence[int]) -> list[list[int]]:
        """Visual tokens of each prompt before the decoder and after each stage of it."""
        if self.maps is not None:
            assert self.maps.index is not None
            ends = [*wanted[:-1], self.maps.index.shape[1]]  # it has no more than one stage
            return [ends]
        assert self.handle is not None
        last = self.handle.last
        if last is None:
            raise DemoError(f"{self.name} saw no picture")
        return [list(each) for each in zip(last.tokens_after, *last.stages, strict=True)]


def twin(model: Any) -> Any:
    """A copy with modules and hooks of its own over the same weights."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def contenders(
    subject: Subject, specs: Sequence[Spec], keeps: Sequence[int], maps: bool
) -> list[Contender]:
    """The stock model, every method at every budget, and the maps form of those that have one.

    Args:
        subject: the model; it stays as it is.
        specs: methods, see `parse_methods`.
        keeps: budgets of those without one of their own.
        maps: whether to add maps forms.
    """
    rows = [Contender(FULL, "full", None, None, subject.model)]
    for spec in specs:
        if spec.method is Full:
            continue
        for keep in keeps if spec.keep is None else [spec.keep]:
            row = spec.at(keep)
            count = _count(row.keep, subject)
            if row.method is None:
                rows.append(Contender(spec.label, "ops", count, None, reason=row.reason))
                continue
            rows.append(_patched(Contender(spec.label, "ops", count, row.method), subject))
            if maps and has_form(row.method):
                made = Contender(spec.label, "maps", count, spec.at(count).method)
                rows.append(_mapped(made, subject))
    return rows


def _count(keep: Any, subject: Subject) -> int:
    return max(1, round(keep * subject.patches)) if isinstance(keep, float) else int(keep)


def _patched(row: Contender, subject: Subject) -> Contender:
    assert row.method is not None
    row.model = twin(subject.model)
    try:
        row.method.budget(subject.patches)
        row.handle = patch(row.model, row.method, keep_signals=False)
    except (ValueError, NotImplementedError) as error:
        row.reason = first_sentence(error)
    return row


def _mapped(row: Contender, subject: Subject) -> Contender:
    assert row.method is not None
    row.model = twin(subject.model)
    try:
        row.maps = Maps(row.model, row.method)
    except ValueError as error:
        row.reason = first_sentence(error)
    return row


def set_attention(subject: Subject, name: str) -> str:
    """Let a model run an attention, "sdpa", "eager" or "flash"; why it can't, or nothing."""
    from transformers.utils import is_flash_attn_2_available

    if name == "flash":
        if subject.device.type != "cuda":
            return "flash attention needs a GPU"
        if not is_flash_attn_2_available():
            return "flash attention needs the package flash-attn, which can't be imported here"
        if subject.model.dtype not in (torch.float16, torch.bfloat16):
            return "flash attention needs float16 or bfloat16"
    try:
        subject.model.set_attn_implementation("flash_attention_2" if name == "flash" else name)
    except (ValueError, ImportError) as error:
        return first_sentence(error)
    return ""
