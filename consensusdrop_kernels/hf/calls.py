"""State of the calls in flight: one set per thread, none of it copied with the model."""

from __future__ import annotations

import threading
from typing import Any


class Calls:
    """A thread-local and a lock that survive `copy.deepcopy` and pickling as fresh ones."""

    def __init__(self) -> None:
        self.local: Any = threading.local()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()
