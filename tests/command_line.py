"""Runs `accord` in this process: one registered command, its output and exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NamedTuple

import pytest

from accord_shared import cli, cli_roster


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def accord_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Run]:
    """Makes a runner of `accord WORDS …` in an empty folder, with the command of `entry` alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli_roster.PASSPHRASE, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    commands = {"registered_groups": cli.app.registered_groups, "registered_commands": cli.app.registered_commands}

    def of(entry: EntryPoint, *prefix: str) -> Run:
        monkeypatch.setattr(cli, "entry_points", lambda **_: [entry])

        def runner(*words: str) -> Done:
            monkeypatch.setattr(sys, "argv", ["accord", *prefix, *words])
            for kind in ("registered_groups", "registered_commands"):  # `main` registers into the one app
                monkeypatch.setattr(cli.app, kind, list(commands[kind]))
            with pytest.raises(SystemExit) as ended:
                cli.main()
            out, err = capfd.readouterr()
            code = ended.value.code
            return Done(code if isinstance(code, int) else 0, out, err)

        return runner

    return of


def refused(done: Done, *words: str) -> None:
    """One clear line, exit code 2."""
    assert done.code == 2
    assert done.err.startswith("accord: ")
    assert done.err.count("\n") == 1
    assert not [word for word in words if word not in done.err], done.err
    assert "Traceback" not in done.err


def ok(done: Done) -> str:
    assert done.code == 0, done.err
    assert done.err == ""
    return done.out
