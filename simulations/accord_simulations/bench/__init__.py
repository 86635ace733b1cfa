"""`accord bench`: what Accord costs beside its peers, measured in the same run on the same machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, cast

from accord_shared.errors import PlanError

Report = Callable[[str], None]

BENCHMARKS = {
    "dp-step": "dp_step",
    "simulation": "simulation",
    "secagg": "secagg",
    "noise": "noise",
    "deployment": "deployment",
}
"""Benchmarks by name, and the module of this package whose `measure` runs each."""


class _Module(Protocol):
    def measure(self, settings: dict[str, Any], progress: Report) -> dict[str, Any]:
        """Run the benchmark."""


def run_benchmark(name: str, settings: dict[str, Any], progress: Report) -> dict[str, Any]:
    """Run benchmark `name` with `settings` over its defaults; `progress` gets a line now and then.

    Raises:
        PlanError: the benchmark or one of the settings is unknown, or a setting is out of range.
    """
    if name not in BENCHMARKS:
        raise PlanError(f"no benchmark {name!r}: known are {', '.join(BENCHMARKS)}")
    module = cast(_Module, import_module(f"{__name__}.{BENCHMARKS[name]}"))
    return module.measure(settings, progress)
