"""`dp-step`: time and memory of one private step against a plain one and against Opacus.

The private step is everything that a trainer pays: forward, backward, clipping, noise and the optimiser's
update. All variants train the same tensors of the same encoder on the same batch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from accord_shared.errors import Aborted, PlanError
from accord_simulations.bench._clock import interleaved_medians, peak_bytes
from accord_simulations.bench._variants import VARIANTS, StepSettings, norm_error
from accord_simulations.resources import versions

_WARM_UP = 3
_MEMORY_STEPS = 3


def measure(settings: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Raises:
        PlanError: a setting is unknown or out of range, or the device is not there.
    """
    chosen = StepSettings.read(settings)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"device = {chosen.device!r}: CUDA is not available here")
    progress("dp-step: norms against a loop in fp64")
    error = norm_error(chosen)
    progress("dp-step: peak memory, a process for each variant")
    peaks = {name: _peak_in_process(name, chosen) for name in ("nonprivate", "accord")}
    progress(f"dp-step: {chosen.repeats} interleaved repeats of {', '.join(VARIANTS)}")
    steps = {name: build(chosen) for name, build in VARIANTS.items()}
    medians = interleaved_medians(steps, chosen.repeats, _WARM_UP, chosen.device)
    return {
        **{f"{name}_ms": round(value, 3) for name, value in medians.items()},
        "overhead": round(medians["accord"] / medians["nonprivate"], 4),
        "speedup_vs_ghost": round(medians["opacus_ghost"] / medians["accord"], 4),
        "peak_bytes_ratio": round(peaks["accord"] / max(1, peaks["nonprivate"]), 4),
        "norm_max_relative_error": error,
        **chosen.model_dump(include={"batch", "tokens", "rank", "repeats", "depth", "precision"}),
        "threads": torch.get_num_threads(),
        "device": _device_name(chosen.device),
        "versions": versions(),
    }


def _device_name(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def _peak_in_process(variant: str, settings: StepSettings) -> int:
    """Peak memory of a variant in a fresh process: memory that another variant has left would hide its growth."""
    command = [sys.executable, "-m", __name__, variant, settings.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Aborted(f"measuring the memory of {variant} failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _main(variant: str, settings: str) -> None:
    chosen = StepSettings.model_validate_json(settings)
    peak = peak_bytes(VARIANTS[variant](chosen), _MEMORY_STEPS, chosen.device)
    sys.stdout.write(json.dumps(peak) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
