"""Training: it learns, goes on after a kill as if there had been none, and writes a folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.accuracy import train
from benchmarks.accuracy.models import Shape
from consensusdrop_kernels import scenes


def options(out, tower="siglip"):
    return train.Options(
        out=out,
        shape=Shape(tower, patch=28, layers=2, width=32, text_layers=1, text_width=32),
        seed=7, images=(32, 48), batch=(8, 8), held_out=8, final=16, look=2, workers=0,
    )  # fmt: skip


def state(out):
    return LlavaForConditionalGeneration.from_pretrained(out).state_dict()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_run_learns_and_writes_a_folder(tmp_path, tower):
    chosen = replace(options(tmp_path / "model", tower), images=(64, 160), rate=(1e-2, 1e-2))
    run = train.Run(chosen)
    assert run.train()
    marks = run.finish()
    log = json.loads((chosen.out / "training.json").read_text())
    assert log["test"] == marks
    assert marks.keys() == {"all", *scenes.QUESTION_TYPES}
    assert [(e["stage"], e["step"]) for e in log["looks"]] == [
        *((1, at) for at in range(2, 9, 2)),
        *((2, at) for at in range(2, 21, 2)),
    ]
    first, last = ([e for e in log["looks"] if e["stage"] == 2][i]["held_out"] for i in (0, -1))
    assert last["loss"] < first["loss"] - 0.3
    assert last["located"] < first["located"]
    assert not (chosen.out / "checkpoint.pt").exists()
    assert AutoProcessor.from_pretrained(chosen.out).patch_size == 28
    assert train.examine(chosen.out, 16) == marks


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    run = train.Run(options(tmp_path_factory.mktemp("whole")))
    assert run.train()
    run.finish()
    return run.options.out


@pytest.mark.parametrize("stops", [(3,), (4, 5), (6, 1)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, whole, stops):
    parted = options(tmp_path)
    for stop in stops:
        assert not train.Run(parted).train(stop)
        assert (parted.out / "checkpoint.pt").exists()
    run = train.Run(parted)
    assert run.stage == (2 if sum(stops) >= 4 else 1)
    assert run.train()
    run.finish()
    one, two = state(whole), state(parted.out)
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [json.loads((out / "training.json").read_text()) for out in (whole, parted.out)]
    assert logs[0]["looks"] == logs[1]["looks"]


def test_the_tower_is_frozen_in_the_second_stage(tmp_path):
    run = train.Run(options(tmp_path))
    run.train(4)
    run = train.Run(options(tmp_path))
    tower = {n: p.clone() for n, p in run.model.model.vision_tower.state_dict().items()}
    text = run.model.lm_head.weight.clone()
    assert run.train()
    after = run.model.model.vision_tower.state_dict()
    assert all(torch.equal(tower[n], after[n]) for n in tower)
    assert not torch.equal(text, run.model.lm_head.weight)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train.Run(options(tmp_path)).train(1)
    with pytest.raises(ValueError, match="is of another run"):
        train.Run(replace(options(tmp_path), seed=8))


def test_a_finished_model_is_not_trained_over(whole, capsys):
    before = (whole / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        train.main(["--out", str(whole), "--images", "32", "48"])
    assert "holds a model" in capsys.readouterr().err
    assert (whole / "model.safetensors").read_bytes() == before


def test_the_rate_warms_up_stays_and_falls():
    layer, rest = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    optimizer = train.Optimizer(layer, rest, (1.0, 3.0), 1000)
    rates = []
    for at in (0, 59, 399, 700, 999):
        (rest(layer(torch.ones(1, 4))) ** 2).sum().backward()
        optimizer.step(at)
        rates.append(optimizer.parts[0].param_groups[0]["lr"])
    assert rates == pytest.approx([1 / 60, 1, 1, 0.51, 0.02], abs=1e-3)
    assert optimizer.parts[1].param_groups[0]["lr"] == pytest.approx(3 * rates[-1])
    adam, muon = (
        {id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts
    )
    assert muon == {id(layer.weight)}
    assert adam == {id(layer.bias), id(rest.weight), id(rest.bias)}
