"""Which methods to examine, at which budgets, and against what: from words on a command line."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from consensusdrop_kernels.demo import DemoError, first_sentence
from consensusdrop_kernels.methods import ConsensusDrop, Full, Method, methods

Keep = int | float
FULL = "Full"
#: The baseline that is the better of ConsensusDrop's two signals, each alone.
SIGNALS = "signals"


@dataclass(frozen=True)
class Spec:
    """A method with its options, but for the budget.

    Args:
        label: what its rows are called.
        method: the class.
        options: keyword arguments of the class but `keep`, ordered.
        keep: a budget of its own; None for those of the command line.
    """

    label: str
    method: type[Method]
    options: tuple[tuple[str, Any], ...] = ()
    keep: Keep | None = None

    def at(self, keep: Keep) -> Run:
        """The row of this method at a budget; with the reason, if there can't be one."""
        if self.method is Full:
            return Run(FULL, None, None)
        try:
            return Run(self.label, keep, self._made(keep))
        except ValueError as error:
            return Run(self.label, keep, None, first_sentence(error))

    def _made(self, keep: Keep) -> Method:
        kind: Any = self.method
        made: Method = kind(keep=keep, **dict(self.options))
        return made

    def check(self) -> None:
        """Raises DemoError for options that the method does not take, whatever the budget."""
        known = [f.name for f in fields(self.method) if f.init and f.name != "keep"]
        for name, _ in self.options:
            if name not in known:
                raise DemoError(
                    f"--methods: {self.method.__name__} has no option {name}; it has "
                    f"{', '.join(known) or 'none'}"
                )
        if self.method is Full:
            return
        try:
            self._made(1.0 if self.keep is None else self.keep)
        except (ValueError, TypeError) as error:
            raise DemoError(f"--methods: {self.label}: {first_sentence(error)}") from error


@dataclass(frozen=True)
class Run:
    """One row: a method at a budget.

    Args:
        label: of the method.
        keep: the budget; None for all tokens.
        method: None for the model without a patch, or where there is a reason.
        reason: why the method can't be had at this budget.
    """

    label: str
    keep: Keep | None
    method: Method | None
    reason: str = ""

    @property
    def key(self) -> str:
        """What its answers depend on, beside the model and the questions: all options, spelled."""
        return FULL if self.method is None else repr(self.method)


@dataclass(frozen=True)
class Plan:
    """Every run, and what each is measured against.

    Attributes:
        runs: rows in order, the model without a patch first.
        against: for a run's place in `runs`, those of its baselines, of which the better counts;
            none for the first and for those that can't be.
        extra: places of the runs that serve as baselines alone.
    """

    runs: tuple[Run, ...]
    against: dict[int, tuple[int, ...]]
    extra: frozenset[int]


def parse_methods(text: str) -> list[Spec]:
    """Methods as Python would write them: `VisionDrop,ConsensusDrop(alpha=0.3, label="ours")`.

    Values are literals. `label` names the rows, by default the text itself does; `keep` gives a
    method a budget of its own.

    Raises:
        DemoError: the text is not so, or a method does not take its options.
    """
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise DemoError(
            f"--methods must be like VisionDrop,ConsensusDrop(alpha=0.3), got {text!r}"
        ) from error
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    if not nodes:
        raise DemoError("--methods must name at least one method, got none")
    return [_spec(node) for node in nodes]


def _spec(node: ast.expr) -> Spec:
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    words = call.keywords if call else []
    shown = ast.unparse(node)
    if not isinstance(name, ast.Name) or (call and call.args):
        raise DemoError(f"--methods takes names and options by name, alpha=0.3, got {shown}")
    table = {row.method.__name__: row.method for row in methods()}
    if name.id not in table:
        raise DemoError(f"--methods must be of {', '.join(table)}, got {name.id}")
    options: dict[str, Any] = {}
    for word in words:
        try:
            assert word.arg is not None
            options[word.arg] = ast.literal_eval(word.value)
        except (ValueError, AssertionError) as error:
            raise DemoError(
                f"--methods: options must be plain values by name, got {ast.unparse(word)}"
            ) from error
    label = options.pop("label", None)
    if label is not None and (not isinstance(label, str) or not label):
        raise DemoError(f"--methods: label must be a text, got {label!r}")
    keep = options.pop("keep", None)
    spec = Spec(label or _label(name.id, options), table[name.id], tuple(options.items()), keep)
    spec.check()
    return spec


def _label(name: str, options: dict[str, Any]) -> str:
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({inside})" if inside else name


def plan(specs: Sequence[Spec], keeps: Sequence[Keep], baseline: str = SIGNALS) -> Plan:
    """The runs of all methods at all budgets, and those that they are measured against.

    Args:
        specs: the methods.
        keeps: budgets of those that have none of their own.
        baseline: `SIGNALS`: ConsensusDrop with `alpha=0` and with `alpha=1`, the better of which
            counts at each budget; otherwise with the options of the method if that is a
            ConsensusDrop, or else of the first one in the list (its defaults without one). "none",
            or a method like those of `parse_methods`.

    Raises:
        DemoError: two methods have one label.
    """
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise DemoError(f"--methods must have labels of their own, got {label} twice")
    runs = [Run(FULL, None, None)]
    for spec in specs:
        if spec.method is not Full:
            runs += [spec.at(keep) for keep in _budgets(spec, keeps)]
    listed = len(runs)
    against: dict[int, tuple[int, ...]] = {}
    first = next((s for s in specs if s.method is ConsensusDrop), Spec("", ConsensusDrop))
    at = 0
    for spec in specs:
        others = _baselines(spec if spec.method is ConsensusDrop else first, baseline)
        for keep in () if spec.method is Full else _budgets(spec, keeps):
            at += 1
            if not runs[at].reason:
                against[at] = tuple(_placed(runs, other.at(keep)) for other in others)
    return Plan(tuple(runs), against, frozenset(range(listed, len(runs))))


def _budgets(spec: Spec, keeps: Sequence[Keep]) -> Iterable[Keep]:
    return keeps if spec.keep is None else (spec.keep,)


def _baselines(spec: Spec, baseline: str) -> list[Spec]:
    if baseline == "none":
        return []
    if baseline != SIGNALS:
        return parse_methods(baseline)
    options = dict(spec.options)
    return [
        replace(
            spec,
            label=_label("ConsensusDrop", options | {"alpha": alpha}),
            options=tuple((options | {"alpha": alpha}).items()),
        )
        for alpha in (0.0, 1.0)
    ]


def _placed(runs: list[Run], run: Run) -> int:
    """The place of a run among `runs`, where it is put if it is not there yet."""
    for at, known in enumerate(runs):
        same = (known.method, known.keep, known.reason) == (run.method, run.keep, run.reason)
        if same and isinstance(known.keep, float) == isinstance(run.keep, float):  # 1 is not 1.0
            return at
    runs.append(run)
    return len(runs) - 1
