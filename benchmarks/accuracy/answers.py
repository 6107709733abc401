"""Ask a model questions in blocks, with one method after the other, and keep what it answers.

A block is a fixed list of questions, cut into fixed batches: what is answered depends neither on
which process answers a block nor on whether a run was interrupted before it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from consensusdrop_kernels import patch
from consensusdrop_kernels.demo import Assistant, first_sentence
from consensusdrop_kernels.scenes import COLORS, QUESTION_TYPES, SHAPES, Question, Scene

from . import flops
from .data import LANE, exam
from .runs import Run

#: Questions of a block, blocks of a seed, and seeds of a split.
BLOCK, BLOCKS = 128, 256
_SCENES = 512  # of a block: more than enough, as one in ten or so can't be asked about
SEEDS = LANE // (_SCENES * BLOCKS)
_ANSWERS = (*COLORS, *SHAPES, *map(str, range(1, 10)), "yes", "no")

Items = Sequence[tuple[Scene, Question]]


def block_sizes(questions: int) -> list[int]:
    """How many questions each block holds; all but the last are full."""
    return [min(BLOCK, questions - start) for start in range(0, questions, BLOCK)]


def draw(split: range, seed: int, block: int, count: int) -> list[tuple[Scene, Question]]:
    """The first `count` questions of a block, each of its own scene, the types in turn.

    Args:
        split: scenes, `data.VALIDATION` or `data.TEST`.
        seed: 0 to `SEEDS - 1`; no two share a scene.
        block: 0 to `BLOCKS - 1`.
    """
    start = (seed * BLOCKS + block) * _SCENES
    picked = exam(split[start : start + _SCENES], count)
    assert len(picked) == count
    return picked


@dataclass(frozen=True)
class Record:
    """What one run answered to one block.

    Attributes:
        run: its `key`.
        block: number of the block.
        right: "1" for a right answer, "0" for any other, in the order of the questions.
        words: the answers.
        seconds: spent in `generate`.
        sums: over the questions: tokens of text, visual tokens before and after the choice and on
            average over the decoder's layers, operations of the prefill and bytes of the cache.
        selection: operations that the choice adds, of the first question of block 0.
        commit: of the code that answered.
    """

    run: str
    block: int
    right: str
    words: list[str]
    seconds: float
    sums: dict[str, float]
    selection: int | None = None
    commit: str | None = None

    @property
    def place(self) -> tuple[str, int, int]:
        """What the record is of: run, block, and how many of its questions."""
        return self.run, self.block, len(self.right)


@dataclass(frozen=True)
class Batch:
    """Prompts padded at the left, and their places in the block."""

    inputs: Any
    places: list[int]


@dataclass(frozen=True)
class Block:
    """Prepared questions; `first` is the prompt of the first one alone."""

    number: int
    answers: list[str]
    batches: list[Batch]
    first: Any


class Impossible(Exception):
    """A method can't do what it was asked, for the reason in the message."""


@dataclass
class Examiner:
    """Asks a model.

    Args:
        assistant: the model and its processor.
        batch: questions at a time.
        suffix: put behind every question.
        commit: noted in records.
    """

    assistant: Assistant
    batch: int
    suffix: str = ""
    commit: str | None = None
    cost: flops.Cost | None = field(init=False, default=None)
    uncounted: str = field(init=False, default="")

    def __post_init__(self) -> None:
        model, tokenizer = self.assistant.model, self.assistant.processor.tokenizer
        tokenizer.padding_side = "left"
        self.layers = model.config.get_text_config().num_hidden_layers
        try:
            self.cost = flops.Cost.of(model.config, model.dtype.itemsize)
        except ValueError as error:
            self.uncounted = first_sentence(error)
        self.steps = max(
            len(ids) for ids in tokenizer(_ANSWERS, add_special_tokens=False).input_ids
        )

    def prepare(self, number: int, items: Items) -> Block:
        """The prompts of a block; questions of like length share a batch, so little is padding."""
        prompts = [self.assistant.prompt(q.text + self.suffix) for _, q in items]
        images = [Image.fromarray(scene.image) for scene, _ in items]
        length = [len(ids) for ids in self.assistant.processor.tokenizer(prompts).input_ids]
        order = sorted(range(len(items)), key=lambda at: length[at])
        batches = [
            Batch(self._inputs(prompts, images, places), places)
            for start in range(0, len(order), self.batch)
            for places in [order[start : start + self.batch]]
        ]
        first = self._inputs(prompts, images, [0])
        return Block(number, [q.answer for _, q in items], batches, first)

    def _inputs(self, prompts: list[str], images: list[Any], places: list[int]) -> Any:
        made = self.assistant.processor(
            text=[prompts[at] for at in places],
            images=[images[at] for at in places],
            padding=True,
            return_tensors="pt",
        )
        return made.to(self.assistant.device, self.assistant.model.dtype)

    def answer(self, run: Run, block: Block) -> Record:
        """Put a block to the model with a run's method.

        Raises:
            Impossible: the method can't be had at this budget in this model.
        """
        words = [""] * len(block.answers)
        sums: Counter[str] = Counter()
        seconds = 0.0
        with self._patched(run) as handle:
            for batch in block.batches:
                start = time.perf_counter()
                said = self._generate(run, batch.inputs)
                seconds += time.perf_counter() - start
                for at, word in zip(batch.places, said, strict=True):
                    words[at] = word
                self._count(sums, batch.inputs, handle)
        selection = None
        if block.number == 0 and run.method is not None and self.cost is not None:
            selection = flops.selection(
                self.assistant.model, block.first, run.method, self.cost
            )  # fmt: skip
        right = "".join(
            str(int(plain(word) == answer))
            for word, answer in zip(words, block.answers, strict=True)
        )
        return Record(
            run.key, block.number, right, words, seconds, dict(sums), selection, self.commit
        )

    @contextlib.contextmanager
    def _patched(self, run: Run) -> Iterator[Any]:
        if run.method is None:
            yield None
            return
        try:
            handle = patch(self.assistant.model, run.method, processor=self.assistant.processor)
        except (ValueError, NotImplementedError) as error:
            raise Impossible(first_sentence(error)) from error
        with handle:
            yield handle

    def _generate(self, run: Run, inputs: Any) -> list[str]:
        model, processor = self.assistant.model, self.assistant.processor
        try:
            out = model.generate(**inputs, max_new_tokens=self.steps, do_sample=False)
        except (ValueError, NotImplementedError) as error:
            if run.method is None:
                raise
            raise Impossible(first_sentence(error)) from error
        new = out[:, inputs["input_ids"].shape[1] :].cpu()  # waits for the device
        return list(processor.batch_decode(new, skip_special_tokens=True))

    def _count(self, sums: Counter[str], inputs: Any, handle: Any) -> None:
        """Add what the prompts of a batch cost, each by itself."""
        image = inputs["input_ids"] == self.assistant.model.config.image_token_id
        before = image.sum(1).tolist()
        whole = inputs["attention_mask"].sum(1).tolist()
        after, stages, at = before, [()] * len(before), ()
        if handle is not None:
            after = list(handle.last.tokens_after)
            if handle.last.stages:
                stages = list(zip(*handle.last.stages, strict=True))
                at = handle.method.stages(self.layers)
        for total, had, enter, left in zip(whole, before, after, stages, strict=True):
            text = total - had
            seen = flops.layer_tokens(text, enter, left, at, self.layers)
            sums.update(text=text, before=had, after=enter)
            sums["average"] += sum(seen) / self.layers - text
            if self.cost is not None:
                sums["flops"] += self.cost.prefill(seen)
                sums["kv_bytes"] += self.cost.kv_bytes(seen)


def plain(answer: str) -> str:
    """The first word of an answer, in lower case and without punctuation."""
    words = "".join(c if c.isalnum() else " " for c in answer.lower()).split()
    return words[0] if words else ""


class Store:
    """The records in a folder: every process appends to a file of its own, and reads all.

    Args:
        folder: holds one file of JSON lines for each process; made if it is not there.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.records: dict[tuple[str, int, int], Record] = {}
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path)
        self._path = folder / f"{rank}.jsonl"
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("a") as file:  # a kill left half a line
                file.write("\n")

    def _read(self, path: Path) -> None:
        for line in path.read_text().splitlines():
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError):  # half a line, of a process that was killed
                continue
            self.records.setdefault(record.place, record)

    def add(self, record: Record) -> None:
        """Keep a record, on disk at once."""
        self.records[record.place] = record
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")


@dataclass(frozen=True)
class Answers:
    """All that a run answered.

    Attributes:
        right: of each question.
        seconds, sums: see `Record`; of all questions.
        selection: operations that the choice adds to a prefill.
    """

    right: list[bool]
    seconds: float
    sums: dict[str, float]
    selection: int | None


def joined(records: dict[tuple[str, int, int], Record], run: str, sizes: list[int]) -> Answers:
    """A run's records of blocks of these sizes as one."""
    parts = [records[run, at, size] for at, size in enumerate(sizes)]
    sums: Counter[str] = Counter()
    for part in parts:
        sums.update(part.sums)
    right = [mark == "1" for part in parts for mark in part.right]
    seconds = sum(part.seconds for part in parts)
    return Answers(right, seconds, dict(sums), parts[0].selection)


def kinds(count: int) -> npt.NDArray[np.str_]:
    """The types of so many questions, in order."""
    return np.resize(np.array(QUESTION_TYPES), count)
