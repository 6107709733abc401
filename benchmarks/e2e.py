"""Whole prefills: how long until the first token, with all visual tokens and with fewer.

    cdrop bench --out FOLDER --model mid --keep 64,128 --device cpu
    python benchmarks/e2e.py --out FOLDER --model llava-1.5-7b --batch 1,8,32 --attention sdpa,flash

For each attention and batch size every method at every budget, its maps form where it has one (see
`end_to_end/maps.py`), the stock model (Full) and random tokens: time to the first token, tokens a
second after it, peak memory, bytes of the KV cache, and where the time goes. In the folder:
`e2e.json`, `e2e.md`, `ttft.png`, `phases.png`; docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from benchmarks.accuracy.flops import Cost
from benchmarks.accuracy.runs import FULL, Spec, parse_methods
from benchmarks.end_to_end import clock, results
from benchmarks.end_to_end.contenders import Contender, Counts, contenders, set_attention
from benchmarks.end_to_end.maps import PLAIN
from benchmarks.end_to_end.models import RANDOM, TINY, Inputs, Subject
from benchmarks.end_to_end.phases import PHASES, watched
from benchmarks.gpu import header
from consensusdrop_kernels import ConsensusDrop, patch
from consensusdrop_kernels.cli import Parser, quiet_transformers
from consensusdrop_kernels.demo import DemoError, first_sentence, kv_bytes

_PLAIN = ",".join(f"{name}={value!r}" for name, value in PLAIN.items())
METHODS = (
    "Random,ConsensusDrop,ConsensusDrop(probe='lookahead',probe_layer=2,label='lookahead'),"
    f"ConsensusDrop({_PLAIN},label='plain consensus'),"
    "VisionDrop,AdaFV,VisionZip,FastV,PyramidDrop,SparseVLM,DivPrune"
)
FLOOR = "Random"
ATTENTIONS = ("sdpa", "flash", "eager")
_WARM_UPS = 2
_DECODES = 5  # at most so many rounds of whole answers: they are long
_LEAST = 3  # rounds, however little time there is
#: Of the time there is: for first tokens, and as much for phases; for whole answers.
_PREFILLS, _ANSWERS = 0.35, 0.2
_MEASURED = (
    "tokens", "ttft_ms", "samples_ms", "processor_ms", "of_full", "of_random",
    "of_random_processor", "over_ops", "flops_of_full", "share_of_saving", "decode_tokens_per_s",
    "peak_bytes", "peak_above_bytes", "kv_bytes", "phases_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A run.

    Args:
        specs: the methods; Full runs in any case.
        keeps: budgets, counts of visual tokens.
        batches: batch sizes.
        attentions: of `ATTENTIONS`.
        new_tokens: length of an answer, for tokens a second; 1 measures none.
        repeats: rounds.
        maps: whether maps forms run as well.
        seconds: of the whole, about: what would take longer has fewer rounds, but three.
    """

    specs: tuple[Spec, ...]
    keeps: tuple[int, ...] = (64,)
    batches: tuple[int, ...] = (1,)
    attentions: tuple[str, ...] = ("sdpa",)
    new_tokens: int = 32
    repeats: int = 20
    maps: bool = True
    seconds: float = math.inf


def run(
    subject: Subject, options: Options, save: Callable[[results.Results], object] = lambda r: None
) -> results.Results:
    """Measure, and check what is measured.

    Args:
        subject: the model.
        options: what of it.
        save: called with what is there after each attention and batch size.

    Returns:
        `header` and `rows`. A row that went wrong, at its first run or later, has the `reason` and
        no figures; it has `failed` if that is nothing the method or the machine announced (a
        refusal, too little memory), such as another number of tokens than the budget.

    Raises:
        DemoError: the stock model answers otherwise after than before.
    """
    end = time.monotonic() + options.seconds
    rows: list[results.Row] = []
    asked = {"repeats": options.repeats, "new_tokens": options.new_tokens}
    found: results.Results = {"header": header_of(subject) | asked, "rows": rows}
    set_attention(subject, "sdpa")
    before = _answer(subject)
    groups = len(options.attentions) * len(options.batches)
    for attention in options.attentions:
        reason = set_attention(subject, attention)
        if reason:
            made = [Contender(FULL, "full", None, None, reason=reason)]
        else:
            made = contenders(subject, options.specs, options.keeps, options.maps)
        for batch in options.batches:
            seconds = (end - time.monotonic()) / groups
            rows += _measured(subject, options, attention, batch, made, seconds)
            groups -= 1
            save(found)
        del made
    set_attention(subject, "sdpa")
    if _answer(subject) != before:
        raise DemoError("the stock model answers otherwise after the run than before it")
    return found


def _answer(subject: Subject) -> list[int]:
    """Some tokens of the stock model, once after a patch came and went."""
    inputs = subject.batch(1)

    def answer() -> list[int]:
        return subject.model.generate(**inputs, max_new_tokens=4)[0, -4:].tolist()

    found = answer()
    with patch(subject.model, ConsensusDrop(keep=1)):
        answer()
    if answer() != found:
        raise DemoError("the stock model answers otherwise after a patch than before it")
    return found


def _measured(
    subject: Subject, options: Options, attention: str, batch: int, made: Sequence[Contender],
    seconds: float,
) -> list[results.Row]:  # fmt: skip
    """The rows of one attention and batch size, in about so many seconds."""
    end = time.monotonic() + seconds
    inputs = subject.batch(batch)
    rows = {c.name: _row(attention, batch, c) for c in made}
    spent = {c.name: _try(c, subject, inputs, rows[c.name]) for c in made if not c.reason}
    live = [c for c in made if not rows[c.name]["reason"]]
    left, once = end - time.monotonic(), sum(spent[c.name] for c in live)
    rounds = int(min(options.repeats, max(_LEAST, _PREFILLS * left / max(once, 1e-9))))
    decodes = min(rounds, _DECODES) if options.new_tokens > 1 else 0
    title = f"{attention}, batch {batch}"
    total = len(live) * (2 * rounds + decodes)
    with tqdm(total=total, desc=title, unit="run", disable=None) as bar:
        calls = {c.name: partial(c.generate, inputs, 1) for c in live}
        found = clock.interleaved(
            calls, rounds, subject.device, bar.update, failed=lambda name, e: _note(rows[name], e)
        )
        answers = {c.name: partial(_decode, c, subject, inputs, options.new_tokens) for c in live}
        rates = _rates(answers, rows, decodes, _ANSWERS * left, bar)
        for contender in live:
            with _noted(rows[contender.name]) as row:
                if row["reason"]:
                    continue
                row["phases_ms"] = _phases(contender, subject, inputs, rounds, bar)
                samples = found[contender.name]
                row["samples_ms"] = [round(1e3 * t, 4) for t in samples.wall]
                if subject.device.type == "cpu":
                    row["processor_ms"] = [round(1e3 * t, 4) for t in samples.processor]
                row["ttft_ms"] = clock.spread(samples.wall)
                if decodes:
                    row["decode_tokens_per_s"] = statistics.median(rates[contender.name])
    for row in rows.values():
        if row["reason"]:
            row |= dict.fromkeys(_MEASURED)
    live = [c for c in live if not rows[c.name]["reason"]]
    _compare(rows, live, {c.name: found[c.name] for c in live}, subject)
    return list(rows.values())


@contextlib.contextmanager
def _noted(row: results.Row) -> Iterator[results.Row]:
    """The row, which has as its reason what goes wrong meanwhile; the run goes on."""
    try:
        yield row
    except Exception as error:
        _note(row, error)


def _note(row: results.Row, error: Exception) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        row["reason"] = "out of memory"
        return
    kind = "" if isinstance(error, DemoError) else f"{type(error).__name__}: "
    row["reason"] = kind + first_sentence(error)
    row["failed"] = True


def _row(attention: str, batch: int, contender: Contender) -> results.Row:
    """A row as it is before anything was measured."""
    return {
        "attention": attention, "batch": batch, "name": contender.name, "label": contender.label,
        "form": contender.form, "keep": contender.keep,
        "method": None if contender.method is None else repr(contender.method),
        "reason": contender.reason, "failed": False, **dict.fromkeys(_MEASURED),
    }  # fmt: skip


def _try(contender: Contender, subject: Subject, inputs: Inputs, row: results.Row) -> float:
    """Run a contender for the first time and note all that is not time, or why it can't run.

    Returns:
        About the seconds of a prefill.
    """
    spent = 0.0
    with _noted(row):
        try:
            for _ in range(_WARM_UPS):
                start = time.monotonic()
                cache = contender.generate(inputs, 1).past_key_values
                clock.wait(subject.device)
                spent = time.monotonic() - start
        except (ValueError, NotImplementedError) as error:
            row["reason"] = first_sentence(error)
            return spent
        counts = contender.counts(subject)
        row["tokens"] = {"before": counts.before, "after": counts.after, "average": counts.average}
        row["kv_bytes"] = kv_bytes(cache)
        row["flops_of_full"] = _flops(subject, counts)
        del cache
        if subject.device.type == "cuda":
            _note_memory(contender, subject, inputs, row)
    return spent


def _note_memory(contender: Contender, subject: Subject, inputs: Inputs, row: results.Row) -> None:
    """The peak of memory of a prefill on a GPU."""
    torch.cuda.synchronize(subject.device)
    resting = torch.cuda.memory_allocated(subject.device)
    torch.cuda.reset_peak_memory_stats(subject.device)
    contender.generate(inputs, 1)
    torch.cuda.synchronize(subject.device)
    peak = torch.cuda.max_memory_allocated(subject.device)
    row["peak_above_bytes"] = peak - resting  # what other rows still hold is no part of it
    held = (*contender.model.parameters(), *contender.model.buffers(), *inputs.values())
    row["peak_bytes"] = row["peak_above_bytes"] + sum(tensor.nbytes for tensor in held)


def _flops(subject: Subject, counts: Counts) -> float | None:
    """Operations of the prefill over those with all tokens, or None where they are not counted."""
    one = subject.request()
    try:
        cost = Cost.of(subject.model.config, subject.model.dtype.itemsize, one)
    except ValueError:
        return None
    text = one["input_ids"].shape[1] - counts.before
    every = [text + counts.before] * counts.layers
    return cost.prefill(counts.seen(text)) / cost.prefill(every)


def _rates(
    answers: Mapping[str, Callable[[], float]], rows: Mapping[str, results.Row], rounds: int,
    seconds: float, bar: Any,
) -> dict[str, list[float]]:  # fmt: skip
    """What each call says: one round, and as many more, up to `rounds`, as begin in `seconds`."""
    found: dict[str, list[float]] = {name: [] for name in answers}
    end = time.monotonic() + seconds
    for at in range(rounds):
        if at and time.monotonic() > end:
            break
        for name, answer in answers.items():
            with _noted(rows[name]) as row:
                if not row["reason"]:
                    found[name].append(answer())
            bar.update()
    return found


def _decode(contender: Contender, subject: Subject, inputs: Inputs, tokens: int) -> float:
    """Tokens a second of a batch after its first ones."""
    steps = clock.Steps(subject.device)
    contender.generate(inputs, tokens, stopping_criteria=[steps])
    return len(inputs["input_ids"]) * (tokens - 1) / steps.seconds()


def _phases(
    contender: Contender, subject: Subject, inputs: Inputs, repeats: int, bar: Any
) -> dict[str, float]:
    """Medians by phase, in runs that are timed for nothing else."""
    found = []
    with watched(contender, subject.device) as line:
        for _ in range(repeats):
            clock.wait(subject.device)
            found.append(line.run(partial(contender.generate, inputs, 1)))
            bar.update()
    return {phase: statistics.median(one[phase] for one in found) for phase in PHASES}


def _compare(
    rows: dict[str, results.Row], live: Sequence[Contender], found: dict[str, clock.Samples],
    subject: Subject,
) -> None:  # fmt: skip
    """Ratios of times of one round."""
    for contender in live:
        row, mine = rows[contender.name], found[contender.name]
        if FULL in found and contender.keep is not None:
            row["of_full"] = clock.paired_ratio(mine.wall, found[FULL].wall)
            if row["flops_of_full"] is not None and row["flops_of_full"] < 1:
                saved = 1 - row["of_full"].value
                row["share_of_saving"] = saved / (1 - row["flops_of_full"])
        floor = found.get(f"{FLOOR} {contender.keep}")
        if floor is not None and contender.label != FLOOR:
            row["of_random"] = clock.paired_ratio(mine.wall, floor.wall)
            if subject.device.type == "cpu":
                ratio = clock.paired_ratio(mine.processor, floor.processor)
                row["of_random_processor"] = ratio
        ours = found.get(f"{contender.label} {contender.keep}")
        if contender.form == "maps" and ours is not None:
            row["over_ops"] = clock.paired_ratio(mine.wall, ours.wall)


def header_of(subject: Subject) -> dict[str, Any]:
    """What the figures of a model depend on."""
    weights = sum(p.numel() for p in subject.model.parameters())
    return header(subject.device.type) | {
        "model": subject.name, "about": subject.about, "parameters": weights,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if subject.device.type == "cpu" else None,
    }  # fmt: skip


# --- the command line ---------------------------------------------------------------------------


def counts_of(text: str) -> tuple[int, ...]:
    """Counts with commas, such as 1,8,32."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be counts of at least 1 with commas, got {text}")
    return found


def count(text: str) -> int:
    """One count."""
    found = counts_of(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"must be one count, got {text}")
    return found[0]


def _attentions(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(ATTENTIONS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(ATTENTIONS)}, got {text}")
    return found


def add_options(
    parser: argparse.ArgumentParser, methods: str, keeps: tuple[int, ...], tokens: int
) -> None:
    """The options that every benchmark of whole models has."""
    add = parser.add_argument
    models = ", ".join([TINY, *RANDOM])
    # fmt: off
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the results")
    add("--model", default="mid", metavar="NAME",
        help=f"{models} (random weights but for {TINY}), or a Hugging Face id or folder "
        "(default mid)")
    add("--methods", default=methods, metavar="LIST",
        help="written as for cdrop eval; Full always runs")
    add("--keep", type=counts_of, default=keeps, metavar="LIST",
        help=f"budgets in visual tokens (default {','.join(map(str, keeps))})")
    add("--new-tokens", type=count, default=tokens, metavar="N",
        help=f"of an answer (default {tokens})")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="default: as stored; random weights bfloat16 on a GPU, else float32")
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")
    # fmt: on


def _parser(program: str) -> argparse.ArgumentParser:
    parser = Parser(prog=program, description=(__doc__ or "").splitlines()[0])
    add_options(parser, METHODS, (64, 128, 192), 32)
    add = parser.add_argument
    # fmt: off
    add("--batch", type=counts_of, default=(1,), metavar="LIST", help="batch sizes (default 1)")
    add("--attention", type=_attentions, default=("sdpa",), metavar="LIST",
        help=f"of {', '.join(ATTENTIONS)} (default sdpa)")
    add("--repeats", type=count, default=20, metavar="N", help="rounds (default 20)")
    add("--no-maps", action="store_true", help="leave out the maps forms")
    add("--seconds", type=count, metavar="N",
        help="measure for about so long: fewer rounds where all would take longer, but 3")
    # fmt: on
    return parser


def subject_of(args: argparse.Namespace) -> Subject:
    """The model of a command line.

    Raises:
        DemoError: it can't be had.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DemoError(f"--device {device}: torch {torch.__version__} finds no GPU here")
    if ":" in device and device.startswith("cuda"):
        try:
            torch.cuda.set_device(device)  # events and graphs are of the current one
        except RuntimeError as error:
            raise DemoError(f"--device {device} can't be used: {first_sentence(error)}") from error
    subject = Subject(args.model, device, args.dtype)
    most = max(args.keep)
    if most > subject.patches:
        raise DemoError(f"--keep must be in 1..{subject.patches} (the visual tokens), got {most}")
    return subject


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Measure what the command line asks for.

    Returns:
        0; 1 if a row failed, after the others were measured; 2 after a sentence on stderr that
        says what can't be done.
    """
    program = program or "python benchmarks/e2e.py"
    args = _parser(program).parse_args(arguments)
    start = time.monotonic()
    with warnings.catch_warnings():
        quiet_transformers()
        try:
            specs = tuple(parse_methods(args.methods))
            subject = subject_of(args)
            seconds = (args.seconds or math.inf) - (time.monotonic() - start)
            options = Options(
                specs, args.keep, args.batch, args.attention, args.new_tokens, args.repeats,
                not args.no_maps, seconds,
            )  # fmt: skip
            args.out.mkdir(parents=True, exist_ok=True)
            found = run(subject, options, partial(_save, args.out))
        except DemoError as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 2
    paths = _save(args.out, found)
    print(results.markdown(found))
    print(f"written to {', '.join(map(str, paths))}")
    failed = [f"{r['name']} ({r['attention']}, {r['batch']})" for r in found["rows"] if r["failed"]]
    if failed:
        print(f"{program}: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _save(out: Path, found: results.Results) -> list[Path]:
    paths = results.write(out, "e2e", found, results.markdown(found))
    return paths + (results.draw(out, found) if results.drawable() else [])


if __name__ == "__main__":
    sys.exit(main())
