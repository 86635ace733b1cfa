"""The archive of a coordinator: its files, and snapshots of its databases that are whole while it runs."""

from __future__ import annotations

import os
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url

from accord_server.settings import CoordinatorFolder, CoordinatorSettings
from accord_shared.cli_daemon import LOG
from accord_shared.errors import OutputError

ARCHIVE = "archive.tar"
_TRIES = 10
_OF_A_PROCESS = ("control", "flower", "lock", LOG)
"""Sockets, a log, and the SuperLink's database, of which a snapshot is taken."""


def write_backup(paths: CoordinatorFolder, settings: CoordinatorSettings, target: Path) -> dict[str, Any]:
    """Write a new tar archive of mode 0600, whole or absent; what is in it, and what is not.

    Databases are copied first: a run's checkpoint may then be newer than its row, which resuming expects.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    if target.exists():
        raise OutputError(f"{target} exists already and is not overwritten")
    if target.absolute().is_relative_to(paths.path):
        raise OutputError(f"{target} is in the folder that is backed up: write it elsewhere")
    try:
        for _ in range(_TRIES):
            before = _files(paths.runs)
            with tempfile.TemporaryDirectory(prefix=".accord-backup.", dir=target.absolute().parent) as work:
                facts = _written(paths, settings, Path(work))
                if _files(paths.runs) == before:
                    os.link(Path(work) / ARCHIVE, target)  # unlike a rename, it replaces nothing
                    return {"file": str(target), **facts}
    except (OSError, tarfile.TarError) as error:
        raise OutputError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from None
    except sqlite3.Error as error:
        raise OutputError(f"cannot copy a database: {error}") from None
    raise OutputError("runs change faster than they are copied: stop them, or try again")


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """What tells whether a run went on: a checkpoint is two files that belong together."""
    found = ((str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return [(name, status.st_mtime_ns, status.st_size) for name, status in found]


def _written(paths: CoordinatorFolder, settings: CoordinatorSettings, work: Path) -> dict[str, Any]:
    url = make_url(paths.database_url(settings))
    own = Path(url.database or "") if url.drivername == "sqlite" else None
    snapshots = {"flower/link.db": paths.flower / "link.db"} | ({"state.db": own} if own is not None else {})
    found = {name: path for name, path in snapshots.items() if path.exists()}
    for at, path in enumerate(found.values()):
        _snapshot(path, work / f"{at}.db")
    archive = work / ARCHIVE
    archive.touch(mode=0o600)
    with tarfile.open(archive, "w") as tar:
        for at, name in enumerate(found):
            tar.add(work / f"{at}.db", name)
        for path in sorted(paths.path.iterdir()):
            if path.name not in _OF_A_PROCESS and (own is None or not path.name.startswith(own.name)):
                tar.add(path, path.name, filter=_kept)
        names = tar.getnames()
    with archive.open("rb") as file:
        os.fsync(file.fileno())
    elsewhere = None if own is not None else "the database is not in it: back up PostgreSQL with pg_dump"
    return {"bytes": archive.stat().st_size, "entries": len(names), "note": elsewhere}


def _snapshot(source: Path, target: Path) -> None:
    target.touch(mode=0o600)
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as live,
        closing(sqlite3.connect(target)) as copy,
    ):
        live.backup(copy)


def _kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files and folders; half-written files of `write_atomic` are none."""
    half = entry.name.rsplit("/", 1)[-1].startswith(".") and entry.name.endswith(".tmp")
    return entry if (entry.isfile() or entry.isdir()) and not half else None
