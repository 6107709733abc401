"""GQA, TextVQA, POPE, MMBench and the rest of lmms-eval, of a model with fewer visual tokens.

    python -m benchmarks.accuracy.lmms --model llava_hf --tasks gqa,pope \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=ConsensusDrop,keep=64
    accelerate launch --num_processes 8 -m benchmarks.accuracy.lmms --model llava_hf ...

This is the command line of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, to be
installed by whoever runs it), in which the models of `MODELS` take three more of `--model_args`:

- `method`: as `cdrop eval --methods` takes it, but one; without it the model is as it was. In
  quotes where it has commas: `method='ConsensusDrop(alpha=0.3, size_attention=True)'`.
- `keep`: its budget, a count or a share of an image's tokens.
- `breaks`: as `patch` takes it.

They keep their names, as tasks of lmms-eval choose prompts by the name of the model.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from consensusdrop_kernels import patch
from consensusdrop_kernels.demo import DemoError
from consensusdrop_kernels.methods import Full, Method

from .runs import Keep, parse_methods

#: Models of lmms-eval that load a stock Hugging Face model which `patch` takes.
MODELS = ("llava_hf", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl_hf")

#: lmms-eval's own classes, by the name that the class in place of each has in this module.
_STOCK: dict[str, str] = {}


class Pruned:
    """What is put before a model class of lmms-eval, to patch the model that it loads.

    Args:
        method: a method as `parse_methods` reads it; None or "Full" for the model as it is.
        keep: its budget, if it has none of its own.
        breaks: as `patch` takes it.
        arguments: what the class takes.

    Raises:
        ValueError: there is no such method, or not with this budget; nothing is loaded then.
    """

    model: Any
    tokenizer: Any
    rank: int

    def __init__(
        self,
        *,
        method: str | None = None,
        keep: Keep | None = None,
        breaks: str = "drop",
        **arguments: Any,
    ) -> None:
        chosen = read_method(method, keep)
        super().__init__(**arguments)
        self.handle = None
        if chosen is not None:
            self.handle = patch(
                self.model, chosen, processor=self.tokenizer, keep_signals=False, breaks=breaks
            )

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The answers of the class.

        Raises:
            RuntimeError: `generate` failed. Some classes would go on with an empty answer, which
                would count against the method.
        """
        with _failing(self.model):
            answers: list[Any] = super().generate_until(requests)  # type: ignore[misc]
        if self.handle is not None and self.rank == 0:
            print(summary(self.handle), file=sys.stderr)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Those of the class, without a method.

        Raises:
            NotImplementedError: with one. What lmms-eval masks as the prompt is too short by the
                visual tokens, so that the choice would see the answer.
        """
        if self.handle is not None:
            raise NotImplementedError("a method needs tasks that generate, got one of likelihoods")
        answers: list[Any] = super().loglikelihood(requests)  # type: ignore[misc]
        return answers

    def clean(self) -> None:
        """Let go of the model."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        super().clean()  # type: ignore[misc]


def read_method(text: str | None, keep: Keep | None) -> Method | None:
    """The method that `--model_args` ask for; None for the model as it is.

    Raises:
        ValueError: it can't be had.
    """
    if text is None:
        if keep is not None:
            raise ValueError(f"keep must come with a method, got keep={keep} alone")
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]  # lmms-eval leaves them there
    if text.count("(") != text.count(")"):
        raise ValueError(
            f"method must be in quotes where it has commas, method='A(b=1, c=2)', got {text}"
        )
    try:
        specs = parse_methods(text)
    except DemoError as error:
        raise ValueError(str(error).replace("--methods", "method", 1)) from None
    if len(specs) != 1:
        raise ValueError(f"method must be one method, got {text}")
    (spec,) = specs
    if spec.keep is not None and keep is not None:
        raise ValueError(f"keep must be given once, got {spec.keep} in method and {keep}")
    budget = keep if spec.keep is None else spec.keep
    if spec.method is Full:
        return None
    if budget is None:
        raise ValueError(f"keep must be a count or a share of visual tokens, got none for {text}")
    run = spec.at(budget)
    if run.reason:
        raise ValueError(f"{text} can't keep {budget}: {run.reason}")
    return run.method


def summary(handle: Any) -> str:
    """What a patch has done so far, in a line."""
    stats = handle.stats
    if not stats.prefills:
        return f"{handle.method}: no prompt had an image"
    share = stats.tokens_after / max(stats.tokens_before, 1)
    line = f"{handle.method}: {stats.prefills} prefills, {stats.tokens_before} visual tokens, "
    line += f"{stats.tokens_after} ({share:.3f}) after"
    if stats.kv_bytes_before:
        line += f", {stats.kv_bytes_after / stats.kv_bytes_before:.3f} of the KV cache"
    return line


class _Stop(BaseException):
    """Passes by what catches every Exception."""


@contextlib.contextmanager
def _failing(model: Any) -> Iterator[None]:
    """Let what goes wrong in `generate` be raised, whatever catches it in between."""
    stock = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        try:
            return stock(*args, **kwargs)
        except Exception as error:
            raise _Stop from error

    model.generate = generate
    try:
        yield
    except _Stop as stop:
        error = stop.__cause__
        raise RuntimeError(f"generate failed: {type(error).__name__}: {error}") from error
    finally:
        del model.generate


# --- in lmms-eval -------------------------------------------------------------------------------


def register() -> None:
    """Put a class of ours in the place of each of `MODELS`, under the same name."""
    from lmms_eval.models import MODEL_REGISTRY_V2 as registry
    from lmms_eval.models.registry_v2 import ModelManifest

    for name in MODELS:
        stock = registry.get_manifest(name)
        paths = {"simple": stock.simple_class_path, "chat": stock.chat_class_path}
        ours: dict[str, str] = {}
        for kind, path in paths.items():
            if path is not None and not path.startswith(f"{__name__}."):
                _STOCK[f"{name}_{kind}"] = path
                ours[f"{kind}_class_path"] = f"{__name__}.{name}_{kind}"
        if ours:
            registry.register_manifest(ModelManifest(name, **ours), overwrite=True)


def __getattr__(name: str) -> Any:
    """The class in place of one of lmms-eval's, which is only imported now: each of them needs
    packages of its own."""
    if name not in _STOCK:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, stock = _STOCK[name].rsplit(".", 1)
    base = getattr(importlib.import_module(module), stock)
    globals()[name] = type(name, (Pruned, base), {"__module__": __name__, "__doc__": base.__doc__})
    return globals()[name]


def main() -> None:
    """lmms-eval with `register` before it."""
    try:
        from lmms_eval.cli.dispatch import main as lmms_eval
    except ImportError as error:
        sys.exit(f"this needs lmms-eval 0.7.3 or newer: pip install lmms-eval ({error})")
    register()
    lmms_eval()


if __name__ == "__main__":
    # The registry imports this module by its name, which is not __main__.
    importlib.import_module("benchmarks.accuracy.lmms").main()
