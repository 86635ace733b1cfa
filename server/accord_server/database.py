"""The coordinator's durable state: SQLite by default, PostgreSQL by URL."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Boolean, ForeignKey, Integer, String, Text, create_engine, event, select, text
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from accord_shared.errors import AlreadyRunning, OutputError, SettingsError
from accord_shared.files import only_one

SCHEMA_VERSION = 1
AUDIT_START = hashlib.sha256(b"accord/1/audit").hexdigest()
"""The hash before the audit log's first entry."""
BUSY_S = 60
_LOCK = 0xACC04D
_CLAIM = 0xACC04E
_TRY_CLAIM = "SELECT pg_try_advisory_lock(:key, hashtext(coalesce(current_schema(), '')))"
_PATIENCE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
"""Of connections to PostgreSQL, so that a server that vanished is noticed."""
CLAIM_S = 5.0
"""How long a claim waits for a holder that is just ending: a coordinator that is restarted."""
"""Of PostgreSQL: one process at a time makes the tables."""


class Base(DeclarativeBase):
    """All tables."""


class Schema(Base):
    """One row: what version the tables have."""

    __tablename__ = "accord_schema"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column(Integer)


class Site(Base):
    """An institution that enrolled."""

    __tablename__ = "sites"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    """pending, approved or revoked."""
    fingerprint: Mapped[str] = mapped_column(String(64), unique=True)
    member: Mapped[str] = mapped_column(Text)
    """JSON of the `Member`."""
    enrolled_us: Mapped[int] = mapped_column(BigInteger)
    renew: Mapped[bool] = mapped_column(Boolean, default=False)
    """The operator asks for a new key and certificate."""


class SiteKey(Base):
    """A key of a site's certificate and Flower node. A row stays, so that no key serves two sites or comes back."""

    __tablename__ = "site_keys"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of the SubjectPublicKeyInfo."""
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"), index=True)
    state: Mapped[str] = mapped_column(String(16))
    """current; next (issued, not used yet); or gone."""
    public_key: Mapped[str] = mapped_column(Text)
    """PEM, as Flower knows it."""
    certificate: Mapped[str] = mapped_column(Text)
    """The newest one of this key, PEM."""
    expires_us: Mapped[int] = mapped_column(BigInteger)


class InvitationRow(Base):
    """A token, by the SHA-256 of its secret."""

    __tablename__ = "invitations"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), index=True)
    expires_us: Mapped[int] = mapped_column(BigInteger)
    used_us: Mapped[int | None] = mapped_column(BigInteger, default=None)


class RunRow(Base):
    """A run and where it stands."""

    __tablename__ = "runs"
    run: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    plan_hash: Mapped[str] = mapped_column(String(64), index=True)
    plan: Mapped[str] = mapped_column(Text)
    """JSON."""
    signature: Mapped[str] = mapped_column(Text, default="")
    """JSON of the `PlanSignature`."""
    state: Mapped[str] = mapped_column(String(16))
    round: Mapped[int] = mapped_column(Integer, default=0)
    """Finished rounds."""
    rounds: Mapped[int] = mapped_column(Integer)
    detail: Mapped[str] = mapped_column(Text, default="")
    metrics: Mapped[str] = mapped_column(Text, default="")
    """JSON."""
    sites: Mapped[str] = mapped_column(Text, default="[]")
    """JSON: names of those that took part."""
    started_us: Mapped[int] = mapped_column(BigInteger)
    changed_us: Mapped[int] = mapped_column(BigInteger)


class RoundRow(Base):
    """What a finished round released."""

    __tablename__ = "rounds"
    run: Mapped[str] = mapped_column(ForeignKey("runs.run"), primary_key=True)
    round: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    report: Mapped[str] = mapped_column(Text)
    """JSON."""
    finished_us: Mapped[int] = mapped_column(BigInteger)


class ReceiptRow(Base):
    """The newest receipt of a site's privacy ledger."""

    __tablename__ = "receipts"
    site: Mapped[str] = mapped_column(String(64), primary_key=True)
    receipt: Mapped[str] = mapped_column(Text)
    changed_us: Mapped[int] = mapped_column(BigInteger)


class AuditRow(Base):
    """One entry of the audit log."""

    __tablename__ = "audit"
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    time_us: Mapped[int] = mapped_column(BigInteger)
    kind: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(256))
    facts: Mapped[str] = mapped_column(Text)
    """JSON."""
    previous: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class AuditHead(Base):
    """One row: where the audit log ends. It is also the lock of whoever appends."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[str] = mapped_column(String(64))


class Database:
    """The tables behind a URL. Every method raises `OutputError` where the database fails.

    Raises:
        SettingsError: the tables are of a newer version of Accord.
    """

    def __init__(self, url: str, password: str | None = None) -> None:
        self._url = make_url(url) if password is None else make_url(url).set(password=password)
        self.where = self._url.render_as_string(hide_password=True)
        if self.is_sqlite:
            _private_file(self._url)
        self._engine = create_engine(self._url, hide_parameters=True, **_options(self._url))
        if self.is_sqlite:
            event.listen(self._engine, "connect", _on_connect)
            event.listen(self._engine, "begin", _on_begin)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self._url.get_backend_name() == "sqlite"

    @property
    def path(self) -> Path | None:
        """The file, where it is one."""
        return Path(str(self._url.database)) if self.is_sqlite else None

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction: all of it is durable at the end, or nothing happened. Objects stay readable after it."""
        with _typed(self.where), self._sessions.begin() as session:
            yield session

    def connection(self) -> Connection:
        """A connection of its own, outside the pool and without transactions."""
        with _typed(self.where):
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            connection.detach()
            return connection

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _create(self) -> None:
        with self.session() as session:
            if not self.is_sqlite:
                session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            connection = session.connection()
            Schema.metadata.create_all(connection, tables=[Schema.__table__])  # type: ignore[list-item]
            found = session.scalar(select(Schema.version).where(Schema.id == 1))
            if found is not None and found != SCHEMA_VERSION:
                raise SettingsError(
                    f"the database {self.where} has version {found}, this Accord knows {SCHEMA_VERSION}: "
                    "use the Accord that made it, or a newer one"
                )
            Base.metadata.create_all(connection)
            if found is None:
                session.add(Schema(id=1, version=SCHEMA_VERSION))
                session.add(AuditHead(id=1, seq=0, hash=AUDIT_START))


class Claim:
    """That one process alone drives the runs of a database: a lock held as long as it lives, for any thread.

    PostgreSQL: an advisory lock of a connection; whoever loses the connection has lost the claim until `check` has it
    again. SQLite: a lock on a file beside the database's.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._file = ExitStack()

    def take(self) -> None:
        """Claim it.

        Raises:
            AlreadyRunning: another process has it.
            OutputError: the database fails.
        """
        what = f"a coordinator that drives the runs of {self._database.where}"
        if self._database.path is not None:
            lock = self._database.path.with_name(self._database.path.name + ".lock")
            try:
                self._file.enter_context(only_one(lock, what))
            except OSError as error:
                raise OutputError(f"cannot use {lock}: {error.strerror}") from None
            return
        deadline = time.monotonic() + CLAIM_S
        while not self._claimed():
            if time.monotonic() > deadline:
                raise AlreadyRunning(f"{what} is running already")
            time.sleep(0.2)

    def check(self) -> None:
        """Be sure of the claim, and take it anew where the connection was lost.

        Raises:
            AlreadyRunning: another process has it by now, or the server has not noticed yet that this one lost it.
            OutputError: the database fails.
        """
        if self._database.path is None and not self._claimed():
            raise AlreadyRunning(f"another coordinator drives the runs of {self._database.where}")

    def _claimed(self) -> bool:
        with self._lock, _typed(self._database.where):
            if self._connection is not None:
                try:
                    self._connection.scalar(select(1))
                except SQLAlchemyError:
                    self._drop()
                else:
                    return True
            connection = self._database.connection()
            try:
                if connection.scalar(text(_TRY_CLAIM), {"key": _CLAIM}):
                    self._connection = connection
            finally:
                if self._connection is None:
                    connection.close()
            return self._connection is not None

    def _drop(self) -> None:
        with suppress(SQLAlchemyError):
            if self._connection is not None:
                self._connection.close()
        self._connection = None

    def close(self) -> None:
        """Give it up."""
        with self._lock:
            self._drop()
        self._file.close()


@contextmanager
def _typed(where: str) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise OutputError(f"cannot use the database {where}: {_line(error)}") from error


def _options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_S}}
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10, **_PATIENCE}}


def _private_file(url: URL) -> None:
    """Make the file with mode 0600 before SQLite does with another; its log takes the same."""
    try:
        os.close(os.open(str(url.database), os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise OutputError(f"cannot use {url.database}: {error.strerror}") from None


def _on_connect(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins, not the driver
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "trusted_schema = OFF"):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # a reader that writes later would meet "database is locked"


def _line(error: SQLAlchemyError) -> str:
    """What the driver says, without statement and parameters."""
    cause: BaseException | None = error.orig if isinstance(error, DBAPIError) else error
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
