"""What ConsensusDrop's defaults should be: one factor at a time around a middle, and its peers.

    python -m benchmarks.accuracy.study --part probe --model FOLDER --out FOLDER

Options are chosen on the validation split; `--split test` is for what is reported in the end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from . import evaluate

#: What varies around it. Depth 2 of the tiny models' four or five layers.
MIDDLE: dict[str, Any] = {
    "probe": "lookahead", "probe_layer": 2, "rows": "last", "rotary": True, "diversity": 0.5,
    "size_attention": True, "positions": "original",
}  # fmt: skip
STATIC: dict[str, Any] = {"probe": "static", "probe_layer": 0, "rows": "max"}
FOLDED = STATIC | {"rotary": False}
GRID = tuple(itertools.product((0.3, 0.5, 0.65, 0.8), (0.0, 0.5, 0.75, 1.0)))

PARTS: dict[str, list[dict[str, Any]]] = {
    "probe": [
        *(STATIC | {"rows": rows} for rows in ("max", "mean", "last")),
        FOLDED,
        STATIC | {"probe_context": "all"},
        *({"probe": "lookahead", "probe_layer": depth} for depth in (1, 2, 3)),
        *({"probe": "lookahead", "probe_layer": 2, "rows": rows} for rows in ("max", "mean")),
        *({"probe": "in_llm", "probe_layer": depth} for depth in (1, 2, 3)),
    ],
    "fusion": [
        *({"fusion": name} for name in ("rank", "rrf", "sum", "zscore", "product", "max")),
        *({"alpha": alpha} for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)),
    ],
    "spread": [
        *({"diversity": share} for share in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)),
        *({"diversity": 0.0, "coverage": share} for share in (0.25, 0.5)),
    ],
    "merge": [
        *({"blend": blend} for blend in (0.0, 0.5, 1.0)),
        *({"threshold": cosine} for cosine in (0.5, 0.85)),
        {"size_attention": False},
        {"size_attention": False, "blend": 0.0},
        {"size_attention": False, "positions": "compact"},
        {"positions": "compact"},
    ],
    "grid": [{"diversity": share, "alpha": alpha} for share, alpha in GRID],
    "static": [STATIC | {"diversity": share, "alpha": alpha} for share, alpha in GRID],
    "folded": [FOLDED | {"diversity": share, "alpha": alpha} for share, alpha in GRID],
}

OURS = (
    "ConsensusDrop",
    "ConsensusDrop(probe='lookahead', probe_layer=2, alpha=0.75, label='ConsensusDrop, lookahead')",
)
PEERS = (
    "VisionDrop", "AdaFV", "AdaFV(merge=True, size_attention=True)", "VisionZip",
    "VisionZip(size_attention=True)", "FasterVLM", "FastV(layer=1)", "PyramidDrop", "SparseVLM",
    "DivPrune", "CDPruner", "ToMe(size_attention=True)", "Random", "Uniform",
)  # fmt: skip


def methods(part: str) -> str:
    """The runs of a part, as `cdrop eval --methods` takes them."""
    if part == "peers":
        return ",".join([*OURS, *(_at_original(peer) for peer in PEERS)])
    return ",".join(_written(change) for change in _distinct(PARTS[part]))


def _distinct(changes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for change in changes:
        if all(MIDDLE | change != MIDDLE | other for other in found):
            found.append(change)
    return found


def _written(change: dict[str, Any]) -> str:
    label = ", ".join(f"{name}={value}" for name, value in change.items()) or "ConsensusDrop"
    options = MIDDLE | change | {"label": label}
    return f"ConsensusDrop({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def _at_original(peer: str) -> str:
    """Peers keep positions too, so that no comparison is one of positions."""
    name, _, options = peer.rstrip(")").partition("(")
    given = f"{options}, " if options else ""
    return f"{name}({given}positions='original', label={peer!r})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine a part; further options are those of `cdrop eval`, and so is what it returns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=[*PARTS, "peers"], required=True)
    own, others = parser.parse_known_args(arguments)
    if "--split" not in others:
        others = ["--split", "validation", *others]
    return evaluate.main(["--methods", methods(own.part), *others])


if __name__ == "__main__":
    sys.exit(main())
