"""What `cdrop demo` runs: one image, some questions, with all visual tokens and with fewer.

Parsing and printing are `cli`'s; here is what a user of the library could have written.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .data import tiny_llava_path
from .hf import Handle, patch, supported
from .methods import ConsensusDrop, Method, Random
from .viz import SelectionRow

REPEATS = 7  # timings of each way of answering
_ANSWER_TOKENS = 32
# The shipped model was trained on one-word answers, and short of tokens may not stop after one.
_SHIPPED_ANSWER_TOKENS = 1


class DemoError(Exception):
    """Something the user asked for can't be done; the message says what, in one sentence."""


@dataclass(frozen=True)
class Asked:
    """A prompt as the model takes it.

    Args:
        inputs: what the processor made of it and the image.
        tokens: visual tokens in it.
    """

    inputs: Any
    tokens: int


@dataclass
class Run:
    """How one way of answering went: `kept` visual tokens, seconds, bytes, and the choice."""

    name: str
    kept: int = 0
    answer: str = ""
    seconds: float = 0.0
    kv_bytes: int = 0
    pruning: Any = None


class Assistant:
    """A model with its processor.

    Args:
        name: Hugging Face id or folder; None for the model that ships with the package.
        device: as torch names it; None takes a GPU if there is one.
        dtype: "auto" (as stored) or the name of a torch dtype.

    Raises:
        DemoError: there is no such device or model, or it is not a model we can patch.
    """

    def __init__(
        self, name: str | None = None, device: str | None = None, dtype: str = "auto"
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_device(self.device)
        source = str(tiny_llava_path()) if name is None else name
        self.shipped = name is None
        self.name = "tiny-llava (ships with the package)" if name is None else name
        _check_family(source)
        with _loading(source):
            self.processor: Any = AutoProcessor.from_pretrained(source)
            model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
            self.model: Any = model.to(self.device).eval()
        with _with(self, ConsensusDrop(keep=1)):
            pass  # a model that can't be patched is refused here, before anything was asked of it

    def ask(self, image: Any, question: str) -> Asked:
        """The prompt for a question about a PIL image.

        Raises:
            DemoError: the question stands for a picture itself, or the model's processor fails.
        """
        self.check_question(question)
        with _failing(f"the processor of {self.name} can't take {question!r}"):
            text = self.prompt(question)
            inputs = self.processor(text=[text], images=[image], return_tensors="pt")
            inputs = inputs.to(self.device, self.model.dtype)
        tokens = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        return Asked(inputs, tokens)

    def check_question(self, question: str) -> None:
        """Raises DemoError for a question that the processor would take for another image."""
        token = str(self.processor.image_token)
        if token in question:
            raise DemoError(
                f"--question can't contain {token}, which stands for the picture, got {question!r}"
            )

    def prompt(self, question: str) -> str:
        """The text to give the processor for a question about one image."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            turn = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(turn, add_generation_prompt=True))
        if self.shipped:
            question = plain(question)
        return f"USER: {self.processor.image_token}\n{question} ASSISTANT:"

    def unknown_words(self, question: str) -> list[str]:
        """Words that the shipped model never saw; none for any other model."""
        vocabulary = self.processor.tokenizer.get_vocab() if self.shipped else {}
        return [w for w in plain(question).split() if self.shipped and w not in vocabulary]

    def answer(self, asked: Asked) -> str:
        """The model's greedy answer."""
        most = _SHIPPED_ANSWER_TOKENS if self.shipped else _ANSWER_TOKENS
        out = self._generate(asked, most).sequences
        new = out[0, asked.inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(new, skip_special_tokens=True)).strip()

    def first_token(self, asked: Asked) -> tuple[float, int]:
        """Seconds until the first token is there, and bytes of the KV cache by then."""
        self._wait()
        start = time.perf_counter()
        cache = self._generate(asked, 1).past_key_values
        self._wait()
        return time.perf_counter() - start, kv_bytes(cache)

    def seen(self, asked: Asked) -> npt.NDArray[np.uint8]:
        """The image as the encoder gets it, resized and cropped: `[H, W, 3]` uint8."""
        pixels = asked.inputs["pixel_values"][0].float().cpu().permute(1, 2, 0).numpy()
        how = self.processor.image_processor
        if how.do_normalize:
            pixels = pixels * np.array(how.image_std) + np.array(how.image_mean)
        return np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8)

    def _generate(self, asked: Asked, tokens: int) -> Any:
        with _failing(f"{self.name} can't answer on {self.device}"):
            return self.model.generate(
                **asked.inputs,
                max_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def steady_threads(assistant: Assistant) -> Iterator[int]:
    """Run the shipped model on one CPU thread, any other on torch's own number, which it yields.

    A model so small gains nothing from threads, and its times jump tenfold on a busy machine.
    """
    before = torch.get_num_threads()
    if assistant.shipped:
        torch.set_num_threads(1)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def plain(question: str) -> str:
    """A question in the shipped model's spelling: lower case, the question mark a word."""
    return " ".join(re.sub(r"([?,])", r" \1 ", question.lower()).split())


def kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a Hugging Face cache, all layers."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _check_family(source: str) -> None:
    from transformers import AutoConfig

    with _loading(source):
        family = AutoConfig.from_pretrained(source).model_type
    if family not in supported():
        raise DemoError(
            f"model {source} is of type {family!r}, which is not supported; supported: "
            f"{', '.join(supported())}"
        )


def _check_device(name: str) -> None:
    """Refuse a device that is none, or can't be had here, before a model is loaded for it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:  # torch's own sentence lists a dozen that nobody has
        raise DemoError(f"--device must be cpu, cuda, or cuda:1 and so on, got {name}") from error
    if device.type == "meta":
        raise DemoError("--device meta holds no values, so nothing can be computed there")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DemoError(f"--device {name}: torch {torch.__version__} finds no GPU here")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise DemoError(f"--device {name} can't be used: {first_sentence(error)}") from error


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever goes wrong in a model's own code, which may be anyone's, in one sentence."""
    try:
        yield
    except Exception as error:
        raise DemoError(f"{what}: {first_sentence(error)}") from error


@contextlib.contextmanager
def _loading(source: str) -> Iterator[None]:
    """Whatever goes wrong while loading, in one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise DemoError(f"can't load model {source}: {first_sentence(error)}") from error


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, without its last full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")


def open_image(path: Path) -> Any:
    """The picture in a file, as RGB.

    Raises:
        DemoError: there is none, or it can't be read.
    """
    from PIL import Image

    if not path.exists():
        raise DemoError(f"--image {path}: there is no such file")
    if path.is_dir():
        raise DemoError(f"--image {path} is a folder, not a picture")
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DemoError(f"--image {path} is no picture that can be read") from error


def budget(keep: int | float, tokens: int) -> int:
    """The number of tokens a `--keep` stands for.

    Raises:
        DemoError: it is more than there are.
    """
    if keep > tokens:
        raise DemoError(f"--keep must be in 1..{tokens} (the visual tokens), got {keep}")
    return max(1, round(keep * tokens)) if isinstance(keep, float) else keep


def compare(
    assistant: Assistant, asked: Asked, keep: int, alpha: float, seed: int, repeats: int = REPEATS
) -> list[Run]:
    """Answer with all tokens, with ConsensusDrop and with random ones, and time each.

    Each round times every way once, in turn, so that a slow moment of the machine hits all alike;
    the first round, a warm-up, does not count.
    """
    ways: tuple[tuple[str, Method | None], ...] = (
        ("all tokens", None),
        ("ConsensusDrop", ConsensusDrop(keep=keep, alpha=alpha)),
        ("random", Random(keep=keep, seed=seed, positions="original")),
    )
    runs = [_answer(assistant, asked, *way) for way in ways]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats + 1):
        for at, (_, method) in enumerate(ways):
            with _with(assistant, method):
                seconds, runs[at].kv_bytes = assistant.first_token(asked)
            times[at].append(seconds)
    for run, seen in zip(runs, times, strict=True):
        run.seconds = statistics.median(seen[1:])
    return runs


def _answer(assistant: Assistant, asked: Asked, name: str, method: Method | None) -> Run:
    with _with(assistant, method) as handle:
        run = Run(name, asked.tokens, assistant.answer(asked))
        if handle is not None and handle.last is not None:
            run.pruning = handle.last
            run.kept = sum(handle.last.tokens_after)
    return run


@contextlib.contextmanager
def _with(assistant: Assistant, method: Method | None) -> Iterator[Handle | None]:
    if method is None:
        yield None
        return
    try:
        handle = patch(assistant.model, method, processor=assistant.processor)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DemoError(
            f"model {assistant.name} can't be patched: {first_sentence(error)}"
        ) from error
    with handle:
        yield handle


def figure_row(assistant: Assistant, asked: Asked, runs: Sequence[Run], title: str) -> SelectionRow:
    """What ConsensusDrop did in a comparison, for `viz.selection_figure`."""
    pruning = next(run.pruning for run in runs if run.name == "ConsensusDrop")
    chosen, scores = pruning.selection, pruning.scores
    answers = "      ".join(f"{run.name} ({run.kept}): {run.answer}" for run in runs)
    return SelectionRow(
        image=assistant.seen(asked),
        visual=scores.visual[0].cpu().numpy(),
        textual=None if scores.textual is None else scores.textual[0].cpu().numpy(),
        fused=scores.fused[0].cpu().numpy(),
        index=chosen.index[0].cpu().numpy(),
        assign=chosen.assign[0].cpu().numpy(),
        size=chosen.size[0].cpu().numpy(),
        grid=pruning.grid,
        question=title,
        answers=answers,
    )
