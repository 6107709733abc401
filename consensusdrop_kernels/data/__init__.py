"""Files that ship with the package: a small trained LLaVA and a few scenes to ask it about."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def tiny_llava_path() -> Path:
    """Folder of the trained tiny LLaVA, for any ``from_pretrained``."""
    return _folder("tiny-llava")


def scenes_path() -> Path:
    """Folder of the bundled scenes: one PNG each, and ``scenes.json`` describing them."""
    return _folder("scenes")


def _folder(name: str) -> Path:
    # The package is always installed unpacked (it holds a shared library), so this is a real path.
    return Path(str(files(__name__) / name))
