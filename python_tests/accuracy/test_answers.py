"""Blocks of questions, what is noted of their answers, and the folder that keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks.accuracy import answers, data
from benchmarks.accuracy.answers import Examiner, Impossible, Record, Store
from benchmarks.accuracy.runs import Run
from consensusdrop_kernels import scenes
from consensusdrop_kernels.demo import Assistant
from consensusdrop_kernels.methods import ConsensusDrop, FastV, PyramidDrop


def same(one, two):
    return all(
        np.array_equal(a.image, b.image) and p == q
        for (a, p), (b, q) in zip(one, two, strict=True)
    )  # fmt: skip


def test_questions_follow_from_split_seed_and_block():
    drawn = answers.draw(data.TEST, 3, 0, 16)
    assert same(drawn, answers.draw(data.TEST, 3, 0, 16))
    assert same(drawn[:8], answers.draw(data.TEST, 3, 0, 8))
    assert [q.kind for _, q in drawn] == 2 * list(scenes.QUESTION_TYPES)
    assert list(answers.kinds(16)) == [q.kind for _, q in drawn]
    for other in ((data.TEST, 4, 0), (data.TEST, 3, 1), (data.VALIDATION, 3, 0)):
        assert not same(drawn[:1], answers.draw(*other, 1))


def test_no_two_exams_share_a_scene(monkeypatch):
    """Nor does one with training: whatever is drawn lies in its split, in a place of its own."""
    seen = []
    monkeypatch.setattr(answers, "exam", lambda split, count: seen.append(split) or [None] * count)
    ends = [(s, b) for s in (0, 1, answers.SEEDS - 1) for b in (0, 1, answers.BLOCKS - 1)]
    for split in (data.TEST, data.VALIDATION):
        for seed, block in ends:
            answers.draw(split, seed, block, answers.BLOCK)
            assert len(seen[-1]) > 2 * answers.BLOCK
            assert seen[-1][0] in split
            assert seen[-1][-1] in split
    seen.sort(key=lambda scenes: scenes.start)
    assert all(a.stop <= b.start for a, b in zip(seen, seen[1:], strict=False))
    assert data.TRAIN.stop <= seen[0].start


def test_blocks_cover_the_questions():
    assert answers.block_sizes(300) == [128, 128, 44]
    assert answers.block_sizes(128) == [128]


@pytest.mark.parametrize(
    ("said", "word"), [("red", "red"), (" Red.", "red"), ("3 objects", "3"), ("", ""), ("...", "")]
)
def test_an_answer_is_its_first_word(said, word):
    assert answers.plain(said) == word


@pytest.fixture(scope="module")
def examiner():
    return Examiner(Assistant(device="cpu"), batch=5)


@pytest.fixture(scope="module")
def items():
    return answers.draw(data.TEST, 0, 0, 16)


def test_batches_say_what_each_prompt_alone_says(examiner, items):
    """Nothing of a question's answer or cost depends on its batch, but for rounding."""
    assert examiner.steps == 1
    run = Run("", 16, ConsensusDrop(keep=16))
    block = examiner.prepare(1, items)
    assert sorted(at for batch in block.batches for at in batch.places) == list(range(16))
    assert any((batch.inputs["attention_mask"] == 0).any() for batch in block.batches)
    together = examiner.answer(run, block)
    alone = [replace(examiner, batch=1).answer(run, examiner.prepare(1, [item])) for item in items]
    assert together.words == [word for record in alone for word in record.words]
    assert together.right == "".join(record.right for record in alone)
    assert together.right.count("1") > 8
    for name, total in together.sums.items():
        assert total == pytest.approx(sum(record.sums[name] for record in alone)), name
    assert together.sums["after"] == together.sums["average"] == 16 * 16
    text = sum(len(question.text.split()) + 3 for _, question in items)  # <bos> USER: ASSISTANT:
    assert together.sums["text"] == text
    assert together.sums["kv_bytes"] == 4 * 1536 * (text + 16 * 16)


def test_full_is_the_model_without_a_patch(examiner, items):
    block = examiner.prepare(0, items[:8])
    record = examiner.answer(Run("Full", None, None), block)
    assert record.sums["before"] == record.sums["after"] == record.sums["average"] == 8 * 196
    assert record.selection is None
    model = examiner.assistant.model
    out = model.generate(**block.first, max_new_tokens=1, do_sample=False)
    words = examiner.assistant.processor.batch_decode(out[:, -1:])
    assert record.words[0] == words[0]


def test_stages_count_where_they_are(examiner, items):
    block = examiner.prepare(0, items[:8])
    record = examiner.answer(Run("", 16, FastV(keep=16)), block)
    assert record.sums["after"] == 8 * 196
    assert record.sums["average"] == 8 * (196 + 16) / 2
    assert record.selection > 2 * 196 * 192 * 192
    full = examiner.answer(Run("Full", None, None), block)
    assert record.sums["flops"] < full.sums["flops"]


def test_what_a_method_refuses_has_a_reason(examiner, items):
    block = examiner.prepare(0, items[:8])
    with pytest.raises(Impossible, match="keep must be more than 49 tokens of N=196"):
        examiner.answer(Run("", 32, PyramidDrop(keep=32)), block)
    with pytest.raises(Impossible, match="layer must be less than the decoder's 4 layers, got 9"):
        examiner.answer(Run("", 32, FastV(keep=32, layer=9)), block)
    assert not hasattr(examiner.assistant.model, "_cdrop_handle")


def test_a_fault_of_the_model_is_no_reason(examiner, items, monkeypatch):
    def fail(**inputs):
        raise ValueError("broken")

    block = examiner.prepare(0, items[:8])
    monkeypatch.setattr(examiner.assistant.model, "generate", fail)
    with pytest.raises(ValueError, match="broken"):
        examiner.answer(Run("Full", None, None), block)


def record(run="a", block=0, right="10", **more):
    return Record(run, block, right, ["x"] * len(right), 1.0, {"text": 2.0}, **more)


def test_a_folder_is_read_back_whatever_process_wrote(tmp_path):
    one, two = Store(tmp_path, 0), Store(tmp_path, 1)
    one.add(record(selection=7))
    two.add(record(block=1, right="1"))
    both = Store(tmp_path, 5).records
    assert both == one.records | two.records
    found = answers.joined(both, "a", [2, 1])
    assert found == answers.Answers([True, False, True], 2.0, {"text": 4.0}, 7)


def test_half_a_line_of_a_killed_process_is_passed_over(tmp_path):
    Store(tmp_path).add(record())
    line = json.dumps(asdict(record(block=1)))
    with (tmp_path / "0.jsonl").open("a") as file:
        file.write(line[: len(line) // 2])
    again = Store(tmp_path)
    assert set(again.records) == {("a", 0, 2)}
    again.add(record(block=1))
    assert set(Store(tmp_path).records) == {("a", 0, 2), ("a", 1, 2)}


def test_a_shorter_block_does_not_stand_for_a_longer_one(tmp_path):
    store = Store(tmp_path)
    store.add(record(right="1"))
    store.add(record(right="01"))
    assert answers.joined(Store(tmp_path).records, "a", [2]).right == [False, True]
    assert answers.joined(Store(tmp_path).records, "a", [1]).right == [True]
