"""What a run takes of the machine: memory of all its processes, versions of what it ran on."""

from __future__ import annotations

import platform
import threading
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Self

import psutil

from accord_shared import __version__

PERIOD_S = 1.0


class PeakMemory:
    """The largest memory of this process and all its children, shared pages counted once (PSS)."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, memory_now())

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.bytes = max(self.bytes, memory_now())


def memory_now() -> int:
    """Proportional set size [bytes] of this process and its children (RSS where PSS is not to be had)."""
    total = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            total += int(getattr(info, "pss", info.rss))
        except psutil.Error:
            continue
    return total


def versions() -> dict[str, str]:
    """Versions of Accord and of what it computes with."""
    found = {"accord": __version__, "python": platform.python_version()}
    for name in ("flwr", "torch", "opacus", "transformers", "peft", "ray", "dp-accounting", "numpy", "cryptography"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
