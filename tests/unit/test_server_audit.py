"""The coordinator's database and the audit log in it, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, text, update

from accord_server import audit
from accord_server.audit import AuditLog
from accord_server.database import SCHEMA_VERSION, AuditHead, AuditRow, Database, Schema, Site
from accord_shared.errors import AuditDamaged, OutputError, SettingsError
from coordinator_parts import postgresql, url

__all__ = ["postgresql", "url"]


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(Database(url)) as opened:
        yield opened


@pytest.fixture
def log(database: Database) -> AuditLog:
    """A log of five entries."""
    made = AuditLog(database, clock=lambda: 1_800_000_000.25)
    for number in range(5):
        made.note("site.approved", f"bank {number}", number=number, part=0.5, nothing=None, names=["ä", "\0"])
    return made


# --- the log


def test_entries_come_back(log: AuditLog) -> None:
    assert log.verify() == 5
    first, *_, last = log.entries()
    assert (first.seq, first.time_us, first.kind, first.subject) == (
        1,
        1_800_000_000_250_000,
        "site.approved",
        "bank 0",
    )
    assert first.facts == {"number": 0, "part": 0.5, "nothing": None, "names": ["ä", "\0"]}
    assert (log.head(), log.entries(1)) == ((5, last.hash), [last])
    assert [entry.seq for entry in log.entries(2)] == [4, 5]


def test_an_empty_log_is_sound(database: Database) -> None:
    assert (AuditLog(database).verify(), AuditLog(database).entries()) == (0, [])


def test_it_goes_on_after_a_restart(url: str, log: AuditLog) -> None:
    with closing(Database(url)) as again:
        AuditLog(again).note("later", "x")
        assert AuditLog(again).verify() == 6
    assert log.verify() == 6


def _set(at: int, **values: Any) -> Any:
    return update(AuditRow).where(AuditRow.seq == at).values(**values)


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (_set(3, subject="bank 9"), "entry 3 "),
        (_set(3, kind="site.revoked"), "entry 3 "),
        (_set(3, time_us=1), "entry 3 "),
        (_set(3, facts='{"number":9}'), "entry 3 "),
        (_set(5, hash="0" * 64), "entry 5 "),
        (_set(3, previous="0" * 64), "entry 3 "),
        (delete(AuditRow).where(AuditRow.seq == 1), "entry 1 .* missing"),
        (delete(AuditRow).where(AuditRow.seq == 3), "entry 3 .* missing"),
        (delete(AuditRow).where(AuditRow.seq == 5), "ends at entry 4"),
        (delete(AuditRow), "ends at entry 0"),
        (_set(1, seq=0), "entry 1 .* missing"),
        (_set(5, seq=6), "entry 5 .* missing"),
        (update(AuditHead).values(seq=4), "its end was entry 4"),
        (update(AuditHead).values(hash="0" * 64), "ends at entry 5"),
        (delete(AuditHead), "end was removed"),
    ],
)
def test_what_was_tampered_with_is_named(database: Database, log: AuditLog, tamper: Any, said: str) -> None:
    with database.session() as session:
        session.execute(tamper)
    with pytest.raises(AuditDamaged, match=said):
        log.verify()


def test_a_changed_entry_with_a_new_hash_is_found(database: Database, log: AuditLog) -> None:
    with database.session() as session:
        row = session.get_one(AuditRow, 3)
        row.subject = "bank 9"
        row.hash = audit._hash(row)
    with pytest.raises(AuditDamaged, match="entry 4 "):
        log.verify()


def test_entries_that_changed_places_are_found(database: Database, log: AuditLog) -> None:
    with database.session() as session:
        for old, new in ((2, 99), (3, 2), (99, 3)):
            session.execute(_set(old, seq=new))
    with pytest.raises(AuditDamaged, match="entry 2 "):
        log.verify()


def test_an_entry_put_in_behind_the_log_is_found(database: Database, log: AuditLog) -> None:
    with database.session() as session:
        session.add(
            AuditRow(seq=6, time_us=1, kind="x", subject="x", facts="{}", previous=log.head()[1], hash="0" * 64)
        )
    with pytest.raises(AuditDamaged, match="entry 6 "):
        log.verify()


def test_threads_share_one_chain(database: Database) -> None:
    log = AuditLog(database)

    def write(worker: int) -> None:
        for number in range(10):
            log.note("round", f"worker {worker}", number=number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert log.verify() == 80


def test_processes_share_one_chain(url: str, database: Database) -> None:
    code = (
        "import sys; from accord_server.audit import AuditLog; from accord_server.database import Database\n"
        "log = AuditLog(Database(sys.argv[1]))\n"
        "for number in range(20): log.note('round', sys.argv[2], number=number)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, url, str(worker)]) for worker in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert AuditLog(database).verify() == 60


def test_an_entry_shares_the_fate_of_what_it_tells(database: Database, log: AuditLog) -> None:
    with pytest.raises(ZeroDivisionError), database.session() as session:  # noqa: PT012 - both belong to one transaction
        log.add(session, "site.revoked", "bank 1")
        raise ZeroDivisionError
    assert log.verify() == 5


def test_a_strangers_name_is_made_printable(log: AuditLog) -> None:
    log.note("x", "a\nb\0c\x1b[31m" + "x" * 500)
    assert log.entries(1)[0].subject.startswith("a?b?c?[31m")
    assert len(log.entries(1)[0].subject) == 128
    assert log.verify() == 6


# --- the database


def site(name: str, fingerprint: str) -> Site:
    return Site(name=name, state="pending", fingerprint=fingerprint, member="{}", enrolled_us=1, renew=False)


def test_a_transaction_is_whole_or_absent(url: str, database: Database) -> None:
    with database.session() as session:
        session.add(site("a", "1"))
    with pytest.raises(OutputError), database.session() as session:  # the fingerprint is taken
        session.add_all([site("b", "2"), site("c", "1")])
    with closing(Database(url)) as again, again.session() as session:
        assert [session.get(Site, name) is not None for name in "abc"] == [True, False, False]


def test_a_newer_schema_is_refused(url: str, database: Database) -> None:
    with database.session() as session:
        session.execute(update(Schema).values(version=SCHEMA_VERSION + 1))
    with pytest.raises(SettingsError, match=f"version {SCHEMA_VERSION + 1}"):
        Database(url)


def test_many_may_open_a_new_database_at_once(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: Database(url), range(4)))
    for one in opened:
        AuditLog(one).note("x", "y")
    assert AuditLog(opened[0]).verify() == 4
    for one in opened:
        one.close()


def test_errors_show_neither_password_nor_parameters(url: str, database: Database) -> None:
    with database.session() as session:
        session.add(site("a", "1"))
    with pytest.raises(OutputError) as failure, database.session() as session:
        session.add(site("secret name", "1"))
    assert "secret name" not in str(failure.value)
    assert "\n" not in str(failure.value)
    with pytest.raises(OutputError) as failure:
        Database("postgresql+psycopg://accord@127.0.0.1:1/accord", "hunter2")
    assert "hunter2" not in str(failure.value)
    assert "***" in str(failure.value)


def test_sqlite_files_are_private_and_durable(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with closing(Database(f"sqlite:///{tmp_path / 'state.db'}")) as database:
            AuditLog(database).note("x", "y")
            with database.session() as session:
                found = [
                    session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
                ]
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(old)
    assert found == ["wal", 2, 1]
    assert modes == dict.fromkeys(("state.db", "state.db-wal", "state.db-shm"), 0o600)


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database" * 100)
    with pytest.raises(OutputError, match="not a database"):
        Database(f"sqlite:///{tmp_path / 'state.db'}")
    with pytest.raises(OutputError, match="No such file"):
        Database(f"sqlite:///{tmp_path / 'no' / 'state.db'}")
