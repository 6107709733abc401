"""The table of methods, read off the classes themselves."""

from __future__ import annotations

import importlib
import inspect
from typing import NamedTuple

from .base import Method


class Row(NamedTuple):
    """One method: its class and what its `Card` says."""

    method: type[Method]
    name: str
    signals: str
    stages: tuple[str, ...]
    text: bool
    merges: str
    reference: str | None


def methods() -> tuple[Row, ...]:
    """The methods that `consensusdrop_kernels.methods` exports, by name, the controls last."""
    package = importlib.import_module(__package__)
    exported = [getattr(package, name) for name in package.__all__]
    rows = [
        Row(value, *value.card)
        for value in exported
        if inspect.isclass(value) and issubclass(value, Method) and not inspect.isabstract(value)
    ]
    return tuple(sorted(rows, key=lambda row: (row.reference is None, row.name.casefold())))
