"""An append-only, hash-chained list of entries in one SQLite file.

An entry's hash covers its content and the hash before it, so no entry can be changed, removed or put between others
without changing every hash after it. A random nonce makes entries of two copies of a file differ even where they say
the same. A commit is on the disk when it returns (write-ahead log, `synchronous = FULL`), and then moved from the log
into the file itself, so that the file alone holds all that ever left; a transaction that does not end is as if it never
began. Beside the file the newest entry's number and hash are kept, so that an older file in its place is noticed.

Notes are what may be forgotten without any harm but to this site: they are no entries and move no head, so nobody can
make a ledger grow by requests that cost nothing.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from accord_shared.errors import LedgerBehind, LedgerDamaged, LedgerRolledBack, OutputError, ProtocolError
from accord_shared.files import make_private, sync_folder, write_atomic
from accord_shared.frames import hash_frame
from accord_shared.receipts import NO_LEDGER, Head, Seen

DENSE = 64
"""Newest entries that a receipt names one by one."""
MOST_ENTRIES = 2**53
"""Numbers of entries stay below, as integers of JSON and SQLite do."""
MOST_OPEN = 32
"""Connections that one process keeps open, three files each; opening again costs several waits for the disk."""
PATIENCE_S = 60.0
"""How long a process waits for another one's transaction."""
_PAUSE_S = 0.002
MOST_SESSIONS = 16
"""Sessions of a peer whose heads are remembered: those that came furthest."""
RECOVER = "see `accord site ledger recover`"

_APPLICATION, _VERSION = 0x41434C47, 2
_NONCE, _DIGEST = 16, 32
_SCHEMA = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, time INTEGER NOT NULL, nonce BLOB NOT NULL, "
    "kind TEXT NOT NULL, body TEXT NOT NULL, hash BLOB NOT NULL)",
    "CREATE TABLE witnessed (peer TEXT NOT NULL, session BLOB NOT NULL, seq INTEGER NOT NULL, hash BLOB NOT NULL, "
    "PRIMARY KEY (peer, session)) WITHOUT ROWID",
    "CREATE TABLE notes (plan TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash BLOB NOT NULL, "
    "PRIMARY KEY (plan, kind)) WITHOUT ROWID",
    "CREATE TRIGGER entries_follow BEFORE INSERT ON entries WHEN NEW.seq <= (SELECT max(seq) FROM entries) "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
_INSERT = "INSERT INTO entries (seq, time, nonce, kind, body, hash) VALUES (?, ?, ?, ?, ?, ?)"
_FROM = "SELECT seq, time, nonce, kind, body, hash FROM entries WHERE seq >= ? ORDER BY seq"
_NEAR = "SELECT seq, hash FROM entries WHERE seq <= ? AND seq > ? ORDER BY seq DESC"
_NOTE = (
    "INSERT INTO notes VALUES (?, ?, ?, ?) ON CONFLICT (plan, kind) DO UPDATE SET body = excluded.body, "
    "hash = excluded.hash"
)
_MACHINE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
_IN_USE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

_FORGET = (
    "DELETE FROM witnessed WHERE peer = ? AND session NOT IN "
    "(SELECT session FROM witnessed WHERE peer = ? ORDER BY seq DESC LIMIT ?)"
)

Connection = sqlite3.Connection
"""What connections are made of: tests put one here that dies."""


@dataclass(frozen=True)
class Row:
    """One entry as it is stored."""

    seq: int
    time: int
    nonce: bytes = field(repr=False)
    kind: str
    body: str
    hash: bytes

    def __post_init__(self) -> None:
        kinds = (self.seq, int), (self.time, int), (self.nonce, bytes), (self.kind, str), (self.body, str)
        if not all(type(value) is kind for value, kind in (*kinds, (self.hash, bytes))) or self.seq < 1:
            raise LedgerDamaged(f"entry {self.seq!r} of the ledger has no entry's form")

    @property
    def head(self) -> Head:
        """The head of a ledger that ends here."""
        return Head(self.seq, self.hash)

    def check(self, previous: bytes) -> None:
        """Raise `LedgerDamaged` unless the hash is that of the content after `previous`."""
        if self.time < 0 or self.hash != _hash(previous, self.seq, self.time, self.nonce, self.kind, self.body):
            raise LedgerDamaged(f"entry {self.seq} of the ledger is not what was written, or one before it is missing")


def _head(seq: object, digest: object) -> Head:
    """Of what the file has in a number's and a hash's place."""
    if type(seq) is not int or type(digest) is not bytes or not 0 <= seq <= MOST_ENTRIES or len(digest) != _DIGEST:
        raise LedgerDamaged("the ledger has something else in the place of an entry's number and hash")
    return Head(seq, digest)


def _hash(previous: bytes, seq: int, at: int, nonce: bytes, kind: str, body: str) -> bytes:
    return hash_frame("accord/1/ledger/entry", previous, seq, at, nonce, kind, body)


class Chain:
    """The entries of `folder`/ledger.db. Every method may raise these errors:

    LedgerDamaged: the file is not a ledger, not this folder's, or an entry is not what was written.
    LedgerRolledBack: entries that this process knows are gone.
    OutputError: the disk is full or fails, or another process holds the file for a minute.

    `durable=False` does not wait for the disk: a killed process loses nothing, a power cut may lose entries.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder = folder.absolute()
        self.path = self.folder / "ledger.db"
        self._durable = durable

    @property
    def _marker(self) -> Path:
        """Holds the ledger's id and its newest entry, so that a ledger that is gone, older or another's is noticed."""
        return self.folder / "ledger.id"

    def exists(self) -> bool:
        """Whether there is a ledger; `LedgerDamaged` where there must be one and is not."""
        if self.path.exists():
            return True
        if self._marker.exists():
            raise LedgerDamaged(f"{self.path.name} is missing: restore it, or remove {self._marker.name} and {RECOVER}")
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One thread of this process at a time, over all ledgers."""
        with _POOL.lock:
            yield

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """What the file holds."""
        with self._connection() as connection:
            yield Reading(connection)

    @contextmanager
    def writing(self) -> Iterator[Writing]:
        """One transaction, alone among all processes: all of it is durable at the end, or nothing happened.

        If it made an entry, the file alone holds it afterwards, and the newest entry is noted beside it.
        """
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            writing = Writing(connection)
            before = writing.head
            yield writing
            connection.execute("COMMIT")
            if self._durable and writing.head != before:
                _move_into_file(connection, self.path)
                self._note_head(writing.head)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with _typed(self.path), _POOL.borrowed(self.path, durable=self._durable) as connection:
            yield connection

    def create(self, kind: str, body: str) -> None:
        """A new file with one first entry, unless there is one; whole or absent after a crash."""
        if self.exists():
            return
        make_private(self.folder)
        work = Path(tempfile.mkdtemp(prefix=".ledger.", dir=self.folder))
        try:
            with _typed(self.path):
                _build(work / "new.db", kind, body)
            self._adopt(work / "new.db")
        except OSError as error:
            raise OutputError(f"cannot create {self.path}: {error.strerror}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _adopt(self, built: Path) -> None:
        if self._durable:
            with built.open("rb") as file:
                os.fsync(file.fileno())
        try:
            os.link(built, self.path)  # unlike a rename, it never replaces the ledger that another process made
        except FileExistsError:
            return
        if self._durable:
            sync_folder(self.folder)

    def check_owner(self, ledger_id: str, reading: Reading, head: Head, accounted: Collection[Head] = ()) -> None:
        """Compare with what is noted beside the file; note it where nothing is.

        Entries that are `accounted` for elsewhere are not missed.

        Raises:
            LedgerDamaged: the ledger is not the folder's first one.
            LedgerRolledBack: the ledger lacks its newest entry.
        """
        if not self._marker.exists():
            write_atomic(self._marker, _marked(ledger_id, head), mode=0o600, durable=self._durable)
        try:
            owner, number, digest = self._marker.read_text("ascii").split()
            noted = _head(int(number), bytes.fromhex(digest))
        except (OSError, ValueError, LedgerDamaged):
            raise LedgerDamaged(f"{self._marker.name} cannot be read") from None
        if owner != ledger_id:
            raise LedgerDamaged(f"{self.path.name} is not the ledger of this folder, which {self._marker.name} names")
        if noted not in (NO_LEDGER, *accounted) and reading.hash_of(noted.seq) != noted.hash:
            raise LedgerRolledBack(
                f"{self.path.name} lacks entry {noted.seq}, which {self._marker.name} names: an old or partial copy? "
                f"Copy the whole folder, or {RECOVER}"
            )

    def _note_head(self, head: Head) -> None:
        """In place, since it is shorter than what a disk writes at once. It may lag: then it tells less."""
        try:
            descriptor = os.open(self._marker, os.O_WRONLY | os.O_DSYNC)
            try:
                os.pwrite(descriptor, _marked("", head), _MARKER_HEAD)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"cannot write {self._marker}: {error.strerror}") from error


_MARKER_HEAD = 32
"""Where the head begins in the marker: after the ledger's id."""


def _marked(ledger_id: str, head: Head) -> bytes:
    return f"{ledger_id} {head.seq:016d} {head.hash.hex()}\n".encode("ascii")


class Reading:
    """What can be read within a connection or transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def after(self, known: Head) -> Iterator[Row]:
        """The entries after `known`, each checked against the one before it."""
        start = known.seq or -(2**63)  # from the very first: an entry before it is damage
        rows = (Row(*values) for values in self._connection.execute(_FROM, (start,)).fetchall())
        previous = known.hash
        if known.seq:
            first = next(rows, None)
            if first is None or first.head != known:
                raise LedgerRolledBack(f"the ledger no longer holds its entry {known.seq}: an old copy? {RECOVER}")
        for row in rows:
            row.check(previous)
            previous = row.hash
            yield row

    def hash_of(self, seq: int) -> bytes | None:
        """The hash of an entry; None if there is none of this number."""
        if seq > MOST_ENTRIES:
            return None
        found = self._connection.execute("SELECT hash FROM entries WHERE seq = ?", (seq,)).fetchone()
        return None if found is None else _head(seq, found[0]).hash

    def trail(self, head: Head) -> tuple[Head, ...]:
        """Entries by which another ledger finds out what it has in common with this one, newest first.

        The newest `DENSE` ones, then at distances that double.
        """
        near = self._connection.execute(_NEAR, (head.seq, head.seq - DENSE)).fetchall()
        far = [head.seq - DENSE * 2**power for power in range(53)]
        found = [(seq, self.hash_of(seq)) for seq in far if seq > 0]
        return tuple(_head(seq, value) for seq, value in (*near, *found) if value is not None)

    def witnessed(self) -> dict[str, Head]:
        """The newest head that was seen of each peer."""
        rows = self._connection.execute("SELECT peer, seq, hash FROM witnessed ORDER BY peer, seq").fetchall()
        return {str(peer): _head(seq, value) for peer, seq, value in rows}

    def notes(self) -> list[tuple[str, str]]:
        """Kind and body of each note, checked."""
        rows = self._connection.execute("SELECT plan, kind, body, hash FROM notes").fetchall()
        for plan, kind, body, digest in rows:
            if not all(type(value) is str for value in (plan, kind, body)) or digest != _note_hash(plan, kind, body):
                raise LedgerDamaged("a note of the ledger is not what was written")
        return [(kind, body) for _, kind, body, _ in rows]

    def check_pages(self) -> None:
        """Raise `LedgerDamaged` unless SQLite finds all of its pages sound."""
        ((answer,), *_) = self._connection.execute("PRAGMA integrity_check(1)").fetchall()
        if answer != "ok":
            raise LedgerDamaged(f"the ledger's file is damaged: {answer}")


class Writing(Reading):
    """One transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        newest = connection.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        self.head = NO_LEDGER if newest is None else _head(*newest)

    def append(self, kind: str, body: str, *, above: int = 0) -> None:
        """One entry after all others; its number is the next, or the next to `above` where that is higher."""
        row = _made(self.head, kind, body, above)
        self._connection.execute(_INSERT, row)
        self.head = Head(row[0], row[5])

    def note(self, plan: str, kind: str, body: str) -> None:
        """In the place of the plan's note of this kind."""
        self._connection.execute(_NOTE, (plan, kind, body, _note_hash(plan, kind, body)))

    def forget(self, kind: str, plan: str | None = None) -> None:
        """The notes of this kind, of one plan or of all."""
        self._connection.execute("DELETE FROM notes WHERE kind = ? AND ? IN (plan, '')", (kind, plan or ""))

    def witness(self, peer: str, seen: Seen) -> None:
        """Remember a peer's head.

        Sessions that overlap may each lag behind the other, so an old one is held to its own past, a new one to all.

        Raises:
            LedgerBehind: a newer one was seen before, or another one of the same number.
            ProtocolError: no ledger has so many entries.
        """
        known, newest = self._seen_before(peer, seen.session)
        head, before = seen.head, known or newest
        if head.seq > MOST_ENTRIES:
            raise ProtocolError(f"the ledger of {peer!r} cannot have {head.seq} entries")
        if head.seq < before.seq or (head.seq == before.seq and head != before):
            raise LedgerBehind(f"the ledger of {peer!r} went back or forked: entry {before.seq} was seen before")
        if head == known:
            return
        self._connection.execute(
            "INSERT INTO witnessed VALUES (?, ?, ?, ?) ON CONFLICT (peer, session) DO UPDATE SET "
            "seq = excluded.seq, hash = excluded.hash",
            (peer, seen.session, head.seq, head.hash),
        )
        if known is None:
            self._connection.execute(_FORGET, (peer, peer, MOST_SESSIONS))

    def _seen_before(self, peer: str, session: bytes) -> tuple[Head | None, Head]:
        """The newest head of the session (None: it is new), and of all sessions of a peer."""
        query = "SELECT session, seq, hash FROM witnessed WHERE peer = ? ORDER BY seq"
        known, newest = None, NO_LEDGER
        for one, seq, value in self._connection.execute(query, (peer,)).fetchall():
            newest = _head(seq, value)
            known = newest if one == session else known
        return known, newest


def _note_hash(plan: str, kind: str, body: str) -> bytes:
    return hash_frame("accord/1/ledger/note", plan, kind, body)


def _made(after: Head, kind: str, body: str, above: int = 0) -> tuple[int, int, bytes, str, str, bytes]:
    seq, at, nonce = max(after.seq, above) + 1, int(time.time()), secrets.token_bytes(_NONCE)
    return seq, at, nonce, kind, body, _hash(after.hash, seq, at, nonce, kind, body)


# --- the file


def _build(path: Path, kind: str, body: str) -> None:
    """A whole ledger with one entry, nowhere yet: nobody waits for the disk."""
    connection = sqlite3.connect(path, isolation_level=None, factory=Connection)
    try:
        path.chmod(0o600)  # the log and index beside it take its mode
        for statement in (
            "PRAGMA page_size = 1024",  # an entry is a few hundred bytes
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = OFF",
            f"PRAGMA application_id = {_APPLICATION}",
            f"PRAGMA user_version = {_VERSION}",
            *_SCHEMA,
        ):
            connection.execute(statement)
        connection.execute(_INSERT, _made(NO_LEDGER, kind, body))
    finally:
        connection.close()


def _opened(path: Path, *, durable: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,
        timeout=PATIENCE_S,
        check_same_thread=False,
        factory=Connection,
    )
    try:
        for statement in (
            f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}",
            "PRAGMA fullfsync = ON",  # a Mac's fsync alone does not reach the disk
            "PRAGMA trusted_schema = OFF",
        ):
            connection.execute(statement)
        _check_file(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _move_into_file(connection: sqlite3.Connection, path: Path) -> None:
    """All of the log into the file: whoever copies the file alone has every entry. One process does it at a time."""
    until = time.monotonic() + PATIENCE_S
    while True:
        busy, pages, moved = connection.execute("PRAGMA wal_checkpoint(FULL)").fetchone()
        if not busy and pages == moved:
            return
        if time.monotonic() >= until:
            raise OutputError(f"cannot use {path}: another process holds it")
        time.sleep(_PAUSE_S)


def _check_file(connection: sqlite3.Connection, path: Path) -> None:
    kind = [connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")]
    schema = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
    if kind != [(_APPLICATION,), (_VERSION,)] or tuple(sql for (sql,) in schema) != _SCHEMA:
        raise LedgerDamaged(f"{path.name} is not a ledger, or not one of this version")
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    if mode != "wal":
        raise LedgerDamaged(f"{path.name} has journal mode {mode}")


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """SQLite's errors as ours; those that quote a damaged schema are no texts."""
    try:
        yield
    except UnicodeDecodeError:
        raise LedgerDamaged(f"{path.name} is damaged: what should be a text is none") from None
    except MemoryError:
        raise OutputError(f"cannot use {path}: there is too little memory") from None
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # without the extended part
        if code in _MACHINE:
            raise OutputError(f"cannot use {path}: {error}") from error
        if code in _IN_USE:
            raise OutputError(f"cannot use {path}: another process holds it") from error
        raise LedgerDamaged(f"{path.name} is damaged: {error}") from error


_SQLITE_FAILS = (sqlite3.Error, UnicodeDecodeError, MemoryError)


# --- open connections


@dataclass(frozen=True)
class _Key:
    path: Path
    durable: bool


class _Pool:
    """The connections of this process, the least used ones closed. None crosses a fork: SQLite forbids it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._open: OrderedDict[_Key, tuple[sqlite3.Connection, tuple[int, int]]] = OrderedDict()

    @contextmanager
    def borrowed(self, path: Path, *, durable: bool) -> Iterator[sqlite3.Connection]:
        """The connection to `path`, for one thread at a time; what fails within a transaction is undone."""
        key = _Key(path, durable)
        with self.lock:
            connection = self._connection(key)
            try:
                yield connection
            except BaseException as error:
                with suppress(*_SQLITE_FAILS):
                    connection.rollback()
                if isinstance(error, _SQLITE_FAILS):
                    self._close(key)
                raise

    def _connection(self, key: _Key) -> sqlite3.Connection:
        try:
            status = key.path.stat()
        except OSError as error:
            raise OutputError(f"cannot use {key.path}: {error.strerror}") from None
        known, file = self._open.get(key), (status.st_dev, status.st_ino)
        if known is not None and known[1] != file:  # another file has taken its name
            self._close(key)
            known = None
        if known is None:
            known = (_opened(key.path, durable=key.durable), file)
            self._open[key] = known
            while len(self._open) > MOST_OPEN:
                self._close(next(iter(self._open)))
        self._open.move_to_end(key)
        return known[0]

    def _close(self, key: _Key) -> None:
        known = self._open.pop(key, None)
        if known is not None:
            with suppress(*_SQLITE_FAILS):  # a failed checkpoint loses nothing: the log stays
                known[0].close()

    def close_all(self) -> None:
        """Close every connection; the next use opens it again."""
        with self.lock:
            for key in list(self._open):
                self._close(key)

    def before_fork(self) -> None:
        """Wait for other threads' transactions, then close: the child starts without connections."""
        self.lock.acquire()
        self.close_all()

    def after_fork(self) -> None:
        """Go on, in parent and child."""
        self.lock.release()


_POOL = _Pool()
close_all = _POOL.close_all
atexit.register(close_all)
os.register_at_fork(before=_POOL.before_fork, after_in_parent=_POOL.after_fork, after_in_child=_POOL.after_fork)
