"""The output folder: ours or refused, held by one process, never half-taken, and gone again where nothing was run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from accord_shared.errors import OutputError
from accord_shared.files import make_folder, only_one, write_atomic

MARKER = "accord-run.json"
LOCK = ".lock"
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

    @property
    def has_run(self) -> bool:
        """Whether a round was begun: from then on there is something to resume."""
        return self.checkpoint.exists() and any(self.checkpoint.iterdir())


@dataclass(frozen=True)
class RunIdentity:
    """What must not change between a run's begin and its end: hashes, hexadecimal."""

    plan_hash: str
    scenario: str
    """Of the scenario beside its plan and its performance flags."""
    data: str
    """Of all records, in order."""


@contextmanager
def claim(path: Path, identity: RunIdentity, *, resume: bool) -> Iterator[OutputFolder]:
    """Hold a new or empty folder for a run, or with `resume` the folder of an earlier run of the same identity.

    Where it ends by an error before a round was begun, what was written is removed: the command can be given again.

    Raises:
        OutputError: it is not ours, belongs to another plan, scenario or data, holds a run, or there is no room.
        AlreadyRunning: another process holds it.
    """
    marker = path / MARKER

    def check() -> None:
        if marker.exists():
            _check_marker(marker, identity, resume=resume)
        elif resume:
            raise OutputError(f"{path} holds no run to resume")
        else:
            require_empty(path)

    folder = OutputFolder(path)
    with held(path, check, lambda: folder.has_run):
        free = shutil.disk_usage(path).free
        if free < NEEDED_BYTES:
            raise OutputError(f"no room in {path}: {free // 2**20} MiB free, {NEEDED_BYTES // 2**20} MiB needed")
        if not marker.exists():
            write_atomic(marker, json.dumps(asdict(identity)).encode())
        yield folder


@contextmanager
def held(path: Path, check: Callable[[], None], worth_keeping: Callable[[], bool]) -> Iterator[None]:
    """Make the folder if need be and hold it; the lock of a process that died holds nobody.

    `check` raises where it must not be taken. After an error, what was put into a folder that was new or empty is
    removed again, unless it is `worth_keeping`.

    Raises:
        OutputError: it cannot be made; AlreadyRunning: another process holds it; and what `check` raises.
    """
    check()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    with only_one(path / LOCK, f"{path} is in use: a run in it"):
        check()  # what another process did until it let go
        ours = not any(entry.name != LOCK for entry in path.iterdir())
        try:
            yield
        except BaseException:
            if ours and not worth_keeping():
                _remove(path, new)
            raise


def require_empty(path: Path) -> None:
    """The folder is absent or empty.

    Raises:
        OutputError: it is not.
    """
    if path.exists() and (not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir())):
        raise OutputError(f"{path} is not empty and not ours: choose another --out")


def _remove(path: Path, new: list[Path]) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    _remove_empty(new)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def numbered(parent: Path, stem: str) -> Iterator[Path]:
    """A new folder `stem` in `parent`, or `stem-2`, …: nobody else gets the same. One that stays empty goes again.

    Raises:
        OutputError: it cannot be made.
    """
    new = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    make_folder(parent)
    path = next(path for number in count(1) if _made(path := parent / (stem if number == 1 else f"{stem}-{number}")))
    try:
        yield path
    finally:
        _remove_empty([path, *new])


def _made(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise OutputError(f"cannot create {path}: {error.strerror}") from None
    return True


def _check_marker(marker: Path, identity: RunIdentity, *, resume: bool) -> None:
    if not resume:
        raise OutputError(f"{marker.parent} already holds a run: add --resume to continue it, or choose another --out")
    try:
        table = json.loads(marker.read_text())
        known = RunIdentity(**{"scenario": "", "data": "", **{key: str(value) for key, value in table.items()}})
    except (OSError, ValueError, AttributeError, TypeError):
        raise OutputError(f"{marker} is damaged") from None
    if not known.scenario or not known.data:
        raise OutputError(
            f"{marker.parent} was begun without a digest of its data, so it cannot be resumed: begin anew"
        )
    if known.scenario != identity.scenario:
        raise OutputError(f"{marker.parent} belongs to another scenario: its data, population, faults or comparisons")
    if known.data != identity.data:
        raise OutputError(
            f"{marker.parent} was begun with other data: it takes the same records, in order and shared out alike"
        )
    if known.plan_hash != identity.plan_hash:
        raise OutputError(f"{marker.parent} belongs to plan {known.plan_hash[:12]}…, not to {identity.plan_hash[:12]}…")
