"""The rows of a query: streamed from one snapshot, in a fixed order, in a transaction that cannot write."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from accord_client.connectors.source import BATCH_ROWS, Batch, Source, one_line, require_columns
from accord_client.connectors.spec import SqlData
from accord_shared.errors import DataError, MissingExtra, SettingsError, Unreachable

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine

_CONNECT_S = 10


@contextmanager
def open_sql(spec: SqlData, folder: Path) -> Iterator[Source]:
    """Runs the query. Rows are ordered by the columns that are read, and numbered from 1 in that order.

    Raises:
        DataError: the database refuses the query (also because it writes, or takes longer than `timeout_s`), lacks
            a column or has it twice; also while it is read.
        Unreachable: nobody answers, or the login fails. No message holds the password.
        SettingsError: `password_env` names no variable, or the URL is malformed.
        MissingExtra: SQLAlchemy or psycopg is not installed.
    """
    try:
        import sqlalchemy as sa  # optional, so loaded where it is used
    except ImportError:
        raise MissingExtra('databases need SQLAlchemy: pip install "accord-federated[client]"') from None
    name, secret = _name(spec), _password(spec)
    engine = _sqlite(spec, folder) if spec.driver == "sqlite" else _postgresql(spec, secret)
    try:
        with _connected(engine, name, secret) as connection:
            found = _columns(connection, spec)
            require_columns(name, found, spec.columns)
            yield Source(name, dict.fromkeys(found, "sql"), _batches(connection, spec))
    except sa.exc.SQLAlchemyError as error:
        raise DataError(f"{name}: the query fails: {_reason(error, secret)}") from None
    finally:
        engine.dispose()


def _name(spec: SqlData) -> str:
    """The database without the user's name."""
    scheme, _, rest = spec.url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def _password(spec: SqlData) -> str | None:
    if spec.password_env is None:
        return None
    password = os.environ.get(spec.password_env)
    if not password:
        raise SettingsError(f"the environment variable {spec.password_env} (password_env) is not set")
    return password


def _sqlite(spec: SqlData, folder: Path) -> Engine:
    import sqlalchemy as sa

    path = folder / spec.url.removeprefix("sqlite:///")
    if not path.is_file():
        raise DataError(f"{path}: no such file")

    def connect() -> sqlite3.Connection:
        uri = f"file:{quote(str(path.absolute()))}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=_CONNECT_S, check_same_thread=False)
        connection.execute("PRAGMA query_only = ON")
        connection.text_factory = bytes  # decoded cell by cell: one bad byte is one bad row
        deadline = time.monotonic() + spec.timeout_s
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
        return connection

    return sa.create_engine("sqlite://", creator=connect, poolclass=sa.pool.NullPool)


def _postgresql(spec: SqlData, password: str | None) -> Engine:
    import sqlalchemy as sa

    try:
        url: URL = sa.make_url(spec.url).set(drivername=spec.driver)
        url = url if password is None else url.set(password=password)
        return sa.create_engine(
            url,
            poolclass=sa.pool.NullPool,
            connect_args={"connect_timeout": _CONNECT_S, "client_encoding": "utf8", "prepare_threshold": None},
            isolation_level="REPEATABLE READ",
        )
    except (sa.exc.ArgumentError, ValueError):
        raise SettingsError("url of the database is malformed") from None
    except ImportError:
        raise MissingExtra('PostgreSQL needs psycopg: pip install "accord-federated[postgresql]"') from None


@contextmanager
def _connected(engine: Engine, name: str, secret: str | None) -> Iterator[Connection]:
    import sqlalchemy as sa

    try:
        connection = engine.connect()
    except sa.exc.SQLAlchemyError as error:
        if engine.dialect.name == "sqlite":
            raise
        raise Unreachable(f"{name}: no connection to the database: {_reason(error, secret)}") from None
    with connection:
        yield connection


def _columns(connection: Connection, spec: SqlData) -> list[str]:
    """The names of the query's columns, after the transaction was made read-only."""
    raw = connection.execution_options(no_parameters=True, postgresql_readonly=True)
    if connection.dialect.name == "postgresql":
        raw.exec_driver_sql(f"SET LOCAL statement_timeout = {spec.timeout_s * 1000}")
    names = list(raw.exec_driver_sql(f"SELECT * FROM ({spec.query}\n) AS accord_rows LIMIT 0").keys())  # noqa: S608
    # SQLite renames the second `text` of a subquery to `text:1`
    return [name.removesuffix(":1") if name.removesuffix(":1") in names else name for name in names]


def _batches(connection: Connection, spec: SqlData) -> Iterator[Batch]:
    quoted = connection.dialect.identifier_preparer.quote_identifier
    columns = ", ".join(f"accord_rows.{quoted(name)}" for name in spec.columns)
    # the operator's own query; as a subquery it can neither write nor be more than one statement
    statement = f"SELECT {columns} FROM ({spec.query}\n) AS accord_rows ORDER BY {columns}"  # noqa: S608
    options = {"stream_results": True, "max_row_buffer": BATCH_ROWS, "no_parameters": True}
    first = 1
    with connection.exec_driver_sql(statement, execution_options=options) as result:
        for rows in result.partitions(BATCH_ROWS):
            yield Batch(range(first, first + len(rows)), _transposed(rows))
            first += len(rows)


def _transposed(rows: Sequence[Any]) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True))


def _reason(error: Exception, secret: str | None) -> str:
    """The driver's own line: without the statement, and without the password should it be there."""
    text = str(getattr(error, "orig", None) or error)
    for form in {secret, quote(secret, safe="")} if secret else ():
        text = text.replace(form, "***")
    return one_line(Exception(text))
