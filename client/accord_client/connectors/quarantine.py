"""The file of rows that failed: whole or absent, for the operator's eyes, safe to open in a spreadsheet."""

from __future__ import annotations

import contextlib
import csv
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from accord_client.connectors.cells import BadCell, cell_text
from accord_shared.errors import AccordError, OutputError
from accord_shared.files import sync_folder

_MOST_SHOWN = 200
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


class Quarantine:
    """Writes `row,column,problem,value` beside `path`, which is replaced at the end.

    It is replaced too where the data set as a whole is refused, so that the operator sees why; if no row fails,
    what an earlier reading left is removed. Mode 0600.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._file: IO[str] | None = None
        self._writer: Any = None

    def add(self, number: int, column: str, problem: str, cell: object) -> None:
        """Write one row."""
        try:
            if self._file is None:
                self._open()
            self._writer.writerow([number, plain(column), plain(problem), plain(cell)])
        except OSError as error:
            raise self._failed(error) from None
        self.rows += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or (isinstance(error, AccordError) and not isinstance(error, OutputError)):
                self._finish()
        except OSError as problem:
            raise self._failed(problem) from None
        finally:
            self._discard()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, _ = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent)
        self._temporary = Path(_)
        self._file = os.fdopen(handle, "w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["row", "column", "problem", "value"])

    def _finish(self) -> None:
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def _discard(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._file = None

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path}: {error.strerror}")


def plain(cell: object) -> str:
    """A cell on one line, cut to 200 characters, that no spreadsheet takes for a formula."""
    try:
        text = cell_text(cell)
    except BadCell:
        text = cell.decode("utf-8", "backslashreplace") if isinstance(cell, bytes) else repr(cell)
    text = text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
