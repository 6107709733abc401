"""The end-to-end benchmark: that it measures what it says, of models that do what they should."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import e2e
from benchmarks.accuracy.runs import parse_methods
from benchmarks.end_to_end import clock, models, results
from benchmarks.end_to_end.contenders import Contender, contenders, set_attention
from benchmarks.end_to_end.maps import PLAIN
from benchmarks.end_to_end.phases import PHASES, watched
from consensusdrop_kernels import cli, patch
from consensusdrop_kernels.demo import DemoError
from consensusdrop_kernels.methods import FastV

CPU = torch.device("cpu")
FULL_SIZE = dict(models.RANDOM)
_OPTIONS = ",".join(f"{name}={value!r}" for name, value in PLAIN.items())
CONSENSUS = f"ConsensusDrop({_OPTIONS},label='consensus')"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> models.Subject:
    return models.Subject("tiny", "cpu")


def rows_of(subject: models.Subject, methods: str, *keeps: int) -> dict[str, Contender]:
    made = contenders(subject, parse_methods(methods), keeps, maps=True)
    return {row.name: row for row in made}


# --- the maps form ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [9, 64])
@pytest.mark.parametrize("method", [CONSENSUS, "VisionZip", "DivPrune"])
def test_a_maps_form_chooses_and_merges_what_the_ops_do(tiny, method, keep):
    _, ours, maps = rows_of(tiny, method, keep).values()
    assert (ours.form, maps.form) == ("ops", "maps")
    for seed in range(3):
        inputs = tiny.request(seed)
        one = ours.generate(inputs, 2, output_logits=True)
        other = maps.generate(inputs, 2, output_logits=True)
        index = ours.handle.last.selection.index.sort(dim=1).values
        assert torch.equal(index, maps.maps.index)
        torch.testing.assert_close(other.logits[0], one.logits[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(one.sequences[:, -2:], other.sequences[:, -2:])
        assert ours.counts(tiny) == maps.counts(tiny)


def test_fastv_by_the_map_of_a_layer_chooses_what_the_op_chooses_there(tiny):
    maps = rows_of(tiny, "FastV", 32)["FastV, maps 32"]
    inputs = tiny.batch(2)
    out = maps.generate(inputs, 3)
    before = FastV(keep=32, layer=maps.method.layer - 1)  # asks the layer whose map that is
    found = []
    with patch(tiny.model, before) as handle:
        choose = handle.method.select_stage
        object.__setattr__(
            handle.method, "select_stage", lambda *a: found.append(choose(*a)) or found[-1]
        )
        tiny.model.generate(**inputs, max_new_tokens=1)
    assert torch.equal(found[0].index, maps.maps.index)
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    whole = inputs["input_ids"].shape[1] + 2  # the last token was not read again
    assert lengths == [whole, whole, whole - 196 + 32, whole - 196 + 32]


def test_fastv_has_no_maps_form_in_eager_attention(tiny):
    assert set_attention(tiny, "eager") == ""
    try:
        rows = rows_of(tiny, f"FastV,{CONSENSUS}", 32)
    finally:
        assert set_attention(tiny, "sdpa") == ""
    assert "sdpa or flash" in rows["FastV, maps 32"].reason
    for row in rows.values():
        if not row.reason:
            row.generate(tiny.batch(1), 3)
            assert row.counts(tiny).seen()[-1] == (row.keep or 196)
    assert len([row for row in rows.values() if row.reason]) == 1


def test_other_options_have_no_maps_form(tiny):
    rows = rows_of(tiny, f"{CONSENSUS[:-1]},alpha=0.3),Random,FastV(layer=1)", 8)
    assert len(rows) == 4
    assert [row for row in rows if "maps" in row] == []


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llava-1.5-7b", 7.063), ("llava-next-7b", 7.063), ("qwen2.5-vl-7b", 8.292)],
)
def test_models_have_the_size_of_those_they_are_named_after(name, billions):
    model = models.build(models.RANDOM[name].config(), torch.device("meta"), torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=1e-3)
    assert model.dtype == torch.bfloat16


def narrow(name: str) -> Any:
    """The configuration of a model, its prompts as they are and its layers few and thin."""
    config = FULL_SIZE[name].config()
    text, tower = config.get_text_config(), config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = 3, 32, 32
    text.num_attention_heads = text.num_key_value_heads = 2
    if name.startswith("qwen"):
        text.layer_types = text.layer_types[:3]
        text.rope_parameters = text.rope_parameters | {"mrope_section": [2, 3, 3]}
        tower.depth, tower.fullatt_block_indexes, tower.out_hidden_size = 2, [1], 32
        tower.hidden_size, tower.intermediate_size, tower.num_heads = 16, 16, 1
    else:
        text.head_dim = 16
        tower.hidden_size, tower.intermediate_size = 16, 16
        tower.num_hidden_layers, tower.num_attention_heads = 2, 1
    return config


@pytest.mark.parametrize(
    ("name", "patches"), [("llava-1.5-7b", 576), ("llava-next-7b", 2880), ("qwen2.5-vl-7b", 1296)]
)
def test_prompts_fit_the_models(monkeypatch, name, patches):
    thin = replace(models.RANDOM[name], config=partial(narrow, name))
    monkeypatch.setitem(models.RANDOM, name, thin)
    subject = models.Subject(name, "cpu")
    assert subject.patches == patches
    rows = rows_of(subject, "VisionZip,FastV(layer=1)", 64)
    for row in rows.values():
        if row.reason:
            assert "CLIP" in row.reason
            assert name == "qwen2.5-vl-7b"
            continue
        row.generate(subject.batch(1), 1)
        assert row.counts(subject).seen()[-1] == (
            64 if row.keep else rows["Full"].counts(subject).after
        )
    if name != "qwen2.5-vl-7b":
        ours = rows["VisionZip 64"].handle.last.selection.index.sort(dim=1).values
        assert torch.equal(ours, rows["VisionZip, maps 64"].maps.index)


def test_requests_of_several_lengths_are_padded_at_the_left(tiny):
    one, other = tiny.request(0), tiny.request(4)
    assert one["input_ids"].shape != other["input_ids"].shape
    both = tiny.joined([one, other])
    alone = [tiny.model.generate(**each, max_new_tokens=1)[0, -1] for each in (one, other)]
    assert tiny.model.generate(**both, max_new_tokens=1)[:, -1].tolist() == alone


def test_copies_share_weights_and_nothing_else(tiny):
    rows = rows_of(tiny, "Random", 8)
    copy = rows["Random 8"].model
    pairs = zip(copy.parameters(), tiny.model.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())
    inputs = tiny.batch(1)
    rows["Random 8"].generate(inputs, 1)
    assert rows["Random 8"].handle.stats.tokens_after == 8
    assert rows["Full"].counts(tiny).after == 196


# --- gates --------------------------------------------------------------------------------------


def test_a_wrong_count_is_not_timed(tiny):
    row = rows_of(tiny, "DivPrune", 16)["DivPrune, maps 16"]
    rule = row.maps._rule
    row.maps._rule = lambda *a: type(chosen := rule(*a))(*(part[:, 1:] for part in chosen))
    row.generate(tiny.batch(1), 1)
    with pytest.raises(DemoError, match="kept .15. visual tokens, not .16."):
        row.counts(tiny)


def test_a_stock_model_that_changes_is_refused(tiny, monkeypatch):
    answers = iter([[1], [2]])
    monkeypatch.setattr(e2e, "_answer", lambda subject: next(answers))
    monkeypatch.setattr(e2e, "_measured", lambda *a: [])
    with pytest.raises(DemoError, match="answers otherwise after the run"):
        e2e.run(tiny, e2e.Options(tuple(parse_methods("Random"))))


# --- clock and phases ---------------------------------------------------------------------------


def test_calls_take_turns():
    seen: list[str] = []
    calls = {name: partial(seen.append, name) for name in "abc"}
    found = clock.interleaved(calls, 20, CPU)
    rounds = [seen[at : at + 3] for at in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 3
    assert all(len(samples.wall) == len(samples.processor) == 20 for samples in found.values())


def test_a_ratio_is_paired():
    """A machine that gets ten times slower on its way, and calls that differ by 3 %."""
    drift = torch.linspace(1, 10, 41)
    noise = 1 + 0.01 * torch.randn(2, 41, generator=torch.Generator().manual_seed(0))
    value, low, high = clock.paired_ratio(
        (1.03 * drift * noise[0]).tolist(), (drift * noise[1]).tolist()
    )
    assert low < 1.03 < high
    assert low <= value <= high
    assert high - low < 0.03
    assert clock.paired_ratio([2.0], [1.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("form", ["full", "ops", "maps"])
def test_phases_add_up_to_the_whole(tiny, form):
    made = contenders(tiny, parse_methods(CONSENSUS), [32], maps=True)
    row = next(row for row in made if row.form == form)
    inputs = tiny.batch(1)
    row.generate(inputs, 1)
    with watched(row, CPU) as line:
        start = time.perf_counter()
        found = line.run(partial(row.generate, inputs, 1))
        spent = 1e3 * (time.perf_counter() - start)
    assert sum(found.values()) == pytest.approx(spent, abs=1)
    chosen = {"saliency", "selection"} if form != "full" else set()
    assert {phase for phase in PHASES if found[phase] > 0} == {
        "vision",
        "projector",
        "llm",
        "other",
    } | chosen
    row.generate(inputs, 1)  # and nothing of it is left
    assert not any("select" in vars(r.handle.method) for r in made if r.handle)
    assert isinstance(torch.ops.cdrop.attention_saliency, torch._ops.OpOverloadPacket)


# --- what goes wrong ----------------------------------------------------------------------------


def fails_at(monkeypatch, name: str, call: int, error: Exception) -> None:
    """Lets one row raise at that call and ever after."""
    whole, calls = Contender.generate, iter(range(1, 100))

    def generate(self: Contender, *args: Any, **kwargs: Any) -> Any:
        if self.name == name and next(calls) >= call:
            raise error
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Contender, "generate", generate)


#: Of a row with two rounds: its calls are two to warm up, then two of each kind.
FIRST_TRY, FIRST_TOKEN, ANSWER, PHASE = 1, 4, 5, 8


@pytest.mark.parametrize("call", [FIRST_TRY, FIRST_TOKEN, ANSWER, PHASE])
@pytest.mark.parametrize(
    ("error", "reason", "failed"),
    [
        (torch.OutOfMemoryError("of 3 GiB"), "out of memory", False),
        (RuntimeError("no such kernel.\nmore"), "RuntimeError: no such kernel", True),
    ],
)
def test_a_row_that_goes_wrong_says_why_and_the_others_go_on(
    tiny, monkeypatch, call, error, reason, failed
):
    fails_at(monkeypatch, "Random 32", call, error)
    specs = tuple(parse_methods("Random,VisionZip"))
    found = e2e.run(tiny, e2e.Options(specs, (32,), new_tokens=2, repeats=2, maps=False))
    full, bad, good = found["rows"]
    assert (bad["reason"], bad["failed"]) == (reason, failed)
    assert [bad[name] for name in e2e._MEASURED] == [None] * len(e2e._MEASURED)
    for row in (full, good):
        assert (row["reason"], row["failed"]) == ("", False)
        assert len(row["samples_ms"]) == 2
        assert row["decode_tokens_per_s"] > 0
        assert sum(row["phases_ms"].values()) > 0
    assert good["of_full"] is not None
    assert good["of_random"] is None
    assert f"- Random 32: {reason}" in results.markdown(found)


def test_a_refusal_is_no_failure(tiny, monkeypatch):
    fails_at(monkeypatch, "Random 32", FIRST_TRY, ValueError("not on this model"))
    found = e2e.run(tiny, e2e.Options(tuple(parse_methods("Random")), (32,), repeats=1))
    assert (found["rows"][1]["reason"], found["rows"][1]["failed"]) == ("not on this model", False)


def test_a_failed_row_is_the_exit_code_after_all_is_written(tmp_path, monkeypatch, capsys):
    fails_at(monkeypatch, "Random 16", FIRST_TOKEN - 1, RuntimeError("no such kernel"))
    arguments = "bench --model tiny --methods Random --keep 16,8 --repeats 1 --new-tokens 1"
    assert cli.main([*arguments.split(), "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("cdrop bench: failed: Random 16 (sdpa, 1)\n")
    rows = json.loads((tmp_path / "e2e.json").read_text())["rows"]
    assert [(row["name"], bool(row["ttft_ms"])) for row in rows] == [
        ("Full", True), ("Random 16", False), ("Random 8", True),
    ]  # fmt: skip


def test_what_an_earlier_group_found_is_written_whatever_comes_next(tiny, monkeypatch):
    saved: list[int] = []
    specs, measured = tuple(parse_methods("Random")), e2e._measured

    def second_fails(*args: Any) -> Any:
        if saved:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(e2e, "_measured", second_fails)
    options = e2e.Options(specs, (8,), (1, 2), new_tokens=1, repeats=1)
    with pytest.raises(KeyboardInterrupt):
        e2e.run(tiny, options, lambda found: saved.append(len(found["rows"])))
    assert saved == [2]


def test_little_time_makes_fewer_rounds(tiny):
    specs = tuple(parse_methods("Random"))
    hurried = e2e.Options(specs, (8,), (1, 2), new_tokens=2, repeats=50, seconds=0.1)
    rows = e2e.run(tiny, hurried)["rows"]
    assert [len(row["samples_ms"]) for row in rows] == [e2e._LEAST] * 4
    assert all(row["decode_tokens_per_s"] and row["phases_ms"] for row in rows)
    roomy = replace(hurried, batches=(1,), repeats=4, seconds=100.0)
    assert [len(row["samples_ms"]) for row in e2e.run(tiny, roomy)["rows"]] == [4, 4]


# --- the whole ----------------------------------------------------------------------------------


def test_rows_hold_what_they_should(tiny):
    specs = tuple(parse_methods(f"Random,{CONSENSUS},PyramidDrop"))
    options = e2e.Options(specs, (32,), (2,), ("sdpa", "flash"), 3, 2)
    found = e2e.run(tiny, options)
    rows = {(row["attention"], row["name"]): row for row in found["rows"]}
    assert found["header"]["parameters"] == sum(p.numel() for p in tiny.model.parameters())
    assert "needs a GPU" in rows["flash", "Full"]["reason"]
    assert "the layers before the first stage" in rows["sdpa", "PyramidDrop 32"]["reason"]
    full, ours = rows["sdpa", "Full"], rows["sdpa", "consensus 32"]
    maps = rows["sdpa", "consensus, maps 32"]
    text = 9
    for row in (full, ours, maps):
        assert row["tokens"]["before"] == 196
        assert row["tokens"]["average"] == row["tokens"]["after"] == (row["keep"] or 196)
        each = 4 * 2 * 192 * 4  # layers, keys and values, width, bytes
        assert row["kv_bytes"] == 2 * (text + row["tokens"]["after"]) * each
        assert len(row["samples_ms"]) == 2
        assert 0 < row["ttft_ms"]["p20"] <= row["ttft_ms"]["median"] <= row["ttft_ms"]["p80"]
        assert row["decode_tokens_per_s"] > 0
        assert set(row["phases_ms"]) == set(PHASES)
    assert full["flops_of_full"] == 1
    assert 0 < ours["flops_of_full"] < 1
    assert ours["of_random"] is not None
    assert maps["over_ops"] is not None
    assert ours["over_ops"] is full["of_full"] is None


def test_the_plot_is_by_the_tokens_that_a_layer_sees(tiny):
    """A method with stages lies farther right than one that prunes before the LLM."""
    specs = tuple(parse_methods("Random,FastV"))
    options = e2e.Options(specs, (16, 8), new_tokens=1, repeats=1, maps=False)
    rows = e2e.run(tiny, options)["rows"]
    (axis,) = results._against_tokens(rows, "made").axes
    drawn = {bars.get_label(): list(bars[0].get_xdata()) for bars in axis.containers}
    assert drawn == {"Random": [8.0, 16.0], "FastV": [(2 * 196 + 2 * n) / 4 for n in (8, 16)]}


@pytest.mark.parametrize("name", ["llava-next-7b", "qwen2.5-vl-7b"])
def test_operations_of_other_families_are_counted(monkeypatch, name):
    thin = replace(models.RANDOM[name], config=partial(narrow, name))
    monkeypatch.setitem(models.RANDOM, name, thin)
    specs = tuple(parse_methods("Random,FastV(layer=1)"))
    options = e2e.Options(specs, (64,), new_tokens=1, repeats=1, maps=False)
    full, ours, stage = e2e.run(models.Subject(name, "cpu"), options)["rows"]
    assert full["flops_of_full"] == 1
    assert 0 < ours["flops_of_full"] < stage["flops_of_full"] < 1
    for row in (ours, stage):
        saved = 1 - row["of_full"].value
        assert row["share_of_saving"] == pytest.approx(saved / (1 - row["flops_of_full"]))


def test_the_command_hands_over_and_writes(tmp_path, capsys):
    arguments = "bench --model tiny --methods Random --keep 16,8 --repeats 1 --new-tokens 1"
    out = ["--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert cli.main([*arguments.split(), *out]) == 0
    found = json.loads((tmp_path / "e2e.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["Full", "Random 16", "Random 8"]
    assert "| Random | ops | 16 | 196 -> 16 |" in capsys.readouterr().out
    assert {path.name for path in Path(tmp_path).iterdir()} == {
        "e2e.json", "e2e.md", "ttft.png", "phases.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--keep 500", "--keep must be in 1..196"),
        ("--methods Nothing", "--methods must be of"),
        ("--device cuda:7", "finds no GPU here"),
        ("--keep 0", "must be counts of at least 1"),
        ("--attention fast", "must be of sdpa, flash, eager"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, arguments, sentence):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["bench", "--model", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    try:
        code = cli.main([*command, *arguments.split()])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("cdrop bench: ")]
    assert sentence in line
