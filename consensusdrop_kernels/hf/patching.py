"""`patch` and `unpatch`: put a method into a stock Hugging Face model, and take it out."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..methods.base import Method, check_choice
from . import adapter as adapters
from .adapter import Adapter
from .hooks import Hooks
from .native import Native
from .report import Pruning, Stats

_ATTRIBUTE = "_cdrop_handle"
_TESTED = ((5, 17), (5, 23))


class Handle:
    """A patched model's way back, and what happened meanwhile; also a context manager."""

    def __init__(self, model: nn.Module, hooks: Hooks) -> None:
        self._model = model
        self._hooks = hooks
        self._installed = True

    @property
    def method(self) -> Method:
        """The method in use, as it runs in a decoder of this depth."""
        return self._hooks.method

    @property
    def last(self) -> Pruning | None:
        """The most recent prefill with images, of whatever thread; None before the first."""
        return self._hooks.last

    @property
    def stats(self) -> Stats:
        """Sums over all prefills since `patch`."""
        return self._hooks.stats

    def remove(self) -> None:
        """Restore the model; its outputs are again bit for bit what they were. Idempotent."""
        if self._installed:
            self._hooks.remove()
            self._installed = False
            delattr(self._model, _ATTRIBUTE)

    def __enter__(self) -> Handle:
        if not self._installed:
            raise RuntimeError("the patch was removed: call patch(model, method) again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def patch(
    model: nn.Module,
    method: Method,
    *,
    adapter: Adapter | None = None,
    processor: Any = None,
    keep_signals: bool = True,
    breaks: str = "drop",
    backend: str = "hooks",
    replace: bool = False,
) -> Handle:
    """Make a Hugging Face vision-language model spend fewer tokens on each image.

    `model.generate(...)` and `model(...)` are called as before and speak of the whole prompt; the
    decoder and its KV cache see the shorter one. Hooks on this instance alone: no class is
    changed, attention kernels stay as they are, no parameter or buffer is added.

    What counts as the question: tokens that the call wants predicted never do, so that no answer
    leaks into the choice. These are tokens with `labels` other than -100, the last `k - 1` with
    `logits_to_keep=k`, and those that `generate` wrote. A plain `model(...)` without labels or
    logits_to_keep takes every token it gets for the prompt: to score an answer, pass one of the
    two. If labels leave no text after the image, the question is the text before it; if they leave
    none at all, the encoder decides alone, with a warning. Labels are seen where the model is
    called (`model(...)`), not where a wrapper calls `model.forward(...)` past its hooks.

    What is shorter than the prompt: `past_key_values`, and the entries of `hidden_states` and
    `attentions`, which are those of the tokens left. `logits` and `last_hidden_state` have the
    prompt's length; a dropped place shows the last token left before it.

    A pruned cache works only with the patched model: after `remove()` nothing corrects mask and
    positions any more, and going on with such a cache gives wrong tokens without an error.
    Positions passed along with a cache must count the prompt before pruning, not the entries of
    the cache; this is checked on the CPU, on a GPU for several tokens at once or if `CDROP_CHECK=1`
    is set.

    Args:
        model: a loaded model, whole (`...ForConditionalGeneration`), of a family with an adapter.
        method: what to keep, `ConsensusDrop(keep=64)` for one.
        adapter: how to find the parts of another model family; by default by `model_type`.
        processor: the model's processor or tokenizer; its control tokens then are no part of the
            question.
        keep_signals: keep what `handle.last.scores` is computed from until the next prefill (the
            encoder's keys of one layer and the prompt's embeddings).
        breaks: what becomes of image features that are no patches (line breaks of LLaVA-NeXT, class
            tokens of Video-LLaVA) where an image is pruned: "drop", or "keep", beyond the budget.
        backend: "hooks", or "native": `generate` prunes the prompt before it starts, and no step of
            decoding runs anything of ours, so that static caches with padding, compiled decoding
            and chunked prefill work. For transformers >= 5.18, methods that prune before the
            decoder alone, and `generate` alone: `model(...)` with pictures raises. A cache that a
            pruned prompt filled can't be gone on with. A caller's logits processors, stopping
            criteria and streamer see the whole prompt, those that `generate` makes (a repetition
            penalty, drafts from the prompt) see it without the dropped placeholders.
        replace: remove an earlier patch first.

    Returns:
        Handle: `remove()`, `last`, `stats`.

    Raises:
        TypeError: `method` is no `Method`, or `model` no Transformers model.
        ValueError: the model or its configuration is not supported.
        RuntimeError: the model is patched already, its weights are sharded, or transformers is too
            old.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a consensusdrop_kernels Method, got {method!r}")
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__} "
            "(inside a wrapper such as PEFT, patch the base model)"
        )
    check_choice("breaks", breaks, ("drop", "keep"))
    check_choice("backend", backend, ("hooks", "native"))
    _check_version()
    found = adapters.find(model.config) if adapter is None else adapter
    _check_parts(model, found)
    _check_not_sharded(model)
    earlier = getattr(model, _ATTRIBUTE, None)
    if earlier is not None and not replace:
        raise RuntimeError(
            "the model is patched already: remove() the first handle, or pass replace=True"
        )
    kind = Hooks if backend == "hooks" else Native
    hooks = kind(model, found, method, _special_ids(processor), keep_signals, breaks == "keep")
    if earlier is not None:
        earlier.remove()
    hooks.install()
    handle = Handle(model, hooks)
    setattr(model, _ATTRIBUTE, handle)
    return handle


def unpatch(model: nn.Module) -> None:
    """Remove the patch of a model.

    Raises:
        RuntimeError: it has none.
    """
    handle = getattr(model, _ATTRIBUTE, None)
    if handle is None:
        raise RuntimeError("the model is not patched")
    handle.remove()


def _check_version() -> None:
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    oldest, newest = _TESTED
    if version < oldest:
        raise RuntimeError(f"transformers must be >= 5.17, got {transformers.__version__}")
    if version > newest:
        warnings.warn(
            f"transformers {transformers.__version__} is newer than any version this was tested "
            "with (5.17 to 5.23)", stacklevel=3,
        )  # fmt: skip


def _check_parts(model: nn.Module, adapter: Adapter) -> None:
    for path in (adapter.outer, adapter.text, *(source.layers for source in adapter.sources)):
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"{type(model).__name__} has no {path}: pass the whole model "
                "(...ForConditionalGeneration), or an adapter that fits it"
            ) from error


def _check_not_sharded(model: nn.Module) -> None:
    """Tensor-parallel layers hold a part of the heads, FSDP layers gather their weights only in
    their own forward: a probe that calls single projections would be silently wrong."""
    sharded = any("DTensor" in type(p.data).__name__ for p in model.parameters()) or any(
        "FSDP" in base.__name__ or "FullyShardedDataParallel" in base.__name__
        for module in model.modules()
        for base in type(module).__mro__
    )
    if sharded or (getattr(model, "_tp_size", None) or 1) > 1:
        raise RuntimeError(
            "the model's weights are sharded (tensor parallel or FSDP), which is not supported: "
            "each rank sees only a part of the heads"
        )


def _special_ids(processor: Any) -> Tensor | None:
    if processor is None:
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "all_special_ids"):
        raise ValueError(f"processor must have a tokenizer, got {type(processor).__name__}")
    return torch.tensor(tokenizer.all_special_ids, dtype=torch.long)
