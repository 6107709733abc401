"""Training data and exams: fixed by number, held apart, and true to the scenes."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.accuracy import data
from benchmarks.accuracy.models import Shape, processor
from consensusdrop_kernels import scenes

VOCABULARY = processor(Shape()).tokenizer.get_vocab()


def batches(stage, size=3, seed=5, grid=14):
    return data.Batches(data.lane(seed, stage), size, grid, VOCABULARY, stage)


def test_no_two_splits_share_a_scene():
    ranges = [data.VALIDATION, data.TEST]
    ranges += [data.lane(seed, stage) for seed in (0, 1, 65535) for stage in (1, 2)]
    for a, b in itertools.combinations(ranges, 2):
        assert a.stop <= b.start or b.stop <= a.start
    for lane in ranges[2:]:
        assert data.TRAIN.start <= lane.start < lane.stop <= data.TRAIN.stop
    with pytest.raises(ValueError, match="seed must be"):
        data.lane(65536, 1)


def test_an_exam_asks_each_type_equally_and_follows_from_its_split():
    asked = data.exam(data.TEST, 48)
    assert Counter(q.kind for _, q in asked) == dict.fromkeys(scenes.QUESTION_TYPES, 6)
    assert all(q in scenes.questions(scene.objects) for scene, q in asked)
    assert [q for _, q in data.exam(data.TEST, 24)] == [q for _, q in asked[:24]]
    assert [q for _, q in data.exam(data.VALIDATION, 24)] != [q for _, q in asked[:24]]
    said = Counter(q.answer for _, q in data.exam(data.TEST, 60, ("exists",)))
    assert 15 <= said["yes"] <= 45
    assert said.keys() == {"yes", "no"}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_follows_from_its_number_with_and_without_workers(stage):
    source = batches(stage)
    drawn = list(data.load(source, 2, 5, workers=0))
    ahead = list(data.load(source, 2, 5, workers=1))
    assert len(drawn) == len(ahead) == 3
    for at, (one, two) in enumerate(zip(drawn, ahead, strict=True)):
        again = source[2 + at]
        assert one.keys() == two.keys() == again.keys()
        for name in one:
            assert torch.equal(one[name], two[name])
            assert torch.equal(one[name], again[name])
    assert not torch.equal(drawn[0]["pixels"], drawn[1]["pixels"])
    other = batches(stage, seed=6)[2]
    assert not torch.equal(drawn[0]["pixels"], other["pixels"])


def test_packed_questions_are_of_their_scene_and_answered_right():
    words = {at: word for word, at in VOCABULARY.items()}
    source = batches(2)
    batch = source[0]
    related = 0
    for row, seed in enumerate(source.seeds[:3]):
        objects = scenes.make_scene(seed).objects
        known = {(q.kind, q.text, q.answer) for q in scenes.questions(objects)}
        for i in range(data.PACK):
            spoken = [words[at] for at in batch["words"][row, i].tolist() if at]
            turn = int(batch["turn"][row, i])
            assert spoken[turn] == "ASSISTANT:"
            assert spoken[turn + 2 :] == ["<eos>"]
            kind = scenes.QUESTION_TYPES[batch["kind"][row, i]]
            assert (kind, " ".join(spoken[:turn]), spoken[turn + 1]) in known
            if kind != "relation":
                assert not batch["named"][row, i].any()
                continue
            related += 1
            for place, center in zip(batch["named"][row, i], batch["centers"][row, i], strict=True):
                (named,) = [o for o in objects if o.shape == spoken[place]]
                expected = torch.tensor([named.x, named.y]) / scenes.IMAGE_SIZE
                torch.testing.assert_close(center, expected)
    assert related >= 3


def test_every_question_fits_its_segment_and_the_vocabulary():
    longest = 0
    for seed in range(30):
        for q in scenes.questions(scenes.make_scene(seed).objects):
            words = f"{q.text} ASSISTANT: {q.answer} <eos>".split()
            assert set(words) <= VOCABULARY.keys()
            longest = max(longest, len(words))
    assert longest == data.SEGMENT


OBJECTS = (
    scenes.SceneObject("star", "red", 28, 84, 36, 4),
    scenes.SceneObject("moon", "blue", 90, 30, 20),
    scenes.SceneObject("heart", "green", 60.5, 12, 12),
)


@pytest.mark.parametrize("grid", [4, 14, 16])
def test_patches_are_labelled_with_the_object_on_them(grid):
    found = data.patch_labels(OBJECTS, grid)
    shape = found["shape"].reshape(grid, grid)
    for item in OBJECTS:
        row, column = (int(v * grid / scenes.IMAGE_SIZE) for v in (item.y, item.x))
        at = row * grid + column
        assert shape[row, column] == scenes.SHAPES.index(item.shape)
        assert found["color"][at] == scenes.COLORS.index(item.color)
        assert found["digit"][at] == (item.digit or 0)
        np.testing.assert_allclose(found["center"][at] * scenes.IMAGE_SIZE, (item.x, item.y))
        mine = found["shape"] == scenes.SHAPES.index(item.shape)
        assert mine.sum() <= ((item.size * grid / scenes.IMAGE_SIZE) + 1) ** 2
        assert found["weight"][mine].sum() == pytest.approx(mine.sum() ** 0.5)
    assert found["size"][found["shape"] == scenes.SHAPES.index("star")].tolist()[0] == 0
    background = found["shape"] == data.IGNORE
    assert background[-1]
    assert not found["weight"][background].any()
    assert (found["color"][background] == data.IGNORE).all()


def test_captions_name_the_large_object_and_nothing_that_is_not_there():
    heard: Counter[str] = Counter()
    for seed in range(200):
        words = data.caption(np.random.default_rng(seed), OBJECTS)
        text = " ".join(words)
        assert set(words) <= VOCABULARY.keys()
        named = [f"{o.color} {o.shape}" for o in OBJECTS if f"{o.color} {o.shape}" in text]
        heard.update(named)
        assert sum(word in scenes.SHAPES for word in words) == len(named)
    assert heard["red star"] == 200
    assert 110 <= heard["blue moon"] <= 165  # 0.8 of six in seven
    assert 45 <= heard["green heart"] <= 95  # 0.4 of them
