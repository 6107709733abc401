"""Methods: what to keep of an image and where the rest goes, one frozen dataclass each.

A method turns the `Signals` of a model into a `Selection` with a call or two of
`torch.ops.cdrop`; it never sees a model, so it can be tested and reused without one. `methods()`
is the table of all that are here.
"""

from .base import Card, Method, Scores, Selection, Signals, TextProbe, Words
from .consensusdrop import ConsensusDrop
from .random import Random
from .table import Row, methods

__all__ = [
    "Card",
    "ConsensusDrop",
    "Method",
    "Random",
    "Row",
    "Scores",
    "Selection",
    "Signals",
    "TextProbe",
    "Words",
    "methods",
]
