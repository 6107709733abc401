"""Queries folded through the key projection, in place of keys: the same probe, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaModel, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

import consensusdrop_kernels as cdrop
from consensusdrop_kernels.hf import patch, probe
from consensusdrop_kernels.hf.probe import Projection
from consensusdrop_kernels.methods import ConsensusDrop

from .families import FAMILIES
from .models import batch, pixels, prompt, random_llava
from .test_lookahead import Peek, heard

DECODERS = {
    "llama": (LlamaModel, LlamaConfig),
    "gemma": (GemmaModel, GemmaConfig),  # its norm multiplies by 1 + weight
    "qwen2": (Qwen2Model, Qwen2Config),  # its projections have biases
}


def projection(name: str, dtype: torch.dtype = torch.float32) -> Projection:
    """Of a decoder's first layer, 8 heads of 32 over 2 key heads, with weights that all matter."""
    model, config = DECODERS[name]
    torch.manual_seed(3)
    text = model(
        config(
            vocab_size=9, hidden_size=256, intermediate_size=16, num_hidden_layers=1, head_dim=32,
            num_attention_heads=8, num_key_value_heads=2,
        )
    )  # fmt: skip
    layer = text.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight.normal_(0.5, 0.5)
        layer.self_attn.k_proj.weight.normal_(0, 0.1)
        if layer.self_attn.k_proj.bias is not None:
            layer.self_attn.k_proj.bias.normal_()
    return Projection(text.to(dtype), 0)


def centred(q: Tensor, k: Tensor) -> Tensor:
    """Logits `[B, H, M, n]` up to what is the same for every key of a row, in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.double() @ k.double().transpose(2, 3)
    return logits - logits.mean(-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_it_rounds_no_more_than_projected_keys(name: str, dtype: torch.dtype) -> None:
    """Either way one operand of the logits is rounded once, and enters as many products of one
    size: of random weights, the errors have one standard deviation."""
    project = projection(name, dtype)
    draw = torch.Generator().manual_seed(1)
    asks = torch.randn(2, 5, 256, generator=draw).to(dtype)
    x = torch.randn(2, 40, 256, generator=draw).to(dtype)
    q = project.queries(asks)
    layer = project._norm, project._attention.k_proj
    keys = layer[0](x).double() @ layer[1].weight.double().T
    exact = centred(q, keys.view(2, 40, 2, 32).transpose(1, 2))
    direct = centred(q, project.keys(x)) - exact
    folded_q, folded_k = project.folded(q, x)
    assert folded_q.shape == (2, 8, 5, 256)
    assert folded_k.shape == (2, 1, 40, 256)
    assert folded_q.dtype == folded_k.dtype == dtype
    folded = centred(folded_q, folded_k) - exact
    assert folded.norm() < 1.3 * direct.norm()
    assert direct.norm() < 0.01 * exact.norm()


def asked(name: str, fold: float, monkeypatch: Any, **options: Any) -> tuple[Any, Tensor]:
    """The first probe of a family's batch, and its saliency."""
    monkeypatch.setattr(probe, "FOLD", fold)
    family = FAMILIES[name]
    model, method = family.model(), Peek(keep=family.keep, rotary=False, **options)
    with torch.no_grad():
        for at, layer in enumerate(model.get_decoder().layers):
            layer.input_layernorm.weight.normal_(0.5, 0.3, generator=torch.manual_seed(at))
            if layer.self_attn.k_proj.bias is not None:
                layer.self_attn.k_proj.bias.normal_(generator=torch.manual_seed(9 + at))
        with patch(model, method):
            model.generate(
                **family.join(family.samples()), max_new_tokens=1, do_sample=False
            )  # fmt: skip
    found = method.seen[0][method.asks[0]]
    return found, heard(found)


NEVER = float("inf")


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "name", ["llava-llama", "paligemma-gemma", "qwen2_5_vl-images", "mistral3"]
)
def test_a_probe_is_the_same_either_way(name: str, depth: int, monkeypatch: Any) -> None:
    """Padded prompts, several images; depth 1: behind text that ran ahead."""
    direct, want = asked(name, NEVER, monkeypatch, asks=((depth, "visual"),))
    folded, got = asked(name, 0, monkeypatch, asks=((depth, "visual"),))
    rows, heads, count, width = direct.q.shape
    model = folded.q.shape[3]
    assert model > width
    assert folded.q.shape == (rows, heads, count, model)
    assert folded.k.shape == (rows, 1, direct.k.shape[2], model)
    assert folded.scale == direct.scale
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"rotary": True}, {"asks": ((0, "all"),)}],
    ids=["rotary", "all keys"],
)
def test_what_is_more_than_a_projection_is_never_folded(
    options: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(probe, "FOLD", 0)
    method = Peek(**({"rotary": False, "asks": ((0, "visual"),)} | options))
    with torch.no_grad(), patch(random_llava(), method) as handle:
        handle._model(**batch(prompt(2, 4)), pixel_values=pixels(1))
    assert method.seen[0][method.asks[0]].k.shape[1] == 2


class Adapted(nn.Linear):
    """As adapters and quantised layers are: no plain projection."""


def in_half(linear: Any) -> None:
    linear.weight.data = linear.weight.data.half()


def with_class(linear: Any) -> None:
    linear.__class__ = Adapted


def with_forward(linear: Any) -> None:
    linear.forward = linear.forward  # as accelerate leaves it


def with_meta_weight(linear: Any) -> None:
    linear.weight = nn.Parameter(linear.weight.to("meta"))


def with_weight_class(linear: Any) -> None:
    class Quantised(torch.Tensor):
        pass

    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))


@pytest.mark.parametrize(
    "change",
    [
        in_half,
        with_class,
        with_forward,
        with_meta_weight,
        with_weight_class,
        lambda linear: linear.register_forward_hook(lambda *given: None),
        lambda linear: linear.register_forward_pre_hook(lambda *given: None),
        nn.utils.parametrizations.weight_norm,
    ],
)
def test_a_projection_with_more_to_it_is_never_folded(
    change: Callable[[Any], Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(probe, "FOLD", 0)
    project = projection("llama")
    assert project.folds(torch.zeros(1, 8, 1, 32))
    change(project._attention.k_proj)
    assert not project.folds(torch.zeros(1, 8, 1, 32))


def test_normalised_keys_are_never_folded(monkeypatch: Any) -> None:
    monkeypatch.setattr(probe, "FOLD", 0)
    text: Any = random_llava("qwen3").model.language_model
    assert not Projection(text, 0).folds(torch.zeros(1, 4, 1, 12))


def test_it_is_for_few_rows_on_the_cpu() -> None:
    """64 columns of keys; 8 heads."""
    project = projection("llama")
    assert project.folds(torch.zeros(3, 8, 2, 32))
    assert not project.folds(torch.zeros(3, 8, 3, 32))
    project._attention.k_proj.to("meta")
    assert not project.folds(torch.zeros(3, 8, 1, 32, device="meta"))


@torch.no_grad()
def test_the_choice_is_the_same(monkeypatch: Any) -> None:
    method = ConsensusDrop(keep=5, alpha=1.0, rotary=False, query="last_token")
    chosen, folds = [], []
    folded = Projection.folded
    monkeypatch.setattr(
        Projection, "folded", lambda *given: folds.append(1) or folded(*given)
    )  # fmt: skip
    for least in (probe.FOLD, NEVER):
        monkeypatch.setattr(probe, "FOLD", least)
        with patch(random_llava(), method) as handle:
            handle._model(**batch(prompt(2, 4), prompt(3, 7)), pixel_values=pixels(2))
            chosen.append(handle.last.selection.index)
    assert folds == [1]
    assert torch.equal(*chosen)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("rows", [1, 8])
def test_the_kernels_take_heads_as_wide_as_a_model(rows: int, reduce: str) -> None:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    q, k, weight = normal(2, 4, rows, 4096), normal(2, 1, 30, 4096), torch.ones(2, rows)
    saliency: dict[str, Any] = {"scale": 0.02, "query_weight": weight, "reduce": reduce}
    encoder = normal(2, 30, 8), normal(2, 2, 1, 8), normal(2, 2, 31, 8)
    fused: dict[str, Any] = {
        "keep": 6, "prefix": 1, "scale_txt": 0.02, "txt_weight": weight, "txt_reduce": reduce,
    }  # fmt: skip
    got = cdrop.attention_saliency(q, k, **saliency), *cdrop.select_merge(*encoder, q, k, **fused)
    with cdrop.use_backend("reference"):
        want = (
            cdrop.attention_saliency(q, k, **saliency),
            *cdrop.select_merge(*encoder, q, k, **fused),
        )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
