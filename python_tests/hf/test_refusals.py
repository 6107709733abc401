"""What can't be done is refused, with the reason, before anything wrong comes out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from consensusdrop_kernels.hf import patch, patching
from consensusdrop_kernels.methods import ConsensusDrop, Random

from .models import IMAGE, TOKENS, batch, pixels, prompt, random_llava

WORDS = prompt(2, 4, seed=1)
METHOD = ConsensusDrop(keep=3)


def test_other_models() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match=r"must be one of .*llava.*, got 'llama'"):
        patch(LlamaForCausalLM(config), METHOD)
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        patch(nn.Linear(2, 2), METHOD)
    with pytest.raises(ValueError, match="pass the whole model"):
        patch(random_llava().model, METHOD)
    with pytest.raises(TypeError, match="method must be"):
        patch(random_llava(), "consensus")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("vision_feature_layer", [-2, -5], "must name one of the 4 layers"),
        ("vision_feature_layer", [], "must name one of the 4 layers"),
        ("vision_feature_layer", 0, "must name one of the 4 layers"),
        ("vision_feature_layer", -5, "must name one of the 4 layers"),
    ],
)
def test_configurations(option: str, value: Any, reason: str) -> None:
    model = random_llava()
    setattr(model.config, option, value)
    with pytest.raises(ValueError, match=reason):
        patch(model, METHOD)


def test_other_towers() -> None:
    model = random_llava()
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="must be one of clip_vision_model, siglip_vision_model"):
        patch(model, METHOD)
    model.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="must be 'full' with a siglip_vision_model"):
        patch(model, METHOD)


def test_features_of_another_layer_than_the_tapped() -> None:
    model = random_llava()
    with patch(model, METHOD), pytest.raises(ValueError, match="features of encoder layer 1"):
        model(**batch(WORDS), pixel_values=pixels(1), vision_feature_layer=2)


def test_budget_above_the_tokens() -> None:
    model = random_llava()
    for method in (ConsensusDrop(keep=TOKENS + 1), Random(keep=TOKENS + 1)):
        with (
            patch(model, method),
            pytest.raises(ValueError, match=rf"keep must be in 1..N={TOKENS}, got {TOKENS + 1}"),
        ):
            model.generate(**batch(WORDS), pixel_values=pixels(1), max_new_tokens=1)
    with (
        patch(model, ConsensusDrop(keep=TOKENS, contextual=1)),
        pytest.raises(ValueError, match=r"keep \+ contextual"),
    ):
        model(**batch(WORDS), pixel_values=pixels(1))


def test_probe_layers() -> None:
    model = random_llava()
    with pytest.raises(ValueError, match=r"probe_layer must be in 0..2, got 3"):
        patch(model, ConsensusDrop(keep=3, probe_layer=3))
    patch(model, ConsensusDrop(keep=3, probe_layer=3, alpha=0.0)).remove()
    model.model.language_model.layers[0].input_layernorm = nn.Identity()
    with pytest.raises(ValueError, match="has no input_layernorm of its own"):
        patch(model, METHOD)


@torch.no_grad()
def test_another_turn_on_a_pruned_cache() -> None:
    model = random_llava()
    first = batch(WORDS)
    with patch(model, METHOD):
        out = model.generate(
            **first, pixel_values=pixels(1), max_new_tokens=3, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        longer = torch.cat([out.sequences, torch.tensor([[5, 6, 7]])], 1)
        with pytest.raises(NotImplementedError, match="do not continue the pruned cache"):
            model.generate(
                input_ids=longer, attention_mask=torch.ones_like(longer),
                past_key_values=out.past_key_values, max_new_tokens=2,
            )  # fmt: skip


@torch.no_grad()
def test_several_tokens_at_positions_that_do_not_continue() -> None:
    model, more = random_llava(), torch.tensor([[5, 6]])
    with patch(model, METHOD):
        cache = model(input_ids=torch.tensor([WORDS]), pixel_values=pixels(1)).past_key_values
        for first in (len(WORDS) - 1, len(WORDS) + 1):
            where = torch.tensor([[first, first + 1]])
            with pytest.raises(NotImplementedError, match="do not continue the pruned cache"):
                model(input_ids=more, position_ids=where, past_key_values=cache)
        where = torch.tensor([[len(WORDS), len(WORDS) + 1]])
        model(input_ids=more, position_ids=where, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("padded", [False, True])
def test_one_token_at_a_position_counted_in_the_cache(positions: str, padded: bool) -> None:
    model = random_llava()
    inputs = batch(WORDS, prompt(6, 9)) if padded else batch(WORDS)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.full((len(mask), 1), 5), "attention_mask": mask}
    with patch(model, ConsensusDrop(keep=3, positions=positions)):
        where = (mask.cumsum(1) - 1).clamp_min(0)
        inputs |= {"pixel_values": pixels(len(mask)), "position_ids": where[:, :-1]}
        cache = model(**inputs).past_key_values
        wrong = torch.full((len(mask), 1), cache.get_seq_length())
        with pytest.raises(NotImplementedError, match="positions must count the prompt before"):
            model(**step, position_ids=wrong, past_key_values=cache)
        model(**step, position_ids=where[:, -1:], past_key_values=cache)


def test_generation_after_padding_at_the_right() -> None:
    """Stock `generate` only warns, and goes on at the position of the padding."""
    model, inputs = random_llava(), batch(WORDS, prompt(6, 9), side="right")
    with patch(model, METHOD), pytest.raises(NotImplementedError, match="pad prompts at the left"):
        model.generate(**inputs, pixel_values=pixels(2), max_new_tokens=2)


@torch.no_grad()
def test_a_whole_mask_for_several_tokens() -> None:
    model, more = random_llava(), torch.tensor([[5, 6]])
    with patch(model, METHOD):
        cache = model(input_ids=torch.tensor([WORDS]), pixel_values=pixels(1)).past_key_values
        whole = torch.ones(1, 1, 2, cache.get_seq_length() + 2, dtype=torch.bool)
        with pytest.raises(NotImplementedError, match="attention_mask must be"):
            model(input_ids=more, attention_mask=whole, past_key_values=cache)


@torch.no_grad()
def test_another_turn_by_hand_continues() -> None:
    """The new tokens alone, with right positions or none, are a continuation like any other."""
    model = random_llava()
    more = torch.tensor([[5, 6, 7]])
    with patch(model, ConsensusDrop(keep=3, query=lambda i, v, a: a & ~v & (i == WORDS[-1]))):
        whole = model(input_ids=torch.tensor([[*WORDS, 5, 6, 7]]), pixel_values=pixels(1)).logits[
            :, -3:
        ]
        cache = model(input_ids=torch.tensor([WORDS]), pixel_values=pixels(1)).past_key_values
        after = model(input_ids=more, past_key_values=cache).logits
    torch.testing.assert_close(after, whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_new_image_on_a_cache_that_holds_tokens() -> None:
    model, second = random_llava(), torch.tensor([[IMAGE] * TOKENS + [5]])
    with patch(model, METHOD):
        pruned = model(input_ids=torch.tensor([WORDS]), pixel_values=pixels(1)).past_key_values
        with pytest.raises(NotImplementedError, match="a new image can't join a pruned cache"):
            model(input_ids=second, pixel_values=pixels(1), past_key_values=pruned)
        words = model(input_ids=torch.tensor([prompt(3)])).past_key_values
        with pytest.raises(NotImplementedError, match="cache that already holds tokens"):
            model(input_ids=second, pixel_values=pixels(1), past_key_values=words)


@pytest.mark.parametrize("chunk", [4, 12])
def test_chunked_prefill(chunk: int) -> None:
    model = random_llava()
    with patch(model, METHOD), pytest.raises((NotImplementedError, ValueError), match="chunk"):
        model.generate(
            **batch(WORDS), pixel_values=pixels(1), max_new_tokens=2, prefill_chunk_size=chunk
        )


def test_static_cache_with_padding() -> None:
    model = random_llava()
    for inputs, images in ((batch(WORDS, prompt(6, 4)), 2), (batch(prompt(2, 1, 1), WORDS), 3)):
        with patch(model, METHOD), pytest.raises(NotImplementedError, match="static cache"):
            model.generate(
                **inputs, pixel_values=pixels(images), max_new_tokens=2,
                cache_implementation="static", disable_compile=True,
            )  # fmt: skip


def test_paged_attention() -> None:
    model = random_llava()
    with patch(model, METHOD):
        model.model.language_model.config._attn_implementation_internal = "paged|sdpa"
        with pytest.raises(NotImplementedError, match="paged attention"):
            model(**batch(WORDS), pixel_values=pixels(1))


@torch.no_grad()
def test_features_computed_elsewhere() -> None:
    model = random_llava()
    outside = model.model.get_image_features(pixel_values=pixels(1), return_dict=True)
    words = model.get_input_embeddings()(torch.tensor([WORDS]))
    with patch(model, METHOD):
        with pytest.raises(NotImplementedError, match="computed outside the patched model"):
            model.model(input_ids=torch.tensor([WORDS]), mm_encoder_outputs={"image": outside})
        with pytest.raises(NotImplementedError, match="pass input_ids"):
            model(inputs_embeds=words, pixel_values=pixels(1))
        with pytest.warns(UserWarning, match="inputs_embeds came without images"):
            model(inputs_embeds=words)
        with pytest.raises(ValueError, match="no image came with it"):
            model(input_ids=torch.tensor([WORDS]))


def test_masks_that_do_not_fit() -> None:
    model = random_llava()
    with patch(model, METHOD), pytest.raises(NotImplementedError, match="attention_mask must be"):
        model(
            input_ids=torch.tensor([WORDS]), pixel_values=pixels(1),
            attention_mask=torch.ones(1, 1, len(WORDS), len(WORDS), dtype=torch.bool),
        )  # fmt: skip


def test_an_image_cut_by_the_prompt_border() -> None:
    model, half = random_llava(), TOKENS // 2
    rows = [[IMAGE] * half + [5], [IMAGE] * half + [6]]
    with patch(model, METHOD), pytest.raises(ValueError, match="must be whole images"):
        model(input_ids=torch.tensor(rows), pixel_values=pixels(1))


def test_sharded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llava()

    class FSDPModule:
        pass

    layer = model.model.language_model.layers[0]
    layer.__class__ = type("FSDPLayer", (type(layer), FSDPModule), {})
    with pytest.raises(RuntimeError, match="sharded"):
        patch(model, METHOD)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching.transformers, "__version__", "5.16.2")
    with pytest.raises(RuntimeError, match="must be >= 5.17"):
        patch(random_llava(), METHOD)
    monkeypatch.setattr(patching.transformers, "__version__", "5.99.0")
    with pytest.warns(UserWarning, match=r"5.99.0 is newer"):
        patch(random_llava(), METHOD)


@pytest.mark.parametrize("answer", [torch.ones(1, 3, dtype=torch.bool), torch.ones(1), "all"])
def test_query_rules_that_return_something_else(answer: Any) -> None:
    model = random_llava()
    with (
        patch(model, ConsensusDrop(keep=3, query=lambda *_: answer)),
        pytest.raises(ValueError, match="query must return a bool tensor"),
    ):
        model(**batch(WORDS), pixel_values=pixels(1))


def test_weights_that_two_processes_share() -> None:
    """FSDP and tensor parallelism, over gloo."""
    kinds = ["fsdp", "tensor"]
    run = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "python_tests.hf.sharded", *kinds,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        run, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in kinds:
        assert done.stdout.count(f"{kind} refused: the model's weights are sharded") == 2
