"""The `cdrop` command: what it prints, what it measures, and how it refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import transformers
from PIL import Image

from consensusdrop_kernels import cli, demo, scenes
from consensusdrop_kernels.data import tiny_llava_path

ROW = re.compile(
    r"^  (all tokens|ConsensusDrop|random) +(\d+) -> (\d+) +([\d.]+) ms +([\d.]+) KiB   (.*)$"
)


@pytest.fixture(autouse=True)
def _away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """So small a model gains nothing from threads, and loses much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def assistant():
    return demo.Assistant(device="cpu")


@pytest.fixture
def circle(assistant):
    """The question about the circle's digit in the default scene."""
    scene, _ = scenes.load_scene("slate")
    return assistant.ask(Image.fromarray(scene.image), "what digit is on the circle ?")


def table(text):
    """The rows printed: name, visual tokens before, after, ms, KiB, answer."""
    found = [ROW.match(line) for line in text.splitlines()]
    return [
        (m[1], int(m[2]), int(m[3]), float(m[4]), float(m[5]), m[6]) for m in found if m is not None
    ]


def run_module(*arguments):
    command = [sys.executable, "-m", "consensusdrop_kernels.cli", *arguments]
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def refusal(capsys, *arguments):
    """The sentence `cdrop demo` refuses with; it must be one line, exit code 2, nothing printed."""
    try:
        code = cli.main(["demo", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("cdrop demo: ")
    assert err.count("\n") == 1
    return err.removeprefix("cdrop demo: ").strip()


# --- the demo -----------------------------------------------------------------------------------


def test_demo_as_a_newcomer_runs_it(tmp_path):
    done = run_module("demo", "--device", "cpu")
    assert done.returncode == 0
    assert done.stderr == ""
    rows = table(done.stdout)
    names = ["all tokens", "ConsensusDrop", "random"]
    assert [row[0] for row in rows] == names * 2
    assert [row[1:3] for row in rows] == [(196, 196), (196, 49), (196, 49)] * 2
    assert [row[5] for row in rows[:2]] == ["8", "8"]
    assert [row[5] for row in rows[3:5]] == ["square", "square"]
    assert all(row[3] > 0 for row in rows)
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


def test_demo_prints_the_caches_real_size(capsys):
    assert cli.main(["demo", "--question", "what digit is on the circle ?", "--keep", "20"]) == 0
    full, consensus, random = table(capsys.readouterr().out)
    text = 10  # <bos> USER: what digit is on the circle ? ASSISTANT:
    per_token = 2 * 4 * 192 * 4 / 1024  # keys and values, layers, width, bytes of float32
    assert full[4] == pytest.approx((196 + text) * per_token, abs=0.05)
    assert consensus[4] == random[4] == pytest.approx((20 + text) * per_token, abs=0.05)


def test_demo_on_a_picture_of_mine_with_a_share_and_a_jpg(capsys, tmp_path):
    scene = scenes.make_scene(5)
    Image.fromarray(scene.image).convert("L").resize((300, 200)).save("mine.jpg")
    arguments = ["--image", "mine.jpg", "--keep", "0.5", "--alpha", "0", "--out", "my.jpg"]
    assert cli.main(["demo", *arguments, "--question", "How many objects are there?"]) == 0
    out, err = capsys.readouterr()
    assert [row[1:3] for row in table(out)] == [(196, 196), (196, 98), (196, 98)]
    assert "true answer" not in out
    assert "image   mine.jpg" in out
    assert err == ""
    assert (tmp_path / "my.jpg").stat().st_size > 10_000


def test_demo_says_which_words_the_shipped_model_never_saw(capsys):
    assert cli.main(["demo", "--question", "what color is the elephant ?"]) == 0
    assert "does not know elephant;" in capsys.readouterr().err


def test_demo_takes_a_model_from_a_folder(capsys, tmp_path):
    shutil.copytree(tiny_llava_path(), tmp_path / "copy")
    assert cli.main(["demo", "--model", "copy", "--question", "what digit is on the circle ?"]) == 0
    out = capsys.readouterr().out
    assert "model   copy" in out
    assert table(out)[0][5].split()[0] == "8"


def test_demo_takes_a_random_model_with_a_chat_template(capsys, tmp_path):
    processor = transformers.AutoProcessor.from_pretrained(tiny_llava_path())
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %} ASSISTANT:"
    )
    config = transformers.AutoConfig.from_pretrained(tiny_llava_path())
    config.text_config.num_hidden_layers = 2
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "random")
    processor.save_pretrained(tmp_path / "random")
    arguments = ["--model", "random", "--question", "a red star", "--dtype", "bfloat16"]
    assert cli.main(["demo", *arguments, "--device", "cpu"]) == 0
    full, consensus, _ = table(capsys.readouterr().out)
    per_token = 2 * 2 * 192 * 2 / 1024
    text = 5  # <bos> a red star ASSISTANT:
    assert full[4] == pytest.approx((196 + text) * per_token, abs=0.05)
    assert consensus[4] == pytest.approx((49 + text) * per_token, abs=0.05)


def test_compare_leaves_the_model_as_it_was(assistant, circle):
    with torch.no_grad():
        before = assistant.model(**circle.inputs).logits
        demo.compare(assistant, circle, 16, 0.5, 0, repeats=1)
        after = assistant.model(**circle.inputs).logits
    assert torch.equal(before, after)


def test_only_the_shipped_model_is_held_to_one_thread(assistant, monkeypatch):
    torch.set_num_threads(2)
    with demo.steady_threads(assistant) as threads:
        assert threads == torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(assistant, "shipped", False)
    with demo.steady_threads(assistant) as threads:
        assert threads == 2
    torch.set_num_threads(1)


def test_random_tokens_follow_the_seed(assistant, circle):
    def drawn(seed):
        runs = demo.compare(assistant, circle, 16, 0.5, seed, repeats=1)
        return runs[2].pruning.selection.index.tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_figure_row_holds_what_was_chosen(assistant, circle):
    runs = demo.compare(assistant, circle, 49, 0.5, 0, repeats=1)
    row = demo.figure_row(assistant, circle, runs, "title")
    assert row.index.tolist() == runs[1].pruning.selection.index[0].tolist()
    assert row.size.sum() == 196
    assert row.grid == (14, 14)
    kept = np.isin(np.arange(196), row.index)
    assert row.fused[kept].mean() > row.fused[~kept].mean()
    assert "ConsensusDrop (49): 8" in row.answers


def test_the_drawn_image_is_what_the_encoder_gets(assistant):
    scene, _ = scenes.load_scene("moss")
    asked = assistant.ask(Image.fromarray(scene.image), "is there a red star ?")
    assert abs(assistant.seen(asked).astype(int) - scene.image).max() <= 1


@pytest.mark.parametrize(
    ("keep", "tokens"), [(49, 49), (0.25, 49), (1.0, 196), (196, 196), (0.001, 1)]
)
def test_budget(keep, tokens):
    assert demo.budget(keep, 196) == tokens


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "argument --keep: must be at least 1 token, got 0"),
        (["--keep", "-3"], "argument --keep: must be at least 1 token, got -3"),
        (["--keep", "1.5"], "share above 0 and up to 1.0, got 1.5"),
        (["--keep", "0.0"], "share above 0 and up to 1.0, got 0.0"),
        (["--keep", "many"], "argument --keep: must be a number, got many"),
        (["--keep", "nan"], "argument --keep: must be a number, got nan"),
        (["--keep", "197"], r"--keep must be in 1\.\.196 \(the visual tokens\), got 197"),
        (["--alpha", "1.1"], r"argument --alpha: must be in 0\.\.1, got 1\.1"),
        (["--alpha", "-0.1"], r"argument --alpha: must be in 0\.\.1, got -0\.1"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0, got -1"),
        (["--scene", "moon"], "argument --scene: invalid choice: 'moon'"),
        (["--image", "none.png"], "--image none.png: there is no such file"),
        (["--image", "."], "is a folder, not a picture"),
        (["--image", "text.png"], "--image text.png is no picture that can be read"),
        (["--image", "cut.png"], "--image cut.png is no picture that can be read"),
        (["--image", "a.png", "--scene", "moss"], "not allowed with argument"),
        (["--out", "none/demo.png"], "--out none/demo.png: there is no folder none"),
        (["--out", "folder.png"], "--out folder.png can't be written"),
        (["--out", "demo.xyz"], r"--out must end in one of \.png, .* got demo.xyz"),
        (["--model", "bert"], "model bert is of type 'bert', which is not supported; .*llava"),
        (["--model", "empty"], "can't load model empty: "),
        (["--model", "weightless"], "can't load model weightless: "),
        (
            ["--model", "deep"],
            "model deep can't be patched: vision_feature_layer must",
        ),
        (["--device", "abacus"], "--device must be cpu, cuda, or cuda:1 and so on, got abacus"),
        (["--device", "meta"], "--device meta holds no values"),
        (["--device", "cuda:99"], "--device cuda:99( can't be used|: torch .* finds no GPU here)"),
        (
            ["--question", "how many ?", "--question", "what <image> is"],
            "--question can't contain <image>, .* got 'what <image> is'",
        ),
    ],
)
def test_refuses_in_one_sentence(capsys, tmp_path, arguments, message):
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for folder in ("folder.png", "empty"):
        (tmp_path / folder).mkdir()
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    shutil.copytree(tiny_llava_path(), tmp_path / "deep")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "deep")
    config.vision_feature_layer = -99
    config.save_pretrained(tmp_path / "deep")
    shutil.copytree(tiny_llava_path(), tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    assert re.search(message, refusal(capsys, *arguments))
    assert not (tmp_path / "demo.png").exists()


def test_a_failing_processor_is_named(assistant, monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("no such template\nat line 3")

    monkeypatch.setattr(assistant, "prompt", fail)
    with pytest.raises(
        demo.DemoError, match=r"the processor of tiny-.* 'why \?': no such template$"
    ):
        assistant.ask(Image.new("RGB", (8, 8)), "why ?")


def test_a_failing_model_is_named(assistant, circle, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory.")

    monkeypatch.setattr(assistant.model, "generate", fail)
    with pytest.raises(demo.DemoError, match=r"can't answer on cpu: out of memory$"):
        demo.compare(assistant, circle, 16, 0.5, 0, repeats=1)


@pytest.mark.parametrize(
    ("package", "extra"), [("transformers", "hf"), ("PIL", "hf"), ("matplotlib", "viz")]
)
def test_a_missing_package_names_its_extra(capsys, monkeypatch, package, extra):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    message = refusal(capsys)
    assert message == f"{package} is not installed: pip install 'consensusdrop_kernels[{extra}]'"


def test_a_mistake_ends_the_process_with_2():
    done = run_module("demo", "--image", "none.png")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "cdrop demo: --image none.png: there is no such file\n"


# --- the rest -----------------------------------------------------------------------------------


def test_without_arguments_it_helps(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "usage: cdrop" in out
    assert "demo" in out
    assert "info" in out


def test_info_names_versions_every_backend_and_the_build(capsys):
    import consensusdrop_kernels

    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"consensusdrop_kernels {consensusdrop_kernels.__version__}\n")
    for package in ("torch", "transformers"):
        version = sys.modules[package].__version__
        assert re.search(rf"^  {package} +{re.escape(version)}$", out, re.M)
    for name, backend in consensusdrop_kernels.backends().items():
        state = "available" if backend else "missing"
        assert re.search(rf"^  {name} +{state}: {re.escape(backend.reason)}$", out, re.M)
    assert re.search(r"^build\n  \w+", out, re.M)


def test_info_says_what_is_not_installed(capsys, monkeypatch):
    def absent(name):
        raise cli.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli.metadata, "version", absent)
    assert cli.main(["info"]) == 0
    assert re.search(r"^  triton +not installed$", capsys.readouterr().out, re.M)


def test_importing_the_command_is_cheap():
    code = (
        "import sys, consensusdrop_kernels.cli\n"
        "assert not {'transformers', 'matplotlib', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
