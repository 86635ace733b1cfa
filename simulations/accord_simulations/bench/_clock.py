"""Clocks and memory meters that treat every variant alike."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
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

    CUDA: the allocator's own peak. CPU: growth of this process' resident memory (the kernel's high-water mark where
    it can be reset, else samples), which sees torch, numpy and the libraries' work space alike; it is only fair in
    a process that has run no other variant before.
    """
    if device.startswith("cuda"):
        return _cuda_peak_bytes(step, repeats, device)
    meter = _HighWater() if _reset_high_water() else _Sampled()
    with meter:
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


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _reset_high_water() -> bool:
    """Ask Linux to forget the peak of this process so far (proc(5), clear_refs); False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water() is not None


def _high_water() -> int | None:
    """Peak resident memory since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


class _Meter:
    """Growth of this process' resident memory over a block: `growth`, in bytes."""

    def __init__(self) -> None:
        self._before = self._peak = 0

    @property
    def growth(self) -> int:
        """Peak of the block above its start."""
        return self._peak - self._before

    def __enter__(self) -> Self:
        self._before = self._peak = _resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._peak = max(self._peak, _resident())


class _HighWater(_Meter):
    """By the kernel's high-water mark."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._peak = max(self._peak, _high_water() or 0)


class _Sampled(_Meter):
    """By a sample every 0.5 ms: what lives shorter is missed."""

    def __init__(self) -> None:
        super().__init__()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        super().__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        super().__exit__(kind, error, trace)

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self._peak = max(self._peak, _resident())
