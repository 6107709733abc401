"""A served model under load: requests a second and latency, with all visual tokens and with fewer.

    python benchmarks/serve.py --out FOLDER --model llava-1.5-7b --keep 64 --concurrency 1,8,32

A plain loop stands for a server: clients put requests into a queue, a worker takes as many as wait
there (up to `--max-batch`), pads them at the left, and calls `generate`; so a request that comes
while a batch runs waits for its end. Every client has one request under way and sends the next as
soon as it is answered (a closed loop). Requests are prompts with a picture each, questions of
different lengths, already on the device: no network, no decoding of pictures, no tokenizer.

Not `transformers serve`: it loads models by name, so it can't be given a patched one, and its
continuous batching runs paged attention, which the patch refuses.

In the folder: `serve.json`, `serve.md`, `serve.png`; docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not __package__:  # run as a file: the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from benchmarks.accuracy.runs import Spec, parse_methods
from benchmarks.e2e import add_options, count, counts_of, header_of, subject_of
from benchmarks.end_to_end import clock, results
from benchmarks.end_to_end.contenders import Contender, contenders
from benchmarks.end_to_end.models import AFTER, Inputs, Subject
from consensusdrop_kernels.cli import Parser, quiet_transformers
from consensusdrop_kernels.demo import DemoError, first_sentence

METHODS = "Random,ConsensusDrop"
#: Different prompts; a load goes through them again and again.
_PROMPTS = 32
#: Questions of 12 to 35 tokens.
_WORDS = range(AFTER // 2, 3 * AFTER // 2)
_COLUMNS = (
    "clients", "method", "keep", "requests/s", "of Full", "p50 ms", "p95 ms", "mean batch",
    "tokens/s",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A load.

    Args:
        specs: the methods; Full runs in any case.
        keeps: budgets, counts of visual tokens.
        concurrency: numbers of clients.
        requests: of every client, after its first, which does not count.
        max_batch: requests that run together at most.
        new_tokens: length of an answer.
    """

    specs: tuple[Spec, ...]
    keeps: tuple[int, ...] = (64,)
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    requests: int = 8
    max_batch: int = 32
    new_tokens: int = 16


@dataclass
class _Job:
    """A request on its way."""

    inputs: Inputs
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Answered(NamedTuple):
    """One request: when it was sent and answered, by `time.perf_counter`."""

    sent: float
    back: float


class Server:
    """A queue and a worker over one contender.

    Args:
        subject: whose requests come.
        contender: what answers them.
        max_batch: requests that run together at most.
        new_tokens: length of an answer.
    """

    def __init__(
        self, subject: Subject, contender: Contender, max_batch: int, new_tokens: int
    ) -> None:
        self.batches: list[int] = []
        self._subject = subject
        self._contender = contender
        self._max_batch = max_batch
        self._new_tokens = new_tokens
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()

    def ask(self, inputs: Inputs) -> Answered:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the model failed.
        """
        job = _Job(inputs)
        sent = time.perf_counter()
        self._waiting.put(job)
        job.done.wait()
        if job.error is not None:
            raise RuntimeError(f"a request failed: {job.error}") from job.error
        return Answered(sent, time.perf_counter())

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the worker runs."""
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        try:
            yield
        finally:
            self._waiting.put(None)
            worker.join()

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            jobs, last = [job], False
            while len(jobs) < self._max_batch and not self._waiting.empty():
                more = self._waiting.get()
                if more is None:
                    last = True
                    break
                jobs.append(more)
            self._answer(jobs)
            if last:
                return

    def _answer(self, jobs: list[_Job]) -> None:
        """One batch; an error reaches every client that is in it."""
        self.batches.append(len(jobs))
        try:
            batch = self._subject.joined([job.inputs for job in jobs])
            self._contender.generate(batch, self._new_tokens)
            clock.wait(self._subject.device)
        except Exception as error:
            for job in jobs:
                job.error = error
        for job in jobs:
            job.done.set()


def load(
    subject: Subject, contender: Contender, clients: int, options: Options,
    prompts: Sequence[Inputs],
) -> tuple[list[Answered], list[int]]:  # fmt: skip
    """Requests of so many clients, each `options.requests` after its first, and batch sizes.

    What was sent before every client had its first answer does not count.

    Raises:
        RuntimeError: the model failed.
    """
    server = Server(subject, contender, options.max_batch, options.new_tokens)
    found: list[Answered] = []
    errors: list[BaseException] = []
    warm = threading.Barrier(clients)

    def client(number: int) -> None:
        try:
            server.ask(prompts[number % len(prompts)])
            if warm.wait() == 0:  # of all clients one
                server.batches.clear()
            warm.wait()
            for at in range(1, options.requests + 1):
                found.append(server.ask(prompts[(number + at * clients) % len(prompts)]))
        except (RuntimeError, threading.BrokenBarrierError) as error:
            errors.append(error)
            warm.abort()

    with server.running():
        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((e for e in errors if isinstance(e, RuntimeError) and str(e)), errors[0])
    return found, server.batches


def run(
    subject: Subject, options: Options, save: Callable[[results.Results], object] = lambda r: None
) -> results.Results:
    """Measure every method under every load, the methods in turn.

    Args:
        subject: the model.
        options: the loads.
        save: called with what is there after each number of clients.

    Returns:
        `header` and `rows`.
    """
    made = contenders(subject, options.specs, options.keeps, maps=False)
    words = [_WORDS[at % len(_WORDS)] for at in range(_PROMPTS)]
    prompts = [subject.request(at, words[at]) for at in range(_PROMPTS)]
    rows: list[results.Row] = []
    header = header_of(subject) | {
        "requests": options.requests, "max_batch": options.max_batch,
        "new_tokens": options.new_tokens,
    }  # fmt: skip
    found: results.Results = {"header": header, "rows": rows}
    bar = tqdm(total=len(made) * len(options.concurrency), unit="load", disable=None)
    for clients in options.concurrency:
        first: results.Row | None = None
        for contender in made:
            row = _row(subject, contender, clients, options, prompts)
            first = first or row
            if row["requests_per_s"] and first["requests_per_s"]:
                row["of_full"] = row["requests_per_s"] / first["requests_per_s"]
            rows.append(row)
            bar.update()
        save(found)
    bar.close()
    return found


def _row(
    subject: Subject, contender: Contender, clients: int, options: Options,
    prompts: Sequence[Inputs],
) -> results.Row:  # fmt: skip
    row: results.Row = {
        "clients": clients, "name": contender.name, "label": contender.label,
        "form": contender.form, "keep": contender.keep, "reason": contender.reason,
    }  # fmt: skip
    columns = ("requests_per_s", "of_full", "latency_ms", "mean_batch", "tokens_per_s")
    row |= dict.fromkeys(columns)
    if row["reason"]:
        return row
    try:
        contender.generate(subject.joined(prompts[: min(clients, options.max_batch)]), 2)
        contender.counts(subject)
        found, batches = load(subject, contender, clients, options, prompts)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return row | {"reason": first_sentence(error)}
    spent = max(one.back for one in found) - min(one.sent for one in found)
    p50, p95 = np.quantile([1e3 * (one.back - one.sent) for one in found], (0.5, 0.95))
    rate = len(found) / spent
    return row | {
        "requests_per_s": rate, "latency_ms": {"p50": float(p50), "p95": float(p95)},
        "mean_batch": sum(batches) / len(batches), "tokens_per_s": rate * options.new_tokens,
    }  # fmt: skip


def markdown(found: results.Results) -> str:
    """The table."""
    header, rows = found["header"], found["rows"]
    parts = [
        f"# Served load: {header['model']}", results.about(header),
        f"{header['new_tokens']} tokens an answer, batches of up to {header['max_batch']}, "
        f"{header['requests']} requests of every client",
        results.table(_COLUMNS, (_cells(row) for row in rows if not row["reason"])),
    ]  # fmt: skip
    left_out = [
        f"- {row['name']}, {row['clients']} clients: {row['reason']}"
        for row in rows
        if row["reason"]
    ]
    parts += ["Not measured:", "\n".join(left_out)] if left_out else []
    return "\n\n".join(parts) + "\n"


def _cells(row: results.Row) -> list[str]:
    latency = row["latency_ms"]
    return [
        str(row["clients"]), row["label"], str(row["keep"] or "all"),
        f"{row['requests_per_s']:.2f}", f"{row['of_full']:.2f}" if row["of_full"] else "-",
        f"{latency['p50']:.0f}", f"{latency['p95']:.0f}", f"{row['mean_batch']:.1f}",
        f"{row['tokens_per_s']:.1f}",
    ]  # fmt: skip


def draw(out: Path, found: results.Results) -> list[Path]:
    """`serve.png`: requests a second and latency against the number of clients."""
    rows = [row for row in found["rows"] if not row["reason"]]
    if not rows:
        return []
    title = f"{found['header']['model']}, {found['header']['device']}"
    figure, (rates, waits) = results.panels(2, 4.6, 4.2, title)
    for at, (name, points) in enumerate(results.grouped(rows, "name").items()):
        clients = [row["clients"] for row in points]
        style: dict[str, Any] = {
            "color": results.COLORS[at % len(results.COLORS)],
            "marker": results.MARKS[at % len(results.MARKS)], "markersize": 5, "linewidth": 1.4,
        }  # fmt: skip
        rates.plot(clients, [row["requests_per_s"] for row in points], label=name[0], **style)
        waits.plot(clients, [row["latency_ms"]["p50"] for row in points], label=name[0], **style)
        late = [row["latency_ms"]["p95"] for row in points]
        waits.plot(clients, late, linestyle=":", **(style | {"markersize": 3, "linewidth": 1.0}))
    for axes, label in ((rates, "requests a second"), (waits, "latency, ms (p50; dotted p95)")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clients, one request each under way")
        axes.set_ylabel(label)
    waits.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    path = out / "serve.png"
    figure.savefig(path)
    return [path]


def _parser(program: str) -> argparse.ArgumentParser:
    parser = Parser(prog=program, description=(__doc__ or "").splitlines()[0])
    add_options(parser, METHODS, (64,), 16)
    add = parser.add_argument
    # fmt: off
    add("--concurrency", type=counts_of, default=(1, 2, 4, 8, 16, 32), metavar="LIST",
        help="numbers of clients (default 1,2,4,8,16,32)")
    add("--requests", type=count, default=8, metavar="N",
        help="of every client, after one that does not count (default 8)")
    add("--max-batch", type=count, default=32, metavar="N",
        help="requests that run together at most (default 32)")
    # fmt: on
    return parser


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Measure what the command line asks for.

    Returns:
        0, or 2 after a sentence on stderr that says what can't be done.
    """
    program = program or "python benchmarks/serve.py"
    args = _parser(program).parse_args(arguments)
    with warnings.catch_warnings():
        quiet_transformers()
        try:
            options = Options(
                tuple(parse_methods(args.methods)), args.keep, args.concurrency, args.requests,
                args.max_batch, args.new_tokens,
            )  # fmt: skip
            subject = subject_of(args)
            args.out.mkdir(parents=True, exist_ok=True)
            found = run(subject, options, partial(_save, args.out))
        except DemoError as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 2
    print(markdown(found))
    print(f"written to {', '.join(map(str, _save(args.out, found)))}")
    return 0


def _save(out: Path, found: results.Results) -> list[Path]:
    paths = results.write(out, "serve", found, markdown(found))
    return paths + (draw(out, found) if results.drawable() else [])


if __name__ == "__main__":
    sys.exit(main())
