"""Clocks and memory meters that treat every variant alike."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import psutil
import torch

Step = Callable[[], object]


def interleaved_medians(steps: Mapping[str, Step], repeats: int, warm_up: int, device: str) -> dict[str, float]:
    """Median milliseconds of each step.

    The steps take turns, and each repeat starts with another one, so that a neighbour's load or a changing clock
    rate meets all of them.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-warm_up, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _milliseconds(steps[name], device)
            if repeat >= 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(step: Step, device: str) -> float:
    _finish(device)
    started = time.perf_counter()
    step()
    _finish(device)
    return 1e3 * (time.perf_counter() - started)


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_bytes(step: Step, repeats: int, device: str) -> int:
    """Peak memory of `repeats` steps above what was held before the first.

    CUDA: the allocator's own peak. CPU: growth of this process' resident memory, which sees torch, numpy and
    the libraries' work space alike; it is only fair in a process that has run no other variant before.
    """
    if device.startswith("cuda"):
        return _cuda_peak_bytes(step, repeats, device)
    with _ResidentPeak() as meter:
        for _ in range(repeats):
            step()
    return meter.growth


def _cuda_peak_bytes(step: Step, repeats: int, device: str) -> int:
    _finish(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        step()
    _finish(device)
    return torch.cuda.max_memory_allocated(device) - before


class _ResidentPeak:
    """Growth of this process' resident memory while the block runs, sampled every 0.5 ms."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = self._peak = 0

    @property
    def growth(self) -> int:
        """Bytes above the start."""
        return self._peak - self._before

    def __enter__(self) -> Self:
        self._before = self._peak = self._resident()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self._peak = max(self._peak, self._resident())
