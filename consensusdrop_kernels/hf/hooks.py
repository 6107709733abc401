"""The hooks on one model: see the prompt, shorten what enters the decoder, correct what follows.

A prefill passes, in this order, `_before_model` (which tokens does the caller want predicted?),
`_Features` (the encoder's signals; in `generate` of transformers >= 5.18 already before),
`_before_outer` (prompt, mask), `_before_text` (the embeddings: select and shorten), `_after_text`
(back to the prompt's length, for losses). A decode step passes `_before_outer` alone. `generate`
prepares each of its steps by `_Steps`, which tells the prompt from what was generated.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..methods.base import Method, Selection, Signals
from .adapter import Adapter, Encoded
from .cache import attach, continue_call, state_of
from .calls import Calls
from .inputs import (
    check_cache,
    check_static,
    first_tokens,
    full_positions,
    is_dispatched,
    padding,
    supervised,
)
from .layout import Layout, Shortened, locate, shorten, source_rows
from .probe import StaticProbe, check_probe_layer
from .report import Pruning, Stats
from .tap import Tap

_ENCODED = "_cdrop"
_STEP = "prepare_inputs_for_generation"


@dataclass(frozen=True)
class _Wanted:
    """What a caller wants predicted; those tokens are no question."""

    logits: int = 0  # how many last logits; 0: all, at the prompt's length
    labels: Tensor | None = None
    generated: int = 0  # tokens at the end that `generate` wrote, where it has no cache for them


@dataclass
class _Prefill:
    """A call with images between the hooks of one thread."""

    ids: Tensor
    mask: Tensor | None
    cache: Any
    encoded: Encoded | None
    wanted: _Wanted
    restore: Tensor | None = None


class Hooks:
    """Everything `patch` puts into a model, and takes out again.

    Args:
        model: the model, outer module, decoder stack and adapter that `patch` checked.
        method: what to keep.
        special: token ids that are no question, or None.
        keep_signals: whether `Pruning.selection.scores` stays computable.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, method: Method, special: Tensor | None,
        keep_signals: bool,
    ) -> None:  # fmt: skip
        self.method = method
        self.last: Pruning | None = None
        self.stats = Stats()
        self._model: Any = model
        self._adapter = adapter
        self._outer: Any = model.get_submodule(adapter.outer)
        self._text: Any = model.get_submodule(adapter.text)
        self._special = special
        self._keep_signals = keep_signals
        self._calls = Calls()
        self._hooks: list[Any] = []
        self._replaced: list[tuple[Any, str, Any]] = []
        self._tap: Tap | None = None
        self._layer = adapter.tap_layer(model.config, {})
        if "encoder" in method.needs:
            layers: Any = model.get_submodule(adapter.layers)
            self._tap = Tap(layers[self._layer].get_submodule(adapter.attention))
        if method.probed_layer is not None:
            check_probe_layer(self._text, method.probed_layer)

    def install(self) -> None:
        """Put everything in place, or, if that fails, nothing."""
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        names = list(inspect.signature(self._outer.forward).parameters)
        self._outer_names = [n for n in names if n != "kwargs"]
        names = list(inspect.signature(self._model.forward).parameters)
        self._model_names = [n for n in names if n != "kwargs"]
        if self._tap is not None:
            self._tap.install()
        self._replace(self._outer, self._adapter.features, _Features)
        self._replace(self._model, _STEP, _Steps)
        model, outer, text, hold = self._model, self._outer, self._text, self._hooks.append
        hold(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        hold(outer.register_forward_pre_hook(self._before_outer, with_kwargs=True))
        hold(outer.register_forward_hook(self._after_outer, always_call=True))
        hold(text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        hold(text.register_forward_hook(self._after_text))

    def _replace(self, module: Any, name: str, stand_in: Callable[..., Any]) -> None:
        """Put a stand-in for a method on the instance, where someone's own may lie already."""
        call = getattr(module, name)
        self._replaced.append((module, name, vars(module).get(name)))
        setattr(module, name, stand_in(call, self))

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        while self._replaced:
            module, name, own = self._replaced.pop()
            if own is not None:
                setattr(module, name, own)
            elif name in vars(module):
                delattr(module, name)
        if self._tap is not None:
            self._tap.remove()

    # The encoder.

    def encode(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run the model's own feature function and note what the encoder attended to."""
        arguments = inspect.signature(call).bind(*args, **kwargs).arguments
        layer = self._adapter.tap_layer(self._model.config, arguments)
        if layer != self._layer:
            raise ValueError(
                f"this call uses features of encoder layer {layer}, but the patch listens to layer "
                f"{self._layer}: set it in the config before patching"
            )
        with contextlib.nullcontext() if self._tap is None else self._tap.recording() as tapped:
            output = call(*args, **kwargs)
        if isinstance(output, tuple):
            raise ValueError(f"{self._adapter.features} must be called with return_dict=True")
        if tapped is not None and not tapped:
            raise RuntimeError("the encoder's attention did not go through its interface")
        encoded = self._adapter.encode(self._model, tapped, output, arguments)
        setattr(output, _ENCODED, encoded)
        if is_dispatched(self._model):
            self._calls.local.encoded = encoded, first_tokens(output)
        prefill = self._prefill
        if prefill is not None:
            prefill.encoded = encoded
        return output

    def prepare(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Prepare a step of `generate` as the model does, and note what it has generated so far.

        Without a cache every step runs the whole sequence anew: what was generated must not join
        the question, or the choice would drift away from the one that a cache keeps.
        """
        inputs = call(*args, **kwargs)
        ids = inputs.get("input_ids")
        local = self._calls.local
        local.generated = 0
        if ids is None or kwargs.get("use_cache", True):
            return inputs
        if kwargs.get("is_first_iteration"):
            local.prompt = ids.shape[1]
        local.generated = max(ids.shape[1] - getattr(local, "prompt", ids.shape[1]), 0)
        return inputs

    # Hooks.

    @property
    def _prefill(self) -> _Prefill | None:
        return getattr(self._calls.local, "prefill", None)

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = dict(zip(self._model_names, args, strict=False)) | kwargs
        logits = given.get("logits_to_keep")
        generated = getattr(self._calls.local, "generated", 0)
        self._calls.local.generated = 0
        self._calls.local.wanted = _Wanted(
            logits if isinstance(logits, int) else 0, given.get("labels"), generated
        )

    def _before_outer(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._calls.local.prefill = None
        given = dict(zip(self._outer_names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        images = self._images(given)
        state = None if cache is None else state_of(cache)
        if state is not None:
            if images:
                raise NotImplementedError(
                    "a new image can't join a pruned cache (another turn, or chunked prefill); "
                    "start without past_key_values"
                )
            continue_call(given, state, cache)
            return (), given
        if images:
            self._start(given, cache)
        elif cache is None or cache.get_seq_length() == 0:
            self._check_no_image(given)
        return None

    def _start(self, given: dict[str, Any], cache: Any) -> None:
        check_cache(cache, self._text)
        outputs = (given.get("mm_encoder_outputs") or {}).get(self._adapter.modality)
        encoded = getattr(outputs, _ENCODED, None)
        if outputs is not None and encoded is None:
            encoded = self._recall(outputs)
        if outputs is not None and encoded is None:
            raise NotImplementedError(
                "the image features were computed outside the patched model (or cut into chunks by "
                "prefill_chunk_size), so there is no encoder saliency; pass pixel_values instead"
            )
        if given.get("input_ids") is None:
            raise NotImplementedError(
                "images with inputs_embeds: pass input_ids, image placeholders are found by id"
            )
        self._calls.local.prefill = _Prefill(
            ids=given["input_ids"],
            mask=given.get("attention_mask"),
            cache=cache,
            encoded=encoded,
            wanted=getattr(self._calls.local, "wanted", _Wanted()),
        )

    def _recall(self, outputs: Any) -> Encoded | None:
        """What was noted of features that accelerate rebuilt while it moved them: it keeps the
        tensors' values and loses all else."""
        noted: tuple[Encoded, Tensor] | None = getattr(self._calls.local, "encoded", None)
        if noted is None or not is_dispatched(self._model):
            return None
        encoded, known = noted
        same_size = all(len(f) == encoded.tokens for f in outputs.pooler_output)
        given = first_tokens(outputs).to(known.device)
        if not same_size or not torch.eq(given[:, None], known).all(-1).any(1).all():
            return None
        return encoded

    def _after_outer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.local.prefill = None
        self._calls.local.wanted = _Wanted()

    def _before_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        prefill = self._prefill
        if prefill is None:
            return None
        if args:
            raise RuntimeError("the decoder stack must be called with keyword arguments")
        if prefill.encoded is None:
            raise RuntimeError(f"images came, but {self._adapter.features} was not called")
        embeds = kwargs["inputs_embeds"]
        valid = padding(prefill.mask, prefill.cache, embeds)
        encoded = prefill.encoded
        layout = locate(
            self._placeholders(prefill.ids), valid, prefill.ids, encoded.tokens, embeds.device
        )
        positions = full_positions(kwargs.get("position_ids"), embeds)
        layout = _prompt_alone(layout, prefill.wanted)
        signals = self._signals(embeds, positions, layout, encoded)

        budget = self.method.budget(encoded.tokens)
        if budget == encoded.tokens:
            cached = self._wants_cache(kwargs)
            self._report(self.method.identity(signals), signals, layout, None, embeds, cached)
            return None
        selection = self.method.select(signals)
        compact = self.method.positions == "compact"
        short = shorten(embeds, positions, layout, selection, compact)
        check_static(prefill.cache, layout, short)
        kwargs = kwargs | self._shortened(kwargs, short, embeds.shape[1])
        # Only the last logit stands at the same place in the shorter sequence, whatever was asked.
        prefill.restore = None if prefill.wanted.logits == 1 else short.restore
        cached = kwargs.get("past_key_values") is not None
        self._report(selection, signals, layout, short, embeds, cached)
        return (), kwargs

    def _after_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        prefill = self._prefill
        if prefill is None or prefill.restore is None:
            return None
        hidden = output[0]
        index = prefill.restore[:, :, None].expand(-1, -1, hidden.shape[2])
        whole = hidden.gather(1, index)
        if isinstance(output, tuple):
            return (whole, *output[1:])
        output.last_hidden_state = whole
        return output

    # The steps of a prefill.

    def _images(self, given: dict[str, Any]) -> bool:
        if any(given.get(name) is not None for name in self._adapter.pixels):
            return True
        outputs = given.get("mm_encoder_outputs") or {}
        return outputs.get(self._adapter.modality) is not None

    def _check_no_image(self, given: dict[str, Any]) -> None:
        ids = given.get("input_ids")
        if ids is None:
            warnings.warn(
                "inputs_embeds came without images: image tokens merged into them beforehand are "
                "not pruned", stacklevel=2,
            )  # fmt: skip
        elif bool(self._placeholders(ids).any()):
            raise ValueError(
                "the prompt has image placeholders, but no image came with it (a forgotten "
                "pixel_values, or chunked prefill)"
            )

    def _placeholders(self, ids: Tensor) -> Tensor:
        wanted = (getattr(self._model.config, name) for name in self._adapter.visual_ids)
        return functools.reduce(torch.logical_or, (ids == one for one in wanted))

    def _signals(
        self, embeds: Tensor, positions: Tensor, layout: Layout, encoded: Encoded
    ) -> Signals:
        source = source_rows(layout, encoded.images)
        q, k = encoded.q_vis, encoded.k_vis
        if source is not None and q is not None and k is not None:
            index = torch.tensor(source, device=q.device)
            q, k = q[index], k[index]
        probe = None
        if "text" in self.method.needs:
            probe = StaticProbe(self._text, embeds, positions, layout, self._special)
        return Signals(
            x=layout.tokens(embeds),
            grid=encoded.grid,
            q_vis=None if q is None else q.to(embeds.device),
            k_vis=None if k is None else k.to(embeds.device),
            prefix=encoded.prefix,
            scale_vis=encoded.scale,
            probe=probe,
        )

    def _shortened(self, kwargs: dict[str, Any], short: Shortened, length: int) -> dict[str, Any]:
        cache = kwargs.get("past_key_values")
        if cache is None and self._wants_cache(kwargs):
            cache = DynamicCache(config=self._text.config)
        mask = short.mask
        if cache is not None:
            attach(cache, length, short)
        elif mask is None:
            # Without cache and mask, gaps in the positions would pass for packed sequences.
            mask = torch.ones_like(short.positions, dtype=torch.bool)
        return {
            "inputs_embeds": short.embeds,
            "attention_mask": mask,
            "position_ids": short.positions,
            "past_key_values": cache,
        }

    def _wants_cache(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("use_cache")
        wanted = self._text.config.use_cache if wanted is None else wanted
        return bool(wanted) or kwargs.get("past_key_values") is not None

    def _report(
        self, selection: Selection, signals: Signals, layout: Layout, short: Shortened | None,
        embeds: Tensor, cached: bool,
    ) -> None:  # fmt: skip
        if self._keep_signals:
            light = replace(signals, x=signals.x.detach())
            if "encoder" in self.method.needs or "text" in self.method.needs:
                score = functools.partial(self.method.scores, light)
                selection = replace(selection, score_fn=cast(Any, score))
        selection = replace(selection, tokens=selection.tokens.detach())
        pruning = Pruning.of(selection, signals.grid, layout, short)
        kv = self._kv_bytes(embeds) if cached else 0
        rows, length = layout.visual.shape
        width = length if short is None else short.embeds.shape[1]
        with self._calls.lock:
            self.last = pruning
            self.stats = self.stats.plus(pruning, kv, rows, length, width)

    def _kv_bytes(self, embeds: Tensor) -> int:
        """Bytes of one token's keys and values in all layers."""
        config = self._text.config
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width * embeds.element_size()


def _prompt_alone(layout: Layout, wanted: _Wanted) -> Layout:
    """The layout where no token asks that is to be predicted: an answer with labels or to be
    scored, a draft of assisted decoding, what was generated without a cache. What is chosen must
    not depend on those, as it can't when the answer is yet to come."""
    scored = max(wanted.logits - 1, 0)  # the first logit is the last prompt token's
    layout = layout.without_last(max(scored, wanted.generated))
    if wanted.labels is None:
        return layout
    return layout.without(supervised(wanted.labels, layout.ids))


class _Steps:
    """Stands on the model in place of its `prepare_inputs_for_generation`, like `_Features`."""

    def __init__(self, call: Callable[..., Any], hooks: Hooks) -> None:
        functools.update_wrapper(self, call)
        self._call = call
        self._hooks = hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooks.prepare(self._call, args, kwargs)


class _Features:
    """Stands on the outer module in place of its feature function, with the same signature.

    An object and not a closure, so that a deep copy of the model gets one of its own.
    """

    def __init__(self, call: Callable[..., Any], hooks: Hooks) -> None:
        functools.update_wrapper(self, call)
        self._call = call
        self._hooks = hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooks.encode(self._call, args, kwargs)
