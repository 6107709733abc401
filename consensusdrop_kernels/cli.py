"""The `cdrop` command: `demo` shows token reduction at work, `methods` lists what can be chosen,
`eval` examines them, `bench` times them, `report` turns results into Markdown, `info` says what is
installed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .demo import Assistant, Run
    from .viz import SelectionRow

_PICTURES = (".png", ".pdf", ".svg", ".jpg")
_DEFAULT_SCENE = "slate"
_DEFAULT_QUESTIONS = 2
_SHIPPED_QUESTIONS = ("how many objects are there ?", "what color is the largest object ?")
_OTHER_QUESTIONS = ("What is shown in the image?",)
_METHOD_COLUMNS = ("method", "class", "goes by", "prunes", "question", "merges", "reference")
#: Commands whose code is in `benchmarks`: the module, what it is, and whether it needs models.
_BESIDE = {
    "eval": ("accuracy.evaluate", "the accuracy benchmark", True),
    "bench": ("e2e", "the end-to-end benchmark", True),
    "report": ("report", "the reader of benchmark results", False),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cdrop`.

    Args:
        argv: the arguments; by default the process's own.

    Returns:
        The exit code: 0, or 2 after a sentence on stderr that says what can't be done.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in _BESIDE:  # its options are with the code that is not always here
        return _hand_over(argv[0], argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    return int(args.run(args))


def _parser() -> argparse.ArgumentParser:
    from ._version import __version__

    parser = Parser(prog="cdrop", description="Fewer visual tokens for vision-language models.")
    parser.add_argument("--version", action="version", version=f"cdrop {__version__}")
    names = "{demo,methods,eval,bench,report,info}"
    commands = parser.add_subparsers(dest="command", metavar=names, title="commands")
    demo = commands.add_parser(
        "demo",
        help="ask a model about an image with all visual tokens and with fewer",
        description="Ask a vision-language model about an image, with all visual tokens, with "
        "those ConsensusDrop keeps, and with as many at random; print what it costs and draw "
        "what was kept. Without options: a small trained model and a scene that ship with the "
        "package.",
    )
    demo.set_defaults(run=_demo)
    _add_demo_options(demo)
    methods = commands.add_parser("methods", help="the reduction methods, and what each goes by")
    methods.add_argument("--json", action="store_true", help="as a list of objects")
    methods.set_defaults(run=_methods)
    commands.add_parser("eval", help="accuracy and cost of methods on questions of known answer")
    commands.add_parser("bench", help="time to the first token, memory and phases of whole models")
    commands.add_parser("report", help="Markdown tables and plots of benchmark results")
    info = commands.add_parser("info", help="versions, backends, and why one is missing")
    info.set_defaults(run=_info)
    return parser


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    from .scenes import scene_names

    source = demo.add_mutually_exclusive_group()
    source.add_argument("--image", type=Path, metavar="FILE", help="a picture of yours")
    source.add_argument(
        "--scene",
        choices=scene_names(),
        default=_DEFAULT_SCENE,
        help=f"a bundled scene (default {_DEFAULT_SCENE})",
    )
    demo.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help="may be given several times (default: two questions that suit the image)",
    )
    demo.add_argument(
        "--model", metavar="ID", help="Hugging Face id or folder (default: the shipped tiny LLaVA)"
    )
    demo.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    demo.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: as stored)",
    )
    demo.add_argument(
        "--keep",
        type=_keep,
        default=0.25,
        metavar="N",
        help="visual tokens to keep: a count, or a share such as 0.25 (the default)",
    )
    demo.add_argument(
        "--alpha",
        type=_alpha,
        default=0.5,
        help="weight of the question against the encoder, 0..1 (default 0.5)",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="of the random tokens (default 0)")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo.png"),
        metavar="FILE",
        help="the picture to write (default demo.png)",
    )


def _keep(text: str) -> int | float:
    value = _number(text)
    if text.strip().lstrip("+-").isdigit():
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1 token, got {text}")
        return int(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"must be a count such as 49 or a share above 0 and up to 1.0, got {text}"
        )
    return value


def _alpha(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in 0..1, got {text}")
    return value


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text}")
    return value


# --- cdrop demo ---------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    missing = _missing()
    if missing:
        return _fail(missing)
    with warnings.catch_warnings():
        quiet_transformers()
        from .demo import DemoError

        try:
            _check_out(args.out)
            _run_demo(args)
        except DemoError as error:
            return _fail(str(error))
    return 0


def _missing() -> str:
    """What `demo`, `eval` and `bench` need and is not installed, in a sentence; or nothing."""
    for package, extra in (("transformers", "hf"), ("PIL", "hf"), ("matplotlib", "viz")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install 'consensusdrop_kernels[{extra}]'"
    return ""


def _fail(sentence: str, command: str = "demo") -> int:
    print(f"cdrop {command}: {sentence}", file=sys.stderr)
    return 2


def quiet_transformers() -> None:
    """No progress bars for weights that load in a blink, no advice that is not for our user."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for module in ("transformers", "huggingface_hub", "torch"):
        warnings.filterwarnings("ignore", module=module)


def _check_out(out: Path) -> None:
    """Refuse a picture that can't be written before minutes are spent on it."""
    from .demo import DemoError

    if out.suffix.lower() not in _PICTURES:
        raise DemoError(f"--out must end in one of {', '.join(_PICTURES)}, got {out}")
    folder = out.parent
    if not folder.is_dir():
        raise DemoError(f"--out {out}: there is no folder {folder}")
    if out.is_dir() or not os.access(out if out.exists() else folder, os.W_OK):
        raise DemoError(f"--out {out} can't be written")


def _run_demo(args: argparse.Namespace) -> None:
    from .demo import REPEATS, Assistant, DemoError, steady_threads
    from .viz import selection_figure

    image, truths = _subject(args)
    assistant = Assistant(args.model, args.device, args.dtype)
    with steady_threads(assistant) as threads:
        rows = _ask_all(args, assistant, image, truths)
    where = f", {threads} CPU thread{'s' * (threads > 1)}" if assistant.device == "cpu" else ""
    print(f"first token: image encoding, choice and merging, prefill; median of {REPEATS}{where}")
    print("KV cache: keys and values of all layers after prefill, text included")
    try:
        selection_figure(rows).savefig(args.out)
    except OSError as error:
        raise DemoError(f"--out {args.out} can't be written: {error.strerror}") from error
    print(f"picture: {args.out}")


def _ask_all(
    args: argparse.Namespace, assistant: Assistant, image: Any, truths: dict[str, str]
) -> list[SelectionRow]:
    """Ask each question, print its table, and gather the rows of the picture."""
    from .demo import budget, compare, figure_row

    rows: list[SelectionRow] = []
    questions = args.question or _default_questions(args, truths, assistant)
    for question in questions:
        assistant.check_question(question)
    for question in questions:
        _warn_of_unknown_words(assistant, question)
        asked = assistant.ask(image, question)
        keep = budget(args.keep, asked.tokens)
        if not rows:
            _print_header(args, assistant, keep, asked.tokens)
        runs = compare(assistant, asked, keep, args.alpha, args.seed)
        truth = truths.get(question)
        title = question if truth is None else f"{question}  (true answer: {truth})"
        _print_table(title, asked.tokens, runs)
        rows.append(figure_row(assistant, asked, runs, title))
    return rows


def _subject(args: argparse.Namespace) -> tuple[Any, dict[str, str]]:
    """The PIL image to ask about, and the true answers known, those worth asking first."""
    from PIL import Image

    from .demo import open_image
    from .scenes import load_scene, questions

    if args.image is not None:
        return open_image(args.image), {}
    scene, chosen = load_scene(args.scene)
    truths = {q.text: q.answer for q in (*chosen, *questions(scene.objects))}
    return Image.fromarray(scene.image), truths


def _default_questions(
    args: argparse.Namespace, truths: dict[str, str], assistant: Assistant
) -> Sequence[str]:
    if truths:
        return list(truths)[:_DEFAULT_QUESTIONS]
    return _SHIPPED_QUESTIONS if assistant.shipped else _OTHER_QUESTIONS


def _warn_of_unknown_words(assistant: Assistant, question: str) -> None:
    unknown = assistant.unknown_words(question)
    if unknown:
        print(
            f"cdrop demo: the shipped model does not know {', '.join(unknown)}; "
            "its README lists what it can be asked",
            file=sys.stderr,
        )


def _print_header(args: argparse.Namespace, assistant: Assistant, keep: int, tokens: int) -> None:
    image = args.image or f"scene {args.scene} (synthetic)"
    print(f"model   {assistant.name}, on {assistant.device}")
    print(f"image   {image}")
    print(f"budget  {keep} of {tokens} visual tokens, alpha {args.alpha:g}\n")


def _print_table(title: str, tokens: int, runs: Sequence[Run]) -> None:
    print(title)
    print(f"  {'':<14}{'visual tokens':>15}{'first token':>14}{'KV cache':>12}   answer")
    name, unit = _unit(max(run.kv_bytes for run in runs))
    for run in runs:
        count = f"{tokens} -> {run.kept}"
        spent = f"{1000 * run.seconds:.1f} ms"
        size = f"{run.kv_bytes / unit:.1f} {name}"
        print(f"  {run.name:<14}{count:>15}{spent:>14}{size:>12}   {_one_line(run.answer)}")
    print()


def _unit(count: int) -> tuple[str, int]:
    """The unit to write so many bytes in, and its size."""
    for power, name in ((3, "GiB"), (2, "MiB")):
        if count >= 10 * 1024**power:
            return name, 1024**power
    return "KiB", 1024


def _one_line(answer: str, width: int = 70) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= width else line[: width - 3] + "..."


# --- cdrop methods ------------------------------------------------------------------------------


def _methods(args: argparse.Namespace) -> int:
    from .methods import methods

    rows = []
    for row in methods():
        rest = row._asdict()
        rows.append({"name": rest.pop("name"), "class": rest.pop("method").__name__, **rest})
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    lines = [list(_METHOD_COLUMNS), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        value = ", ".join(value)
    return str(value or "-")


# --- cdrop eval, cdrop bench, cdrop report ------------------------------------------------------


def _hand_over(command: str, argv: Sequence[str]) -> int:
    """Run a command of `benchmarks`, which lies beside the package in a checkout."""
    module, what, models = _BESIDE[command]
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / f"{module.replace('.', '/')}.py").exists():
        return _fail(
            f"{what} is in the repository, not in the installed package: run this in a checkout "
            "installed with pip install -e .", command,
        )  # fmt: skip
    missing = _missing() if models else ""
    if missing:
        return _fail(missing, command)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    main = importlib.import_module(f"benchmarks.{module}").main
    with warnings.catch_warnings():
        return int(main(argv, f"cdrop {command}"))


# --- cdrop info ---------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    import torch

    from . import __version__, backends

    print(f"consensusdrop_kernels {__version__}")
    print(f"  {'python':<14}{platform.python_version()}")
    for package in ("torch", "transformers", "triton", "matplotlib"):
        print(f"  {package:<14}{_version(package)}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"  {'gpu':<14}{gpu}")
    print("backends")
    for name, backend in backends().items():
        state = "available" if backend else "missing"
        print(f"  {name:<14}{state}{': ' if backend.reason else ''}{backend.reason}")
    print("build")
    for name, value in _build_info().items():
        print(f"  {name:<20}{value}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _build_info() -> dict[str, Any]:
    try:
        module = importlib.import_module("consensusdrop_kernels._C")
    except ImportError as error:
        return {"kernels": f"not built ({error})"}
    return dict(module.build_info())


if __name__ == "__main__":
    sys.exit(main())
