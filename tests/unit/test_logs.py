"""Logs of daemons are JSON lines without secrets; systemd is told how they fare."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from accord_shared.errors import BadInput, Refused
from accord_shared.service import notify
from accord_shared.service.logs import configure

log = logging.getLogger("accord_server.test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The loggers of the other tests."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    known = {name: (logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in ("flwr", "httpx")}
    yield
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, (its_level, its_handlers) in known.items():
        logging.getLogger(name).setLevel(its_level)
        logging.getLogger(name).handlers[:] = its_handlers


def lines(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out, err = capfd.readouterr()
    assert out == ""
    return [json.loads(line) for line in err.splitlines()]


def test_a_line_is_one_object(capfd: pytest.CaptureFixture[str]) -> None:
    configure()
    log.info("round %d\nis done", 3, extra={"run": "demo", "path": Path("x"), "level": "fake"})
    log.debug("not told")
    (line,) = lines(capfd)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "accord_server.test",
        "message": "round 3\nis done",
        "run": "demo",
        "path": "x",
    }


def test_what_an_unknown_error_says_stays_out(capfd: pytest.CaptureFixture[str]) -> None:
    configure()
    secret = "hunter2"  # noqa: F841 - a local that must not be shown
    for error in (ValueError("the password is hunter2"), Refused("a clear line")):
        try:
            raise error
        except (ValueError, Refused):
            log.exception("a call failed")
    unknown, ours = lines(capfd)
    assert unknown["error"] == "ValueError"
    assert unknown["where"][0].startswith("test_logs.py:")
    assert "hunter2" not in json.dumps(unknown)
    assert ours["error"] == "Refused: a clear line"


def test_libraries_are_quiet_and_have_no_handlers_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("flwr")
    library.addHandler(logging.StreamHandler())
    configure("DEBUG")
    for name in ("flwr", "flwr.server", "httpx", "uvicorn.error", "grpc"):
        logging.getLogger(name).info("chatter")
    library.warning("trouble")
    log.debug("told")
    assert [line["message"] for line in lines(capfd)] == ["trouble", "told"]


def test_nothing_else_writes_between_the_lines(capfd: pytest.CaptureFixture[str]) -> None:
    configure()

    def fails() -> None:
        raise ValueError("the password is hunter2")

    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old\nhabits", stacklevel=1)

    class Ends:
        def __del__(self) -> None:
            raise ValueError("hunter2")

    Ends()
    sys.excepthook(KeyError, KeyError("hunter2"), None)
    found = lines(capfd)
    assert [line.get("error") for line in found] == ["ValueError", None, "ValueError", "KeyError"]
    assert "hunter2" not in json.dumps(found)
    assert "habits" in found[1]["message"]


def test_plain_lines_are_one_line_each(capfd: pytest.CaptureFixture[str]) -> None:
    configure(json=False)
    log.warning("a\nb", extra={"run": "demo"})
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert line.endswith(" WARNING a b run=demo\n")


def test_levels_that_are_none() -> None:
    with pytest.raises(BadInput, match="LOUD"):
        configure("LOUD")


# --- sd_notify


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """systemd's end of the socket."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@accord-test-{os.getpid()}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.bind(name.replace("@", "\0"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listener


def test_systemd_is_told(manager: socket.socket) -> None:
    notify.ready("federation Nord\nREADY=0")
    notify.alive()
    notify.status("")
    notify.status("round 3")
    notify.stopping()
    heard = [manager.recv(1024) for _ in range(4)]
    assert heard == [b"READY=1\nSTATUS=federation Nord READY=0", b"WATCHDOG=1", b"STATUS=round 3", b"STOPPING=1"]


def test_nobody_to_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.ready()
    for gone in (str(tmp_path / "gone"), "relative", ""):
        monkeypatch.setenv("NOTIFY_SOCKET", gone)
        notify.ready()


@pytest.mark.parametrize(
    ("period", "process", "every"),
    [("", "", None), ("0", "", None), ("30000000", "", 15.0), ("30000000", "1", None), ("x", "", None)],
)
def test_the_watchdogs_period(monkeypatch: pytest.MonkeyPatch, period: str, process: str, every: float | None) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", period)
    monkeypatch.setenv("WATCHDOG_PID", process)
    assert notify.watchdog_s() == every
    if every is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        assert notify.watchdog_s() == every
