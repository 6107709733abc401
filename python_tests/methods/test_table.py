"""The table of methods: complete, and what the methods do is what their cards say."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import consensusdrop_kernels
from consensusdrop_kernels import cli
from consensusdrop_kernels import methods as package
from consensusdrop_kernels.methods import Card, Method, Row, methods
from consensusdrop_kernels.methods.base import MERGES, STAGES

from .cases import draw

ROWS = methods()
each = pytest.mark.parametrize("row", ROWS, ids=[row.method.__name__ for row in ROWS])
LAYERS, TOKENS = 32, 576


def made(row: Row, **options: Any) -> Method:
    """The method with its default options and a quarter of the tokens, fitted to a decoder."""
    if next(f for f in fields(row.method) if f.name == "keep").init:
        options = {"keep": 0.25, **options}
    return row.method(**options).fitted(LAYERS)


def defined() -> list[type[Method]]:
    """Every method of a module of the package; a base that others share and that has no card is
    none."""
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method)]
        found += [c for c in classes if c.__module__ == module.__name__]
    shared = {base for cls in found for base in cls.__bases__}
    return [cls for cls in found if "card" in vars(cls) or cls not in shared]


def test_every_method_is_exported_and_in_the_table() -> None:
    names = {cls.__name__ for cls in defined()}
    assert {"AdaFV", "ConsensusDrop", "Full", "Random", "ToMe"} <= names
    assert names <= set(package.__all__)
    assert sorted(row.method.__name__ for row in ROWS) == sorted(names)


def test_the_package_and_the_function_have_the_same_name() -> None:
    assert consensusdrop_kernels.methods is package
    assert package.methods is methods


@each
def test_a_card_of_its_own(row: Row) -> None:
    card = vars(row.method)["card"]  # not one of a base class
    assert isinstance(card, Card)
    assert row[1:] == card
    assert card.name
    assert card.signals
    assert set(card.stages) <= set(STAGES)
    assert list(card.stages) == sorted(card.stages, key=STAGES.index)
    assert card.merges in MERGES
    assert card.reference is None or card.reference.startswith("arXiv ")


def test_names_and_references_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    references = [row.reference for row in ROWS if row.reference is not None]
    assert len(set(references)) == len(references)


def test_controls_come_last() -> None:
    controls = [row.reference is None for row in ROWS]
    assert controls == sorted(controls)
    papers = [row.name.casefold() for row in ROWS if row.reference is not None]
    assert papers == sorted(papers)


@each
def test_stages_are_where_it_prunes(row: Row) -> None:
    method = made(row)
    early = method.budget(TOKENS) < TOKENS
    by_encoder = method.needs == {"encoder"}
    assert ("in-LLM" in row.stages) == bool(method.stages(LAYERS))
    assert ("encoder" in row.stages) == (early and by_encoder)
    assert ("pre-LLM" in row.stages) == (early and not by_encoder)


@each
def test_text_is_what_it_needs(row: Row) -> None:
    """Inside the decoder text is at hand without a need."""
    asks = bool(made(row).needs & {"text", "words"})
    if "in-LLM" in row.stages:
        assert row.text or not asks
    else:
        assert row.text == asks


@each
def test_a_control_goes_by_nothing(row: Row) -> None:
    assert (row.signals == "none") == (row.reference is None)
    if row.reference is None:
        assert not made(row).needs
        assert not row.text
        assert row.merges == "no"


@each
def test_merging_is_a_field_where_it_is_an_option(row: Row) -> None:
    names = {f.name for f in fields(row.method)}
    assert ("merge" in names) == (row.merges == "option")
    if "in-LLM" not in row.stages:
        assert ("size_attention" in names) == (row.merges != "no")
    if row.merges == "option":
        assert made(row).merge is False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "row", [r for r in ROWS if made(r).budget(24) < 24], ids=lambda r: r.method.__name__
)
def test_merges_what_it_says(row: Row) -> None:
    """Of what a method chooses before the LLM."""
    chosen = made(row).select(draw())
    assert bool((chosen.size > 1).any()) == (row.merges == "yes")
    if row.merges == "option":
        assert (made(row, merge=True).select(draw()).size > 1).any()


class _Counted(TorchDispatchMode):
    """The ops of this package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cdrop":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_ops_that_each_method_is_said_to_call() -> None:
    """In the page's table: 64 of 576 tokens, which ToMe halves four times."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    table = page[page.index("| before the LLM | ops |") :].split("\n\n")[0]
    said = {
        name: re.findall(r"`([a-z]+_[a-z_]+)`", cells)
        for names, cells in re.findall(r"^\| (.*?) \| (.*) \|$", table, re.M)
        for name in names.split(", ")
    }
    signals = draw(1, 576)
    for row in ROWS:
        method = row.method() if row.name == "Full" else row.method(keep=64.0 / 576)
        method = replace(method, merge=True) if row.merges == "option" else method
        if method.budget(576) == 576:
            assert row.method.__name__ not in said
            continue
        with _Counted() as counted:
            method.fitted(32).select(signals)
        rounds = 4 if row.name == "ToMe-style" else 1
        assert counted.names == said[row.method.__name__] * rounds, row.name


# --- cdrop methods ------------------------------------------------------------------------------


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["class"] for one in found] == [row.method.__name__ for row in ROWS]
    for one, row in zip(found, ROWS, strict=True):
        want = row._asdict() | {"class": row.method.__name__, "stages": list(row.stages)}
        del want["method"]
        assert one == want


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "method",
        "class",
        "goes",
        "by",
        "prunes",
        "question",
        "merges",
        "reference",
    ]
    assert len(lines) == len(ROWS)
    columns = [
        head.index(name)
        for name in ("class", "goes by", "prunes", "question", "merges", "reference")
    ]
    for line, row in zip(lines, ROWS, strict=True):
        cells = [line[a:b].strip() for a, b in zip([0, *columns], [*columns, None], strict=True)]
        assert cells == [
            row.name,
            row.method.__name__,
            row.signals,
            ", ".join(row.stages) or "-",
            "yes" if row.text else "no",
            row.merges,
            row.reference or "-",
        ]
        assert line == line.rstrip()
        assert all(line[at - 1] == " " for at in columns)
