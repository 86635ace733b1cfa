"""The rows of a CSV file under one strict rule (RFC 4180), for sites and simulations alike.

An opening quote stands directly behind a delimiter or the start of a line, a closing one directly before a delimiter or
the end of a line, and a quote inside a quoted cell is doubled. Lines end with LF, CRLF or CR; within quotes a line
break is kept as it is. What breaks the rule is reported with all the lines that may belong to it, so that nothing of
doubtful origin passes for a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

BOM = b"\xef\xbb\xbf"
MOST_LINE_BYTES = 2**26
_BLOCK_BYTES = 2**20
_MOST_SHOWN = 200
_INSIDE = re.compile(rb'[^"]*+(?:""[^"]*+)*+')
"""The rest of a quoted cell, up to the quote that closes it or the end of what was read."""


class Unreadable(Exception):
    """No CSV file at all, in words that name the line. Never leaves this package."""


class Row(NamedTuple):
    """A row of the header's width; `lines` is how many lines of the file it takes."""

    cells: list[bytes]
    lines: int


class Malformed(NamedTuple):
    """Lines that are no row for certain: why, how they begin, and how many they are."""

    problem: str
    look: bytes
    lines: int


@dataclass(frozen=True)
class _Syntax:
    """The rule for one delimiter; `line` and `cell` are for the common row, which is well formed in one line."""

    delimiter: bytes
    unquoted: re.Pattern[bytes]
    closing: re.Pattern[bytes]
    line: re.Pattern[bytes]
    cell: re.Pattern[bytes]

    @staticmethod
    def of(delimiter: str) -> _Syntax:
        sign = delimiter.encode()
        escaped = re.escape(sign)
        unquoted = rb'[^"\r\n' + escaped + rb"]*+"
        cell = rb'(?:"[^"]*+(?:""[^"]*+)*+"|' + unquoted + rb")"
        return _Syntax(
            delimiter=sign,
            unquoted=re.compile(unquoted),
            closing=re.compile(rb'"(?=' + escaped + rb"|[\r\n]|\Z)"),
            line=re.compile(cell + rb"(?:" + escaped + cell + rb")*+(?:\r\n|\r|\n)?"),
            cell=re.compile(rb"(?:\A|" + escaped + rb")(" + cell + rb")"),
        )

    def cells(self, line: bytes) -> list[bytes] | None:
        """The cells of a row in one line; None where it breaks the rule or goes on in the next."""
        if self.line.fullmatch(line) is None:
            return None
        raw = self.cell.findall(line)
        return [cell[1:-1].replace(b'""', b'"') if cell[:1] == b'"' else cell for cell in raw]


class CsvRows:
    """Reads rows: `header` is there at once, iterating gives the others. An empty line is None.

    Memory is bounded by a block and a row. Raises `Unreadable`, also while it iterates.
    """

    def __init__(self, file: BinaryIO, delimiter: str, most_cell_lines: int) -> None:
        self._lines = _lines(file)
        self.syntax = _Syntax.of(delimiter)
        self.most_cell_lines = most_cell_lines
        self.line = 0
        """Number of the line that was read last, from 1."""
        self.bytes = 0
        """Read since somebody set it to 0."""
        first = self._read(self.more())
        if isinstance(first, Malformed):
            raise Unreadable(f"row 1: {first.problem}")
        self.header = [b""] if first is None else first.cells

    def __iter__(self) -> Iterator[Row | Malformed | None]:
        syntax, delimiter, width = self.syntax, self.syntax.delimiter, len(self.header)
        for line in self._lines:
            self.line += 1
            self.bytes += len(line)
            lines = 1
            if b'"' not in line:
                cells = line.rstrip(b"\r\n").split(delimiter)
            elif (quoted := syntax.cells(line)) is not None:
                cells = quoted
            else:
                found = self._read(line)
                if found is None or isinstance(found, Malformed):
                    yield found
                    continue
                cells, lines = found.cells, found.lines
            if len(cells) == width:
                yield Row(cells, lines)
            elif cells == [b""] and b'"' not in line:
                yield None
            else:
                yield Malformed(f"{len(cells)} columns where the header has {width}", _look(line), lines)

    def _read(self, line: bytes) -> Row | Malformed | None:
        """The row that begins with `line`, and as many more lines as its quotes span."""
        first = self.line
        if not line.strip(b"\r\n"):
            return None
        record = _Record(self, line)
        cells = record.cells()
        lines = self.line - first + 1
        return Row(cells, lines) if record.problem is None else Malformed(record.problem, _look(line), lines)

    def more(self) -> bytes:
        """The next line; empty at the end of the file."""
        line = next(self._lines, b"")
        self.line += bool(line)
        self.bytes += len(line)
        return line


class _Record:
    """One record with quotes: `cells`, and after that what is wrong with it."""

    def __init__(self, rows: CsvRows, text: bytes) -> None:
        self._rows, self._text = rows, text
        self._syntax = rows.syntax
        self._at = 0
        self._opened = rows.line
        self.problem: str | None = None

    def cells(self) -> list[bytes]:
        """All cells; what they are worth once `problem` is set, nobody knows."""
        found: list[bytes] = []
        while True:
            quoted = self._text.startswith(b'"', self._at)
            found.append(self._quoted() if quoted else self._unquoted())
            if not self._text.startswith(self._syntax.delimiter, self._at):
                return found
            self._at += 1

    def _unquoted(self) -> bytes:
        match = self._syntax.unquoted.match(self._text, self._at)
        begin, self._at = self._at, match.end() if match else self._at
        if self._text.startswith(b'"', self._at):
            self._fail(f"line {self._rows.line}: a quote inside a cell that does not begin with one")
            self._at = len(self._text)  # it is over with this line: a quote that opens nothing is a mere character
        return self._text[begin : self._at]

    def _quoted(self) -> bytes:
        self._opened = self._rows.line
        begin = self._at + 1
        end = self._inside(begin)
        while end == len(self._text):
            if self.problem is None and self._rows.line - self._opened + 1 >= self._rows.most_cell_lines:
                most = self._rows.most_cell_lines
                self._fail(f"the quote that opens in line {self._opened} spans more than max_cell_lines = {most} lines")
            if self.problem is not None:
                return self._to_a_closing_quote(end)
            more = self._rows.more()
            if not more:
                raise self._endless()
            self._text += more
            end = self._inside(end)
        self._at = end + 1
        if self._text[self._at : self._at + 1] not in (b"", b"\r", b"\n", self._syntax.delimiter):
            where = f"line {self._rows.line}: a quote inside the cell that opens in line {self._opened}"
            self._fail(f"{where}, neither doubled nor at the cell's end")
            return self._to_a_closing_quote(self._at)
        return self._text[begin:end].replace(b'""', b'"')

    def _inside(self, start: int) -> int:
        match = _INSIDE.match(self._text, start)
        return match.end() if match else start

    def _to_a_closing_quote(self, start: int) -> bytes:
        """Skip, across lines, all that may be inside the broken cell."""
        while (match := self._syntax.closing.search(self._text, start)) is None:
            self._text, start = self._rows.more(), 0
            if not self._text:
                raise self._endless()
        self._at = match.end()
        return b""

    def _endless(self) -> Unreadable:
        return Unreadable(f"line {self._opened}: the quote that opens here is never closed")

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem


def _look(line: bytes) -> bytes:
    return line[:_MOST_SHOWN].rstrip(b"\r\n")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, without a BOM; a CRLF is never cut, wherever a block ends."""
    rest, number = b"", 0
    while block := file.read(_BLOCK_BYTES):
        lines = (rest + block).splitlines(keepends=True)
        # a CR at the end may be half of a CRLF
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        if len(rest) > MOST_LINE_BYTES:
            raise Unreadable(f"line {number + len(lines) + 1}: longer than {MOST_LINE_BYTES} bytes")
        if number == 0 and lines:
            lines[0] = lines[0].removeprefix(BOM)
        number += len(lines)
        yield from lines
    if rest:
        yield rest.removeprefix(BOM) if number == 0 else rest


def hidden_labels(row: Row, label: int, delimiter: str) -> set[bytes]:
    """Label cells of the rows that a cell of several lines may have swallowed; none where it holds no such line.

    A stray quote and one more, far below, make a well-formed cell of all that is between. If a line of it, by itself or
    with the cells before or after it, is a whole row, its label tells: this is what the caller compares with labels.
    """
    if row.lines == 1:
        return set()
    width, sign = len(row.cells), delimiter.encode()
    found: set[bytes] = set()
    for at, cell in enumerate(row.cells):
        lines = cell.splitlines()
        for i, line in enumerate(lines if len(lines) > 1 else ()):
            before = row.cells[:at] if i == 0 else []
            after = row.cells[at + 1 :] if i == len(lines) - 1 else []
            parts = line.split(sign)
            here = label - len(before)
            if len(before) + len(parts) + len(after) == width and 0 <= here < len(parts) > 1:
                found.add(parts[here])
    return found
