"""The README's sections 2 and 3, followed literally: a fresh copy, fresh environments, the commands as they stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = (
    ("2", 0),
    ("3", 0),
    ("2", 1),
    ("2", 2),
    ("3", 1),
    ("2", 3),
    ("3", 2, "before the model"),
    ("2", 4),
    ("3", 2, "the model"),
)
"""Section and block, in the order that the text says."""


def blocks(section: str) -> list[list[str]]:
    """Commands of each console block of a section."""
    text = (ROOT / "README.md").read_text()
    part = text.split(f"\n## {section}. ")[1].split("\n## ")[0]
    found = re.findall(r"```console\n(.*?)```", part, re.DOTALL)
    return [[line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")] for block in found]


def script() -> str:
    """One bash script of all commands; what has to be waited for is waited for as a reader would."""
    lines = ["set -eu", "shopt -s expand_aliases", "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT"]
    for section, block, *part in ORDER:
        commands = blocks(section)[block]
        if part:
            models = [command for command in commands if command.startswith("site model")]
            commands = models if part == ["the model"] else [one for one in commands if one not in models]
        for command in commands:
            plan = command.split(" approve ")[0].endswith("site plan")
            if plan:  # until the coordinator has offered it
                lines.append("until site plan list --folder bank-03 --json | grep -q waiting; do sleep 1; done")
            lines.append(command)
            if "server up" in command:
                lines.append("until server status >/dev/null 2>&1; do sleep 1; done")
            if "site up" in command:
                lines.append(
                    'until site status --folder bank-03 --json | grep -q \'"state": "ready"\'; do sleep 1; done'
                )
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_readme_is_followed_literally(tmp_path: Path) -> None:
    copy = tmp_path / "accord"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".mypy_cache", ".ruff_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    path = tmp_path / "readme.sh"
    path.write_text(script())
    log = tmp_path / "readme.log"
    with log.open("wb") as file:
        done = subprocess.run(
            ["bash", str(path)],
            cwd=copy,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=1400,
            check=False,
            env={
                "PATH": f"{Path(sys.executable).parents[0]}:/usr/local/bin:/usr/bin:/bin",
                "HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "1",
            },
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    assert (copy / "model" / "head.safetensors").stat().st_size > 1000
