"""`accord` with a wrong clock: `python shifted_clock.py FILE WORDS…`; FILE says by how many seconds, now.

Accord's own modules read the shifted clock. grpc must not: it compares Python's clock with that of its C core.
"""

import sys
import time
from pathlib import Path

FILE = Path(sys.argv.pop(1))
_time, _time_ns = time.time, time.time_ns


def offset() -> float:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return float(FILE.read_text()) if caller.startswith("accord_") else 0.0


def shifted_time() -> float:
    return _time() + offset()


def shifted_time_ns() -> int:
    return _time_ns() + round(offset() * 1e9)


time.time, time.time_ns = shifted_time, shifted_time_ns

from accord_shared.cli import main  # noqa: E402

main()
