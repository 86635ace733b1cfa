"""`up --wait`, `status --wait`, `down`: daemons from a command line whose next line needs them to be ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from accord_shared.errors import Aborted, BadInput, NotRunning, OutputError

WAIT_S = 120.0
_LOOK_S = 0.2
_MAIN = "from accord_shared.cli import main; main()"
LOG = "daemon.log"
"""In the daemon's folder, mode 0600: what it says where it has no terminal."""

WaitUp = Annotated[
    bool, typer.Option("--wait", help="Start it in the background, and return when it is ready; `down` stops it.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Return when it is ready; exit code 3 if it is not in time.")]
Timeout = Annotated[float, typer.Option(min=0.1, max=86400.0, help="Seconds to wait, at most.")]


def wait_ready(obstacle: Callable[[], str], timeout_s: float, alive: Callable[[], None] = lambda: None) -> None:
    """Until a daemon is ready: `obstacle` says why it is not, and raises `NotRunning` where there is none.

    Raises:
        Aborted: it is not in time; the obstacle is named. Also what `alive` raises, which is asked in between.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        alive()
        try:
            why = obstacle()
        except NotRunning as error:
            why = str(error)
        if not why:
            return
        if time.monotonic() >= deadline:
            raise Aborted(f"not ready within {timeout_s:g} s: {why}")
        time.sleep(_LOOK_S)


def start_detached(
    part: str,
    folder: Path,
    log_level: str,
    obstacle: Callable[[], str],
    process_of: Callable[[], int],
    timeout_s: float,
) -> None:
    """`accord PART up` as a process of its own that outlives this one; returns when it is ready.

    `process_of` asks whoever answers in the folder for its process: the one that was there before is not the new one.

    Raises:
        Aborted: it is not ready in time, and goes on.
        BadInput: it ends; its last line says why.
    """
    log = folder / LOG
    words = [part, "up", "--folder", str(folder.absolute()), "--log-level", log_level]
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise OutputError(f"cannot write {log}: {error.strerror}") from None
    with os.fdopen(descriptor, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )

    def alive() -> None:
        if process.poll() is not None:
            raise BadInput(f"it ended at once: {_last_line(log)}")

    def not_ready() -> str:
        return obstacle() if process_of() == process.pid else "another one answers"

    wait_ready(not_ready, timeout_s, alive)
    process.returncode = 0  # it is nobody's child to wait for: no warning that it still runs
    typer.echo(f"ready, process {process.pid}; its log is {log}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("accord: ")[:500] if lines else f"see {log}"


def stop_daemon(process_of: Callable[[], int], timeout_s: float) -> None:
    """SIGTERM, and wait until it is gone. `process_of` asks the daemon for its process.

    Raises:
        NotRunning: there is none.
        Aborted: it does not end in time.
    """
    process = process_of()
    deadline = time.monotonic() + timeout_s
    os.kill(process, signal.SIGTERM)
    while _is_there(process):
        if time.monotonic() >= deadline:
            raise Aborted(f"process {process} did not end within {timeout_s:g} s")
        time.sleep(_LOOK_S)
    typer.echo("stopped")


def _is_there(process: int) -> bool:
    """A zombie, whose parent does not look, has ended."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return state != "Z"
