"""Patching leaves nothing behind: `remove`, `unpatch`, copies, saving."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from consensusdrop_kernels.hf import patch, unpatch
from consensusdrop_kernels.methods import ConsensusDrop, Random

from .models import batch, pixels, prompt, random_llava

WORDS = prompt(2, 4, seed=1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(WORDS, prompt(1, 2)), pixel_values=pixels(2)).logits


def anatomy(model: Any) -> dict[str, Any]:
    """Everything a patch could leave in the modules: attributes, hooks, configs."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = sorted(module.__dict__)
        found[f"{name}:hooks"] = [
            len(hooks)
            for kind, hooks in sorted(module.__dict__.items())
            if "hooks" in kind and isinstance(hooks, dict)
        ]
        config = getattr(module, "config", None)
        found[f"{name}:config"] = (id(config), getattr(config, "_attn_implementation", None))
    return found


def test_remove_restores_every_bit() -> None:
    model = random_llava()
    with torch.no_grad():  # the first call installs transformers' own output hooks
        before = logits(model)
    parts, state = anatomy(model), {k: v.clone() for k, v in model.state_dict().items()}
    handle = patch(model, ConsensusDrop(keep=3))
    assert not torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(state)
    handle.remove()
    handle.remove()
    assert anatomy(model) == parts
    assert torch.equal(logits(model), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert handle.last is not None  # what happened can still be read


def test_context_manager_removes_after_an_error() -> None:
    model = random_llava()
    before = logits(model)
    with pytest.raises(ZeroDivisionError), patch(model, ConsensusDrop(keep=3)):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)


def test_a_removed_handle_can_not_be_entered_again() -> None:
    model = random_llava()
    handle = patch(model, ConsensusDrop(keep=3))
    with handle:
        pass
    with pytest.raises(RuntimeError, match="the patch was removed"), handle:
        pass


@pytest.mark.parametrize(
    ("path", "name"), [("model", "get_image_features"), ("", "prepare_inputs_for_generation")]
)
def test_a_method_that_lay_on_the_instance_is_put_back(path: str, name: str) -> None:
    model, calls = random_llava(), []
    module: Any = model.get_submodule(path)
    stock = getattr(module, name)

    @functools.wraps(stock)
    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return stock(*args, **kwargs)

    setattr(module, name, mine)
    with patch(model, ConsensusDrop(keep=3)):
        model.generate(**batch(WORDS), pixel_values=pixels(1), max_new_tokens=1)
    assert calls
    assert vars(module)[name] is mine


@pytest.mark.parametrize("at", range(5))
def test_a_patch_that_fails_halfway_leaves_nothing(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_llava()
    logits(model)
    parts, count = anatomy(model), iter(range(9))

    def failing(register: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if next(count) == at:
                raise MemoryError
            return register(*args, **kwargs)

        return instead

    for name in ("register_forward_pre_hook", "register_forward_hook"):
        monkeypatch.setattr(torch.nn.Module, name, failing(getattr(torch.nn.Module, name)))
    with pytest.raises(MemoryError):
        patch(model, ConsensusDrop(keep=3))
    assert anatomy(model) == parts


def test_a_failed_encoder_leaves_nothing_recording() -> None:
    model = random_llava()
    with patch(model, ConsensusDrop(keep=3)) as handle:
        with pytest.raises(ValueError, match="size"):
            model(**batch(WORDS), pixel_values=pixels(1)[..., :16])
        assert handle._hooks._taps[0]._calls.local.tapped is None


def test_a_failed_call_does_not_spoil_the_next() -> None:
    model = random_llava()
    with patch(model, ConsensusDrop(keep=3)):
        want = logits(model)
        with pytest.raises(ValueError, match="do not match"):
            model(**batch(WORDS), pixel_values=pixels(2))
        assert torch.equal(logits(model), want)


def test_second_patch_needs_replace() -> None:
    model = random_llava()
    before = logits(model)
    patch(model, ConsensusDrop(keep=3))
    first = logits(model)
    with pytest.raises(RuntimeError, match="patched already"):
        patch(model, Random(keep=3))
    assert torch.equal(logits(model), first)
    patch(model, Random(keep=3), replace=True)
    assert not torch.equal(logits(model), first)
    unpatch(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match="not patched"):
        unpatch(model)


def test_a_refused_replacement_leaves_the_first_patch() -> None:
    model = random_llava()
    with patch(model, ConsensusDrop(keep=3)):
        first = logits(model)
        with pytest.raises(ValueError, match="probe_layer"):
            patch(model, ConsensusDrop(keep=3, probe_layer=9), replace=True)
        assert torch.equal(logits(model), first)


def test_a_deep_copy_is_patched_on_its_own() -> None:
    model = random_llava()
    before = logits(model)
    handle = patch(model, ConsensusDrop(keep=3))
    want = logits(model)
    twin = copy.deepcopy(model)
    handle.remove()
    seen = handle.last
    del model
    gc.collect()
    assert torch.equal(logits(twin), want)
    assert handle.last is seen  # the copy reports to its own handle
    unpatch(twin)
    assert torch.equal(logits(twin), before)


def test_models_side_by_side_keep_their_own_methods() -> None:
    one, two = random_llava(), random_llava()
    want = logits(two)
    with patch(one, ConsensusDrop(keep=3)), patch(two, ConsensusDrop(keep=1.0)):
        assert not torch.equal(logits(one), want)
        assert torch.equal(logits(two), want)


def test_save_pretrained_saves_the_stock_model(tmp_path: Path) -> None:
    model = random_llava()
    before = logits(model)
    model.save_pretrained(tmp_path / "stock")
    with patch(model, ConsensusDrop(keep=3)):
        logits(model)
        model.save_pretrained(tmp_path / "patched")
    saved, want = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("patched", "stock")
    )
    assert saved == want
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(logits(loaded), before)


def test_feature_function_keeps_its_signature() -> None:
    """`generate` of transformers >= 5.18 picks the encoder's arguments by it."""
    model = random_llava()
    stock = inspect.signature(model.model.get_image_features)
    with patch(model, ConsensusDrop(keep=3)):
        assert inspect.signature(model.model.get_image_features) == stock


def test_attention_may_be_switched_while_patched() -> None:
    model = random_llava()
    with patch(model, ConsensusDrop(keep=3)):
        sdpa = logits(model)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model), sdpa, atol=1e-4, rtol=1e-4)
