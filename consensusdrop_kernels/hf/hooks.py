"""The hooks on one model: see the prompt, shorten what enters the decoder, correct what follows.

A prefill passes, in this order, `_before_model` (which tokens does the caller want predicted?),
`_Features` (the encoder's signals; in `generate` of transformers >= 5.18 already before),
`_before_outer` (prompt, mask), `_before_text` (the embeddings: select and shorten), `_after_text`
(back to the prompt's length, for losses); with stages also `_before_layer`. A decode step passes
`_before_outer` alone; with size-aware attention `_before_text` too, with stages `_before_layer`.
`generate` prepares each of its steps by `_Steps`, which tells the prompt from what was generated.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..methods.base import Method, Selection, Signals
from ..methods.parts import upload
from ..profiling import step
from .adapter import Adapter, Encoded
from .cache import continue_call, state_of, weigh
from .calls import Calls
from .inputs import (
    check_cache,
    check_prompt,
    check_static,
    first_tokens,
    full_positions,
    is_dispatched,
    is_static,
    padding,
    supervised,
    token_count,
)
from .layout import Group, Layout, Shortened, locate, shorten
from .lookahead import Lookahead, Masked, check_lookahead
from .prefill import shortened_inputs, wants_cache
from .probe import StaticProbe, check_probe_layer
from .report import Pruning, Stats
from .sizes import Unflashed, key_bias, weighted_mask
from .stages import (
    Progress,
    advance,
    check_not_recomputed,
    check_stages,
    implementation_of,
    later_inputs,
    layer_hidden,
    prefill_inputs,
    with_hidden,
)
from .tap import Tap
from .words import question_words

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
    encoded: list[Encoded | None]  # of every source
    wanted: _Wanted
    host: tuple[Tensor, Tensor | None]  # ids and plain mask, on the CPU
    restore: Tensor | None = None
    progress: Progress | None = None  # of the stages inside the decoder
    pruning: Pruning | None = None
    kv_bytes: int = 0  # of a token in one layer, if there is a cache


class Hooks:
    """Everything `patch` puts into a model, and takes out again.

    Args:
        model: the model, outer module, decoder stack and adapter that `patch` checked.
        method: what to keep.
        special: token ids that are no question, or None.
        keep_signals: whether `Pruning.selection.scores` stays computable.
        keep_breaks: whether image features that are no patches stay in the prompt.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, method: Method, special: Tensor | None,
        keep_signals: bool, keep_breaks: bool,
    ) -> None:  # fmt: skip
        self._text: Any = model.get_submodule(adapter.text)
        layers: Any = self._text.layers
        self.method = method = method.fitted(len(layers))
        self.last: Pruning | None = None
        self.stats = Stats()
        self._model: Any = model
        self._adapter = adapter
        self._outer: Any = model.get_submodule(adapter.outer)
        self._special = special
        self._keep_signals = keep_signals
        self._keep_breaks = keep_breaks
        self._calls = Calls()
        self._hooks: list[Any] = []
        self._replaced: list[tuple[Any, str, Any]] = []
        self._layers = [source.tap_layer(model.config, {}) for source in adapter.sources]
        self._taps: list[Tap | None] = [None] * len(adapter.sources)
        if "encoder" in method.needs:
            self._taps = self._make_taps()
        if method.positions == "compact" and adapter.spatial_positions:
            raise ValueError(
                "positions must be 'original' (or None) for a model whose positions have height "
                "and width, got 'compact'"
            )
        self._compact = method.positions != "original" and not adapter.spatial_positions
        self._unflashed = Unflashed(self._text)
        self._stages = method.stages(len(layers))
        if self._stages:
            check_stages(self._stages, self._text, adapter.first_stage(model.config))
            for layer in self._stages:
                check_probe_layer(self._text, layer)
        if method.probed_layer is not None:
            check_probe_layer(self._text, method.probed_layer)
        ahead = method.probed_layer or 0 if self._looks_ahead else 0
        if ahead:
            check_lookahead(self._text, ahead)
        self._masked = Masked(layers[:ahead])

    @property
    def _looks_ahead(self) -> bool:
        return self.method.probe == "lookahead"

    def _make_taps(self) -> list[Tap | None]:
        """One tap for each attention module; sources may share one."""
        taps: dict[int, Tap] = {}
        found: list[Tap | None] = []
        for source, layer in zip(self._adapter.sources, self._layers, strict=True):
            layers: Any = self._model.get_submodule(source.layers)
            attention = layers[layer].get_submodule(source.attention)
            found.append(taps.setdefault(id(attention), Tap(attention)))
        return found

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
        for tap in dict.fromkeys(self._taps):
            if tap is not None:
                tap.install()
        if self.method.size_attention:
            self._unflashed.install()
        self._masked.install()
        for at, source in enumerate(self._adapter.sources):
            self._replace(self._outer, source.features, functools.partial(_Features, at))
        self._replace(self._model, _STEP, _Steps)
        model, outer, text, hold = self._model, self._outer, self._text, self._hooks.append
        hold(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        hold(outer.register_forward_pre_hook(self._before_outer, with_kwargs=True))
        hold(outer.register_forward_hook(self._after_outer, always_call=True))
        hold(text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        hold(text.register_forward_hook(self._after_text))
        layers: Any = self._text.layers
        first = min(self._stages, default=len(layers))
        for at, layer in enumerate(layers[first:], first):
            before = functools.partial(self._before_layer, at)
            hold(layer.register_forward_pre_hook(before, with_kwargs=True))

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
        self._masked.remove()
        self._unflashed.remove()
        for tap in dict.fromkeys(self._taps):
            if tap is not None:
                tap.remove()

    # The encoder.

    @step("encode")
    def encode(
        self, at: int, call: Callable[..., Any], signature: inspect.Signature,
        args: tuple[Any, ...], kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run the model's own feature function and note what the encoder attended to."""
        local = self._calls.local
        if getattr(local, "encoding", False):  # a video path that goes through the image path
            return call(*args, **kwargs)
        source, tap = self._adapter.sources[at], self._taps[at]
        arguments = signature.bind(*args, **kwargs).arguments
        layer = source.tap_layer(self._model.config, arguments)
        if layer != self._layers[at]:
            raise ValueError(
                f"this call uses features of encoder layer {layer}, but the patch listens to layer "
                f"{self._layers[at]}: set it in the config before patching"
            )
        local.encoding = True
        try:
            with contextlib.nullcontext() if tap is None else tap.recording() as tapped:
                output = call(*args, **kwargs)
        finally:
            local.encoding = False
        if isinstance(output, tuple):
            raise ValueError(f"{source.features} must be called with return_dict=True")
        if tapped is not None and not tapped:
            raise RuntimeError("the encoder's attention did not go through its interface")
        with torch.no_grad():
            encoded = source.encode(self._model, tapped, output, arguments)
        setattr(output, _ENCODED, encoded)
        if is_dispatched(self._model):
            notes = vars(local).setdefault("encoded", {})
            notes[at] = encoded, first_tokens(output)
        prefill = self._prefill
        if prefill is not None:
            prefill.encoded[at] = encoded
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
        elif token_count(given) > 1 and (cache is None or cache.get_seq_length() == 0):
            self._check_no_image(given)  # one token goes on from others: no look at the cache
        return None

    def _start(self, given: dict[str, Any], cache: Any) -> None:
        check_cache(cache, self._text)
        check_prompt(given, cache, self._adapter)
        if given.get("input_ids") is None:
            raise NotImplementedError(
                "images with inputs_embeds: pass input_ids, image placeholders are found by id"
            )
        ids, mask = given["input_ids"], given.get("attention_mask")
        self._calls.local.prefill = _Prefill(
            ids=ids,
            mask=mask,
            cache=cache,
            encoded=[self._given(at, given) for at in range(len(self._adapter.sources))],
            wanted=getattr(self._calls.local, "wanted", _Wanted()),
            host=_on_host(ids, mask),
        )

    def _given(self, at: int, given: dict[str, Any]) -> Encoded | None:
        """What was noted of a source's features, if `generate` computed them ahead."""
        outputs: Any = given.get("mm_encoder_outputs")
        bare = isinstance(outputs, Tensor)
        if not bare:
            outputs = (outputs or {}).get(self._adapter.sources[at].modality)
        if outputs is None:
            return None
        encoded: Encoded | None = getattr(outputs, _ENCODED, None)
        encoded = self._recall(at, outputs) if encoded is None and not bare else encoded
        if encoded is None:
            raise NotImplementedError(
                "the image features were computed outside the patched model (or cut into chunks by "
                "prefill_chunk_size), so there is no encoder saliency; pass pixel_values instead"
            )
        return encoded

    def _recall(self, at: int, outputs: Any) -> Encoded | None:
        """What was noted of features that accelerate rebuilt while it moved them, or `generate`
        while it repeated them for beams: both keep the tensors' values and lose all else."""
        noted = getattr(self._calls.local, "encoded", {}).get(at)
        if noted is None:
            return None
        encoded, known = noted
        given = first_tokens(outputs).to(known.device)
        same_width = given.shape[1:] == known.shape[1:]
        if not same_width or not torch.eq(given[:, None], known).all(-1).any(1).all():
            return None
        return encoded

    def _after_outer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.local.prefill = None
        self._calls.local.wanted = _Wanted()

    def _before_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        prefill = self._prefill
        if prefill is None:
            return self._weighed_again(args, kwargs) if self.method.size_attention else None
        if args:
            raise RuntimeError("the decoder stack must be called with keyword arguments")
        if all(encoded is None for encoded in prefill.encoded):
            raise RuntimeError("images came, but the model's feature function was not called")
        if self._stages:
            check_not_recomputed(self._text)
        embeds = kwargs["inputs_embeds"]
        valid = padding(prefill.mask, prefill.cache, embeds)
        layout = self._locate(prefill, valid, embeds.device)
        positions = full_positions(
            kwargs.get("position_ids"), embeds, self._adapter.spatial_positions
        )
        signals, chosen, whole = self._choose(
            layout, embeds, positions, prefill.encoded, kwargs.get("attention_mask")
        )
        if all(whole) and not self._stages:
            cached = wants_cache(kwargs, self._text)
            self._report(chosen, signals, layout, None, embeds, cached)
            return self._weighed_again(args, kwargs) if self.method.size_attention else None
        breaks = layout.breaks
        if not self._keep_breaks:  # then those go whose image is cut, here or further on
            breaks = layout.unbroken([every and not self._stages for every in whole])
        short = shorten(embeds, positions, layout, chosen, self._compact, breaks)
        check_static(prefill.cache, layout, short)
        changed = shortened_inputs(kwargs, layout, chosen, short, self._text, self.method.blend)
        kwargs = kwargs | changed
        if self.method.size_attention:
            self._weigh(kwargs, chosen, short)
        # Only the last logit stands at the same place in the shorter sequence, whatever was asked.
        prefill.restore = None if prefill.wanted.logits == 1 else short.restore
        cached = kwargs.get("past_key_values") is not None
        self._report(chosen, signals, layout, short, embeds, cached)
        if self._stages:
            if is_static(prefill.cache):
                raise NotImplementedError("stages inside the decoder can't use a static cache")
            weighs = self.method.size_attention
            causal = not self._adapter.whole_masks
            prefill.progress = Progress.after(
                layout, chosen, short, weighs, signals, whole, causal
            )  # fmt: skip
        return (), kwargs

    def _weigh(self, kwargs: dict[str, Any], chosen: list[Selection], short: Shortened) -> None:
        """Let the prefill attend to merged tokens by their sizes, and the cache remember them."""
        cache, embeds = kwargs["past_key_values"], kwargs["inputs_embeds"]
        if is_static(cache):
            raise NotImplementedError(
                "size_attention can't use a static cache; give the method size_attention=False, or "
                "generate without one"
            )
        sizes = [selection.size for selection in chosen]
        bias = key_bias(sizes, short.slots, *embeds.shape[:2])
        mask = kwargs["attention_mask"]
        kwargs["attention_mask"] = weighted_mask(mask, bias, embeds, self._text)
        if cache is not None:
            weigh(cache, bias)

    def _weighed_again(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The same in a call that continues a cache, or has nothing to prune: layers that no longer
        run flash attention need a mask that says more than what is padding."""
        cache: Any = kwargs.get("past_key_values")
        state = None if cache is None else state_of(cache)
        embeds, given = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        bias = None if state is None else state.bias
        if bias is None and self._unflashed.installed and embeds is not None:
            bias = embeds.new_zeros(len(embeds), 0)
        if bias is None:
            return None
        assert embeds is not None
        mask = weighted_mask(given, bias, embeds, self._text, cache)
        return args, kwargs | {"attention_mask": mask}

    def _before_layer(self, at: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before every layer from the first stage on: prune, or hand on what fits the length."""
        prefill = self._prefill
        stage = bisect.bisect_right(self._stages, at) - 1
        if prefill is None:
            cache = kwargs.get("past_key_values")
            state = None if cache is None else state_of(cache)
            if state is None or stage >= len(state.stages):
                return None
            count = layer_hidden(args, kwargs).shape[1]
            later = later_inputs(state, stage, kwargs, count, implementation_of(module))
            return None if later is None else (args, later)
        progress = prefill.progress
        if progress is None:
            return None
        hidden = layer_hidden(args, kwargs)
        if at in self._stages:
            if progress.order is not None:
                kwargs_now = prefill_inputs(progress, kwargs, self._text, hidden)
            else:
                kwargs_now = kwargs
            before = progress.width
            hidden, left = advance(
                progress, hidden, kwargs_now, self.method, at, self._text, self._special
            )
            if prefill.restore is not None:
                prefill.restore = left.restore.gather(1, prefill.restore)
            self._report_stage(prefill, progress, before - progress.width, at)
        return with_hidden(args, prefill_inputs(progress, kwargs, self._text, hidden), hidden)

    def _report_stage(self, prefill: _Prefill, progress: Progress, fewer: int, at: int) -> None:
        assert prefill.pruning is not None
        text = progress.layout.text.sum(1).tolist()
        after = tuple(n - t for n, t in zip(progress.lengths, text, strict=True))
        pruning = replace(prefill.pruning, stages=(*prefill.pruning.stages, after))
        prefill.pruning = pruning
        rows, layers = len(progress.lengths), len(self._text.layers) - at
        with self._calls.lock:
            self.last = pruning
            self.stats = self.stats.with_less(prefill.kv_bytes * rows * layers * fewer)

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
        outputs = given.get("mm_encoder_outputs")
        if isinstance(outputs, Tensor):  # an older form that Idefics3 and SmolVLM still take
            return True
        outputs = outputs or {}
        return any(
            outputs.get(source.modality) is not None
            or any(given.get(name) is not None for name in source.pixels)
            for source in self._adapter.sources
        )

    def _check_no_image(self, given: dict[str, Any]) -> None:
        ids = given.get("input_ids")
        if ids is None:
            warnings.warn(
                "inputs_embeds came without images: image tokens merged into them beforehand are "
                "not pruned", stacklevel=2,
            )  # fmt: skip
        elif any(bool(self._placeholders(i, ids).any()) for i in range(len(self._taps))):
            raise ValueError(
                "the prompt has image placeholders, but no image came with it (a forgotten "
                "pixel_values, or chunked prefill)"
            )

    def _placeholders(self, at: int, ids: Tensor) -> Tensor:
        return ids == getattr(self._model.config, self._adapter.sources[at].visual_id)

    def _masks(self, prefill: _Prefill, prompt: Tensor) -> list[Tensor]:
        """The placeholders of every source in a prompt `[B, L]`. Images and videos may have the
        same one: then all are of the source that was encoded."""
        ids = [getattr(self._model.config, source.visual_id) for source in self._adapter.sources]
        used = [n for n, found in zip(ids, prefill.encoded, strict=True) if found is not None]
        if len(used) != len(set(used)):
            raise NotImplementedError(
                f"images and videos have the same placeholder {used[0]} in this model: pass one "
                "kind in a call"
            )
        return [
            torch.zeros_like(prompt, dtype=torch.bool)
            if found is None and n in used
            else prompt == n
            for n, found in zip(ids, prefill.encoded, strict=True)
        ]

    def _locate(self, prefill: _Prefill, valid: Tensor | None, device: torch.device) -> Layout:
        """Where the images are, and which tokens ask."""
        ids, plain = prefill.host
        layout = locate(
            self._masks(prefill, ids), prefill.encoded, valid if plain is None else plain, ids,
            device,
            self.method.budget_scope == "crop", [s.joined for s in self._adapter.sources],
        )  # fmt: skip
        return _prompt_alone(layout, prefill.wanted)

    @step("choose")
    def _choose(
        self, layout: Layout, embeds: Tensor, positions: Tensor, found: list[Encoded | None],
        masks: Any,
    ) -> tuple[list[Signals], list[Selection], list[bool]]:  # fmt: skip
        """For each group: what the model says, what the method keeps, and whether that is all;
        `masks` are those of the whole prompt, as the decoder takes them."""
        ahead = None
        if self._looks_ahead:
            ahead = Lookahead(self._text, embeds, positions, layout, masks)
        signals = [self._signals(embeds, positions, group, found, ahead) for group in layout.groups]
        budgets = [self.method.budget(group.tokens) for group in layout.groups]
        whole = [b == g.tokens for b, g in zip(budgets, layout.groups, strict=True)]
        chosen = [
            self.method.identity(one) if every else self.method.select(one)
            for one, every in zip(signals, whole, strict=True)
        ]
        return signals, chosen, whole

    def _signals(
        self, embeds: Tensor, positions: Tensor, group: Group, found: list[Encoded | None],
        ahead: Lookahead | None,
    ) -> Signals:  # fmt: skip
        encoded = found[group.places[0].source]
        assert encoded is not None
        device = embeds.device
        images = [place.image for place in group.places]

        def pick(parts: tuple[Tensor, ...] | None) -> Tensor | None:
            if parts is None:
                return None
            return torch.stack([place.take(parts) for place in group.places])

        q, k, lse = encoded.q_vis, encoded.k_vis, encoded.lse_vis
        if q is not None and k is not None and images != list(range(len(q))):
            index = upload(torch.tensor(images), q.device)
            q, k, lse = q[index], k[index], None if lse is None else lse[index]
        visual, metric = pick(encoded.visual), pick(encoded.metric)
        x, probe, words = group.take(embeds), None, None
        if "text" in self.method.needs:
            probe = StaticProbe(self._text, embeds, positions, group, x, self._special, ahead)
        if "words" in self.method.needs:
            words = functools.partial(
                question_words, group=group, special=self._special, embeds=embeds.detach()
            )
        return Signals(
            x=x,
            grid=group.grid,
            q_vis=None if q is None else q.to(device),
            k_vis=None if k is None else k.to(device),
            prefix=encoded.prefix,
            scale_vis=encoded.scale,
            lse_vis=None if lse is None else lse.to(device),
            visual=None if visual is None else visual.to(device),
            metric=None if metric is None else metric.to(device),
            crops=group.crops,
            probe=probe,
            words=words,
        )

    def _report(
        self, chosen: list[Selection], signals: list[Signals], layout: Layout,
        short: Shortened | None, embeds: Tensor, cached: bool,
    ) -> None:  # fmt: skip
        parts = [self._reported(*pair) for pair in zip(chosen, signals, strict=True)]
        pruning = Pruning.of(parts, layout, short)
        kv = self._kv_values * embeds.element_size() if cached else 0
        rows, length = layout.visual.shape
        width = length if short is None else short.embeds.shape[1]
        if (prefill := self._prefill) is not None:
            prefill.pruning, prefill.kv_bytes = pruning, kv // len(self._text.layers)
        with self._calls.lock:
            self.last = pruning
            self.stats = self.stats.plus(pruning, kv, rows, length, width)

    def _reported(self, selection: Selection, signals: Signals) -> Selection:
        tokens, score = selection.tokens.detach(), selection.score_fn
        if self._keep_signals and self.method.needs & {"encoder", "text"}:
            light = replace(signals, x=signals.x.detach())
            score = cast(Any, functools.partial(self.method.scores, light))
        return replace(selection, tokens=tokens, score_fn=score)

    @functools.cached_property
    def _kv_values(self) -> int:
        """How many numbers one token's keys and values are, in all layers."""
        config = self._text.config
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width


def _on_host(ids: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
    """The prompt and its mask `[B, L]`, if it is one, on the CPU. Copied before the encoder runs:
    later the copy would wait for it, and the device then for the host."""
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return ids.cpu(), None
    both = torch.stack([ids, mask.to(ids)]).cpu()
    return both[0], both[1]


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

    def __init__(self, source: int, call: Callable[..., Any], hooks: Hooks) -> None:
        functools.update_wrapper(self, call)
        self._source = source
        self._call = call
        self._hooks = hooks
        own = inspect.signature(call)  # annotations can't always be copied
        bare = [one.replace(annotation=one.empty) for one in own.parameters.values()]
        self._signature = inspect.Signature(bare)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooks.encode(self._source, self._call, self._signature, args, kwargs)
