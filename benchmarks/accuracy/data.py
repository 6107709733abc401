"""Scenes, captions and questions for training and for held-out exams, all of them by number.

A split is a range of scene seeds, and no two splits share one:

| split | seeds | for |
|---|---|---|
| `TRAIN` | 2^40 ... 2^41 - 1 | training; every model seed has a lane of 2^24, half for each stage |
| `VALIDATION` | 2^41 ... 2^41 + 2^24 - 1 | figures during training, and choosing anything |
| `TEST` | 2^42 ... 2^42 + 2^24 - 1 | what is reported |

Whatever is drawn follows from the seed and the number of the scene alone, so a run that goes on
from a checkpoint sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from consensusdrop_kernels.scenes import (
    COLORS,
    IMAGE_SIZE,
    QUESTION_TYPES,
    SHAPES,
    Question,
    Scene,
    SceneObject,
    make_scene,
    questions,
)

LANE = 2**24
TRAIN = range(2**40, 2**41)
VALIDATION = range(2**41, 2**41 + LANE)
TEST = range(2**42, 2**42 + LANE)

#: Questions packed behind one image, and the tokens that each has room for.
PACK, SEGMENT = 16, 11
IGNORE = -100
_CAPTION = 64
#: How often a type is asked in training; relations are the hardest to learn.
_ASKED = {kind: 3.0 if kind == "relation" else 1.0 for kind in QUESTION_TYPES}
_SHRINK = 0.85  # of an object's square, so that few of its patches show only background


def lane(seed: int, stage: int) -> range:
    """The training scenes of a model seed in stage 1 (tower) or 2 (LLaVA).

    Raises:
        ValueError: `seed` is not in 0 ... 65535.
    """
    if not 0 <= seed < len(TRAIN) // LANE:
        raise ValueError(f"seed must be from 0 to {len(TRAIN) // LANE - 1}, got {seed}")
    start = TRAIN.start + seed * LANE + (stage - 1) * LANE // 2
    return range(start, start + LANE // 2)


def exam(
    split: range, count: int, kinds: tuple[str, ...] = QUESTION_TYPES
) -> list[tuple[Scene, Question]]:
    """Questions about the scenes of a split, each of its own scene, the types in turn.

    A scene without a clear question of the type it should be asked is passed over. Of `exists`,
    yes and no are asked equally often. A shorter exam is the beginning of a longer one.
    """
    picked: list[tuple[Scene, Question]] = []
    for seed in split:
        if len(picked) == count:
            break
        kind = kinds[len(picked) % len(kinds)]
        scene, rng = make_scene(seed), np.random.default_rng([1, seed])
        wanted = _wanted(rng, kind)
        asked = [q for q in questions(scene.objects) if q.kind == kind and q.answer in wanted]
        if asked:
            picked.append((scene, asked[rng.integers(len(asked))]))
    return picked


class _Any:
    def __contains__(self, answer: str) -> bool:
        return True


def _wanted(rng: np.random.Generator, kind: str) -> tuple[str, ...] | _Any:
    if kind == "exists":
        return (("yes", "no")[int(rng.integers(2))],)
    return _Any()


@dataclass(frozen=True)
class Batches(Dataset[dict[str, Tensor]]):
    """Training batches by number, for a `DataLoader` with `batch_size=None`.

    Args:
        seeds: the scenes; batch `i` takes the `size` ones from `i * size`.
        size: images per batch.
        grid: patches each way.
        vocabulary: token ids of words.
        stage: 1 for captions and what each patch shows, 2 for packed questions.
    """

    seeds: range
    size: int
    grid: int
    vocabulary: dict[str, int]
    stage: int

    def __len__(self) -> int:
        return len(self.seeds) // self.size

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        seeds = self.seeds[at * self.size : (at + 1) * self.size]
        scenes = [make_scene(seed) for seed in seeds]
        rows = []
        for seed, scene in zip(seeds, scenes, strict=True):
            rng = np.random.default_rng([2, seed])
            if self.stage == 1:
                row = patch_labels(scene.objects, self.grid)
                row["caption"] = self._tokens(caption(rng, scene.objects), _CAPTION)
            else:
                row = self._packed(rng, scene.objects)
            rows.append(row)
        batch = {name: torch.from_numpy(np.stack([r[name] for r in rows])) for name in rows[0]}
        pixels = np.stack([scene.image for scene in scenes])
        return batch | {"pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2)}

    def _tokens(self, words: list[str], room: int) -> npt.NDArray[np.int64]:
        ids = np.full(room, self.vocabulary["<pad>"], np.int64)
        ids[: len(words)] = [self.vocabulary[word] for word in words[:room]]
        return ids

    def _packed(
        self, rng: np.random.Generator, objects: tuple[SceneObject, ...]
    ) -> dict[str, npt.NDArray]:
        """`words` [PACK, SEGMENT]; `turn` [PACK], where a question's `ASSISTANT:` stands; `kind`
        [PACK]; for relations `named` [PACK, 2], the places of the two shapes (0: none), and
        `centers` [PACK, 2, 2], where they are."""
        picked = pick(rng, objects)
        words = [f"{q.text} ASSISTANT: {q.answer} <eos>".split() for q in picked]
        named = np.zeros((PACK, 2), np.int64)
        centers = np.zeros((PACK, 2, 2), np.float32)
        at = {o.shape: (o.x / IMAGE_SIZE, o.y / IMAGE_SIZE) for o in objects}
        for row, (q, spoken) in enumerate(zip(picked, words, strict=True)):
            if q.kind == "relation":
                named[row] = [i for i, word in enumerate(spoken) if word in at]
                centers[row] = [at[spoken[i]] for i in named[row]]
        return {
            "words": np.stack([self._tokens(w, SEGMENT) for w in words]),
            "turn": np.array([len(w) - 3 for w in words]),
            "kind": np.array([QUESTION_TYPES.index(q.kind) for q in picked]),
            "named": named,
            "centers": centers,
        }


def pick(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> list[Question]:
    """`PACK` questions about a scene: a type by its share in training, then any of that type."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions(objects):
        by_kind.setdefault(question.kind, []).append(question)
    kinds = list(by_kind)
    share = np.array([_ASKED[kind] for kind in kinds])
    picked = []
    for chosen in rng.choice(len(kinds), PACK, p=share / share.sum()):
        kind = kinds[chosen]
        wanted = _wanted(rng, kind)
        asked = [q for q in by_kind[kind] if q.answer in wanted] or by_kind[kind]
        picked.append(asked[rng.integers(len(asked))])
    return picked


def caption(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> list[str]:
    """Words that name the large objects, most medium and some small ones, in any order.

    One caption in seven is short: it names the large ones only.
    """
    short = rng.random() < 1 / 7
    shares = (1.0, 0.0, 0.0) if short else (1.0, 0.8, 0.4)
    named = [o for o in objects if rng.random() < shares[_size_class(o)]]
    words: list[str] = []
    for o in (named[i] for i in rng.permutation(len(named))):
        if words:
            words.append("," if rng.random() < 0.5 else "and")
        words.append("a" if rng.random() < 0.5 else "the")
        if rng.random() < 0.5:
            words += [("large",), (), ("small",)][_size_class(o)]
        words += [o.color, o.shape]
        if o.digit and rng.random() < 0.7:
            words += ["with", "digit", str(o.digit)]
    return words


def _size_class(item: SceneObject) -> int:
    """0 large, 1 medium, 2 small."""
    return 0 if item.size >= 28 else 1 if item.size >= 18 else 2


def patch_labels(objects: tuple[SceneObject, ...], grid: int) -> dict[str, npt.NDArray]:
    """What each of `grid * grid` patches shows, by the object whose square holds its centre.

    `shape`, `color`, `digit` (0: none), `size`: classes, `IGNORE` on background; `center`: of
    the object, [N, 2], as shares of the picture; `weight`: an object's patches weigh the root of
    their number together, and background weighs nothing.
    """
    middles = (np.arange(grid) + 0.5) * IMAGE_SIZE / grid
    owner = np.full((grid, grid), -1)
    for at, o in enumerate(objects):
        reach = _SHRINK * o.size / 2
        owner[np.ix_(abs(middles - o.y) <= reach, abs(middles - o.x) <= reach)] = at
        owner[int(o.y * grid / IMAGE_SIZE), int(o.x * grid / IMAGE_SIZE)] = at
    owner = owner.ravel()

    def spread(values: list[int] | list[float], background: float) -> npt.NDArray:
        return np.array([*values, background])[owner]  # -1 is the last

    counts = np.bincount(owner + 1, minlength=len(objects) + 1)[1:]
    return {
        "shape": spread([SHAPES.index(o.shape) for o in objects], IGNORE),
        "color": spread([COLORS.index(o.color) for o in objects], IGNORE),
        "digit": spread([o.digit or 0 for o in objects], IGNORE),
        "size": spread([_size_class(o) for o in objects], IGNORE),
        "center": np.stack(
            [
                spread([o.x / IMAGE_SIZE for o in objects], 0.0),
                spread([o.y / IMAGE_SIZE for o in objects], 0.0),
            ],
            -1,
        ).astype(np.float32),
        "weight": spread(list(np.maximum(counts, 1) ** -0.5), 0.0).astype(np.float32),
    }


def load(batches: Batches, start: int, steps: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Batches `start` to `steps - 1` in order, drawn ahead by worker processes if there are any."""
    numbers = range(start, min(steps, len(batches)))
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        batches, batch_size=None, sampler=numbers, num_workers=workers
    )
    return iter(loader)
