"""Train a small LLaVA from nothing on synthetic scenes, with all visual tokens.

    python -m benchmarks.accuracy.train --out FOLDER --tower siglip --layers 6 --seed 2

Stage 1 teaches the vision tower: contrastive with captions, and dense heads that say what each
patch shows. Stage 2 teaches projector and LLM to answer, the tower frozen. Then the model is
examined through its saved folder on questions it never saw. Within FOLDER: a Hugging Face model
and processor, `training.json` with losses and accuracies, and until the end `checkpoint.pt`; the
same command goes on from there, with what an uninterrupted run would have seen.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from consensusdrop_kernels.scenes import QUESTION_TYPES

from . import data
from .models import Packed, Shape, TowerHeads, build, processor

MEAN, STD = 0.45, 0.22  # as the processor that ships with the package
_AFTER, _LOCATE = 0.1, 5.0  # weights of the losses beside the answer's


@dataclass(frozen=True)
class Options:
    """A training run; what changes the model is checked against a checkpoint's.

    Args:
        out: the folder.
        shape, seed: of the model; the seed also picks its lane of training scenes.
        images, batch, rate: of the two stages; `rate` is AdamW's.
        muon: Muon's rate over AdamW's in the two stages. Retrieving what a question names is
            learned about twice as fast with a larger one, and the tower does without.
        held_out: validation scenes in a look during training.
        final: test questions at the end.
        look: steps between looks.
        save: seconds between checkpoints.
        workers: processes that draw scenes ahead.
    """

    out: Path
    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    images: tuple[int, int] = (72_000, 48_000)
    batch: tuple[int, int] = (32, 24)
    rate: tuple[float, float] = (2.5e-3, 2e-3)
    muon: tuple[float, float] = (1.0, 3.0)
    held_out: int = 48
    final: int = 1024
    look: int = 100
    save: float = 180.0
    workers: int = 1
    device: str = "cpu"

    def recipe(self) -> dict[str, Any]:
        """What the trained weights depend on."""
        chosen = asdict(self)
        for name in ("out", "save", "workers", "device", "final"):
            del chosen[name]
        return json.loads(json.dumps(chosen))

    def steps(self, stage: int) -> int:
        return self.images[stage - 1] // self.batch[stage - 1]


class Optimizer:
    """Muon for the matrices within `hidden`, AdamW for everything else, one schedule for both:
    60 warm-up steps, then flat, from 40 % of the steps a cosine to a fiftieth. Rates are AdamW's
    and Muon's."""

    def __init__(
        self, hidden: nn.Module, rest: nn.Module, rates: tuple[float, float], steps: int
    ) -> None:
        matrices = [m.weight for m in hidden.modules() if isinstance(m, nn.Linear)]
        known = {id(p) for p in matrices}
        self.parameters = [
            p for m in (hidden, rest) for p in m.parameters() if p.requires_grad
        ]  # fmt: skip
        others = [p for p in self.parameters if id(p) not in known]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.AdamW(others, rates[0], betas=(0.9, 0.98), weight_decay=0.0),
            torch.optim.Muon(matrices, rates[1], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        )
        self.rates, self.steps = rates, steps

    def step(self, at: int) -> None:
        """Step number `at`, from 0; clears the gradients."""
        flat = 0.4 * self.steps
        fall = min(1.0, max(0.0, (at - flat) / (self.steps - flat)))
        wave = (1 + torch.cos(torch.tensor(torch.pi * fall)).item()) / 2
        share = min(1.0, (at + 1) / 60) * (0.02 + 0.98 * wave)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Run:
    """One training run, from its start or from the checkpoint in its folder."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model = build(options.shape, options.seed)
        self.vocabulary = processor(options.shape).tokenizer.get_vocab()
        self.heads = TowerHeads(options.shape, len(self.vocabulary))
        self.packed = Packed(self.model, options.shape)
        for module in (self.heads, self.packed):
            module.to(options.device).train()
        self.model.set_attn_implementation("accuracy_plain" if options.device == "cpu" else "sdpa")
        self.stage, self.at = 1, 0
        self.log: dict[str, Any] = {"recipe": options.recipe(), "seconds": 0.0, "looks": []}
        saved = None
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location=options.device, weights_only=True)
            if saved["log"]["recipe"] != options.recipe():
                raise ValueError(
                    f"{self.checkpoint} is of another run: {saved['log']['recipe']}, "
                    f"not {options.recipe()}"
                )
            self.stage, self.at, self.log = saved["stage"], saved["at"], saved["log"]
            self.packed.load_state_dict(saved["packed"])
            self.heads.load_state_dict(saved["heads"])
        self.optimizer = self._optimizer()
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])

    @property
    def checkpoint(self) -> Path:
        return self.options.out / "checkpoint.pt"

    def _optimizer(self) -> Optimizer:
        """The tower learns in stage 1 only; its last layer is not used in stage 2."""
        options, llava = self.options, self.model.model
        llava.vision_tower.requires_grad_(self.stage == 1)
        rate, muon = options.rate[self.stage - 1], options.muon[self.stage - 1]
        rates, steps = (rate, rate * muon), options.steps(self.stage)
        if self.stage == 1:
            return Optimizer(llava.vision_tower, self.heads, rates, steps)
        hidden = nn.ModuleList([llava.multi_modal_projector, llava.language_model.layers])
        rest = nn.ModuleList(
            [llava.language_model.embed_tokens, llava.language_model.norm,
             self.model.lm_head, self.packed.locate]
        )  # fmt: skip
        return Optimizer(hidden, rest, rates, steps)

    def train(self, stop: int | None = None) -> bool:
        """Go on until the end, or for `stop` steps; True at the end."""
        while self.stage <= 2:
            done = self._train_stage(stop)
            stop = None if stop is None else stop - done
            if self.at < self.options.steps(self.stage):
                self.save()
                return False
            self.stage, self.at = self.stage + 1, 0
            if self.stage == 2:
                self.optimizer = self._optimizer()
        return True

    def _train_stage(self, stop: int | None) -> int:
        options, first = self.options, self.at
        last = options.steps(self.stage)
        last = last if stop is None else min(last, first + stop)
        batches = self._batches(data.lane(options.seed, self.stage), self.stage)
        tick = saved = time.monotonic()
        bar = tqdm(total=options.steps(self.stage), initial=first, desc=f"stage {self.stage}")
        for batch in data.load(batches, first, last, options.workers):
            loss, figures = self._loss(batch)
            loss.backward()
            self.optimizer.step(self.at)
            self.at += 1
            bar.update()
            now = time.monotonic()
            self.log["seconds"] += now - tick
            tick = now
            if self.at % options.look == 0 or self.at == options.steps(self.stage):
                self._look(figures)
                bar.set_postfix_str(self._words())
            if now - saved > options.save:
                self.save()
                saved = now
        bar.close()
        return self.at - first

    def _batches(self, seeds: range, stage: int) -> data.Batches:
        options = self.options
        size = options.batch[stage - 1]
        return data.Batches(seeds, size, options.shape.grid, self.vocabulary, stage)

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The stage's loss of a batch and figures of it."""
        batch = {name: tensor.to(self.options.device) for name, tensor in batch.items()}
        pixels = (batch.pop("pixels").float() / 255 - MEAN) / STD
        with torch.autocast(self.options.device, torch.bfloat16):
            if self.stage == 1:
                tower = self.model.model.vision_tower
                return self.heads(tower(pixels, output_hidden_states=True), batch)
            answer, after, located = self.packed(pixels, batch)
        return _answer_loss(answer, after, located, batch)

    @torch.no_grad()
    def _look(self, figures: dict[str, Tensor]) -> None:
        """Add to the log: the last batch's figures, and those of validation scenes."""
        entry: dict[str, Any] = {"stage": self.stage, "step": self.at}
        entry["train"] = _rounded(figures)
        seeds = data.VALIDATION[: self.options.held_out]
        size = min(self.options.batch[self.stage - 1], len(seeds))
        batches = replace(self._batches(seeds, self.stage), size=size)
        looked = [self._loss(batches[i])[1] for i in range(len(batches))]
        names = {name for each in looked for name in each}
        entry["held_out"] = _rounded(
            {n: torch.stack([e[n] for e in looked if n in e]).mean() for n in sorted(names)}
        )
        self.log["looks"].append(entry)

    def _words(self) -> str:
        return " ".join(f"{n} {v:.2f}" for n, v in self.log["looks"][-1]["held_out"].items())

    def save(self) -> None:
        """Write the checkpoint and the log; a kill meanwhile leaves the former ones whole."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        state = {
            "stage": self.stage,
            "at": self.at,
            "log": self.log,
            "packed": self.packed.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with _whole(self.checkpoint) as path:
            torch.save(state, path)
        self._write_log()

    def _write_log(self) -> None:
        with _whole(self.options.out / "training.json") as path:
            path.write_text(json.dumps(self.log, indent=1) + "\n")

    def finish(self) -> dict[str, float]:
        """Write the model, examine it as it was written, and drop the checkpoint."""
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        self.model.set_attn_implementation("sdpa")
        self.model.requires_grad_(True).save_pretrained(out)
        processor(self.options.shape).save_pretrained(out)
        self.log["test"] = examine(out, self.options.final, self.options.device)
        self._write_log()
        self.checkpoint.unlink(missing_ok=True)
        return self.log["test"]


def _answer_loss(
    answer: Tensor, after: Tensor, located: Tensor | None, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of the answers, a little of what ends them and of where the objects are that
    a relation names; the accuracy over all and of each type."""
    said = [
        batch["words"].gather(2, batch["turn"][..., None] + i).squeeze(2).flatten() for i in (1, 2)
    ]
    logits = answer.flatten(0, 1).float()
    figures = {"loss": F.cross_entropy(logits, said[0])}
    loss = figures["loss"] + _AFTER * F.cross_entropy(after.flatten(0, 1).float(), said[1])
    related = (batch["named"].sum(2) > 0)[..., None, None]
    if located is not None:
        off = (located.float() - batch["centers"]).square() * related
        figures["located"] = off.sum() / (4 * related.sum()).clamp(min=1)
        loss = loss + _LOCATE * figures["located"]
    right = (logits.argmax(1) == said[0]).float()
    kinds = batch["kind"].flatten()
    figures["accuracy"] = right.mean()
    for at, kind in enumerate(QUESTION_TYPES):
        if (kinds == at).any():
            figures[kind] = right[kinds == at].mean()
    return loss, figures


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` once it is written."""
    draft = path.with_name(path.name + ".part")
    yield draft
    os.replace(draft, path)


def _rounded(figures: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in figures.items()}


@torch.no_grad()
def examine(
    folder: Path, count: int, device: str = "cpu", split: range = data.TEST
) -> dict[str, float]:
    """Accuracy of a saved model with all its tokens, over all types (`all`) and of each.

    Args:
        folder: a Hugging Face folder of a LLaVA and its processor.
        count: questions, the types in equal parts.
        split: the scenes.
    """
    asked_of = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval().to(device)
    right: dict[str, list[bool]] = {}
    items = data.exam(split, count)
    for start in range(0, count, 32):
        some = items[start : start + 32]
        inputs = asked_of(
            text=[f"USER: <image> {question.text} ASSISTANT:" for _, question in some],
            images=[scene.image for scene, _ in some],
            padding=True,
            return_tensors="pt",
        ).to(device)
        ids = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        words = asked_of.tokenizer.convert_ids_to_tokens(ids)
        for (_, question), word in zip(some, words, strict=True):
            right.setdefault(question.kind, []).append(word == question.answer)
    every = [hit for hits in right.values() for hit in hits]
    marks = {"all": every} | right
    return {name: round(sum(hits) / len(hits), 4) for name, hits in marks.items()}


def main(arguments: list[str] | None = None) -> None:
    """Train what the command line asks for, or go on with it."""
    default, shape = Options(Path()), Shape()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the model, the log and the checkpoint")
    add("--tower", choices=("clip", "siglip"), default=shape.tower)
    for name in ("patch", "layers", "width", "text_layers", "text_width"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name))
    add("--seed", type=int, default=default.seed)
    add("--images", type=int, nargs=2, default=default.images, help="of stage 1 and of stage 2")
    add("--batch", type=int, nargs=2, default=default.batch, help="images of each stage's batch")
    add("--rate", type=float, nargs=2, default=default.rate, help="AdamW's in each stage")
    add("--muon", type=float, nargs=2, default=default.muon, help="Muon's rate over AdamW's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=None, help="processes that draw scenes (1; GPU: cores - 2)")
    add("--final", type=int, default=default.final, help="test questions at the end")
    add("--save", type=float, default=default.save, help="seconds between checkpoints")
    add("--look", type=int, default=default.look, help="steps between looks at held-out scenes")
    chosen = parser.parse_args(arguments)
    if (chosen.out / "model.safetensors").exists() and not (chosen.out / "checkpoint.pt").exists():
        parser.error(f"--out must be a new or an unfinished folder, {chosen.out} holds a model")
    workers = chosen.workers
    if workers is None:
        workers = 1 if chosen.device == "cpu" else max(1, (os.cpu_count() or 1) - 2)
    run = Run(
        Options(
            out=chosen.out,
            shape=Shape(
                chosen.tower, chosen.patch, chosen.layers, chosen.width, chosen.text_layers,
                chosen.text_width,
            ),
            seed=chosen.seed, images=tuple(chosen.images), batch=tuple(chosen.batch),
            rate=tuple(chosen.rate), muon=tuple(chosen.muon), final=chosen.final,
            look=chosen.look, save=chosen.save,
            workers=workers, device=chosen.device,
        )
    )  # fmt: skip
    run.train()
    print(json.dumps(run.finish(), indent=1))


if __name__ == "__main__":
    main()
