"""The native backend: `generate` itself gets a shorter prompt, and decodes without hooks.

From 5.18 on, transformers' `generate` takes image features that were computed before
(`mm_encoder_outputs`). So the pictures are encoded, chosen from and merged ahead, and `generate` is
called with the prompt that is left: fewer placeholders, the merged features for them, mask, type
ids and positions to match. Nothing of ours runs in the decoder or in a decoding step; static
caches, compiled decoding and chunked prefill are the model's own.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..methods.base import Method, Selection
from .adapter import Adapter
from .cache import state_of
from .hooks import Hooks, _Features, _on_host, _Prefill, _Wanted
from .inputs import check_cache, check_prompt, full_positions
from .layout import Layout, Shortened, shorten
from .prefill import DEEPSTACK, decoder_positions, merged_deepstack
from .views import Whole, show_whole

_PRUNED = "_cdrop_native"  # on a cache that `generate` filled with a pruned prompt
_TYPE_IDS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_EARLY = "deepstack_features"


class Native(Hooks):
    """What `patch(model, method, backend="native")` puts into a model, and takes out again.

    Arguments as of `Hooks`.

    Raises:
        RuntimeError: transformers is older than 5.18.
        ValueError: the method prunes inside the decoder or weighs attention by sizes, or the model
            takes no features computed before.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, method: Method, special: Tensor | None,
        keep_signals: bool, keep_breaks: bool,
    ) -> None:  # fmt: skip
        if _version() < (5, 18):
            raise RuntimeError(
                f"backend='native' needs transformers >= 5.18, got {transformers.__version__}; "
                "use backend='hooks'"
            )
        if method.size_attention:
            raise ValueError(
                "backend='native' can't use size_attention, which changes attention in every step; "
                "give the method size_attention=False, or use backend='hooks'"
            )
        super().__init__(model, adapter, method, special, keep_signals, keep_breaks)
        if self._stages:
            raise ValueError(
                f"backend='native' prunes before the decoder, but the method does so before its "
                f"layers {list(self._stages)} too; use backend='hooks'"
            )
        for module in (self._model, self._outer):
            if "mm_encoder_outputs" not in inspect.signature(module.forward).parameters:
                raise ValueError(
                    f"backend='native' needs a model that takes mm_encoder_outputs, and "
                    f"{type(module).__name__} does not; use backend='hooks'"
                )

    def _install(self) -> None:
        names = list(inspect.signature(self._outer.forward).parameters)
        self._outer_names = [n for n in names if n != "kwargs"]
        names = list(inspect.signature(self._model.generate).parameters)
        self._generate_names = [n for n in names if n != "kwargs"]
        for tap in dict.fromkeys(self._taps):
            if tap is not None:
                tap.install()
        self._masked.install()
        for at, source in enumerate(self._adapter.sources):
            self._replace(self._outer, source.features, functools.partial(_Features, at))
        self._replace(self._model, "generate", _Generate)
        pixels = tuple(name for source in self._adapter.sources for name in source.pixels)
        guard = functools.partial(_refuse_direct, tuple(self._outer_names), pixels)
        self._hooks.append(self._outer.register_forward_pre_hook(guard, with_kwargs=True))

    # `generate`.

    @torch.no_grad()
    def generate(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Generate as the model does, from a prompt with fewer visual tokens."""
        local = self._calls.local
        if getattr(local, "inside", False):  # a model that drafts for itself
            return call(*args, **kwargs)
        given = dict(zip(self._generate_names, args, strict=False)) | kwargs
        local.inside = True
        try:
            whole = self._shorten(given)
            local.prefill = None  # while it decodes, nobody needs what the encoder saw
            output = call(**given)
        finally:
            local.inside = False
            local.prefill = None
        if whole is None:
            return output
        for cache in (given.get("past_key_values"), getattr(output, "past_key_values", None)):
            if cache is not None:
                setattr(cache, _PRUNED, True)
        if isinstance(output, Tensor):
            return whole.of(output)
        output.sequences = whole.of(output.sequences)
        return output

    def _shorten(self, given: dict[str, Any]) -> Whole | None:
        """Shorten the arguments of `generate` in place; None where nothing was dropped."""
        self._check_caches(given)
        ids: Any = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
        cache = given.get("past_key_values")
        if not self._images(given):
            asked = ids is not None or given.get("inputs_embeds") is not None
            if asked and (cache is None or cache.get_seq_length() == 0):
                self._check_no_image(given | {"input_ids": ids})
            return None
        check_cache(cache, self._text)
        check_prompt(given, None, self._adapter)
        self._check_options(given, ids)
        if self._model.device.type != "meta":
            ids = ids.to(self._model.device)
        mask = given.get("attention_mask")
        mask = self._inferred_mask(given, ids) if mask is None else mask.to(ids.device)
        positions = self._positions(given, ids, mask)  # reads what `_encode` takes out

        prefill = _Prefill(
            ids, mask, cache, [None] * len(self._adapter.sources), _Wanted(), _on_host(ids, mask)
        )
        self._calls.local.prefill = prefill
        outputs = self._encode(given, prefill)
        layout, embeds = self._prompt(prefill, outputs)
        positions = full_positions(
            positions.to(embeds.device), embeds, self._adapter.spatial_positions
        )
        masks = self._whole_masks(given, embeds, mask, positions) if self._looks_ahead else None
        signals, chosen, whole = self._choose(layout, embeds, positions, prefill.encoded, masks)
        use_cache = self._option(given, "use_cache") is not False
        told = given.get("position_ids") is not None or not self._compact
        given.pop("inputs", None)
        given["mm_encoder_outputs"] = outputs
        if all(whole):
            self._report(chosen, signals, layout, None, embeds, use_cache)
            given |= {"input_ids": ids, "attention_mask": mask}
            given |= {"position_ids": positions} if told else {}
            return None
        if told and bool(layout.visual[:, -1].any()):
            raise NotImplementedError(
                "backend='native' with original positions needs a prompt that ends in text: what "
                "follows counts on from its last token"
            )
        if not (use_cache or self._compact or self._adapter.spatial_positions):
            raise NotImplementedError(
                "backend='native' with original positions needs a cache: without one transformers "
                "takes a gap in the positions for the start of another sequence; give the method "
                "positions='compact', or use backend='hooks'"
            )
        breaks = layout.breaks if self._keep_breaks else layout.unbroken(whole)
        short = shorten(embeds, positions, layout, chosen, self._compact, breaks)
        self._report(chosen, signals, layout, short, embeds, use_cache)
        given |= self._inputs(given, prefill, outputs, layout, chosen, short)
        if told:
            given["position_ids"] = decoder_positions(short)
        return self._retold(given, Whole(ids, short.embeds.shape[1]))

    def _check_caches(self, given: dict[str, Any]) -> None:
        """Refuse a cache that holds a pruned prompt; one that was reset is as good as new."""
        own = getattr(self._model, "_cache", None)  # `generate` resets it on its own
        if own is not None:
            vars(own).pop(_PRUNED, None)
        cache = given.get("past_key_values")
        if cache is None:
            return
        if cache.get_seq_length() == 0:
            vars(cache).pop(_PRUNED, None)
        elif hasattr(cache, _PRUNED) or state_of(cache) is not None:
            raise NotImplementedError(_CONTINUED)

    def _check_options(self, given: dict[str, Any], ids: Any) -> None:
        if ids is None or given.get("inputs_embeds") is not None:
            raise NotImplementedError(
                "images with inputs_embeds: pass input_ids, image placeholders are found by id"
            )
        if given.get("inputs") is not None and given.get("input_ids") is not None:
            raise ValueError("pass the prompt as inputs or as input_ids, got both")
        for name in ("custom_generate", "token_healing"):
            if self._option(given, name):
                raise NotImplementedError(
                    f"backend='native' can't prune with {name}; use backend='hooks'"
                )
        if self._option(given, "cache_implementation") == "paged":
            raise NotImplementedError("paged attention (continuous batching) can't be pruned")
        total = self._option(given, "max_length")
        absolute = total is not None and self._option(given, "max_new_tokens") is None
        if absolute and total <= ids.shape[1]:
            raise ValueError(
                f"max_length must be more than the prompt's {ids.shape[1]} tokens, got {total}"
            )
        if self._option(given, "prefill_chunk_size") is not None:
            self._check_chunks(given)

    def _check_chunks(self, given: dict[str, Any]) -> None:
        """Chunked prefill as transformers does it needs to find the features of each chunk."""
        if _version() < (5, 23):
            raise NotImplementedError(
                "prefill_chunk_size with images needs transformers >= 5.23, got "
                f"{transformers.__version__}, which would leave them out"
            )
        if self._adapter.whole_masks:
            raise NotImplementedError(
                "prefill_chunk_size would hide image tokens from each other, which see each other "
                "in this model: leave it out"
            )
        for source in self._adapter.sources:
            known = getattr(self._model.config, f"{source.modality}_token_id")
            if known != getattr(self._model.config, source.visual_id) and any(
                given.get(name) is not None for name in source.pixels
            ):
                raise NotImplementedError(
                    f"prefill_chunk_size looks for {source.modality} features at placeholders of "
                    f"their own, which this model has not"
                )

    def _option(self, given: dict[str, Any], name: str) -> Any:
        """A setting of `generate`, from where it takes it."""
        places = (given.get("generation_config"), self._model.generation_config)
        found = [given.get(name), *(getattr(place, name, None) for place in places)]
        return next((value for value in found if value is not None), None)

    def _inferred_mask(self, given: dict[str, Any], ids: Tensor) -> Tensor:
        """The mask that `generate` works with where the caller gives none."""
        pad, end = self._option(given, "pad_token_id"), self._option(given, "eos_token_id")
        ends = end if isinstance(end, list) else [end]
        if pad is None or pad in ends:
            return torch.ones_like(ids)
        return (ids != pad).long()

    def _positions(self, given: dict[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        """The prompt's positions, as `generate` would count them."""
        positions = given.get("position_ids")
        if positions is not None:
            return positions
        names = inspect.signature(self._model.forward).parameters
        inputs = {n: v for n, v in given.items() if n in names and n != "input_ids"}
        inputs["attention_mask"] = mask
        return self._model._prepare_position_ids_for_generation(ids, inputs)

    def _encode(self, given: dict[str, Any], prefill: _Prefill) -> dict[str, Any]:
        """The features of every source, with what belongs to them taken out of `given`."""
        outputs, used = {}, set()
        for at, source in enumerate(self._adapter.sources):
            encode = getattr(self._outer, source.features)
            names = [n for n in inspect.signature(encode).parameters if n in given]
            used.update(names)
            encoded = prefill.encoded[at] = self._given(at, given)
            if any(given.get(name) is not None for name in source.pixels):
                if encoded is not None:
                    raise ValueError(
                        f"pass either the {source.modality} pixels or their features, got both"
                    )
                arguments = {n: given[n] for n in names} | {"return_dict": True}
                outputs[source.modality] = encode(**arguments)
            elif encoded is not None:
                outputs[source.modality] = given["mm_encoder_outputs"][source.modality]
        for name in used:
            given.pop(name)
        return outputs

    def _prompt(self, prefill: _Prefill, outputs: dict[str, Any]) -> tuple[Layout, Tensor]:
        """Where the pictures are, and the prompt as it enters the decoder, `[B, L, D]`."""
        masks, words = self._masks(prefill, prefill.ids), self._model.get_input_embeddings()
        visual = torch.stack(masks).any(0)
        embeds = words(prefill.ids.masked_fill(visual, 0))
        layout = self._locate(prefill, prefill.mask, embeds.device)
        for source, mask in zip(self._adapter.sources, masks, strict=True):
            if source.modality in outputs:
                features = _flat(outputs[source.modality].pooler_output).to(embeds)
                here = mask.to(embeds.device)[:, :, None].expand_as(embeds)
                embeds = embeds.masked_scatter(here, features)
        return layout, embeds

    def _whole_masks(
        self, given: dict[str, Any], embeds: Tensor, mask: Tensor, positions: Tensor
    ) -> Any:
        """The masks that the model would make for the whole prompt, where they say more than what
        is padding."""
        if not self._adapter.whole_masks:
            return None
        kinds = {name: given[name] for name in _TYPE_IDS if given.get(name) is not None}
        return self._model.create_masks_for_generate(
            config=self._model.config, inputs_embeds=embeds, attention_mask=mask,
            past_key_values=None, position_ids=positions, is_first_iteration=True, **kinds,
        )  # fmt: skip

    # What `generate` gets.

    def _inputs(
        self, given: dict[str, Any], prefill: _Prefill, outputs: dict[str, Any], layout: Layout,
        chosen: list[Selection], short: Shortened,
    ) -> dict[str, Any]:  # fmt: skip
        """Every argument with a place per token."""
        ids, order = prefill.ids, short.order.to(prefill.ids.device)
        used = torch.ones_like(order, dtype=torch.bool)
        if short.mask is not None:
            used = short.mask.to(ids.device)
        left = ids.gather(1, order).masked_fill(~used, self._padding(given))
        masks = [mask.gather(1, order) & used for mask in self._masks(prefill, prefill.ids)]
        changed: dict[str, Any] = {"input_ids": left, "attention_mask": used.to(torch.long)}
        for name in _TYPE_IDS:
            if given.get(name) is not None:
                kinds = given[name].to(order.device).gather(1, order)
                changed[name] = kinds.masked_fill(~used, 0)

        early = self._early(prefill, outputs, layout, chosen, short)
        expands = max(self._option(given, n) or 1 for n in ("num_beams", "num_return_sequences"))
        features = {}
        for source, mask in zip(self._adapter.sources, masks, strict=True):
            if source.modality not in outputs:
                continue
            output, here = outputs[source.modality], mask.to(short.embeds.device)
            counts = [count for count in here.sum(1).tolist() if count]
            parts = list(short.embeds[here].split(counts))
            if isinstance(output.pooler_output, Tensor):
                values: Any = _stacked(parts, expands)
            else:
                values = parts
            made = type(output)(pooler_output=values)
            if early:
                made[_EARLY] = [list(layer[here].split(counts)) for layer in early]
            features[source.modality] = made
        changed["mm_encoder_outputs"] = features
        return changed

    def _early(
        self, prefill: _Prefill, outputs: dict[str, Any], layout: Layout,
        chosen: list[Selection], short: Shortened,
    ) -> list[Tensor]:  # fmt: skip
        """Features that early layers add, merged like the tokens, each `[B, K, D]`."""
        masks, device = self._masks(prefill, prefill.ids), short.embeds.device
        visual = layout.visual.to(device)
        joint: list[Tensor] = []
        for source, mask in zip(self._adapter.sources, masks, strict=True):
            layers = getattr(outputs.get(source.modality), _EARLY, None) or []
            for at, layer in enumerate(layers):
                features = _flat(layer).to(device)
                if at == len(joint):
                    joint.append(features.new_zeros(*visual.shape, features.shape[-1]))
                joint[at][mask.to(device)] = features
        if not joint:
            return []
        merged = merged_deepstack(
            {DEEPSTACK: [layer[visual] for layer in joint]}, layout, chosen, short,
            self.method.blend,
        )  # fmt: skip
        here = merged["visual_pos_masks"]
        whole = []
        for layer in merged[DEEPSTACK]:
            out = layer.new_zeros(*here.shape, layer.shape[-1])
            out[here] = layer
            whole.append(out)
        return whole

    def _padding(self, given: dict[str, Any]) -> int:
        """An id for unused slots that is no placeholder."""
        config, pad = self._model.config, self._option(given, "pad_token_id")
        taken = {getattr(config, source.visual_id) for source in self._adapter.sources} | {None}
        return next(i for i in (pad, *range(len(taken) + 1)) if i not in taken)

    def _retold(self, given: dict[str, Any], whole: Whole) -> Whole:
        """Lengths that count the prompt, and whoever looks at it, brought to the shorter one."""
        for name in ("max_length", "min_length"):
            total = self._option(given, name)
            if total and self._option(given, name.replace("length", "new_tokens")) is None:
                given[name] = max(total - whole.dropped, 0)
        rows = 1
        if (self._option(given, "num_beams") or 1) == 1:
            rows = self._option(given, "num_return_sequences") or 1
        show_whole(given, whole, rows)
        return whole


class _Generate:
    """Stands on the model in place of its `generate`; an object so that deep copies work."""

    def __init__(self, call: Callable[..., Any], hooks: Native) -> None:
        functools.update_wrapper(self, call)
        self._call = call
        self._hooks = hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooks.generate(self._call, args, kwargs)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _flat(features: Tensor | Sequence[Tensor]) -> Tensor:
    """The features of all pictures, `[total, D]`, whatever they come in."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([part.flatten(0, -2) for part in features])


def _stacked(parts: list[Tensor], expands: int) -> Tensor:
    """The features of each prompt as one tensor, for a model that wants no list: in pieces of one
    length that each prompt has a number of."""
    counts = [len(part) for part in parts]
    if len(set(counts)) > 1 and expands > 1 and _version() < (5, 19):
        raise NotImplementedError(
            "beams and several returned sequences need as many visual tokens left in each prompt "
            f"before transformers 5.19, which mixes up their features, got {counts}"
        )
    return torch.cat(parts).unflatten(0, (-1, math.gcd(*counts)))


_CONTINUED = (
    "generate with backend='native' filled this cache with a pruned prompt, which can't be gone on "
    "with: start without past_key_values, or reset() it"
)


def _refuse_direct(
    names: tuple[str, ...], pixels: tuple[str, ...], module: Any, args: Any, kwargs: Any
) -> None:
    """Before the module that puts features into the text: what would not be pruned, or be wrong.

    It looks at what is there, not at values, so that it is compiled away.
    """
    given = dict(zip(names, args, strict=False)) | kwargs
    for name in pixels:
        if given.get(name) is not None:
            raise NotImplementedError(
                f"backend='native' prunes in generate alone, but the model was called with {name}; "
                "use backend='hooks' for model(...)"
            )
    cache = given.get("past_key_values")
    if cache is not None and getattr(cache, _PRUNED, False):
        raise NotImplementedError(_CONTINUED)
