"""`accord` with a wrong clock: `python shifted_clock.py FILE WORDS…`; FILE says by how many seconds, now."""

import sys
import time
from pathlib import Path

FILE = Path(sys.argv.pop(1))
_time, _time_ns = time.time, time.time_ns


def offset() -> float:
    return float(FILE.read_text())


time.time = lambda: _time() + offset()
time.time_ns = lambda: _time_ns() + round(offset() * 1e9)

from accord_shared.cli import main  # noqa: E402

main()
