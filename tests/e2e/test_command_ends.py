"""How the real command ends where the terminal, the pipe or the user lets it down: one line, and no code of success."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from accord_shared import cli
from accord_shared.errors import Interrupted, PlanError

ACCORD = str(Path(sys.executable).with_name("accord"))


def accord(*args: str, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [ACCORD, *args],
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_what_cannot_be_printed_is_no_success() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor, words in ((writing, b"closed before all was printed"), (full, b"No space left on device")):
        done = accord("version", stdout=descriptor)
        os.close(descriptor)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.startswith(b"accord: ")
        assert done.stderr.count(b"\n") == 1


def test_a_terminal_without_epsilon_gets_it_escaped(tmp_path: Path) -> None:
    """A refusal's line, and what click prints."""
    for words in (("plan", "check", str(tmp_path / "ε.toml")), ("plan", "ε")):
        done = accord(*words, PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
        assert done.returncode == 2
        assert b"\\u03b5" in done.stderr
        assert b"Traceback" not in done.stderr


def _ended(monkeypatch: pytest.MonkeyPatch, end: BaseException) -> int:
    def run(**_: object) -> None:
        raise end

    monkeypatch.setattr(cli, "app", run)
    monkeypatch.setattr(cli, "entry_points", lambda **_: [])
    return cli._run()


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "accord: interrupted\n"),
        (SystemExit(130), 130, "accord: interrupted\n"),
        (Interrupted("stopped after round 3"), 130, "accord: stopped after round 3\n"),
        (PlanError("no such\nthing"), 2, "accord: no such thing\n"),
        (OSError(28, "No space left on device", "/x/y"), 2, "accord: /x/y: No space left on device\n"),
        (PermissionError(13, "Permission denied", "a\x1bb"), 2, "accord: a?b: Permission denied\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
        (SystemExit(0), 0, ""),
    ],
)
def test_every_end_has_its_code_and_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: BaseException, code: int, line: str
) -> None:
    assert _ended(monkeypatch, end) == code
    assert capsys.readouterr().err == line
