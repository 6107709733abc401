"""Hugging Face models: `patch(model, method)` and back.

One module does one thing: `patching` checks and hands out the `Handle`, `hooks` are what it
installs, `adapter` and one file per family say where a model's parts are, `tap` reads attention
queries and keys, `inputs` reads what callers pass, `probe` and `query` ask the question, `layout`
shortens the sequence and `prefill` what goes with it, `cache` corrects the calls that follow,
`report` tells what happened. `native` does without hooks in the decoder, `views` shows callers the
prompt as it was.
"""

from . import gemma as _gemma  # noqa: F401
from . import idefics3 as _idefics3  # noqa: F401
from . import internvl as _internvl  # noqa: F401
from . import llava as _llava  # noqa: F401  (registers its adapter)
from . import llava_next as _llava_next  # noqa: F401
from . import mistral3 as _mistral3  # noqa: F401
from . import qwen_vl as _qwen_vl  # noqa: F401
from . import video_llava as _video_llava  # noqa: F401
from .adapter import Adapter, Encoded, Source, register, supported
from .patching import Handle, patch, unpatch
from .report import Pruning, Stats

__all__ = [
    "Adapter",
    "Encoded",
    "Handle",
    "Pruning",
    "Source",
    "Stats",
    "patch",
    "register",
    "supported",
    "unpatch",
]
