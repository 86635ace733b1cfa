"""The output folder: ours or refused, never half-taken."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from accord_shared.errors import OutputError
from accord_shared.files import make_folder, write_atomic

MARKER = "accord-run.json"
NEEDED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class OutputFolder:
    """A folder that one simulation owns."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The coordinator's checkpoint."""
        return self.path / "checkpoint"

    @property
    def work(self) -> Path:
        """The participants' records and states: deleted by nobody but the user."""
        return self.path / "work"

    @property
    def model(self) -> Path:
        """The finished model."""
        return self.path / "model"


def claim(path: Path, plan_hash: str, *, resume: bool) -> OutputFolder:
    """Take a new or empty folder for a run, or with `resume` the folder of an earlier run of the same plan.

    Raises:
        OutputError: it is not ours, belongs to another plan, already holds a run, or there is no room.
    """
    marker = path / MARKER
    if marker.exists():
        _check_marker(marker, plan_hash, resume=resume)
    elif resume:
        raise OutputError(f"{path} holds no run to resume")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} is not empty and not ours: choose another --out")
    make_folder(path)
    free = shutil.disk_usage(path).free
    if free < NEEDED_BYTES:
        raise OutputError(f"no room in {path}: {free // 2**20} MiB free, {NEEDED_BYTES // 2**20} MiB needed")
    if not marker.exists():
        write_atomic(marker, json.dumps({"plan_hash": plan_hash}).encode())
    return OutputFolder(path)


def _check_marker(marker: Path, plan_hash: str, *, resume: bool) -> None:
    if not resume:
        raise OutputError(f"{marker.parent} already holds a run: add --resume to continue it, or choose another --out")
    try:
        known = json.loads(marker.read_text())["plan_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{marker} is damaged") from None
    if known != plan_hash:
        raise OutputError(f"{marker.parent} belongs to plan {known[:12]}…, not to {plan_hash[:12]}…")
