"""The models of lmms-eval with fewer visual tokens.

What lmms-eval (0.7.3) does itself is only tested where that is installed: registration, its
command line, and a task of its own kind on the shipped model. The rest needs none of it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import pytest
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from benchmarks.accuracy import data, lmms
from consensusdrop_kernels import patch
from consensusdrop_kernels.data import tiny_llava_path
from consensusdrop_kernels.demo import plain
from consensusdrop_kernels.methods import ConsensusDrop, Random

QUESTIONS = 4
METHOD = 'ConsensusDrop(alpha=0.3, positions="original")'

installed = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed (pip install lmms-eval)",
)


# --- what a method is called ---------------------------------------------------------------------


def test_method_and_budget():
    assert lmms.read_method(None, None) is None
    assert lmms.read_method("Full", 64) is None
    assert lmms.read_method("Random", 64) == Random(keep=64)
    assert lmms.read_method("Random(keep=0.25)", None) == Random(keep=0.25)
    assert lmms.read_method(f"'{METHOD}'", 0.5) == ConsensusDrop(
        keep=0.5, alpha=0.3, positions="original"
    )


@pytest.mark.parametrize(
    ("method", "keep", "message"),
    [
        (None, 64, "keep must come with a method, got keep=64 alone"),
        ("Random", None, "keep must be a count or a share of visual tokens, got none"),
        ("Random(keep=8)", 64, "keep must be given once, got 8 in method and 64"),
        ("Random,Uniform", 64, "method must be one method, got Random,Uniform"),
        ("Rondom", 64, "^method must be of .*, got Rondom$"),
        ("ConsensusDrop(alpha=0.3", 64, "method must be in quotes where it has commas"),
        ("Random", 0, "^Random can't keep 0: keep must be a count"),
    ],
)
def test_refusals(method, keep, message):
    with pytest.raises(ValueError, match=message):
        lmms.read_method(method, keep)


# --- around a class of lmms-eval's kind ----------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava_path()).eval()
    return model, AutoProcessor.from_pretrained(tiny_llava_path())


def ask(shipped, asked):
    """Answers of the shipped model, one after the other, to `(scene, question)`."""
    model, processor = shipped
    answers = []
    for scene, question in asked:
        text = f"USER: <image>\n{plain(question.text)} ASSISTANT:"
        inputs = processor(text=text, images=Image.fromarray(scene.image), return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        tokens = out[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(tokens, skip_special_tokens=True))
    return answers


class Stock:
    """As `lmms_eval.models.simple.llava_hf.LlavaHf` (0.7.3) is: `model`, `tokenizer`, `rank`, a
    `generate_until` that goes on with "" where `generate` fails, and `clean`."""

    rank = 0

    def __init__(self, shipped):
        self.model, self.processor = shipped
        self.tokenizer = self.processor.tokenizer

    def generate_until(self, requests):
        try:
            return ask((self.model, self.processor), requests)
        except Exception:
            return [""] * len(requests)

    def loglikelihood(self, requests):
        return [(0.0, True)] * len(requests)

    def clean(self):
        del self.model


class Wrapped(lmms.Pruned, Stock):
    pass


@pytest.fixture(scope="module")
def asked():
    return data.exam(data.VALIDATION, QUESTIONS, ("color", "shape"))


def test_answers_are_those_of_the_patched_model(shipped, asked, capsys):
    lm = Wrapped(shipped=shipped, method=METHOD, keep=16)
    found = lm.generate_until(asked)
    assert lm.handle.method.keep == 16
    assert "4 prefills, 784 visual tokens, 64 (0.082) after, 0.1" in capsys.readouterr().err
    with pytest.raises(NotImplementedError, match="needs tasks that generate"):
        lm.loglikelihood(asked)
    lm.clean()
    chosen = ConsensusDrop(keep=16, alpha=0.3, positions="original")
    with patch(shipped[0], chosen, processor=shipped[1]):
        assert found == ask(shipped, asked)


def test_without_a_method_the_model_is_as_it_was(shipped, asked, capsys):
    lm = Wrapped(shipped=shipped)
    assert lm.generate_until(asked) == ask(shipped, asked)
    assert lm.loglikelihood(asked) == [(0.0, True)] * QUESTIONS
    assert capsys.readouterr().err == ""
    assert not hasattr(shipped[0], "_cdrop_handle")


def test_a_failure_is_no_empty_answer(shipped, asked):
    lm = Wrapped(shipped=shipped, method="PyramidDrop", keep=0.01)  # too little for its stages
    with pytest.raises(RuntimeError, match="^generate failed: ValueError: keep"):
        lm.generate_until(asked)
    assert "generate" not in vars(shipped[0])
    lm.clean()


# --- in lmms-eval --------------------------------------------------------------------------------

TEMPLATE = (
    "USER: {% set content = messages[0].content %}{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}{% if part.type == 'image' %}<image>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %} ASSISTANT:"
)
TASK = """\
task: cdrop_scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/scenes.json
  cache_dir: {folder}/cache
test_split: test
output_type: generate_until
doc_to_visual: !function looks.visual
doc_to_text: !function looks.text
doc_to_target: answer
process_results: !function looks.right
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
lmms_eval_specific_kwargs:
  default: {{suffix: " , unlike llava_hf"}}
  llava_hf: {{suffix: ""}}
"""
LOOKS = """\
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + lmms_eval_specific_kwargs["suffix"]

def right(doc, results):
    return {"right": float(results[0].split() == [doc["answer"]])}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory, asked):
    """A folder with a task of lmms-eval about synthetic scenes, and in `model` the shipped model
    with a chat template."""
    folder = tmp_path_factory.mktemp("lmms")
    shutil.copytree(tiny_llava_path(), folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    rows = []
    for i, (scene, question) in enumerate(asked):
        Image.fromarray(scene.image).save(folder / f"{i}.png")
        rows.append({
            "image": str(folder / f"{i}.png"),
            "question": plain(question.text),
            "answer": question.answer,
        })  # fmt: skip
    (folder / "scenes.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "scenes.yaml").write_text(TASK.format(folder=folder))
    (folder / "tasks" / "looks.py").write_text(LOOKS)
    return folder


def run(task, monkeypatch, name, model_args, *more):
    """One run of the command line: the results file, and the answers in order."""
    out = task / name
    monkeypatch.setattr(sys, "argv", [
        "lmms", "--model", "llava_hf",
        "--model_args", f"pretrained={task}/model,device_map=cpu{model_args}",
        "--tasks", "cdrop_scenes", "--include_path", str(task / "tasks"),
        "--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", str(out), *more,
    ])  # fmt: skip
    lmms.main()
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    lines.sort(key=lambda line: line["doc_id"])
    return json.loads(results.read_text()), [line["filtered_resps"] for line in lines]


@installed
@pytest.mark.parametrize("more", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_command_line(task, shipped, asked, monkeypatch, capsys, more):
    name = "-".join(("full", *more))
    _, full = run(task, monkeypatch, name, "", *more)
    assert full == ask(shipped, asked)
    arguments = f",method='{METHOD}',keep=8"
    results, found = run(task, monkeypatch, name + "-8", arguments, *more)
    with patch(shipped[0], lmms.read_method(METHOD, 8), processor=shipped[1]):
        expected = ask(shipped, asked)
    assert found == expected
    assert "4 prefills, 784 visual tokens, 32 (0.041) after, 0.0" in capsys.readouterr().err
    right = [answer == question.answer for answer, (_, question) in zip(found, asked, strict=True)]
    assert results["results"]["cdrop_scenes"]["right,none"] == sum(right) / QUESTIONS
    assert arguments in results["config"]["model_args"]


@installed
def test_every_model_that_is_there_has_ours_in_its_place():
    from lmms_eval import models
    from lmms_eval.api.model import lmms as base

    lmms.register()
    lmms.register()  # twice is once
    for name in lmms.MODELS:
        manifest = models.get_model_manifest(name)
        assert f"benchmarks.accuracy.lmms.{name}_" in str(manifest)
    made = models.get_model("llava_hf")
    assert issubclass(made, lmms.Pruned)
    assert issubclass(made, base)
    assert made.mro().count(lmms.Pruned) == 1
    assert not issubclass(models.get_model("dummy"), lmms.Pruned)


@installed
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("qwen2_vl", "qwen2_vl-images"),
        ("qwen2_5_vl", "qwen2_5_vl-images"),
        ("qwen3_vl", "qwen3_vl-images"),
        ("internvl_hf", "internvl-qwen2"),
    ],
)
def test_what_their_classes_load_is_patched(shipped, monkeypatch, name, family):
    """With a random model of the family in the place of what they would load."""
    from hf.families import FAMILIES
    from lmms_eval import models

    model, tokenizer = FAMILIES[family].model(), shipped[1].tokenizer
    sample = FAMILIES[family].samples()[0]
    monkeypatch.setattr(type(model), "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: model.config)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: shipped[1])
    lmms.register()
    made = models.get_model(name).create_from_arg_string(
        "pretrained=random,device_map=cpu,method=Random,keep=0.5", {"device": "cpu"}
    )
    made.model.generate(**sample, max_new_tokens=2, do_sample=False)
    assert made.handle.method == Random(keep=0.5)
    assert 0 < made.handle.stats.tokens_after <= made.handle.stats.tokens_before / 2 + 1
    made.clean()
    assert not hasattr(model, "_cdrop_handle")
