"""Logs of daemons: one JSON object a line on standard error."""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from accord_shared.errors import AccordError, BadInput

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_QUIET = ("alembic", "asyncio", "flwr", "grpc", "httpcore", "httpx", "sqlalchemy", "uvicorn")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def configure(level: str = "INFO", json: bool = True) -> None:
    """Log to standard error, in this format alone; libraries from WARNING on.

    Raises:
        BadInput: there is no such level.
    """
    if level.upper() not in LEVELS:
        raise BadInput(f"--log-level {level!r} is not one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if json else PlainLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _QUIET:
        library = logging.getLogger(name)
        library.handlers.clear()  # flwr brings a coloured one
        library.propagate = True
        library.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    sys.unraisablehook = lambda found: _uncaught(found.exc_type, found.exc_value, found.exc_traceback)
    threading.excepthook = lambda found: _uncaught(found.exc_type, found.exc_value, found.exc_traceback)


def _uncaught(kind: type[BaseException], error: BaseException | None, where: TracebackType | None) -> None:
    """What nobody caught is a line like any other, not a traceback between lines."""
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    logging.getLogger(__name__).error("an error that nobody caught", exc_info=(kind, error or kind(), where))


class JsonLines(logging.Formatter):
    """{time, level, logger, message, error?, …extra}."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_error(record),
        }
        return json.dumps({**extra, **fields}, default=str)


class PlainLines(logging.Formatter):
    """For people at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        words = [f"{key}={value}" for key, value in vars(record).items() if key not in _STANDARD]
        error = _error(record).get("error")
        parts = [_time(record), record.levelname, record.getMessage(), *words, *([error] if error else [])]
        return " ".join(" ".join(str(part).split()) for part in parts)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _error(record: logging.LogRecord) -> dict[str, Any]:
    """Our own errors with their line; of any other only what and where: its text may hold what nobody should read."""
    if not record.exc_info or record.exc_info[1] is None:
        return {}
    error = record.exc_info[1]
    if isinstance(error, AccordError):
        return {"error": f"{type(error).__name__}: {error}"}
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": type(error).__name__, "where": where}
