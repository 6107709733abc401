"""Examine visual-token reduction on questions of known answers: accuracy, and what it costs.

    cdrop eval --methods 'ConsensusDrop(alpha=0.3),VisionDrop,AdaFV' --keep 64,32,16,8 --out FOLDER
    torchrun --nproc-per-node 4 -m benchmarks.accuracy.evaluate --out FOLDER ...
    accelerate launch -m benchmarks.accuracy.evaluate --out FOLDER ...

Every method answers the same questions. Within FOLDER: `results.json`, `results.csv`,
`pareto.png`, `types.png`, and `answers/`, from which the same command goes on after a kill, and
which further methods and budgets join.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from consensusdrop_kernels.cli import quiet_transformers
from consensusdrop_kernels.demo import Assistant, DemoError

from . import answers, data, plots, tables
from .answers import Examiner, Impossible, Store
from .runs import SIGNALS, Keep, Plan, Run, parse_methods, plan

_SPLITS = {"test": data.TEST, "validation": data.VALIDATION}
_METHODS = "ConsensusDrop,VisionDrop,AdaFV,Random,Uniform"


@dataclass(frozen=True)
class Options:
    """An examination.

    Args:
        out: the folder.
        plan: what to run.
        model: Hugging Face id or folder; None for the model that ships with the package.
        questions, seed, split: what to ask.
        bars: the budget of the picture by type.
        device, dtype: as `Assistant` takes them.
        batch: questions at a time.
        suffix: put behind every question.
    """

    out: Path
    plan: Plan
    model: str | None = None
    questions: int = 4000
    seed: int = 0
    split: str = "test"
    bars: Keep = 32
    device: str | None = None
    dtype: str = "auto"
    batch: int = 32
    suffix: str = ""

    def check(self) -> None:
        """Raises DemoError for what can't be asked."""
        kinds, most = len(data.QUESTION_TYPES), answers.BLOCK * answers.BLOCKS
        if self.questions % kinds or not 0 < self.questions <= most:
            raise DemoError(
                f"--questions must be a multiple of {kinds} (the types, in equal parts) up to "
                f"{most}, got {self.questions}"
            )
        if not 0 <= self.seed < answers.SEEDS:
            raise DemoError(f"--seed must be in 0..{answers.SEEDS - 1}, got {self.seed}")
        if not 1 <= self.batch <= answers.BLOCK:
            raise DemoError(f"--batch must be in 1..{answers.BLOCK}, got {self.batch}")


@dataclass(frozen=True)
class Team:
    """The processes that share an examination, and this one's place among them."""

    rank: int = 0
    size: int = 1
    state: Any = field(default=None, repr=False)

    @classmethod
    def of_environment(cls, device: str | None) -> Team:
        """What a launcher (torchrun, accelerate) set up; one process without any.

        Raises:
            DemoError: there are several, but not accelerate.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise DemoError("several processes need accelerate: pip install accelerate") from error
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu)
        return cls(state.process_index, state.num_processes, state)

    def device(self, wanted: str | None) -> str | None:
        """This process's own GPU, unless a certain device is wanted."""
        alone = self.state is None or wanted not in (None, "cuda")
        return wanted if alone else str(self.state.device)

    def gather(self, part: list[Any]) -> list[Any]:
        """The items of all processes, in all of them."""
        if self.state is None:
            return part
        from accelerate.utils import gather_object

        return list(gather_object(part))

    def close(self) -> None:
        """Part."""
        if self.state is not None:
            self.state.destroy_process_group()

    def agree(self, problem: str | None) -> None:
        """Raises DemoError in every process if any has a problem."""
        found = self.gather([problem] if problem else [])
        if found:
            raise DemoError(found[0])


def examine(options: Options, team: Team | None = None) -> list[tables.Row]:
    """Run what is missing and write the results.

    Args:
        options: what to ask, of whom, with which methods.
        team: the processes; by default this one alone.

    Returns:
        The rows, see `tables.rows`; in every process but the first none.

    Raises:
        DemoError: something can't be done, with the reason.
    """
    options.check()
    team = team or Team()
    begin = time.monotonic()
    assistant = Assistant(options.model, team.device(options.device), options.dtype)
    examiner = Examiner(assistant, options.batch, options.suffix, _commit())
    settings = _settings(options, assistant)
    team.agree(_settle(options.out, settings, team.rank))
    store = Store(options.out / "answers", team.rank)
    _share(store, team)
    reasons = _ask(options, team, examiner, store)
    _share(store, team)
    reasons = dict(team.gather(list(reasons.items())))
    if team.rank > 0:
        return []
    sizes = answers.block_sizes(options.questions)
    known = [run for run in options.plan.runs if not run.reason and run.key not in reasons]
    found = {run.key: answers.joined(store.records, run.key, sizes) for run in known}
    table = tables.rows(options.plan, found, reasons)
    used = {
        store.records[run.key, at, size].commit for run in known for at, size in enumerate(sizes)
    }
    header = settings | _header(options, assistant, team, examiner) | {
        "commits": sorted(commit or "unknown" for commit in used),
        "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    tables.write(options.out, header, table)
    name = Path(settings["model"]).name or settings["model"]
    title = f"{name}, {options.questions} questions, {options.split} seed {options.seed}"
    plots.draw(options.out, table, options.bars, title)
    return table


def _share(store: Store, team: Team) -> None:
    """Let every process know every record, whatever folders they see."""
    for record in team.gather(list(store.records.values())):
        store.records.setdefault(record.place, record)


def _ask(options: Options, team: Team, examiner: Examiner, store: Store) -> dict[str, str]:
    """Answer this process's blocks, those that are missing; why some runs could not be had."""
    runs = {run.key: run for run in options.plan.runs if not run.reason}
    sizes = answers.block_sizes(options.questions)
    mine = [(at, size) for at, size in enumerate(sizes) if at % team.size == team.rank]
    reasons: dict[str, str] = {}
    total = len(runs) * sum(size for _, size in mine)
    bar = tqdm(total=total, unit="answers", disable=team.rank > 0, smoothing=0.05)
    for at, size in mine:
        missing = [run for key, run in runs.items() if (key, at, size) not in store.records]
        bar.update((len(runs) - len(missing)) * size)
        if not missing:
            continue
        items = answers.draw(_SPLITS[options.split], options.seed, at, size)
        block = examiner.prepare(at, items)
        for run in missing:
            if run.key not in reasons:
                bar.set_postfix_str(f"{run.label} {run.keep or 'all'}", refresh=False)
                _try(examiner, run, block, store, reasons)
            bar.update(size)
    bar.close()
    return reasons


def _try(
    examiner: Examiner, run: Run, block: answers.Block, store: Store, reasons: dict[str, str]
) -> None:
    try:
        store.add(examiner.answer(run, block))
    except Impossible as error:
        reasons[run.key] = str(error)


# --- what was examined --------------------------------------------------------------------------


def _settings(options: Options, assistant: Assistant) -> dict[str, Any]:
    """What answers depend on, beside the method: those in one folder must have it in common."""
    return {
        "model": options.model or assistant.name,
        "weights": _fingerprint(assistant.model),
        "dtype": str(assistant.model.dtype).removeprefix("torch."),
        "device": torch.device(assistant.device).type,
        "split": options.split,
        "seed": options.seed,
        "batch": options.batch,
        "suffix": options.suffix,
    }


def _fingerprint(model: Any) -> str:
    """A hash of some values of every weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        some = weight.detach().flatten()[:64].float().cpu().numpy()
        digest.update(name.encode() + bytes(str(tuple(weight.shape)), "ascii") + some.tobytes())
    return digest.hexdigest()[:16]


def _settle(out: Path, settings: dict[str, Any], rank: int) -> str | None:
    """Note the settings of a new folder; what differs in one with answers, in a sentence."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if not path.exists():
        draft = out / f"settings.{rank}"  # several processes may be about it
        draft.write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(draft, path)
    known = json.loads(path.read_text())
    for name, value in settings.items():
        if known.get(name) != value:
            return f"--out {out} holds answers of {name} {known.get(name)!r}, not {value!r}"
    return None


def _header(
    options: Options, assistant: Assistant, team: Team, examiner: Examiner
) -> dict[str, Any]:
    import transformers

    from consensusdrop_kernels import __version__

    on_gpu = assistant.device.startswith("cuda")
    return {
        "parameters": sum(p.numel() for p in assistant.model.parameters()),
        "hardware": torch.cuda.get_device_name(assistant.device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "processes": team.size,
        "questions": options.questions,
        "answer_tokens": examiner.steps,
        "not_counted": examiner.uncounted or None,
        "versions": {
            "consensusdrop_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        root = Path(__file__).parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# --- the command line ---------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """One that reports a mistake in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _keeps(text: str) -> list[Keep]:
    from consensusdrop_kernels.methods.base import check_keep

    try:
        found: list[Keep] = [int(s) if s.strip().isdigit() else float(s) for s in text.split(",")]
        for keep in found:
            check_keep(keep)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be counts such as 32 and shares such as 0.25, with commas, got {text}"
        ) from error
    return found


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _parser(program: str) -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = _Parser(
        prog=program,
        description=lines[0],
        epilog="Methods are written as in Python, with their options by name: "
        "'VisionDrop,ConsensusDrop(alpha=0.3, label=\"ours\")'; label names the rows, keep gives a "
        "method a budget of its own. benchmarks/accuracy/README.md says what is measured and how.",
    )
    # fmt: off
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the results; goes on there")
    add("--model", metavar="ID", help="Hugging Face id or folder (default: the shipped tiny LLaVA)")
    add("--methods", default=_METHODS, metavar="LIST", help=f"default {_METHODS}; Full always runs")
    add("--keep", type=_keeps, default=[64, 32, 16, 8], metavar="LIST",
        help="budgets: counts of visual tokens, shares such as 0.25 (default 64,32,16,8)")
    add("--baseline", default=SIGNALS, metavar="METHOD",
        help="what to compare with: signals (the default: the better of ConsensusDrop's two "
        "signals alone), none, or a method")
    add("--questions", type=int, default=4000, metavar="N", help="multiple of 8 (default 4000)")
    add("--seed", type=int, default=0, metavar="N", help="of the questions (default 0)")
    add("--split", choices=tuple(_SPLITS), default="test",
        help="scenes to ask about: validation to choose options, test to report (the default)")
    add("--bars", type=_keeps, metavar="KEEP", help="budget of types.png (default: --keep's last)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights (default: as stored)")
    add("--batch", type=int, default=32, metavar="N", help="questions at a time (default 32)")
    add("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)")
    add("--suffix", default="", metavar="TEXT",
        help="put behind every question, such as ' Answer with a single word.'")
    # fmt: on
    return parser


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Examine what the command line asks for.

    Returns:
        0, or 2 after a sentence on stderr that says what can't be done; 130 when interrupted.
    """
    program = program or "python -m benchmarks.accuracy.evaluate"
    args = _parser(program).parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet_transformers()
    try:
        options = _options(args)
        team = Team.of_environment(args.device)
        table = examine(options, team)
        team.close()
    except DemoError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for line in tables.lines(table):
        print(line)
    return 0


def _options(args: argparse.Namespace) -> Options:
    bars = args.bars[0] if args.bars else args.keep[-1]
    chosen = Options(
        args.out, plan(parse_methods(args.methods), args.keep, args.baseline), args.model,
        args.questions, args.seed, args.split, bars, args.device, args.dtype, args.batch,
        args.suffix,
    )  # fmt: skip
    chosen.check()
    return chosen


if __name__ == "__main__":
    sys.exit(main())
