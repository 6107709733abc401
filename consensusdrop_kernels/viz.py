"""Pictures of a token selection: what each signal saw, what was kept, and what joined it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (
    ("image", "what the model is given"),
    ("encoder saliency", "what stands out"),
    ("query saliency", "what the question looks at"),
    ("consensus", "rank of both together"),
    ("kept", "dark: dropped"),
    ("merged", "colour: the kept token joined"),
)
_SIGNAL_MAP = "magma"
_SIGNAL_GAMMA = 0.5  # attention is peaked: the square root shows its lower half too
_CONSENSUS_MAP = "viridis"
_KEPT_EDGE = "black"
_OWN_EDGE = "#ff3b30"
_LUMA = np.array([0.299, 0.587, 0.114])
_GOLDEN = 0.6180339887
_RELIEF = 0.6  # how much of the image's light and shade shows through a tint
_DIMMED = 0.25  # the light that is left in a dropped patch


@dataclass(frozen=True)
class SelectionRow:
    """One image, one question, and what a method made of them.

    Args:
        image: `[H, W, 3]` uint8, as the model saw it.
        visual: `[N]` encoder saliency of each token, in raster order.
        textual: `[N]` query saliency; None where no question was asked.
        fused: `[N]` consensus, higher is better.
        index: `[K]` kept tokens; -1 pads.
        assign: `[N]` position in `index` of the token each one joined; -1 where dropped for good.
        size: `[K]` number of tokens each kept one stands for.
        grid: rows and columns of tokens, `N` in all.
        question: set above the row.
        answers: what was answered, by whom: set under the question.
    """

    image: npt.NDArray[np.uint8]
    visual: npt.NDArray[np.float32]
    textual: npt.NDArray[np.float32] | None
    fused: npt.NDArray[np.float32]
    index: npt.NDArray[np.int64]
    assign: npt.NDArray[np.int64]
    size: npt.NDArray[np.float32]
    grid: tuple[int, int]
    question: str = ""
    answers: str = ""

    def __post_init__(self) -> None:
        rows, columns = self.grid
        for name in ("visual", "textual", "fused", "assign"):
            value = getattr(self, name)
            if value is not None and value.shape != (rows * columns,):
                raise ValueError(
                    f"{name} must have one value for each token of the {rows} x {columns} grid, "
                    f"got shape {list(value.shape)}"
                )
        if self.index.shape != self.size.shape:
            raise ValueError(
                f"index and size must have one value for each slot, got shapes "
                f"{list(self.index.shape)} and {list(self.size.shape)}"
            )
        if self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(f"image must be [H, W, 3], got {list(self.image.shape)}")


def selection_figure(rows: Sequence[SelectionRow]) -> Figure:
    """Draw each row's image, two saliencies, consensus, kept patches and merges, left to right.

    The figure belongs to no pyplot state: save it with `figure.savefig(path)`.

    Args:
        rows: one or more; several questions on one image show how the choice follows the question.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("rows must hold at least one SelectionRow, got none")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib: pip install 'consensusdrop_kernels[viz]'"
        ) from error
    panel, gap, head, title = 2.1, 0.12, 0.5, 0.56  # inches
    width = len(_PANELS) * (panel + gap) + gap
    height = head + len(rows) * (title + panel) + gap
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    shared = _kept_by_all(rows)
    for at, row in enumerate(rows):
        bottom = height - head - (at + 1) * (title + panel)
        for column in range(len(_PANELS)):
            left = gap + column * (panel + gap)
            axes = figure.add_axes(
                (left / width, bottom / height, panel / width, panel / height),
                label=_PANELS[column][0],
            )
            axes.set_axis_off()
            _DRAW[column](axes, row)
            if _PANELS[column][0] == "kept" and shared is not None:
                _outline(axes, row, np.setdiff1d(row.index, shared), _OWN_EDGE)
        _caption(figure, row, gap / width, (bottom + panel) / height, 1 / height)
    for column, (name, meaning) in enumerate(_PANELS):
        if name == "kept" and shared is not None:
            meaning = "dark: dropped; red: this question only"
        middle = (gap + column * (panel + gap) + panel / 2) / width
        _centred(figure, middle, 1 - 0.16 / height, name, weight="bold", size=11)
        _centred(figure, middle, 1 - 0.38 / height, meaning, color="0.35", size=8.5)
    return figure


def _kept_by_all(rows: Sequence[SelectionRow]) -> npt.NDArray[np.int64] | None:
    """Tokens that every row keeps; None unless there are several rows on one image."""
    if len(rows) < 2 or any(not np.array_equal(row.image, rows[0].image) for row in rows):
        return None
    shared = rows[0].index
    for row in rows[1:]:
        shared = np.intersect1d(shared, row.index)
    return shared


def _caption(figure: Figure, row: SelectionRow, left: float, base: float, inch: float) -> None:
    figure.text(left, base + 0.27 * inch, row.question, size=11, weight="bold", va="bottom")
    figure.text(left, base + 0.08 * inch, row.answers, size=9.5, color="0.2", va="bottom")


def _centred(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    figure.text(x, y, text, ha="center", va="center", **style)


def _show(axes: Axes, picture: npt.NDArray[Any], row: SelectionRow, **style: Any) -> None:
    height, width = row.image.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest", **style)


def _draw_image(axes: Axes, row: SelectionRow) -> None:
    _show(axes, row.image, row)


def _draw_visual(axes: Axes, row: SelectionRow) -> None:
    _draw_score(axes, row, row.visual, _SIGNAL_MAP, _SIGNAL_GAMMA)


def _draw_textual(axes: Axes, row: SelectionRow) -> None:
    if row.textual is not None:
        _draw_score(axes, row, row.textual, _SIGNAL_MAP, _SIGNAL_GAMMA)


def _draw_fused(axes: Axes, row: SelectionRow) -> None:
    _draw_score(axes, row, row.fused, _CONSENSUS_MAP, 1.0)


def _draw_score(
    axes: Axes, row: SelectionRow, score: npt.NDArray[Any], cmap: str, gamma: float
) -> None:
    from matplotlib.colors import PowerNorm

    finite = score[np.isfinite(score)]
    # One outlier (a register-like token, often) must not turn all the others black.
    low, high = np.percentile(finite, (0, 98)) if finite.size else (0.0, 1.0)
    scale = PowerNorm(gamma, low, max(high, low + 1e-12), clip=True)
    _show(axes, score.reshape(row.grid), row, cmap=cmap, norm=scale)


def _draw_kept(axes: Axes, row: SelectionRow) -> None:
    _show(axes, dim_dropped(row), row)


def dim_dropped(row: SelectionRow) -> npt.NDArray[np.uint8]:
    """The row's image, `[H, W, 3]` uint8, its dropped patches grey and dark."""
    kept = np.zeros(row.grid[0] * row.grid[1], bool)
    kept[row.index[row.index >= 0]] = True
    height, width = row.image.shape[:2]
    clear = kept.reshape(row.grid)[_cells(height, row.grid[0])][:, _cells(width, row.grid[1])]
    dark = _DIMMED * (row.image @ _LUMA)[..., None]
    return np.where(clear[..., None], row.image, dark).astype(np.uint8)


def _cells(pixels: int, count: int) -> npt.NDArray[np.int64]:
    """The grid row (or column) of each pixel row (or column)."""
    return np.arange(pixels, dtype=np.int64) * count // pixels


def _draw_merged(axes: Axes, row: SelectionRow) -> None:
    _show(axes, tint_merged(row), row)
    _outline(axes, row, row.index, _KEPT_EDGE)


def _outline(axes: Axes, row: SelectionRow, tokens: npt.NDArray[np.int64], color: str) -> None:
    from matplotlib.patches import Rectangle

    height, width = row.image.shape[:2]
    tall, wide = height / row.grid[0], width / row.grid[1]
    for token in tokens[tokens >= 0]:
        corner = (token % row.grid[1] * wide, token // row.grid[1] * tall)
        axes.add_patch(Rectangle(corner, wide, tall, fill=False, edgecolor=color, linewidth=1.2))


def tint_merged(row: SelectionRow) -> npt.NDArray[np.uint8]:
    """The row's image, `[H, W, 3]` uint8, each group of merged tokens in a colour of its own.

    A kept token that stands for itself alone keeps its pixels; one dropped for good is white.
    """
    slots = np.arange(len(row.index))
    table = np.vstack([_distinct_colors(slots), np.ones(3)])  # -1 reads the last row: white
    alone = np.append(row.size <= 1, False)
    gone = row.assign < 0
    height, width = row.image.shape[:2]
    pixel = _cells(height, row.grid[0])[:, None] * row.grid[1] + _cells(width, row.grid[1])
    light = row.image @ _LUMA / 255
    shade = 1 + _RELIEF * (light - light.mean())
    tinted = np.clip(255 * table[row.assign][pixel] * shade[..., None], 0, 255)
    tinted[gone[pixel]] = 255
    return np.where(alone[row.assign][pixel][..., None], row.image, tinted).astype(np.uint8)


def _distinct_colors(slots: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A colour a slot: the golden ratio puts the hues of neighbours far apart."""
    from matplotlib.colors import hsv_to_rgb

    value = 0.7 + 0.12 * (slots % 3)
    return hsv_to_rgb(np.stack([slots * _GOLDEN % 1.0, np.full(len(slots), 0.5), value], -1))


_DRAW = (_draw_image, _draw_visual, _draw_textual, _draw_fused, _draw_kept, _draw_merged)
