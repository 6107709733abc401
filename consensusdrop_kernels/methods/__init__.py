"""Methods: what to keep of an image and where the rest goes, one frozen dataclass each.

A method turns the `Signals` of a model into a `Selection` with a call or two of
`torch.ops.cdrop`; it never sees a model, so it can be tested and reused without one.
"""

from .base import Method, Scores, Selection, Signals, TextProbe
from .consensusdrop import ConsensusDrop
from .random import Random

__all__ = ["ConsensusDrop", "Method", "Random", "Scores", "Selection", "Signals", "TextProbe"]
