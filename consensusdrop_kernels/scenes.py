"""Synthetic scenes with questions of known answer, like those the tiny LLaVA was trained on.

A scene is a 112 x 112 picture of 4-9 coloured shapes on a noisy background, some with a digit.
Everything follows from a seed: the same seed gives the same pixels and the same questions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .data import scenes_path

IMAGE_SIZE = 112
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "moon")
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "cyan": (60, 205, 220),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
}
COLORS = tuple(PALETTE)
QUESTION_TYPES = ("color", "shape", "digit", "count", "extreme", "size", "exists", "relation")

# Pixels across, from the largest class to the smallest: (least, most, fewest, most objects).
_SIZE_CLASSES = ((28, 36, 1, 2), (18, 22, 1, 3), (12, 14, 2, 4))
_SMALL = 14
_DIGIT_SHARE = 0.6
_FINE = 4  # points a pixel, each way

# 3 x 5 glyphs, three bits a row from the top, drawn at twice that size: 6 x 10 pixels.
_GLYPHS = {
    1: (0b010, 0b110, 0b010, 0b010, 0b111),
    2: (0b110, 0b001, 0b010, 0b100, 0b111),
    3: (0b110, 0b001, 0b010, 0b001, 0b110),
    4: (0b101, 0b101, 0b111, 0b001, 0b001),
    5: (0b111, 0b100, 0b110, 0b001, 0b110),
    6: (0b011, 0b100, 0b111, 0b101, 0b111),
    7: (0b111, 0b001, 0b010, 0b010, 0b010),
    8: (0b111, 0b101, 0b111, 0b101, 0b111),
}

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene: its centre and its width in pixels, and the digit on it, if any."""

    shape: str
    color: str
    x: float
    y: float
    size: int
    digit: int | None = None


@dataclass(frozen=True)
class Scene:
    """A picture, ``[112, 112, 3]`` uint8, and what is on it."""

    image: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Question:
    """A question in the model's words, its one-word answer, and its type."""

    kind: str
    text: str
    answer: str


def scene_names() -> tuple[str, ...]:
    """Names of the scenes that ship with the package."""
    return tuple(_bundled())


def load_scene(name: str) -> tuple[Scene, tuple[Question, ...]]:
    """A scene that ships with the package, and questions worth asking of it.

    Args:
        name: one of `scene_names()`.

    Raises:
        KeyError: there is no such scene.
    """
    from PIL import Image

    entry = _bundled()[name]
    with Image.open(scenes_path() / f"{name}.png") as picture:
        image = np.asarray(picture.convert("RGB"))
    objects = tuple(SceneObject(**fields) for fields in entry["objects"])
    return Scene(image, objects), tuple(Question(**fields) for fields in entry["questions"])


def _bundled() -> dict[str, Any]:
    bundled: dict[str, Any] = json.loads((scenes_path() / "scenes.json").read_text("utf-8"))
    return bundled


def make_scene(seed: int) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: any non-negative number; the same one gives the same scene, pixel by pixel.
    """
    rng = np.random.default_rng(seed)
    objects = _place_objects(rng)
    canvas = _background(rng)
    for item in objects:
        _draw(canvas, item, rng)
    canvas += rng.normal(0.0, 6.0, canvas.shape).astype(np.float32)
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), objects)


def _place_objects(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    while True:
        sizes = [
            int(rng.integers(least, most + 1))
            for least, most, fewest, count in _SIZE_CLASSES
            for _ in range(rng.integers(fewest, count + 1))
        ]
        centres: list[tuple[float, float]] = []
        for at, size in enumerate(sizes):
            centre = _free_place(rng, size, list(zip(centres, sizes[:at], strict=True)))
            if centre is None:
                break
            centres.append(centre)
        else:
            return tuple(_dress(rng, *c, s) for c, s in zip(centres, sizes, strict=True))


def _free_place(
    rng: np.random.Generator, size: int, taken: list[tuple[tuple[float, float], int]]
) -> tuple[float, float] | None:
    """A centre whose square, with 2 pixels of air, meets no other; None after many tries."""
    edge = size / 2 + 1
    for _ in range(60):
        x, y = rng.uniform(edge, IMAGE_SIZE - edge, 2)
        if all(max(abs(x - a), abs(y - b)) > (size + s) / 2 + 2 for (a, b), s in taken):
            return round(float(x), 2), round(float(y), 2)
    return None


def _dress(rng: np.random.Generator, x: float, y: float, size: int) -> SceneObject:
    digit = None
    if size > _SMALL and rng.random() < _DIGIT_SHARE:
        digit = int(rng.integers(1, 9))
    shape = SHAPES[rng.integers(len(SHAPES))]
    return SceneObject(shape, COLORS[rng.integers(len(COLORS))], x, y, size, digit)


def _background(rng: np.random.Generator) -> Array:
    """A dim colour with soft blotches: coarse noise, stretched smoothly over the picture."""
    base = rng.uniform(60, 120) + rng.uniform(-15, 15, 3)
    cells = 8
    coarse = rng.normal(0.0, 14.0, (cells + 1, cells + 1, 1))
    at = np.linspace(0, cells, IMAGE_SIZE, endpoint=False)
    low = at.astype(int)
    part = (at - low)[:, None, None]
    rows = coarse[low] * (1 - part) + coarse[low + 1] * part
    part = part.transpose(1, 0, 2)
    texture = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return (base + texture).astype(np.float32)


def _draw(canvas: Array, item: SceneObject, rng: np.random.Generator) -> None:
    color = np.array(PALETTE[item.color]) + rng.normal(0.0, 8.0, 3)
    opacity = rng.uniform(0.55, 0.75) if item.size <= _SMALL else 1.0
    top, left = int(item.y - item.size / 2), int(item.x - item.size / 2)
    under = canvas[top : top + item.size + 2, left : left + item.size + 2]
    cover = opacity * _coverage(item, top, left, under.shape[:2])
    under += cover[..., None] * (color.astype(np.float32) - under)
    if item.digit is not None:
        _draw_digit(canvas, item)


def _coverage(item: SceneObject, top: int, left: int, extent: tuple[int, ...]) -> Array:
    """The share of each pixel that the shape covers, from a grid of points within the pixel."""
    half = np.float32(item.size / 2)
    rows, columns = (np.arange(n * _FINE, dtype=np.float32) / _FINE + 0.5 / _FINE for n in extent)
    v = (rows[:, None] + top - np.float32(item.y)) / half
    u = (columns[None, :] + left - np.float32(item.x)) / half
    inside = _INSIDE[item.shape](u, v).astype(np.float32)
    return inside.reshape(extent[0], _FINE, extent[1], _FINE).mean((1, 3), dtype=np.float32)


def _star(u: Array, v: Array) -> npt.NDArray[np.bool_]:
    angle = np.arctan2(u, -v) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    # The edge from a tip (radius 1) to an inner corner (radius 0.42, an angle of 36 degrees on).
    inner, turn = 0.42, np.pi / 5
    reach = (
        inner
        * np.sin(turn)
        / (np.sin(angle) * (1 - inner * np.cos(turn)) + np.cos(angle) * inner * np.sin(turn))
    )
    return np.hypot(u, v) <= reach


def _heart(u: Array, v: Array) -> npt.NDArray[np.bool_]:
    a, b = 1.15 * u, 0.1 - 1.15 * v
    return (a * a + b * b - 1) ** 3 - a * a * b**3 <= 0


_INSIDE: dict[str, Callable[[Array, Array], npt.NDArray[np.bool_]]] = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.9,
    "triangle": lambda u, v: (v <= 0.85) & (2 * abs(u) <= v + 1),
    "star": _star,
    "diamond": lambda u, v: abs(u) + abs(v) <= 1,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.33) & (np.maximum(abs(u), abs(v)) <= 1),
    "heart": _heart,
    "moon": lambda u, v: (u * u + v * v <= 1) & ((u - 0.45) ** 2 + v * v > 0.64),
}


def _draw_digit(canvas: Array, item: SceneObject) -> None:
    """Stamp the digit in black, or in white where the colour below is dark."""
    assert item.digit is not None
    rows = _GLYPHS[item.digit]
    glyph = np.array([[row >> bit & 1 for bit in (2, 1, 0)] for row in rows], bool)
    glyph = glyph.repeat(2, 0).repeat(2, 1)
    top, left = round(item.y) - 5, round(item.x) - 3
    luma = float(np.dot(PALETTE[item.color], (0.299, 0.587, 0.114)))
    canvas[top : top + 10, left : left + 6][glyph] = 10 if luma > 110 else 250


def questions(objects: tuple[SceneObject, ...]) -> list[Question]:
    """Every question the model knows whose answer is clear from these objects."""
    return [q for kind in QUESTION_TYPES for q in _ASK[kind](objects)]


def _unique(objects: tuple[SceneObject, ...], field: str) -> list[SceneObject]:
    seen = Counter(getattr(o, field) for o in objects)
    return [o for o in objects if seen[getattr(o, field)] == 1]


def _ask_color(objects: tuple[SceneObject, ...]) -> Iterator[Question]:
    for o in _unique(objects, "shape"):
        yield Question("color", f"what color is the {o.shape} ?", o.color)


def _ask_shape(objects: tuple[SceneObject, ...]) -> Iterator[Question]:
    for o in _unique(objects, "color"):
        yield Question("shape", f"what shape is the {o.color} object ?", o.shape)


def _ask_digit(objects: tuple[SceneObject, ...]) -> Iterator[Question]:
    both = Counter((o.color, o.shape) for o in objects)
    shapes, colors = _unique(objects, "shape"), _unique(objects, "color")
    for o in objects:
        names = [f"{o.color} {o.shape}"] if both[o.color, o.shape] == 1 else []
        names += [o.shape] if o in shapes else []
        names += [f"{o.color} object"] if o in colors else []
        for name in names if o.digit else ():
            yield Question("digit", f"what digit is on the {name} ?", str(o.digit))


def _ask_count(objects: tuple[SceneObject, ...]) -> Iterator[Question]:
    yield Question("count", "how many objects are there ?", str(len(objects)))
    for field in ("color", "shape"):
        for value, count in Counter(getattr(o, field) for o in objects).items():
            yield Question("count", f"how many {value} objects are there ?", str(count))


def _ask_extreme(objects: tuple[SceneObject, ...]) -> Iterator[Question]:
    ways = {"leftmost": (1, 0), "rightmost": (-1, 0), "topmost": (0, 1), "bottommost": (0, -1)}
    for word, (dx, dy) in ways.items():
        ranked = sorted(objects, key=lambda o: dx * o.x + dy * o.y)
        if abs(dx * (ranked[1].x - ranked[0].x) + dy * (ranked[1].y - ranked[0].y)) >= 4:
            yield from _ask_both("extreme", word, ranked[0])


def _ask_size(objects: tuple[SceneObject, ...]) -> Iterator[Question]:
    ranked = sorted(objects, key=lambda o: o.size)
    if ranked[1].size - ranked[0].size >= 2:
        yield from _ask_both("size", "smallest", ranked[0])
    if ranked[-1].size - ranked[-2].size >= 3:
        yield from _ask_both("size", "largest", ranked[-1])


def _ask_both(kind: str, word: str, o: SceneObject) -> Iterator[Question]:
    yield Question(kind, f"what color is the {word} object ?", o.color)
    yield Question(kind, f"what shape is the {word} object ?", o.shape)


def _ask_exists(objects: tuple[SceneObject, ...]) -> Iterator[Question]:
    there = {(o.color, o.shape) for o in objects}
    colors = list(dict.fromkeys(o.color for o in objects))
    shapes = list(dict.fromkeys(o.shape for o in objects))
    # "no" is asked of a colour and a shape that are both there, so that neither alone gives it away
    for color in colors:
        for shape in shapes:
            answer = "yes" if (color, shape) in there else "no"
            yield Question("exists", f"is there a {color} {shape} ?", answer)


def _ask_relation(objects: tuple[SceneObject, ...]) -> Iterator[Question]:
    named = _unique(objects, "shape")
    for a in named:
        for b in named:
            if abs(a.x - b.x) >= 8:
                word = "yes" if a.x < b.x else "no"
                yield Question("relation", f"is the {a.shape} left of the {b.shape} ?", word)
            if abs(a.y - b.y) >= 8:
                word = "yes" if a.y < b.y else "no"
                yield Question("relation", f"is the {a.shape} above the {b.shape} ?", word)


_ASK: dict[str, Callable[[tuple[SceneObject, ...]], Iterator[Question]]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "digit": _ask_digit,
    "count": _ask_count,
    "extreme": _ask_extreme,
    "size": _ask_size,
    "exists": _ask_exists,
    "relation": _ask_relation,
}


def sample_questions(
    count: int, seed: int, kinds: tuple[str, ...] = QUESTION_TYPES
) -> list[tuple[Scene, Question]]:
    """Fresh questions, each about a scene of its own, the types in equal parts.

    Args:
        count: how many.
        seed: fixes the scenes and the choice of questions.
        kinds: the types to ask, in turn.
    """
    rng = np.random.default_rng(seed)
    picked: list[tuple[Scene, Question]] = []
    while len(picked) < count:
        kind = kinds[len(picked) % len(kinds)]
        scene = make_scene(int(rng.integers(2**63)))
        asked = list(_ASK[kind](scene.objects))
        if kind == "exists":
            wanted = ("yes", "no")[int(rng.integers(2))]
            asked = [q for q in asked if q.answer == wanted]
        if asked:
            picked.append((scene, asked[rng.integers(len(asked))]))
    return picked
