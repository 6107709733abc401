"""Methods: what to keep of an image and where the rest goes, one frozen dataclass each.

A method turns the `Signals` of a model into a `Selection` with a call or two of
`torch.ops.cdrop`; it never sees a model, so it can be tested and reused without one. `methods()`
is the table of all that are here.
"""

from .adafv import AdaFV
from .base import Card, Method, Scores, Selection, Signals, TextProbe, Words
from .cdpruner import CDPruner
from .consensusdrop import ConsensusDrop
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .fastv import FastV
from .full import Full
from .pyramiddrop import PyramidDrop
from .random import Random
from .sparsevlm import SparseVLM
from .table import Row, methods
from .tome import ToMe
from .uniform import Uniform
from .visiondrop import VisionDrop
from .visionzip import VisionZip

__all__ = [
    "AdaFV",
    "CDPruner",
    "Card",
    "ConsensusDrop",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "Full",
    "Method",
    "PyramidDrop",
    "Random",
    "Row",
    "Scores",
    "Selection",
    "Signals",
    "SparseVLM",
    "TextProbe",
    "ToMe",
    "Uniform",
    "VisionDrop",
    "VisionZip",
    "Words",
    "methods",
]
