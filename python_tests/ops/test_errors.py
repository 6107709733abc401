"""Bad input: one sentence that names the argument and what was found, the same on every backend."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import consensusdrop_kernels as cdrop

from .cases import (
    Args,
    diverse_case,
    merge_case,
    overload,
    packed_case,
    saliency_case,
    scores,
    select_merge_case,
    similarity_case,
)

ops = torch.ops.cdrop
pytestmark = pytest.mark.usefixtures("poison")

Change = dict[str, Any]
#: (change to a good call, argument that the sentence starts with, what it says was found)
Row = tuple[str, Change, str, str]


def base(op: str) -> Args:
    if op == "attention_saliency":
        return saliency_case(2, 4, 2, 3, 20, 16, prefix=1)
    if op == "consensus_select":
        return {"visual": scores(2, 20), "textual": scores(2, 20, seed=1), "keep": 5}
    if op == "token_merge":
        return merge_case(2, 20, 5, 8, 6)
    if op == "attention_saliency.varlen":
        return packed_case((5, 8, 0, 7), 4, 2, 16)
    if op == "similarity_saliency":
        return similarity_case(2, 3, 20, 16)
    if op == "adaptive_split_select":
        return {"visual": scores(2, 20), "textual": scores(2, 20, seed=1), "keep": 5}
    if op == "greedy_diverse_select":
        return diverse_case(2, 20, 5, 6)
    return select_merge_case(2, 20, 5, width=8, head_dim=16, rows_txt=3, prefix=1)


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


def with_one(tensor: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def other_stride(*shape: int) -> Tensor:
    return torch.ones(*shape, 2)[..., 0]


mask = {"dtype": torch.bool}
half = torch.float16

SALIENCY: list[Row] = [
    ("float64", {"q": ones(2, 4, 3, 16).double()}, "q", "float64"),
    ("integer", {"q": ones(2, 4, 3, 16).int()}, "q", "int32"),
    ("key dtype", {"k": ones(2, 2, 21, 16, dtype=half)}, "k", "float16"),
    ("q rank", {"q": ones(4, 3, 16)}, "q", "[4, 3, 16]"),
    ("k rank", {"k": ones(2, 2, 1, 21, 16)}, "k", "[2, 2, 1, 21, 16]"),
    ("k batch", {"k": ones(3, 2, 21, 16)}, "k", "[3, 2, 21, 16]"),
    ("k width", {"k": ones(2, 2, 21, 8)}, "k", "[2, 2, 21, 8]"),
    ("heads", {"k": ones(2, 3, 21, 16)}, "the heads of q", "4"),
    ("more key heads", {"k": ones(2, 8, 21, 16)}, "the heads of q", "4"),
    ("no key head", {"k": ones(2, 0, 21, 16)}, "k", "[2, 0, 21, 16]"),
    ("q stride", {"q": other_stride(2, 4, 3, 16)}, "q", "2"),
    ("k stride", {"k": other_stride(2, 2, 21, 16)}, "k", "2"),
    ("prefix below 0", {"prefix": -1}, "prefix", "-1"),
    ("prefix above all", {"prefix": 22}, "prefix", "22"),
    ("scale nan", {"scale": math.nan}, "scale", "nan"),
    ("scale inf", {"scale": math.inf}, "scale", "inf"),
    ("reduce", {"reduce": "sum"}, "reduce", '"sum"'),
    ("reduce empty", {"reduce": ""}, "reduce", '""'),
    ("lse dtype", {"lse": ones(2, 4, 3, dtype=half)}, "lse", "float16"),
    ("lse shape", {"lse": ones(2, 4, 4)}, "lse", "[2, 4, 4]"),
    ("lse rank", {"lse": ones(2, 12)}, "lse", "[2, 12]"),
    ("mask dtype", {"key_valid": ones(2, 21)}, "key_valid", "float32"),
    ("mask of N", {"key_valid": ones(2, 20, **mask)}, "key_valid", "[2, 20]"),
    ("mask to broadcast", {"key_valid": ones(1, 21, **mask)}, "key_valid", "[1, 21]"),
    ("weight dtype", {"query_weight": ones(2, 3).long()}, "query_weight", "int64"),
    ("weight shape", {"query_weight": ones(2, 4)}, "query_weight", "[2, 4]"),
    (
        "weight below 0",
        {"query_weight": with_one(ones(2, 3), (1, 2), -0.5)},
        "query_weight",
        "-0.5",
    ),
    ("weight nan", {"query_weight": with_one(ones(2, 3), (0, 1), math.nan)}, "query_weight", "nan"),
    ("weight inf", {"query_weight": with_one(ones(2, 3), (0, 1), math.inf)}, "query_weight", "inf"),
    ("device", {"k": ones(2, 2, 21, 16, device="meta")}, "k", "meta"),
    ("lse device", {"lse": ones(2, 4, 3, device="meta")}, "lse", "meta"),
]

CHOICE: list[Row] = [
    ("keep 0", {"keep": 0}, "keep", "0"),
    ("keep below 0", {"keep": -3}, "keep", "-3"),
    ("keep above N", {"keep": 21}, "keep", "21"),
    ("alpha below", {"alpha": -0.1}, "alpha", "-0.1"),
    ("alpha above", {"alpha": 1.5}, "alpha", "1.5"),
    ("alpha nan", {"alpha": math.nan}, "alpha", "nan"),
    ("fusion", {"fusion": "mean"}, "fusion", '"mean"'),
    ("fusion case", {"fusion": "Rank"}, "fusion", '"Rank"'),
    ("valid dtype", {"valid": ones(2, 20).int()}, "valid", "int32"),
    ("valid shape", {"valid": ones(2, 19, **mask)}, "valid", "[2, 19]"),
    ("valid rank", {"valid": ones(20, **mask)}, "valid", "[20]"),
    ("valid device", {"valid": ones(2, 20, device="meta", **mask)}, "valid", "meta"),
    ("no priority", {"priority_keep": 2}, "priority", "None"),
    ("reserve below 0", {"priority": ones(20), "priority_keep": -1}, "priority_keep", "-1"),
    ("reserve above keep", {"priority": ones(20), "priority_keep": 6}, "priority_keep", "6"),
    ("priority dtype", {"priority": ones(20, dtype=half)}, "priority", "float16"),
    ("priority shape", {"priority": ones(19)}, "priority", "[19]"),
    ("priority rows", {"priority": ones(3, 20)}, "priority", "[3, 20]"),
    ("priority rank", {"priority": ones(1, 2, 20)}, "priority", "[1, 2, 20]"),
]

SCORES: list[Row] = [
    ("visual dtype", {"visual": ones(2, 20, dtype=half)}, "visual", "float16"),
    ("visual rank", {"visual": ones(20)}, "visual", "[20]"),
    ("textual dtype", {"textual": ones(2, 20).double()}, "textual", "float64"),
    ("textual shape", {"textual": ones(2, 21)}, "textual", "[2, 21]"),
    ("textual to broadcast", {"textual": ones(1, 20)}, "textual", "[1, 20]"),
    ("textual device", {"textual": ones(2, 20, device="meta")}, "textual", "meta"),
]

NUMBERS: list[Row] = [
    ("contextual below 0", {"contextual": -1}, "contextual", "-1"),
    ("threshold nan", {"threshold": math.nan}, "threshold", "nan"),
    ("blend below 0", {"blend": -0.25}, "blend", "-0.25"),
    ("blend above 1", {"blend": 1.25}, "blend", "1.25"),
    ("blend nan", {"blend": math.nan}, "blend", "nan"),
]

good_index = torch.tensor([[0, 3, 5, 7, 9], [1, 2, 3, 4, 19]])

MERGE: list[Row] = [
    *NUMBERS,
    ("x dtype", {"x": ones(2, 20, 8).double()}, "x", "float64"),
    ("x rank", {"x": ones(20, 8)}, "x", "[20, 8]"),
    ("metric dtype", {"metric": ones(2, 20, 6).long()}, "metric", "int64"),
    ("metric rank", {"metric": ones(2, 20)}, "metric", "[2, 20]"),
    ("metric tokens", {"metric": ones(2, 21, 6)}, "metric", "[2, 21, 6]"),
    ("metric batch", {"metric": ones(1, 20, 6)}, "metric", "[1, 20, 6]"),
    ("metric without width", {"metric": ones(2, 20, 0)}, "metric", "[2, 20, 0]"),
    ("metric device", {"metric": ones(2, 20, 6, device="meta")}, "metric", "meta"),
    ("index dtype", {"index": good_index.int()}, "index", "int32"),
    ("index rank", {"index": good_index[0]}, "index", "[5]"),
    ("index batch", {"index": good_index[:1]}, "index", "[1, 5]"),
    ("index longer than N", {"index": torch.arange(21).repeat(2, 1)}, "index", "[2, 21]"),
    ("index empty", {"index": torch.zeros(2, 0, dtype=torch.int64)}, "index", "[2, 0]"),
    ("index device", {"index": good_index.to("meta")}, "index", "meta"),
    ("index above N", {"index": with_one(good_index, (1, 4), 20)}, "index", "20"),
    ("index far out", {"index": with_one(good_index, (1, 4), 2**62)}, "index", str(2**62)),
    ("index below -1", {"index": with_one(good_index, (0, 2), -2)}, "index", "-2"),
    ("index twice", {"index": with_one(good_index, (1, 4), 2)}, "index", "token 2 twice"),
    ("index twice apart", {"index": with_one(good_index, (0, 4), 0)}, "index", "token 0 twice"),
    (
        "index of an invalid token",
        {"index": good_index, "valid": with_one(ones(2, 20, **mask), (1, 19), False)},
        "index",
        "token 19",
    ),
    ("weight dtype", {"weight": ones(2, 20).bool()}, "weight", "bool"),
    ("weight shape", {"weight": ones(2, 5)}, "weight", "[2, 5]"),
    ("weight rank", {"weight": ones(2, 20, 1)}, "weight", "[2, 20, 1]"),
    ("weight below 0", {"weight": with_one(ones(2, 20), (1, 7), -2.0)}, "weight", "-2"),
    ("weight nan", {"weight": with_one(ones(2, 20), (1, 7), math.nan)}, "weight", "nan"),
    ("weight inf", {"weight": with_one(ones(2, 20), (1, 7), math.inf)}, "weight", "inf"),
    ("valid dtype", {"valid": ones(2, 20)}, "valid", "float32"),
    ("valid shape", {"valid": ones(20, 2, **mask)}, "valid", "[20, 2]"),
]

none = dict.fromkeys(("q_txt", "k_txt"))

FLAGSHIP: list[Row] = [
    *CHOICE,
    *NUMBERS,
    ("x dtype", {"x": ones(2, 20, 8).bool()}, "x", "bool"),
    ("x rank", {"x": ones(2, 20, 8, 1)}, "x", "[2, 20, 8, 1]"),
    ("q_vis dtype", {"q_vis": ones(2, 4, 1, 16).double()}, "q_vis", "float64"),
    ("q_vis rank", {"q_vis": ones(4, 1, 16)}, "q_vis", "[4, 1, 16]"),
    ("q_vis device", {"q_vis": ones(2, 4, 1, 16, device="meta")}, "q_vis", "meta"),
    ("k_vis dtype", {"k_vis": ones(2, 4, 21, 16, dtype=half)}, "k_vis", "float16"),
    ("k_vis without prefix", {"k_vis": ones(2, 4, 20, 16)}, "k_vis", "[2, 4, 20, 16]"),
    ("k_vis batch", {"k_vis": ones(1, 4, 21, 16)}, "k_vis", "[1, 4, 21, 16]"),
    ("k_vis stride", {"k_vis": other_stride(2, 4, 21, 16)}, "k_vis", "2"),
    ("heads of vis", {"q_vis": ones(2, 6, 1, 16)}, "the heads of q_vis", "6"),
    ("heads of txt", {"q_txt": ones(2, 5, 3, 16)}, "the heads of q_txt", "5"),
    ("k_txt alone", {"q_txt": None}, "q_txt", "None"),
    ("q_txt alone", {"k_txt": None}, "k_txt", "None"),
    ("k_txt tokens", {"k_txt": ones(2, 2, 21, 16)}, "k_txt", "[2, 2, 21, 16]"),
    ("k_txt width", {"k_txt": ones(2, 2, 20, 8)}, "k_txt", "[2, 2, 20, 8]"),
    ("q_txt stride", {"q_txt": other_stride(2, 4, 3, 16)}, "q_txt", "2"),
    ("txt_weight without text", {**none, "txt_weight": ones(2, 3)}, "txt_weight", "tensor"),
    ("lse_txt without text", {**none, "lse_txt": ones(2, 4, 3)}, "lse_txt", "tensor"),
    ("txt_weight shape", {"txt_weight": ones(2, 4)}, "txt_weight", "[2, 4]"),
    ("txt_weight below 0", {"txt_weight": with_one(ones(2, 3), (1, 1), -1)}, "txt_weight", "-1"),
    ("txt_reduce", {"txt_reduce": "min"}, "txt_reduce", '"min"'),
    ("txt_reduce without text", {**none, "txt_reduce": "min"}, "txt_reduce", '"min"'),
    ("scale_vis", {"scale_vis": math.inf}, "scale_vis", "inf"),
    ("scale_txt", {"scale_txt": math.nan}, "scale_txt", "nan"),
    ("lse_vis shape", {"lse_vis": ones(2, 4, 2)}, "lse_vis", "[2, 4, 2]"),
    ("lse_txt dtype", {"lse_txt": ones(2, 4, 3, dtype=half)}, "lse_txt", "float16"),
    ("prefix below 0", {"prefix": -2}, "prefix", "-2"),
    ("prefix of other keys", {"prefix": 2}, "k_vis", "[2, 4, 21, 16]"),
    ("metric tokens", {"metric": ones(2, 21, 6)}, "metric", "[2, 21, 6]"),
    ("metric dtype", {"metric": ones(2, 20, 6).double()}, "metric", "float64"),
    ("diversity below 0", {"diversity": -0.1}, "diversity", "-0.1"),
    ("little diversity", {"diversity": 0.01}, "diversity", "0.01"),
    ("diversity above 1", {"diversity": 1.5}, "diversity", "1.5"),
    ("diversity nan", {"diversity": math.nan}, "diversity", "nan"),
    (
        "places beside diversity",
        {"diversity": 0.5, "priority": ones(20), "priority_keep": 2},
        "priority_keep",
        "2",
    ),
]


def starts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


PACKED: list[Row] = [
    ("float64", {"q": ones(20, 4, 16).double()}, "q", "float64"),
    ("q rank", {"q": ones(1, 4, 20, 16)}, "q", "[1, 4, 20, 16]"),
    ("k rank", {"k": ones(20, 16)}, "k", "[20, 16]"),
    ("key dtype", {"k": ones(20, 2, 16, dtype=half)}, "k", "float16"),
    ("no head", {"q": ones(20, 0, 16)}, "q", "[20, 0, 16]"),
    ("k tokens", {"k": ones(21, 2, 16)}, "k", "[21, 2, 16]"),
    ("k width", {"k": ones(20, 2, 8)}, "k", "[20, 2, 8]"),
    ("heads", {"k": ones(20, 3, 16)}, "the heads of q", "4"),
    ("q stride", {"q": other_stride(20, 4, 16)}, "q", "2"),
    ("k stride", {"k": other_stride(20, 2, 16)}, "k", "2"),
    ("starts dtype", {"cu_seqlens": ones(5)}, "cu_seqlens", "float32"),
    ("starts rank", {"cu_seqlens": starts(0, 20)[None]}, "cu_seqlens", "[1, 2]"),
    ("no starts", {"cu_seqlens": starts()}, "cu_seqlens", "[0]"),
    ("index of start", {"cu_seqlens": starts(1, 5, 20)}, "cu_seqlens", "1"),
    ("index of end", {"cu_seqlens": starts(0, 5, 19), "max_seqlen": 20}, "cu_seqlens", "19"),
    ("index below", {"cu_seqlens": starts(0, 9, 5, 20)}, "cu_seqlens", "5 after 9"),
    ("index far", {"max_seqlen": 7}, "max_seqlen", "7"),
    ("length below 0", {"max_seqlen": -1}, "max_seqlen", "-1"),
    ("scale", {"scale": math.inf}, "scale", "inf"),
    ("reduce", {"reduce": "sum"}, "reduce", '"sum"'),
    ("lse dtype", {"lse": ones(4, 20, dtype=half)}, "lse", "float16"),
    ("lse shape", {"lse": ones(20, 4)}, "lse", "[20, 4]"),
    ("weight dtype", {"query_weight": ones(20).long()}, "query_weight", "int64"),
    ("weight shape", {"query_weight": ones(1, 20)}, "query_weight", "[1, 20]"),
    ("weight below 0", {"query_weight": with_one(ones(20), (3,), -2)}, "query_weight", "-2"),
    ("device", {"k": ones(20, 2, 16, device="meta")}, "k", "meta"),
    ("starts device", {"cu_seqlens": starts(0, 20).to("meta")}, "cu_seqlens", "meta"),
]

SIMILARITY: list[Row] = [
    ("text dtype", {"text": ones(2, 3, 16).double()}, "text", "float64"),
    ("text rank", {"text": ones(3, 16)}, "text", "[3, 16]"),
    ("no text row", {"text": ones(2, 0, 16)}, "text", "[2, 0, 16]"),
    ("visual rank", {"visual": ones(20, 16)}, "visual", "[20, 16]"),
    ("visual dtype", {"visual": ones(2, 20, 16, dtype=half)}, "visual", "float16"),
    ("visual batch", {"visual": ones(1, 20, 16)}, "visual", "[1, 20, 16]"),
    ("visual width", {"visual": ones(2, 20, 8)}, "visual", "[2, 20, 8]"),
    ("no visual token", {"visual": ones(2, 0, 16)}, "visual", "[2, 0, 16]"),
    ("temperature 0", {"temperature": 0.0}, "temperature", "0"),
    ("temperature nan", {"temperature": math.nan}, "temperature", "nan"),
    ("temperature inf", {"temperature": math.inf}, "temperature", "inf"),
    ("reduce", {"reduce": "last"}, "reduce", '"last"'),
    ("text mask dtype", {"text_valid": ones(2, 3)}, "text_valid", "float32"),
    ("text mask shape", {"text_valid": ones(2, 4, **mask)}, "text_valid", "[2, 4]"),
    ("visual mask shape", {"visual_valid": ones(2, 3, **mask)}, "visual_valid", "[2, 3]"),
    ("visual device", {"visual": ones(2, 20, 16, device="meta")}, "visual", "meta"),
]

SPLIT: list[Row] = [
    *SCORES,
    *(row for row in CHOICE if row[0].startswith(("keep", "valid"))),
    ("no textual", {"textual": ones(2, 0)}, "textual", "[2, 0]"),
    ("reserve below 0", {"reserve": -0.1}, "reserve", "-0.1"),
    ("reserve above a half", {"reserve": 0.51}, "reserve", "0.51"),
    ("reserve nan", {"reserve": math.nan}, "reserve", "nan"),
]

DIVERSE: list[Row] = [
    ("features dtype", {"features": ones(2, 20, 6).double()}, "features", "float64"),
    ("features rank", {"features": ones(20, 6)}, "features", "[20, 6]"),
    ("no width", {"features": ones(2, 20, 0)}, "features", "[2, 20, 0]"),
    *(row for row in CHOICE if row[0].startswith(("keep", "valid"))),
    ("objective", {"objective": "dpps"}, "objective", '"dpps"'),
    ("relevance dtype", {"relevance": ones(2, 20, dtype=half)}, "relevance", "float16"),
    ("relevance shape", {"relevance": ones(20)}, "relevance", "[20]"),
    (
        "weight below 0",
        {"relevance": with_one(ones(2, 20), (1, 4), -0.5), "objective": "dpp"},
        "relevance",
        "-0.5",
    ),
    (
        "weight inf",
        {"relevance": with_one(ones(2, 20), (1, 4), math.inf), "objective": "dpp"},
        "relevance",
        "inf",
    ),
]

TABLE = {
    "attention_saliency.varlen": PACKED,
    "similarity_saliency": SIMILARITY,
    "adaptive_split_select": SPLIT,
    "greedy_diverse_select": DIVERSE,
    "attention_saliency": SALIENCY,
    "consensus_select": CHOICE + SCORES,
    "token_merge": MERGE,
    "select_merge": FLAGSHIP,
}
ROWS = [pytest.param(op, *row, id=f"{op}-{row[0]}") for op, rows in TABLE.items() for row in rows]
#: What only values show; a fake tensor has none.
BY_VALUE = re.compile(r"weight (below|nan|inf)|index (above|far|below|twice|of)")


@pytest.fixture(autouse=True)
def _look_at_values(monkeypatch):
    """On a GPU what only values show is checked on request alone; on the CPU, always."""
    monkeypatch.setenv("CDROP_CHECK", "1")


def refusal(call: Callable[..., object], args: Args) -> str:
    with pytest.raises(RuntimeError) as error:
        call(**args)
    assert type(error.value) is RuntimeError
    return str(error.value)


@pytest.mark.parametrize(("op", "what", "change", "argument", "found"), ROWS)
def test_refused_in_one_sentence(backend, op, what, change, argument, found):
    args = backend.place_all({**base(op), **change})
    message = refusal(overload(op), args)
    with cdrop.use_backend("reference"):
        assert message == refusal(overload(op), args), "the backends disagree"
    shape = re.fullmatch(r"(.+?) must (.+), got (.+)", message)
    assert shape, message
    assert shape[1] == argument
    assert found in shape[3]
    # "None" or "0" say little: what the argument must be has to stand there too.
    assert len(shape[2]) > 4


@pytest.mark.parametrize(("op", "what", "change", "argument", "found"), ROWS)
def test_refused_the_same_way_while_tracing(op, what, change, argument, found):
    if BY_VALUE.search(what):
        return
    args = {**base(op), **change}
    message = refusal(overload(op), args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            n: mode.from_tensor(v) if isinstance(v, Tensor) and v.device.type != "meta" else v
            for n, v in args.items()
        }
        if any(isinstance(v, Tensor) and v.is_meta for v in args.values()):
            return  # a fake tensor can't be mixed with a meta one
        assert refusal(overload(op), fake) == message


@pytest.mark.parametrize("op", list(TABLE))
def test_the_good_call_is_taken(backend, op):
    """Otherwise any of the above could pass for another reason."""
    overload(op)(**backend.place_all(base(op)))


@pytest.mark.parametrize("op", list(TABLE))
def test_a_refused_call_leaves_the_inputs_alone(backend, op):
    for _, change, *_ in TABLE[op][:6]:
        args = backend.place_all({**base(op), **change})
        before = {n: v.clone() for n, v in args.items() if isinstance(v, Tensor)}
        refusal(overload(op), args)
        for name, value in before.items():
            assert value.is_meta or torch.equal(value, args[name])


@pytest.mark.parametrize("op", list(TABLE))
def test_the_documented_functions_refuse_the_same(backend, op):
    _, change, _, _ = TABLE[op][0]
    args = backend.place_all({**base(op), **change})
    assert refusal(getattr(cdrop, op.replace(".", "_")), args) == refusal(overload(op), args)


def test_more_contextual_slots_than_tokens_is_no_error(backend):
    args = backend.place_all({**base("select_merge"), "contextual": 40})
    tokens, index, _, size = ops.select_merge(**args)
    assert index.shape == (2, 45)
    assert (index[:, 20:] == -1).all()
    assert not size[:, 20:].any()
    assert not tokens[:, 20:].any()


@pytest.mark.parametrize("weight", [0.0, -0.0, 1e-45])
def test_weights_that_are_just_allowed(backend, weight):
    args = backend.place_all({**base("token_merge"), "weight": torch.full((2, 20), weight)})
    ops.token_merge(**args)
