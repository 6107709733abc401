"""The ops under `torch.ops.cdrop`: schemas, fakes, gradients, and the choice of a backend.

Each op is defined here, so it exists with the same errors whatever was built. Its plain-torch
definition is registered for every device; compiled kernels override it where they are there. With
no explicit choice a call goes from the dispatcher straight into the kernel; `use_backend` puts
another backend's functions in front for as long as it is entered.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks, reference
from . import triton as triton_ops

SCHEMAS = {
    "attention_saliency": (
        "(Tensor q, Tensor k, *, float? scale=None, Tensor? lse=None, Tensor? key_valid=None, "
        'Tensor? query_weight=None, int prefix=0, bool causal=False, str reduce="mean") -> Tensor'
    ),
    "attention_saliency.varlen": (
        "(Tensor q, Tensor k, Tensor cu_seqlens, int max_seqlen, *, float? scale=None, "
        "Tensor? lse=None, Tensor? query_weight=None, bool causal=False, "
        'str reduce="mean") -> Tensor'
    ),
    "similarity_saliency": (
        "(Tensor text, Tensor visual, *, float temperature=0.01, Tensor? text_valid=None, "
        'Tensor? visual_valid=None, str reduce="max") -> Tensor'
    ),
    "adaptive_split_select": (
        "(Tensor visual, Tensor textual, int keep, *, float reserve=0.25, Tensor? valid=None) "
        "-> (Tensor index, Tensor split)"
    ),
    "greedy_diverse_select": (
        '(Tensor features, int keep, *, Tensor? relevance=None, str objective="maxmin", '
        "Tensor? valid=None) -> Tensor"
    ),
    "consensus_select": (
        '(Tensor visual, Tensor? textual, int keep, *, float alpha=0.5, str fusion="rank", '
        "Tensor? valid=None, Tensor? priority=None, int priority_keep=0) "
        "-> (Tensor index, Tensor score)"
    ),
    "token_merge": (
        "(Tensor x, Tensor metric, Tensor index, *, int contextual=0, Tensor? weight=None, "
        "Tensor? valid=None, float threshold=-1.0, float blend=1.0) "
        "-> (Tensor tokens, Tensor assign, Tensor size)"
    ),
    "select_merge": (
        "(Tensor x, Tensor q_vis, Tensor k_vis, Tensor? q_txt=None, Tensor? k_txt=None, *, "
        'int keep, int contextual=0, float alpha=0.5, str fusion="rank", int prefix=0, '
        "float? scale_vis=None, float? scale_txt=None, Tensor? lse_vis=None, "
        'Tensor? lse_txt=None, Tensor? txt_weight=None, str txt_reduce="mean", '
        "Tensor? metric=None, Tensor? valid=None, Tensor? priority=None, int priority_keep=0, "
        "float threshold=-1.0, float blend=1.0, float diversity=0.0) "
        "-> (Tensor tokens, Tensor index, Tensor assign, Tensor size)"
    ),
}

# The scores choose tokens, they are no part of the result.
NOT_DIFFERENTIABLE = (
    "attention_saliency",
    "attention_saliency.varlen",
    "similarity_saliency",
    "consensus_select",
    "adaptive_split_select",
    "greedy_diverse_select",
)


def _definition(op: str) -> Callable[..., Any]:
    """The plain-torch function of an op; of an overload, `<op>_<overload>`."""
    function = getattr(reference, op.replace(".", "_"))
    return torch.no_grad()(function) if op in NOT_DIFFERENTIABLE else function


_library = torch.library.Library("cdrop", "DEF")
for _op, _schema in SCHEMAS.items():
    _library.define(
        _op + _schema,
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )
    _library.impl(_op, _definition(_op), "CompositeExplicitAutograd")


# --- shapes, for torch.compile ------------------------------------------------------------------


def _fake_attention_saliency(q, k, *, causal=False, **options):  # type: ignore[no-untyped-def]
    _checks.attention(q, k, **options)
    return q.new_empty((k.shape[0], k.shape[2] - options.get("prefix", 0)), dtype=torch.float32)


def _fake_attention_saliency_varlen(  # type: ignore[no-untyped-def]
    q, k, cu_seqlens, max_seqlen, *, causal=False, **options
):
    _checks.packed_attention(q, k, cu_seqlens, max_seqlen, **options)
    return q.new_empty((q.shape[0],), dtype=torch.float32)


def _fake_similarity_saliency(text, visual, **options):  # type: ignore[no-untyped-def]
    _checks.similarity(text, visual, **options)
    return text.new_empty(visual.shape[:2], dtype=torch.float32)


def _fake_adaptive_split_select(
    visual: Tensor,
    textual: Tensor,
    keep: int,
    *,
    reserve: float = 0.25,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _checks.split(visual, textual, keep, reserve=reserve, valid=valid)
    batch = visual.shape[0]
    return (
        visual.new_empty((batch, keep), dtype=torch.int64),
        visual.new_empty((batch,), dtype=torch.int64),
    )


def _fake_greedy_diverse_select(
    features: Tensor,
    keep: int,
    *,
    relevance: Tensor | None = None,
    objective: str = "maxmin",
    valid: Tensor | None = None,
) -> Tensor:
    _checks.diverse(features, keep, relevance=relevance, objective=objective, valid=valid)
    return features.new_empty((features.shape[0], keep), dtype=torch.int64)


def _fake_consensus_select(
    visual: Tensor,
    textual: Tensor | None,
    keep: int,
    *,
    alpha: float = 0.5,
    fusion: str = "rank",
    valid: Tensor | None = None,
    priority: Tensor | None = None,
    priority_keep: int = 0,
) -> tuple[Tensor, Tensor]:
    _checks.scores(visual, textual)
    batch, tokens = visual.shape
    _checks.selection(
        batch, tokens, visual, "visual", keep=keep, alpha=alpha, fusion=fusion, valid=valid,
        priority=priority, priority_keep=priority_keep,
    )  # fmt: skip
    return visual.new_empty((batch, keep), dtype=torch.int64), visual.new_empty((batch, tokens))


def _fake_token_merge(
    x: Tensor,
    metric: Tensor,
    index: Tensor,
    *,
    contextual: int = 0,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    threshold: float = -1.0,
    blend: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.merge(
        x, metric, index, contextual=contextual, weight=weight, valid=valid, threshold=threshold,
        blend=blend,
    )  # fmt: skip
    batch, tokens, width = x.shape
    slots = index.shape[1] + contextual
    return (
        x.new_empty((batch, slots, width)),
        x.new_empty((batch, tokens), dtype=torch.int64),
        x.new_empty((batch, slots), dtype=torch.float32),
    )


def _fake_select_merge(x, q_vis, k_vis, q_txt=None, k_txt=None, **options):  # type: ignore[no-untyped-def]
    schema = torch.ops.cdrop.select_merge.default._schema
    options = {a.name: a.default_value for a in schema.arguments if a.kwarg_only} | options
    _checks.fused(x, q_vis, k_vis, q_txt, k_txt, **options)
    batch, tokens, width = x.shape
    slots = options["keep"] + options["contextual"]
    return (
        x.new_empty((batch, slots, width)),
        x.new_empty((batch, slots), dtype=torch.int64),
        x.new_empty((batch, tokens), dtype=torch.int64),
        x.new_empty((batch, slots), dtype=torch.float32),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "attention_saliency": _fake_attention_saliency,
    "attention_saliency.varlen": _fake_attention_saliency_varlen,
    "similarity_saliency": _fake_similarity_saliency,
    "adaptive_split_select": _fake_adaptive_split_select,
    "greedy_diverse_select": _fake_greedy_diverse_select,
    "consensus_select": _fake_consensus_select,
    "token_merge": _fake_token_merge,
    "select_merge": _fake_select_merge,
}
for _op, _fake in _FAKES.items():
    torch.library.register_fake(f"cdrop::{_op}", _fake, lib=_library)


# --- gradients ----------------------------------------------------------------------------------

# A fallthrough leaves their outputs without a gradient and adds nothing to a call.
for _op in NOT_DIFFERENTIABLE:
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")


class _TokenMerge(torch.autograd.Function):
    """`token_merge` with gradients for `x` and the keyword-only `weight`.

    `torch.library.register_autograd` passes keyword-only tensors through as constants, so the
    autograd kernels of the two merging ops are registered by hand.
    """

    @staticmethod
    def forward(ctx, below, x, weight, metric, index, options):  # type: ignore[no-untyped-def]
        tokens, assign, size = below(x, metric, index, weight=weight, **options)
        contextual = options.get("contextual", 0)
        own = index
        if contextual > 0:  # then every dropped valid token is in a contextual slot
            slots = reference.contextual_slots(assign >= index.shape[1], contextual)
            own = torch.cat((index, slots), dim=1)
        _save_for_merge_backward(ctx, x, weight, tokens, assign, size, own, options)
        return tokens, assign, size

    @staticmethod
    def backward(ctx, grad_tokens, _, grad_size):  # type: ignore[no-untyped-def]
        grad_x, grad_weight = _merge_backward(ctx, grad_tokens, grad_size)
        return None, grad_x, grad_weight, None, None, None


class _SelectMerge(torch.autograd.Function):
    """`select_merge` with the gradient of its merge for `x`; the choice is a constant."""

    @staticmethod
    def forward(ctx, below, x, others, options):  # type: ignore[no-untyped-def]
        tokens, index, assign, size = below(x, *others, **options)
        _save_for_merge_backward(ctx, x, None, tokens, assign, size, index, options)
        return tokens, index, assign, size

    @staticmethod
    def backward(ctx, grad_tokens, _, __, grad_size):  # type: ignore[no-untyped-def]
        return None, _merge_backward(ctx, grad_tokens, grad_size)[0], None, None


def _save_for_merge_backward(ctx, x, weight, tokens, assign, size, own, options):  # type: ignore[no-untyped-def]
    weighted = weight is not None and ctx.needs_input_grad[2]
    ctx.mark_non_differentiable(*((assign, own) if weighted else (assign, own, size)))
    ctx.blend, ctx.dtype, ctx.weighted = options.get("blend", 1.0), x.dtype, weighted
    # The gradient of `x` needs the assignment alone; only that of `weight` looks at values.
    ctx.save_for_backward(*((x, tokens) if weighted else (None, None)), weight, assign, own)


def _merge_backward(ctx, grad_tokens, grad_size):  # type: ignore[no-untyped-def]
    x, tokens, weight, assign, own = ctx.saved_tensors
    return reference.merge_backward(
        grad_tokens, grad_size, x, tokens, weight, assign, own, blend=ctx.blend, dtype=ctx.dtype
    )


def _below_autograd(op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet) -> Callable:
    def call(*args, **options):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    return call


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Without a rule for forward-mode derivatives they would be 0, silently."""
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("forward-mode derivatives of a merge; use reverse mode")


def _autograd_token_merge(keyset, x, metric, index, *, weight=None, **options):  # type: ignore[no-untyped-def]
    _refuse_tangents(x, weight)
    below = _below_autograd(torch.ops.cdrop.token_merge.default, keyset)
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return _TokenMerge.apply(below, x, weight, metric, index, options)
    return below(x, metric, index, weight=weight, **options)


def _autograd_select_merge(keyset, x, *others, **options):  # type: ignore[no-untyped-def]
    _refuse_tangents(x)
    below = _below_autograd(torch.ops.cdrop.select_merge.default, keyset)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SelectMerge.apply(below, x, others, options)
    return below(x, *others, **options)


_library.impl("token_merge", _autograd_token_merge, "Autograd", with_keyset=True)
_library.impl("select_merge", _autograd_select_merge, "Autograd", with_keyset=True)


# --- backends -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """Whether a backend can be used here, for which ops, and if not, why."""

    available: bool
    reason: str
    ops: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.available


NAMES = ("cuda", "triton", "cpu", "reference")
_CPU_OPS = tuple(SCHEMAS)


def _load_kernels() -> str:
    """Load the compiled kernels; why they could not be, or an empty string."""
    path = pathlib.Path(__file__).with_name("libcdrop.so")
    if not path.exists():
        return "the compiled kernels (libcdrop.so) were not built"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"libcdrop.so did not load: {error}"
    return ""


# The CUDA C++ kernels, apart from the ops: until a GPU has been seen to agree with them, they run
# where they are asked for by name.
_CUDA_OPS = ("select_merge",)
_cuda_library = torch.library.Library("cdrop_cuda", "DEF")
for _op in _CUDA_OPS:
    _cuda_library.define(_op + SCHEMAS[_op])

_kernels_missing = _load_kernels()

# Imported at the first call. What the compiled kernels cover stays theirs.
_triton = {op: triton_ops.function(op) for op in triton_ops.OPS}
if triton_ops.installed():
    for _op, _function in _triton.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"cdrop::{_op}", "CUDA"):
            _library.impl(_op, _function, "CUDA")


def backends() -> dict[str, Backend]:
    """What can run the ops here: `cuda`, `triton`, `cpu` and `reference`, each with the reason
    where it cannot."""
    found = {"reference": Backend(True, "plain torch, on every device", tuple(SCHEMAS))}
    found["cpu"] = Backend(
        not _kernels_missing,
        _kernels_missing or f"C++ kernels, {torch.ops.cdrop_info.cpu_capability()}",
        () if _kernels_missing else _CPU_OPS,
    )
    found["triton"] = _triton_backend()
    missing = _kernels_missing or torch.ops.cdrop_info.cuda_missing()
    found["cuda"] = Backend(
        not missing,
        missing or f"C++ kernels for {', '.join(_CUDA_OPS)}, on request only",
        () if missing else _CUDA_OPS,
    )
    return {name: found[name] for name in NAMES}


def _triton_device() -> str:
    return "cpu" if triton_ops.interpreted() else "cuda"


def _triton_backend() -> Backend:
    missing = triton_ops.missing()
    if missing:
        return Backend(False, missing)
    where = "interpreted, on the CPU" if triton_ops.interpreted() else "on CUDA and ROCm devices"
    return Backend(True, f"Triton kernels, {where}", tuple(triton_ops.OPS))


def _cuda_function(op: str) -> Callable:
    """The CUDA C++ kernel of an op. It checks everything but values, which are on the device."""
    kernel = getattr(torch.ops.cdrop_cuda, op)

    def call(*args, **options):  # type: ignore[no-untyped-def]
        if os.environ.get("CDROP_CHECK") == "1":
            _FAKES[op](*args, **options)  # makes the checks of the op
        return kernel(*args, **options)

    return call


def _refusing(op: str, backend: str, device: str) -> Callable:
    def refuse(*args, **options):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            f"backend must be one that runs {op} on {device} tensors, got {backend!r}"
        )

    return refuse


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every `torch.ops.cdrop` op on the named backend while entered.

    Args:
        name: `"cuda"`, `"triton"`, `"cpu"` or `"reference"`.

    Raises:
        RuntimeError: the backend is unknown or can't run here, with the reason; or, from a call
            inside, it does not run that op on that device.

    The choice holds for the process, not for one thread: it changes what the dispatcher holds.
    """
    _require(name)
    outer = _forced.name
    _forced.put(name)
    try:
        yield
    finally:
        _forced.put(outer)


class _Forced:
    """The one override in force, if any: two at once would hide the compiled kernels from each
    other."""

    name: str | None = None
    _library: torch.library.Library | None = None

    def put(self, name: str | None) -> None:
        if self._library is not None:
            self._library._destroy()
        self.name, self._library = name, None if name is None else _override(name)


def _require(name: str) -> Backend:
    if name not in NAMES:
        raise RuntimeError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    backend = backends()[name]
    if not backend:
        raise RuntimeError(f"backend {name!r} can't be used here: {backend.reason}")
    return backend


def _override(name: str) -> torch.library.Library:
    backend = _require(name)
    library = torch.library.Library("cdrop", "IMPL")
    with warnings.catch_warnings():  # torch warns of the override, which is the point
        warnings.simplefilter("ignore", UserWarning)
        for op, (key, device) in itertools.product(SCHEMAS, (("CPU", "cpu"), ("CUDA", "cuda"))):
            if name == "reference":
                function = _definition(op)
            elif name == "triton" and op in backend.ops and device == _triton_device():
                function = _triton[op]
            elif name == "cuda" and op in backend.ops and device == "cuda":
                function = _cuda_function(op)
            elif name == device and op in backend.ops:
                continue  # the compiled kernel is what the dispatcher holds already
            else:
                function = _refusing(op, name, device)
            library.impl(op, function, key, allow_override=True)
    return library


_forced = _Forced()
if os.environ.get("CDROP_BACKEND"):
    _forced.put(os.environ["CDROP_BACKEND"])
