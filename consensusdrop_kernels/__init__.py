"""Visual-token reduction for vision-language models: kernels, methods and a Hugging Face patch.

The ops are `torch.ops.cdrop.*`, with documented Python functions of the same names here; `patch`
puts a method such as `ConsensusDrop` into a stock Hugging Face model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .functional import (
    adaptive_split_select,
    attention_saliency,
    attention_saliency_varlen,
    consensus_select,
    greedy_diverse_select,
    select_merge,
    similarity_saliency,
    token_merge,
)
from .ops import Backend, backends, use_backend

if TYPE_CHECKING:
    from .hf import Handle, patch, unpatch
    from .methods import ConsensusDrop, Method, Random

__all__ = [
    "Backend",
    "ConsensusDrop",
    "Handle",
    "Method",
    "Random",
    "__version__",
    "adaptive_split_select",
    "attention_saliency",
    "attention_saliency_varlen",
    "backends",
    "consensus_select",
    "greedy_diverse_select",
    "patch",
    "select_merge",
    "similarity_saliency",
    "token_merge",
    "unpatch",
    "use_backend",
]

# Imported when first asked for: transformers takes seconds, and the ops do not need it.
_LAZY = dict.fromkeys(("ConsensusDrop", "Method", "Random"), "methods")
_LAZY |= dict.fromkeys(("Handle", "patch", "unpatch"), "hf")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
