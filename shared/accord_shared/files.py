"""Files that are whole or absent: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from accord_shared.errors import AlreadyRunning, OutputError


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Replace `path` by `data` so that a crash at any instant leaves the old or the new file.

    Without `durable` a reader still sees one or the other, but a power cut may leave neither.

    Raises:
        OutputError: the folder is missing, not writable, or the disk is full.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()
            raise
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; an OSError where that fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the system frees it when its holder dies. `what` names the holder in words.

    Raises:
        AlreadyRunning: another process holds it.
        OutputError: it cannot be written.
    """
    try:
        file = path.open("wb")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.stat()  # a holder that removes the file leaves a lock on nothing
        except OSError:
            raise AlreadyRunning(f"{what} is running already") from None
        yield


def make_folder(path: Path) -> None:
    """Create `path` and its parents.

    Raises:
        OutputError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {path}: {error.strerror}") from error


def has_home() -> bool:
    """Whether this user has a home folder, by the environment or the system."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def make_private(path: Path) -> Path:
    """Create `path`, open to nobody but its owner; parents that are missing, too. Its path again.

    Raises:
        OutputError: it cannot be created, or is somebody else's.
    """
    try:
        for parent in reversed([folder for folder in path.parents if not folder.exists()]):
            parent.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise OutputError(f"cannot create {path}: {error.strerror}") from error
    return path


def open_private(path: Path, mode: str) -> IO[Any]:
    """Open a file; if it is made, then for its owner's eyes alone, whatever the process' umask is."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))  # Path has no opener


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
