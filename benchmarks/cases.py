"""The cases of the microbenchmarks: every op at the shapes its users have, and its contenders.

`test_ops.py` (pytest-benchmark) and `gpu_ops.py` (no dependency but torch) time the same cases, and
`growth.py` makes its own from the same constructors. Shapes: LLaVA-1.5 (576 tokens), Video-LLaVA
(2048), LLaVA-NeXT (2880), Qwen2.5-VL (1k to 16k), batches of 1, 8 and 32. Queries and keys are laid
out as Hugging Face models produce them, projections `[B, rows, H * d]` viewed as `[B, H, rows, d]`
(`hf`), or heads first in memory (`contiguous`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import consensusdrop_kernels as cdrop
from benchmarks.baselines import (
    Inputs,
    eager_saliency,
    eager_select_merge,
    plain_diverse,
    plain_merge,
    plain_packed,
    plain_read,
    plain_saliency,
    plain_select,
    plain_select_merge,
    plain_similarity,
    plain_split,
    random_choice,
    random_tokens,
    some_tokens,
)
from consensusdrop_kernels import reference, triton

Call = Callable[[Inputs], Any]

OURS = "cdrop"  # the op as it is called, on the default backend
NEAR_TIES = 0.05  # where a near tie may move a token to another slot
#: Bytes of inputs of one case, and bytes of the maps an eager baseline keeps, above which they are
#: left out.
INPUT_LIMIT = {"cpu": 10**9, "cuda": 16 * 10**9}
MAP_LIMIT = {"cpu": 10**9, "cuda": 20 * 10**9}


#: Bytes of inputs above which the definition of an op, which is not made to be fast, is not timed.
REFERENCE_LIMIT = {"cpu": 50 * 10**6, "cuda": 10**9}


class Model(NamedTuple):
    """What of a model shapes the ops."""

    tokens: int
    width: int
    heads: int = 32
    key_heads: int = 32
    head_width: int = 128
    layers: int = 32
    encoder_heads: int = 16
    encoder_width: int = 64
    encoder_layers: int = 24
    prefix: int = 1


LLAVA = Model(576, 4096)
VIDEO = Model(2048, 4096)
NEXT = Model(2880, 4096)


def qwen(tokens: int) -> Model:
    """Qwen2.5-VL-7B at a resolution; no CLS: one row of queries stands for the image."""
    return Model(tokens, 3584, 28, 4, 128, 28, 16, 80, 32, prefix=0)


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """One op at one shape: its inputs, its options, and what it is compared with."""

    op: str
    shape: str
    dtype: torch.dtype
    #: Tensors on a device: those of the op, then those that baselines alone look at.
    make: Callable[[str], Inputs]
    takes: int
    options: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Call] = field(default_factory=dict)
    compiled: bool = False  # time torch.compile of plain torch too: takes seconds to build
    tolerance: float = 1e-3  # relative, of floating outputs, against the definition
    checked: bool = True  # off where the definition would hold a map of many gigabytes
    left_out: tuple[str, ...] = ()  # baselines that would not fit, and why

    @property
    def name(self) -> str:
        """Of the case among all: op, shape, dtype."""
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def __repr__(self) -> str:
        return self.name

    def own(self, inputs: Inputs) -> Inputs:
        """The tensors of the op."""
        return inputs[: self.takes]

    def call(self, function: Callable[..., Any]) -> Call:
        """A function of the op's signature as a call on the inputs of the case."""
        return lambda inputs: function(*self.own(inputs), **self.options)

    @property
    def ours(self) -> Call:
        """The op as users call it."""
        return self.call(attrgetter(self.op)(torch.ops.cdrop))

    @property
    def definition(self) -> Call:
        """The plain-torch definition of the op."""
        return self.call(getattr(reference, self.op.replace(".", "_")))

    def kernels(self, device: str) -> dict[str, Call]:
        """The op on the default backend, and the other compiled kernels of it that are here."""
        known = cdrop.backends()
        found = {OURS: self.ours}
        in_cuda = self.op in known["cuda"].ops and not self.options.get("diversity")
        if device == "cuda" and in_cuda:
            found[f"{OURS} cuda"] = self.call(attrgetter(self.op)(torch.ops.cdrop_cuda))
        if device == "cuda" and self.op in known["triton"].ops and default_backend() != "triton":
            found[f"{OURS} triton"] = self.call(triton.function(self.op))
        return found

    def contenders(self, device: str, compiled: bool = True) -> dict[str, Call]:
        """Everything that is timed, ours first."""
        plain = self.baselines.get("plain torch")
        found = self.kernels(device)
        if size(self.own(self.make("meta"))) <= REFERENCE_LIMIT[device]:
            found[f"{OURS} reference"] = self.definition
        found |= self.baselines
        if compiled and self.compiled and plain is not None:
            found["torch.compile"] = torch.compile(plain, dynamic=False)
        return found


def default_backend(device: str = "cuda") -> str:
    """The backend that runs an op where none is asked for."""
    if os.environ.get("CDROP_BACKEND"):
        return os.environ["CDROP_BACKEND"]
    kernels = "triton" if device == "cuda" else "cpu"
    return kernels if cdrop.backends()[kernels] else "reference"


def size(values: Any) -> int:
    """Bytes of a tensor, or of all tensors of a sequence."""
    values = values if isinstance(values, tuple | list) else (values,)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _randn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def _heads(
    device: str, dtype: torch.dtype, batch: int, heads: int, rows: int, width: int,
    layout: str = "hf",
) -> Tensor:  # fmt: skip
    flat = _randn(device, dtype, batch, rows, heads, width)
    return flat.transpose(1, 2) if layout == "hf" else flat.transpose(1, 2).contiguous()


def _eager(
    device: str, layers: int, batch: int, heads: int, rows: int, dtype: torch.dtype, call: Call
) -> tuple[dict[str, Call], tuple[str, ...]]:
    """The eager maps of `layers` layers as a baseline, or why they are left out."""
    if not layers:
        return {}, ()
    name = f"eager maps, {layers} layer{'s' * (layers > 1)}"
    kept = layers * batch * heads * rows * rows * dtype.itemsize
    if kept > MAP_LIMIT[device]:
        return {}, (f"{name}: {kept / 1e9:.1f} GB of maps",)
    return {name: call}, ()


def _flash_colreduce(device: str) -> dict[str, Call]:
    if device != "cuda" or importlib.util.find_spec("flash_colreduce") is None:
        return {}
    from flash_colreduce import flash_colreduce

    # Its own output, one row a head: the mean over heads, which the op makes, is not counted.
    return {"flash-colreduce": lambda i: flash_colreduce(i[0], i[1], reduction="mean")}


# --- one case of an op --------------------------------------------------------------------------


def few_rows(
    device: str, dtype: torch.dtype, batch: int, rows: int, tokens: int, heads: int,
    key_heads: int, width: int, *, prefix: int = 0, layers: int = 0, compiled: bool = False,
) -> Case:  # fmt: skip
    """`attention_saliency` of a few rows: the CLS row where there is a prefix, else the last rows.

    `layers` is the number of maps a model returns: 0 leaves the eager baseline out.
    """
    keys = prefix + tokens
    asking = slice(0, rows) if prefix else slice(keys - rows, keys)
    eager, left_out = _eager(
        device, layers, batch, heads, keys, dtype,
        partial(eager_saliency, rows=asking, layers=layers, prefix=prefix),
    )  # fmt: skip

    def make(device: str) -> Inputs:
        k = _heads(device, dtype, batch, key_heads, keys, width)
        if not eager:
            return _heads(device, dtype, batch, heads, rows, width), k
        whole = _heads(device, dtype, batch, heads, keys, width)
        return whole[:, :, asking], k, whole

    plain = {
        "plain torch": lambda i: plain_saliency(i[:2], prefix),
        "plain read": lambda i: plain_read(i[:2]),
    }
    # Without a prefix: it has none to leave out. One key head for each query head.
    flash = _flash_colreduce(device) if heads == key_heads and not prefix else {}
    shape = f"B{batch} M{rows} N{tokens} H{heads}/{key_heads} d{width}" + " CLS" * bool(prefix)
    return Case(
        "attention_saliency", shape, dtype, make, 2, {"prefix": prefix}, plain | eager | flash,
        compiled, left_out=left_out,
    )  # fmt: skip


def square(
    device: str, dtype: torch.dtype, batch: int, tokens: int, heads: int, width: int, *,
    layers: int = 0, plain: bool = True, compiled: bool = False,
) -> Case:  # fmt: skip
    """`attention_saliency` of every row, as encoders without a CLS need it."""
    eager, left_out = _eager(
        device, layers, batch, heads, tokens, dtype,
        lambda i: eager_saliency((*i, i[0]), slice(None), layers),
    )  # fmt: skip

    def make(device: str) -> Inputs:
        q, k = (_heads(device, dtype, batch, heads, tokens, width) for _ in range(2))
        return q, k

    return Case(
        "attention_saliency", f"square B{batch} N{tokens} H{heads} d{width}", dtype, make, 2, {},
        ({"plain torch": plain_saliency} if plain else {}) | eager | _flash_colreduce(device),
        compiled, checked=plain, left_out=left_out,
    )  # fmt: skip


def packed(dtype: torch.dtype, count: int, length: int, compiled: bool = False) -> Case:
    """`attention_saliency.varlen` over Qwen2.5-VL's encoder: 16 heads of 80."""

    def make(device: str) -> Inputs:
        q, k = (_randn(device, dtype, count * length, 16, 80) for _ in range(2))
        ends = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
        return q, k, ends

    return Case(
        "attention_saliency.varlen", f"{count} of {length} H16 d80", dtype, make, 3,
        {"max_seqlen": length}, {"plain torch": lambda i: plain_packed(i, count)}, compiled,
    )  # fmt: skip


def similarity(
    dtype: torch.dtype, batch: int, rows: int, tokens: int, width: int, compiled: bool = False
) -> Case:
    """`similarity_saliency` of text embeddings against projected image tokens."""
    return Case(
        "similarity_saliency", f"B{batch} T{rows} N{tokens} D{width}", dtype,
        lambda d: (_randn(d, dtype, batch, rows, width), _randn(d, dtype, batch, tokens, width)),
        2, {}, {"plain torch": plain_similarity, "plain read": plain_read}, compiled,
    )  # fmt: skip


def choice(
    op: str, plain: Callable[..., Tensor], batch: int, tokens: int, keep: int, compiled: bool
) -> Case:
    """An op that chooses by two scores, which are float32 always."""
    return Case(
        op, f"B{batch} N{tokens} K{keep}", torch.float32,
        lambda d: (torch.rand(batch, tokens, device=d), torch.rand(batch, tokens, device=d)),
        2, {"keep": keep},
        {"plain torch": partial(plain, keep=keep),
         "random tokens": partial(random_choice, keep=keep)},
        compiled,
    )  # fmt: skip


def diverse(dtype: torch.dtype, batch: int, tokens: int, width: int, keep: int) -> Case:
    """`greedy_diverse_select` over the encoder's features."""
    return Case(
        "greedy_diverse_select", f"B{batch} N{tokens} F{width} K{keep}", dtype,
        lambda d: (_randn(d, dtype, batch, tokens, width),), 1, {"keep": keep},
        {"plain torch": partial(plain_diverse, keep=keep),
         "random tokens": partial(random_choice, keep=keep)},
    )  # fmt: skip


def merge(
    dtype: torch.dtype, batch: int, tokens: int, width: int, keep: int, compiled: bool = False
) -> Case:
    """`token_merge` of tokens nobody ranked; the metric is 64 wide, as an encoder's keys are."""

    def make(device: str) -> Inputs:
        x, metric = (_randn(device, dtype, batch, tokens, f) for f in (width, 64))
        return x, metric, some_tokens(batch, tokens, keep, device)

    baselines = {
        "plain torch": plain_merge,
        "plain torch, scatter_reduce": partial(plain_merge, by="scatter_reduce"),
        "random tokens": partial(random_tokens, keep=keep),
        "plain read": plain_read,
    }
    return Case(
        "token_merge", f"B{batch} N{tokens} D{width} K{keep}", dtype, make, 3, {}, baselines,
        compiled, NEAR_TIES,
    )  # fmt: skip


def fused(
    device: str, dtype: torch.dtype, batch: int, model: Model, keep: int, *, layout: str = "hf",
    rows: int = 8, compiled: bool = False, diversity: float = 0.0,
) -> Case:  # fmt: skip
    """`select_merge`: one encoder row, `rows` question rows, the model's heads and widths; with
    `diversity` as ConsensusDrop calls it by default."""
    m = model
    keys = m.prefix + m.tokens
    options: dict[str, Any] = {"keep": keep, "prefix": m.prefix}
    if diversity > 0:
        options["diversity"] = diversity
    eager, left_out = _eager(
        device, m.encoder_layers, batch, m.encoder_heads, keys, dtype,
        partial(eager_select_merge, layers=m.encoder_layers, **options),
    )  # fmt: skip

    def make(device: str) -> Inputs:
        heads = partial(_heads, device, dtype, batch, layout=layout)
        # The row that asks is one of all the rows, where a baseline needs them all.
        whole = heads(m.encoder_heads, keys if eager else 1, m.encoder_width)
        inputs = (
            _randn(device, dtype, batch, m.tokens, m.width),
            whole[:, :, :1],
            heads(m.encoder_heads, keys, m.encoder_width),
            heads(m.heads, rows, m.head_width),
            heads(m.key_heads, m.tokens, m.head_width),
        )
        return (*inputs, whole) if eager else inputs

    baselines = {
        "plain torch": partial(plain_select_merge, **options),
        "plain torch, scatter_reduce": partial(plain_select_merge, **options, by="scatter_reduce"),
        "random tokens": partial(random_tokens, keep=keep),
        "plain read": lambda i: plain_read(i[:5]),
    }
    return Case(
        "select_merge",
        f"B{batch} N{m.tokens} D{m.width} K{keep} {layout}" + (" diverse" if diversity else ""),
        dtype, make, 5, options | {"txt_reduce": "max"}, baselines | eager, compiled, NEAR_TIES,
        left_out=left_out,
    )  # fmt: skip


# --- the cases of each kind ---------------------------------------------------------------------


def _batches(device: str, model: Model) -> tuple[int, ...]:
    """On a CPU a batch of LLaVA-1.5 stands for all: the whole run is to end in minutes."""
    if model is LLAVA:
        return (1, 8, 32)
    if device == "cpu":
        return (1,)
    return (1, 8, 32) if model.tokens <= 2880 else (1, 8)


def select_merge_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The flagship."""
    if small:
        tiny = Model(256, 512, 8, 8, 64, 2, 4, 64, 2)
        yield fused(device, dtype, 1, tiny, 32)
        yield fused(device, dtype, 1, tiny, 32, diversity=0.65)
        return
    yield fused(device, dtype, 1, LLAVA, 64, compiled=True)
    for batch, model, keep in ((1, LLAVA, 64), (8, LLAVA, 128), (1, NEXT, 160)):
        if (batch, model) != (1, LLAVA):
            yield fused(device, dtype, batch, model, keep)
        yield fused(device, dtype, batch, model, keep, layout="contiguous")
    yield fused(device, dtype, 32, LLAVA, 64)
    for batch, model, keep in ((1, LLAVA, 64), (32, LLAVA, 64), (1, NEXT, 160)):
        yield fused(device, dtype, batch, model, keep, diversity=0.65)
    for model, keep in (
        (VIDEO, 256), (NEXT, 160), (qwen(1024), 128), (qwen(4096), 512), (qwen(16384), 1024),
    ):  # fmt: skip
        for batch in _batches(device, model):
            if (batch, model) != (1, NEXT):
                yield fused(device, dtype, batch, model, keep)


def saliency_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The CLS row of an encoder, question rows of an LLM over its visual keys, and square."""
    if small:
        yield few_rows(device, dtype, 1, 1, 128, 4, 4, 64, prefix=1, layers=2)
        yield few_rows(device, dtype, 2, 8, 128, 4, 2, 64, layers=1)
        yield square(device, dtype, 1, 128, 4, 64, layers=2)
        return
    for batch in (1, 8, 32):
        yield few_rows(
            device, dtype, batch, 1, 576, 16, 16, 64, prefix=1, layers=24, compiled=batch == 1
        )
    for model in (LLAVA, VIDEO, NEXT, qwen(1024), qwen(4096), qwen(16384)):
        for batch in _batches(device, model):
            yield few_rows(
                device, dtype, batch, 8, model.tokens, model.heads, model.key_heads,
                model.head_width, layers=model.layers, compiled=batch == 1 and model is LLAVA,
            )  # fmt: skip
    for rows in (1, 64):
        yield few_rows(device, dtype, 1, rows, 2880, 32, 32, 128)
    for batch, tokens in ((1, 576), (8, 576), (1, 1024)):
        yield square(
            device, dtype, batch, tokens, 16, 64, layers=24, compiled=(batch, tokens) == (1, 1024)
        )
    if device == "cuda":  # seconds a call on a CPU
        yield square(device, dtype, 32, 576, 16, 64, layers=24)
        yield square(device, dtype, 1, 4096, 16, 64, layers=24)
        # Plain torch would hold 17 GB of logits in float32.
        yield square(device, dtype, 1, 16384, 16, 64, plain=False)


def varlen_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Qwen2.5-VL's encoder: windows of 64 patches, and whole images, of 1k to 4k tokens."""
    long = [(4, 4096), (1, 16384)] if device == "cuda" else []
    for count, length in [(4, 64)] if small else [(64, 64), (256, 64), (4, 1024), *long]:
        yield packed(dtype, count, length, compiled=(count, length) == (64, 64))


def similarity_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Twenty words."""
    if small:
        yield similarity(dtype, 1, 5, 128, 256)
        return
    for batch in (1, 8, 32):
        yield similarity(dtype, batch, 20, 576, 4096, compiled=batch == 1)
    for model in (VIDEO, NEXT, qwen(4096), qwen(16384)):
        yield similarity(dtype, 1, 20, model.tokens, model.width)


def _choice_cases(op: str, plain: Callable[..., Tensor], small: bool) -> Iterator[Case]:
    shapes = [(1, 576), (8, 576), (32, 576), (1, 2048)]
    shapes += [(b, n) for n in (2880, 16384) for b in (1, 32)]
    for batch, tokens in shapes[:1] if small else shapes:
        compiled = not small and (batch, tokens) == (1, 576)
        yield choice(op, plain, batch, tokens, tokens // 9, compiled)


def select_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """One sample and many, up to past the one-program limit."""
    return _choice_cases("consensus_select", plain_select, small)


def split_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """AdaFV's rule."""
    return _choice_cases("adaptive_split_select", plain_split, small)


def greedy_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """DivPrune's choice over the encoder's features; no torch.compile, which would unroll the loop
    over the tokens it keeps."""
    shapes = [(1, 576, 64), (8, 576, 64), (32, 576, 64), (1, 2048, 256), (1, 2880, 160)]
    for b, n, k in [(1, 128, 8)] if small else shapes:
        yield diverse(dtype, b, n, 1024, k)


def merge_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The second half of `select_merge` alone."""
    shapes = [
        (1, LLAVA, 64), (8, LLAVA, 128), (32, LLAVA, 64), (1, VIDEO, 256), (1, NEXT, 320),
        (8, NEXT, 320), (1, qwen(4096), 512), (1, qwen(16384), 1024),
    ]  # fmt: skip
    if small:
        yield merge(dtype, 1, 256, 512, 32)
        return
    for b, m, k in shapes:
        yield merge(dtype, b, m.tokens, m.width, k, compiled=b == 1 and m is LLAVA)


CASES: dict[str, Callable[[str, torch.dtype, bool], Iterator[Case]]] = {
    "select_merge": select_merge_cases,
    "saliency": saliency_cases,
    "select": select_cases,
    "merge": merge_cases,
    "varlen": varlen_cases,
    "similarity": similarity_cases,
    "split": split_cases,
    "greedy": greedy_cases,
}


def too_large(case: Case, device: str) -> str:
    """Why the case is left out on a device, or an empty string."""
    held = size(case.own(case.make("meta")))
    if held <= INPUT_LIMIT[device]:
        return ""
    return f"{held / 1e9:.1f} GB of inputs, over {INPUT_LIMIT[device] / 1e9:.0f}"


def default_dtypes(device: str, kind: str) -> list[torch.dtype]:
    """bfloat16 on a GPU; float32 on a CPU, where the flagship is timed in both."""
    if device == "cuda":
        return [torch.bfloat16]
    return [torch.float32, torch.bfloat16] if kind == "select_merge" else [torch.float32]


def fitting(
    device: str, small: bool, dtypes: Iterable[torch.dtype] = (), kinds: Iterable[str] = ()
) -> tuple[dict[str, Case], list[str]]:
    """The cases that fit on a device, by name, and a line for each thing that does not.

    Args:
        device: "cpu" or "cuda".
        small: a tiny case of each op instead.
        dtypes: of the tensors; without them the default ones.
        kinds: keys of `CASES`; without them all.
    """
    found: dict[str, Case] = {}
    left_out = []
    if device == "cpu" and not small:
        left_out.append("batches but of LLaVA-1.5, square maps over 1024 tokens: minutes on a CPU")
    for kind in kinds or CASES:
        for dtype in dtypes or default_dtypes(device, kind):
            for case in CASES[kind](device, dtype, small):
                why = too_large(case, device)
                if why:
                    left_out.append(f"{case.name}: {why}")
                elif case.name not in found:
                    found[case.name] = case
                    left_out += [f"{case.name}, {what}" for what in case.left_out]
    return found, left_out


# --- the gate -----------------------------------------------------------------------------------


def _of_tokens(tokens: Tensor, index: Tensor, assign: Tensor, size: Tensor) -> tuple[Tensor, ...]:
    """What each token became, `[B, N, ...]`: slots are numbered by what is kept, so that a near tie
    would count for all those between the two tokens."""
    slot = assign.clamp_min(0)
    merged = tokens.gather(1, slot[:, :, None].expand(-1, -1, tokens.shape[2]))
    return merged, index.gather(1, slot), size.gather(1, slot)


def check(case: Case, inputs: Inputs, kernel: Call | None = None) -> None:
    """The op, or another kernel of it, against its definition; a wrong one is not timed.

    Raises:
        AssertionError: with how far it is off.
    """
    ours, right = (kernel or case.ours)(inputs), case.definition(inputs)
    if case.options.get("diversity"):
        ours, right = _of_tokens(*ours), _of_tokens(*right)
    pairs = zip(
        ours if isinstance(ours, tuple) else (ours,),
        right if isinstance(right, tuple) else (right,),
        strict=True,
    )
    for got, want in pairs:
        if got.dtype == torch.int64:
            same = (got == want).float().mean().item()
            if same < 0.98:  # two scores closer than rounding may change places
                raise AssertionError(f"only {same:.3f} of the integers agree with the definition")
        else:
            error = ((got.double() - want.double()).norm() / want.double().norm()).item()
            if not error < case.tolerance:
                raise AssertionError(f"relative error {error:.2e} against the definition")
