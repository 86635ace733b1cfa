"""The README's sections 2 and 3, followed literally: a fresh copy, fresh environments, the commands as they stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = (("2", 0), ("3", 0), ("2", 1), ("2", 2), ("3", 1), ("2", 3), ("3", 2), ("2", 4), ("3", 3))
"""Section and block, in the order that the text says."""


def blocks(section: str) -> list[str]:
    """The blocks of a section, as they are pasted."""
    text = (ROOT / "README.md").read_text()
    part = text.split(f"\n## {section}. ")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", part, re.DOTALL)


def test_every_block_has_its_place() -> None:
    """None is left out, and none needs more than to be pasted: no prompt, no job of the shell's, no parser of JSON."""
    assert sorted(ORDER) == [(section, at) for section in ("2", "3") for at in range(len(blocks(section)))]
    for section, at in ORDER:
        block = blocks(section)[at]
        commands = re.sub(r"#.*", "", block)
        assert not re.search(r"^\$|\balias\b|&\s*$|& done|python3 -c|json\.load", commands, re.MULTILINE), block
        assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_the_readme_is_followed_literally(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("r")  # a path that a socket's name has room in
    copy = tmp_path / "accord"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".mypy_cache", ".ruff_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    pasted = "".join(blocks(section)[at] for section, at in ORDER)
    log = tmp_path / "readme.log"
    try:
        with log.open("wb") as file:
            done = subprocess.run(
                [
                    "bash",
                    "-eu",
                    "-s",
                ],  # from standard input, as a paste: a command that reads it would swallow the next
                input=pasted.encode(),
                cwd=copy,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=2600,
                check=False,
                env={
                    "PATH": f"{Path(sys.executable).parents[0]}:/usr/local/bin:/usr/bin:/bin",
                    "HOME": str(tmp_path),
                    "HF_HUB_OFFLINE": "1",
                },
            )
    finally:
        left = stopped(copy)
    assert done.returncode == 0, log.read_text()[-4000:]
    assert left == []  # its last block stops them
    assert (copy / "model" / "head.safetensors").stat().st_size > 1000


def stopped(copy: Path) -> list[str]:
    """Daemons that still ran: they are nobody's children, so they are stopped as their operator would."""
    found = []
    for part, folder in (*(("site", f"bank-0{n}") for n in (1, 2, 3)), ("server", "accord-server")):
        command = [copy / f"{part}-env/bin/accord", part, "down", "--folder", folder]
        with suppress(OSError):
            if subprocess.run(command, cwd=copy, capture_output=True, check=False).returncode == 0:
                found.append(folder)
    return found
