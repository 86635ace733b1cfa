"""The privacy ledger: what it counts, what it refuses, and every way in which its file can be wrong."""

from __future__ import annotations

import hmac
import itertools
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accord_client.ledger import chain, limits
from accord_client.ledger.balance import Releases
from accord_client.ledger.entries import Account, DataSet, Limits, Released, Reserved, Spent
from accord_client.ledger.ledger import Ledger
from accord_client.ledger.receipts import Receipt
from accord_shared.dp.accounting import epsilon
from accord_shared.dp.events import Event, SampledGaussian, SharedGaussian
from accord_shared.errors import (
    AccordError,
    LedgerBehind,
    LedgerDamaged,
    LedgerRolledBack,
    LimitReached,
    OutputError,
    PrivacyError,
    ProtocolError,
)
from accord_shared.identity import Identity
from accord_shared.receipts import NO_LEDGER, Head, Seen

PLAN, OTHER, THIRD = "a" * 64, "b" * 64, "c" * 64
SITE_NOISE = SampledGaussian(2.0, 0.5, 3)
SHARED = SharedGaussian(4.0, 1.0, 0.25, 1, 0.0)
FULL = SampledGaussian(5.0, 1.0, 1)
"""Unsampled: its epsilon is exact and takes no time."""
DELTA = 1e-5
ME, STRANGER = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32), Identity.from_seeds(b"\x03" * 32, b"\x04" * 32)


def step(
    number: int = 1, event: Event | None = FULL, *, plan: str = PLAN, dataset: str = "d", attempt: int = 1
) -> Reserved:
    return Reserved(dataset=dataset, plan=plan, run="run", round=number, attempt=attempt, event=event)


def release(ledger: Ledger, reserved: Reserved, **options: Any) -> Releases:
    def finish(_: Releases) -> Released:
        return Released(**dict(reserved), model="m", update="", digest="", cohort=())

    return ledger.release(reserved, finish, **options)


def spend(ledger: Ledger, *numbers: int, **options: Any) -> None:
    for number in numbers:
        ledger.reserve(step(number, **options))
        release(ledger, step(number, **options))


def cost(count: int) -> float:
    return epsilon([FULL] * count, DELTA)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def ledger(folder: Path) -> Ledger:
    return Ledger(folder)


def limited(folder: Path, *more: DataSet, **caps: float) -> Ledger:
    return Ledger(folder, datasets=[DataSet(name="d", limits=Limits(**caps)), *more])


# --- what is spent


def test_only_releases_are_spent(ledger: Ledger) -> None:
    ledger.reserve(step(1))
    assert ledger.spent("d") == Spent()
    release(ledger, step(1))
    assert ledger.spent("d") == Spent((FULL,))
    ledger.reserve(step(2))
    assert ledger.epsilon("d", DELTA) == pytest.approx(cost(1))


def test_spending_adds_up_over_plans_and_runs(ledger: Ledger) -> None:
    spend(ledger, 1, 2)
    spend(ledger, 1, plan=OTHER)
    spend(ledger, 5, plan=OTHER, dataset="e")
    assert ledger.epsilon("d", DELTA) == pytest.approx(cost(3))
    assert ledger.epsilon("e", DELTA) == pytest.approx(cost(1))
    assert ledger.epsilon("never used", DELTA) == 0.0


def test_both_epsilons(ledger: Ledger) -> None:
    spend(ledger, 1, 2, event=SharedGaussian(5.0, 1.0, 1.0, 1, 0.0))
    assert ledger.epsilon("d", DELTA) == pytest.approx(cost(2))
    alone = epsilon([SampledGaussian(1.0, 1.0, 2)], DELTA)
    assert ledger.epsilon("d", DELTA, colluding=True) == pytest.approx(alone)


def test_a_release_without_noise_has_no_bound(ledger: Ledger) -> None:
    spend(ledger, 1)
    release(ledger, step(2, None))
    assert ledger.spent("d").bare == 1
    assert ledger.epsilon("d", DELTA) == math.inf


def test_a_lineage_shares_one_budget(folder: Path) -> None:
    sets = [DataSet(name="child", derived_from="d"), DataSet(name="grandchild", derived_from="child")]
    ledger = Ledger(folder, datasets=[DataSet(name="d"), *sets, DataSet(name="else")])
    for name in ("d", "child", "grandchild", "else"):
        spend(ledger, 1, dataset=name, plan=(name[0] * 64).translate(str.maketrans("gl", "ff")))
    for name in ("d", "child", "grandchild"):
        assert ledger.epsilon(name, DELTA) == pytest.approx(cost(3))
    assert ledger.epsilon("else", DELTA) == pytest.approx(cost(1))


def test_a_lineage_that_was_declared_once_stays(folder: Path) -> None:
    spend(Ledger(folder, datasets=[DataSet(name="d"), DataSet(name="e", derived_from="d")]), 1)
    later = Ledger(folder, datasets=[DataSet(name="d"), DataSet(name="e")])
    spend(later, 1, dataset="e", plan=OTHER)
    assert later.epsilon("e", DELTA) == pytest.approx(cost(2))


# --- limits


def test_a_plan_beyond_the_limit_is_refused_before_training(folder: Path) -> None:
    ledger = limited(folder, epsilon=cost(5) + 1e-9)
    ledger.check_plan("d", PLAN, FULL, 5)
    with pytest.raises(LimitReached, match="data set 'd'"):
        ledger.check_plan("d", PLAN, FULL, 6)
    spend(ledger, 1, 2)
    ledger.check_plan("d", PLAN, FULL, 5)  # of which two are spent
    ledger.check_plan("d", OTHER, FULL, 3)
    with pytest.raises(LimitReached):
        ledger.check_plan("d", OTHER, FULL, 4)


def test_a_round_beyond_the_limit_is_refused_mid_run(folder: Path) -> None:
    ledger = limited(folder, epsilon=cost(3) + 1e-9)
    ledger.check_plan("d", PLAN, FULL, 3)
    spend(ledger, 1, 2)
    spend(ledger, 1, plan=OTHER)
    with pytest.raises(LimitReached):
        ledger.reserve(step(3))
    with pytest.raises(LimitReached):
        release(ledger, step(3))
    assert ledger.epsilon("d", DELTA) == pytest.approx(cost(3))
    assert ledger.releases(PLAN).rounds == 2


def test_the_limit_if_all_others_collude(folder: Path) -> None:
    event = SharedGaussian(5.0, 1.0, 1.0, 1, 0.0)
    alone = epsilon([SampledGaussian(1.0, 1.0, 2)], DELTA)
    ledger = limited(folder, epsilon=100.0, epsilon_all_collude=alone + 1e-9)
    spend(ledger, 1, 2, event=event)
    with pytest.raises(LimitReached, match="if all others collude"):
        ledger.reserve(step(3, event))


def test_the_limit_of_a_run(folder: Path) -> None:
    ledger = limited(folder, run_epsilon=cost(2) + 1e-9)
    spend(ledger, 1, 2)
    with pytest.raises(LimitReached, match="one run"):
        ledger.reserve(step(3))
    spend(ledger, 1, 2, plan=OTHER)


def test_limits_of_the_whole_lineage_hold(folder: Path) -> None:
    ledger = limited(folder, DataSet(name="e", derived_from="d"), epsilon=cost(2) + 1e-9)
    spend(ledger, 1, 2, dataset="e")
    with pytest.raises(LimitReached):
        ledger.reserve(step(1, plan=OTHER))
    with pytest.raises(LimitReached):
        ledger.reserve(step(3, dataset="e"))


def test_open_reservations_of_other_plans_count(folder: Path) -> None:
    ledger = limited(folder, epsilon=cost(2) + 1e-9)
    ledger.reserve(step(1))
    ledger.reserve(step(1, attempt=2))  # replaces the first: still one
    ledger.reserve(step(1, plan=OTHER))
    with pytest.raises(LimitReached):
        ledger.reserve(step(1, plan=THIRD))
    with pytest.raises(LimitReached):
        release(ledger, step(1, plan=THIRD))
    release(ledger, step(1, attempt=2))
    ledger.void(OTHER)
    spend(ledger, 1, plan=THIRD)
    with pytest.raises(LimitReached):
        release(ledger, step(1, plan=OTHER))  # what was given up is checked again
    assert ledger.epsilon("d", DELTA) == pytest.approx(cost(2))


def test_an_equal_reservation_is_used_again(ledger: Ledger) -> None:
    ledger.reserve(step(1))
    head = ledger.head()
    ledger.reserve(step(1))
    assert ledger.head() == head


def test_nothing_leaves_without_noise_where_there_is_a_limit(folder: Path) -> None:
    ledger = limited(folder, epsilon=1e6)
    with pytest.raises(LimitReached):
        ledger.check_plan("d", PLAN, None, 1)
    with pytest.raises(LimitReached):
        release(ledger, step(1, None))
    assert ledger.spent("d") == Spent()


def test_once_a_data_set_is_declared_others_are_refused(folder: Path) -> None:
    spend(limited(folder), 1)
    for action in (
        lambda: Ledger(folder).reserve(step(1, dataset="x")),
        lambda: limited(folder).check_plan("x", PLAN, FULL, 1),
    ):
        with pytest.raises(PrivacyError, match="not declared"):
            action()


def test_limits_hold_in_every_process_and_the_newest_word_holds(folder: Path) -> None:
    spend(limited(folder, epsilon=cost(1) + 1e-9), 1)
    with pytest.raises(LimitReached):
        Ledger(folder).reserve(step(2))
    spend(limited(folder, epsilon=cost(2) + 1e-9), 2)
    words = [entry["body"] for entry in Ledger(folder).entries() if entry["kind"] == "dataset"]
    assert [word["dataset"]["limits"]["epsilon"] for word in words] == [cost(1) + 1e-9, cost(2) + 1e-9]


def test_rounds_of_a_plan_that_was_checked_cost_no_accounting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = limited(folder, epsilon=50.0, epsilon_all_collude=500.0)
    calls: list[object] = []

    def counted(*arguments: Any, **options: Any) -> float:
        calls.append(arguments)
        return epsilon(*arguments, **options)

    monkeypatch.setattr(limits, "epsilon", counted)
    ledger.check_plan("d", PLAN, SHARED, 40)
    assert len(calls) == 2
    spend(ledger, *range(1, 41), event=SHARED)
    assert len(calls) == 2
    ledger.reserve(step(41, SHARED))
    assert len(calls) == 4


# --- a fold


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "release", "void", "attempt", "open", "new process"]),
        st.sampled_from([PLAN, OTHER]),
        st.sampled_from(["d", "e"]),
        st.integers(0, 1),
        st.sampled_from([FULL, SHARED, SITE_NOISE, None]),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_what_is_kept_is_what_a_replay_gives(actions: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger, rival = Ledger(folder, durable=False), Ledger(folder, durable=False)
    spent: dict[str, Counter[Event | None]] = {"d": Counter(), "e": Counter()}
    rounds = Counter({PLAN: 1, OTHER: 1})
    for action, plan, dataset, more, event in actions:
        rounds[plan] += more
        if action == "reserve":
            ledger.reserve(step(rounds[plan], event, plan=plan, dataset=dataset))
        elif action == "release":
            release(ledger, step(rounds[plan], event, plan=plan, dataset=dataset))
            spent[dataset][event] += 1
        elif action == "void":
            ledger.void(plan)
        elif action == "attempt":
            ledger.note_attempt(plan, rounds[plan])
        elif action == "open":
            ledger.note_opened(plan, rounds[plan])
        else:
            ledger, rival = rival, Ledger(folder, durable=False)
    for reader in (ledger, rival, Ledger(folder)):
        for dataset, counts in spent.items():
            expected = Spent.sum(Spent.of(event, count) for event, count in counts.items())
            assert (reader.spent(dataset).steps(), reader.spent(dataset).bare) == (expected.steps(), expected.bare)
        assert reader.head() == ledger.verify().head
        assert [reader.releases(plan) for plan in (PLAN, OTHER)] == [
            Ledger(folder).verify().plan(plan) for plan in (PLAN, OTHER)
        ]


def test_spent_is_a_vector_space() -> None:
    one, two = Spent.of(FULL, 2), Spent((SHARED,), 3)
    assert (one + two) - two == one
    assert one - (one + two) == Spent()
    assert Spent.of(SITE_NOISE, 4).events == (SampledGaussian(2.0, 0.5, 12),)
    assert Spent.of(None, 4) == Spent((), 4)
    assert Spent.of(FULL, 0) == Spent()


# --- the file


def raw(folder: Path) -> sqlite3.Connection:
    """The file behind the ledger's back, its triggers gone."""
    chain.close_all()
    connection = sqlite3.connect(folder / "ledger.db", isolation_level=None)
    for name in ("entries_follow", "entries_stay", "entries_never_change"):
        connection.execute(f"DROP TRIGGER {name}")
    return connection


def restore_triggers(connection: sqlite3.Connection) -> None:
    for statement in chain._SCHEMA[3:]:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = '{}' WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 2",
        "DELETE FROM entries",
        "INSERT OR REPLACE INTO entries SELECT seq, time, nonce, kind, '{}', hash FROM entries WHERE seq = 2",
        "INSERT INTO entries SELECT -seq, time, nonce, kind, body, hash FROM entries",
    ],
)
def test_the_file_refuses_all_but_new_entries(statement: str, ledger: Ledger, folder: Path) -> None:
    spend(ledger, 1, 2)
    chain.close_all()
    connection = sqlite3.connect(folder / "ledger.db")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    ledger.verify()


@pytest.mark.parametrize(("durable", "level"), [(True, 2), (False, 0)])
def test_commits_wait_for_the_disk(durable: bool, level: int, folder: Path) -> None:
    made = Ledger(folder, durable=durable)
    spend(made, 1)
    with chain._POOL.borrowed((folder / "ledger.db").absolute(), durable=durable) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (level,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


EDITS = {
    "an event made cheaper": "UPDATE entries SET body = replace(body, '5.0', '50.0') WHERE kind = 'release'",
    "another hash": "UPDATE entries SET hash = zeroblob(32) WHERE seq = 3",
    "another nonce": "UPDATE entries SET nonce = zeroblob(16) WHERE seq = 3",
    "another time": "UPDATE entries SET time = time - 1 WHERE seq = 3",
    "a negative time": "UPDATE entries SET time = -1 WHERE seq = 3",
    "another kind": "UPDATE entries SET kind = 'open' WHERE kind = 'release'",
    "another number": "UPDATE entries SET seq = seq + 1 WHERE seq = (SELECT max(seq) FROM entries)",
    "a deleted row": "DELETE FROM entries WHERE seq = 2",
    "the first row gone": "DELETE FROM entries WHERE seq = 1",
    "all rows gone": "DELETE FROM entries",
    "a text of bytes": "UPDATE entries SET body = CAST(x'ff' AS TEXT) WHERE seq = 3",
    "a number of text": "UPDATE entries SET hash = 'text' WHERE seq = 3",
    "a row before the first": "INSERT INTO entries SELECT -1, time, nonce, kind, body, hash FROM entries WHERE seq = 2",
    "a further row": "INSERT INTO entries SELECT 99, time, nonce, kind, body, hash FROM entries WHERE seq = 2",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_is_refused(edit: str, ledger: Ledger, folder: Path) -> None:
    spend(ledger, 1, 2)
    known = ledger.head()
    connection = raw(folder)
    connection.execute(EDITS[edit])
    restore_triggers(connection)
    for reader in (Ledger(folder), ledger):
        for action in (
            reader.verify,
            lambda: Ledger(folder).releases(PLAN),
            lambda: Ledger(folder).reserve(step(3)),
            lambda: release(Ledger(folder), step(3)),
        ):
            with pytest.raises(PrivacyError):
                action()
    assert known.seq == 3


def test_the_newest_row_gone_is_refused_by_who_knew_it(ledger: Ledger, folder: Path) -> None:
    spend(ledger, 1, 2)
    head = ledger.head()
    connection = raw(folder)
    connection.execute("DELETE FROM entries WHERE seq = 3")
    restore_triggers(connection)
    with pytest.raises(LedgerRolledBack, match="accord site ledger recover"):
        ledger.releases(PLAN)
    with pytest.raises(LedgerRolledBack, match="accord site ledger recover"):
        Ledger(folder).check_witness(head)


def test_triggers_that_are_gone_are_noticed(ledger: Ledger, folder: Path) -> None:
    spend(ledger, 1)
    raw(folder).close()
    with pytest.raises(LedgerDamaged, match="not a ledger"):
        Ledger(folder).releases(PLAN)


def rehashed(folder: Path, seq: int, kind: str, body: str) -> None:
    """An entry replaced together with its hash, as by whoever knows the format."""
    connection = raw(folder)
    (previous,) = connection.execute("SELECT hash FROM entries WHERE seq = ?", (seq - 1,)).fetchone()
    at, nonce = connection.execute("SELECT time, nonce FROM entries WHERE seq = ?", (seq,)).fetchone()
    digest = chain._hash(previous, seq, at, nonce, kind, body)
    connection.execute("UPDATE entries SET kind = ?, body = ?, hash = ? WHERE seq = ?", (kind, body, digest, seq))
    restore_triggers(connection)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("surprise", {}),
        ("made", {"ledger": "0" * 32}),
        ("release", {}),
        ("release", {"round": 0}),
        ("release", {"round": "1"}),
        ("release", {"surprise": 1}),
        ("release", {"update": "../../secret"}),
        ("release", {"event": {"kind": "nothing"}}),
        ("release", {"event": {**FULL.to_json(), "steps": -3}}),
        ("release", {"event": {**FULL.to_json(), "noise_multiplier": "5"}}),
        ("release", {"event": 3}),
        ("release", {"event": {**FULL.to_json(), "noise_multiplier": math.inf}}),
        ("release", {"plan": "A" * 64}),
        ("release", 7),
        ("open", {"plan": PLAN, "round": -1}),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(kind: str, body: Any, ledger: Ledger, folder: Path) -> None:
    spend(ledger, 1)
    if kind == "release" and body and isinstance(body, dict):
        *_, last = ledger.entries()
        body = {**last["body"], **body}
    rehashed(folder, 2, kind, json.dumps(body))
    with pytest.raises(LedgerDamaged):
        Ledger(folder).releases(PLAN)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(share: float, ledger: Ledger, folder: Path) -> None:
    spend(ledger, *range(1, 30))
    chain.close_all()
    path = folder / "ledger.db"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(LedgerDamaged):
        Ledger(folder).verify()
    with pytest.raises(PrivacyError):
        release(Ledger(folder), step(31))


def everything(ledger: Ledger) -> None:
    """Each thing that is ever asked of a ledger."""
    assert ledger.verify().plan(PLAN).rounds == 1
    assert ledger.releases(PLAN).rounds == 1
    assert ledger.epsilon("d", DELTA) > 0
    list(ledger.entries())
    ledger.witnessed()
    ledger.check_witness(Head(2, b"\x01" * 32))


def more(ledger: Ledger) -> None:
    """And what writes."""
    ledger.witness({"b": seen(9, 3), "c": seen(1, 1)})
    ledger.reserve(step(2))
    release(ledger, step(2))
    ledger.note_attempt(PLAN, 2)
    ledger.statement()
    ledger.recover(Ledger(ledger._chain.folder.with_name("other")).receipt("site", ME), ME)
    ledger.void(OTHER)


@pytest.fixture
def used(ledger: Ledger, folder: Path) -> Path:
    """The file of a ledger with all kinds of rows."""
    spend(ledger, 1)
    ledger.note_attempt(PLAN, 2)
    ledger.reserve(step(1, plan=OTHER))
    ledger.witness({"b": seen(5), "c": seen(7, 2)})
    release(Ledger(folder.with_name("other")), step(1))
    chain.close_all()
    return folder / "ledger.db"


def flipped(file: Path, whole: bytes, at: int, mask: int) -> bool:
    """Whether one changed byte is refused, by typed errors alone; harmless is what changes no count."""
    refused = False
    for action in (everything, more):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        marker = file.with_name("ledger.id")
        kept = marker.read_bytes()
        try:
            action(Ledger(file.parent, durable=False))
        except AccordError:
            refused = True
        chain.close_all()
        marker.write_bytes(kept)
        for extra in ("-wal", "-shm", "-journal"):
            file.with_name(f"ledger.db{extra}").unlink(missing_ok=True)
    return refused


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_flipped_byte_is_harmless_or_refused(every: int, used: Path) -> None:
    """Harmless are pages and counters that hold nothing of ours: then what was spent is what it was."""
    whole = used.read_bytes()
    refused = [flipped(used, whole, at, 0x41) for at in range(0, len(whole), every)]
    assert sum(refused) > 20


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_flipped_byte_gives_typed_errors_alone(at: float, mask: int, used: Path) -> None:
    chain.close_all()
    whole = used.read_bytes()
    flipped(used, whole, int(at * len(whole)), mask)
    used.write_bytes(whole)


def test_a_schema_that_is_no_text_is_a_typed_error(used: Path) -> None:
    """SQLite quotes it in its message, which then cannot be read."""
    whole = used.read_bytes()
    schema = [at for at in range(len(whole)) if whole[at : at + 6] == b"CREATE"]
    assert len(schema) >= len(chain._SCHEMA)
    for start in schema:
        refused = [flipped(used, whole, at, 0x80) for at in range(start, start + 60, 7)]
        assert any(refused)


WRONG = {
    "the newest hash is text": "UPDATE entries SET hash = 'text' WHERE seq = 2",
    "the newest hash is a number": "UPDATE entries SET hash = 99999999999 WHERE seq = 2",
    "a short hash": "UPDATE entries SET hash = x'00' WHERE seq = 2",
    "a witness's hash is a number": "UPDATE witnessed SET hash = 99999999999",
    "a witness's hash is text": "UPDATE witnessed SET hash = 'text'",
    "a witness's number is text": "UPDATE witnessed SET seq = 'text'",
    "a witness's number is negative": "UPDATE witnessed SET seq = -1",
    "a note is bytes": "UPDATE notes SET body = x'ff'",
    "another note": "UPDATE notes SET body = replace(body, '5.0', '9.0')",
    "a note of another plan": "UPDATE notes SET plan = replace(plan, 'b', 'c') WHERE kind = 'reserve'",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_rows_of_other_types_are_refused_by_typed_errors(wrong: str, used: Path) -> None:
    connection = raw(used.parent)
    connection.execute(WRONG[wrong])
    restore_triggers(connection)
    with pytest.raises(LedgerDamaged):
        everything(Ledger(used.parent))
    with pytest.raises((LedgerDamaged, LedgerBehind)):
        more(Ledger(used.parent))


def test_the_ledger_of_another_folder_is_refused(ledger: Ledger, folder: Path, tmp_path: Path) -> None:
    spend(ledger, 1)
    spend(Ledger(tmp_path / "other"), 1, 2, 3)
    chain.close_all()
    shutil.copy(tmp_path / "other" / "ledger.db", folder / "ledger.db")
    with pytest.raises(LedgerDamaged, match="not the ledger of this folder"):
        Ledger(folder).releases(PLAN)
    with pytest.raises(LedgerRolledBack):
        ledger.releases(PLAN)


def test_a_ledger_that_is_gone_is_refused(ledger: Ledger, folder: Path) -> None:
    spend(ledger, 1)
    chain.close_all()
    (folder / "ledger.db").unlink()
    for reader in (ledger, Ledger(folder)):
        for action in (lambda reader=reader: reader.releases(PLAN), lambda reader=reader: reader.reserve(step(2))):
            with pytest.raises(LedgerDamaged, match=r"missing.*recover"):
                action()
    (folder / "ledger.id").unlink()
    with pytest.raises(LedgerRolledBack, match="gone"):
        ledger.reserve(step(2))
    with pytest.raises(LedgerRolledBack):
        Ledger(folder).check_witness(Head(3, b"\x01" * 32))


def test_a_full_disk_loses_nothing_and_releases_nothing(ledger: Ledger, folder: Path) -> None:
    spend(ledger, 1)
    with chain._POOL.borrowed((folder / "ledger.db").absolute(), durable=True) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
    done = 1

    def fill() -> None:
        nonlocal done
        while done < 100:
            release(ledger, step(done + 1))
            done += 1

    with pytest.raises(OutputError, match="full"):
        fill()
    assert ledger.releases(PLAN).rounds == Ledger(folder).verify().plan(PLAN).rounds == done
    release(ledger, step(done + 1))  # there is room again
    assert Ledger(folder).releases(PLAN).rounds == done + 1


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("a file")
    with pytest.raises(OutputError):
        Ledger(tmp_path / "site").reserve(step(1))


def test_a_file_that_another_process_holds_is_an_output_error(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spend(ledger, 1)
    chain.close_all()
    monkeypatch.setattr(chain, "PATIENCE_S", 0.05)
    rival = sqlite3.connect(folder / "ledger.db", isolation_level=None)
    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutputError, match="another process"):
        ledger.reserve(step(2))
    rival.close()
    ledger.reserve(step(2))


# --- old copies and witnesses


def copy_of(folder: Path, name: str) -> Path:
    """The folder as it is now, as a backup or a snapshot of the machine would keep it."""
    target = folder.with_name(name)
    chain.close_all()
    shutil.copytree(folder, target)
    return target


@pytest.fixture
def rolled_back(ledger: Ledger, folder: Path) -> tuple[Ledger, Ledger]:
    """An old copy with two releases and the ledger that went on to four."""
    spend(ledger, 1, 2)
    old = copy_of(folder, "old")
    spend(ledger, 3, 4)
    return Ledger(old), ledger


def test_a_witness_that_saw_more_stops_an_old_copy(rolled_back: tuple[Ledger, Ledger]) -> None:
    old, new = rolled_back
    seen = new.head()
    new.check_witness(seen)
    for head in (NO_LEDGER, old.head()):
        old.check_witness(head)
        new.check_witness(head)
    with pytest.raises(LedgerRolledBack, match=r"old copy.*accord site ledger recover"):
        old.check_witness(seen)


def test_a_witness_notices_an_old_copy_that_went_on(rolled_back: tuple[Ledger, Ledger]) -> None:
    """The two say the same things: only their nonces tell them apart."""
    old, new = rolled_back
    seen = new.head()
    spend(old, 3, 4)
    assert old.head().seq == seen.seq
    assert old.releases(PLAN) == new.releases(PLAN)
    with pytest.raises(LedgerRolledBack, match="went on from an old copy"):
        old.check_witness(seen)


def test_a_log_that_is_gone_is_missed_by_nobody(ledger: Ledger, folder: Path) -> None:
    """All that ever left is in the file itself."""
    spend(ledger, 1, 2)
    seen, copy = ledger.head(), folder.with_name("copy")
    shutil.copytree(folder, copy)  # as after kill -9: the log is still beside the file
    assert (copy / "ledger.db-wal").exists()
    (copy / "ledger.db-wal").unlink()
    Ledger(copy).check_witness(seen)
    assert Ledger(copy).verify().plan(PLAN).rounds == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from unit.test_ledger import *
spend(Ledger(Path(sys.argv[1])), *range(1, 8))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_file_of_a_killed_process_moved_alone_is_complete(folder: Path, tmp_path: Path) -> None:
    """Seven releases were none: they stood in the log, and `verify` was content with the file."""
    assert script(KILLED, str(folder)).wait(60) == -signal.SIGKILL
    assert (folder / "ledger.db-wal").stat().st_size
    (tmp_path / "new").mkdir()
    shutil.copy(folder / "ledger.db", tmp_path / "new")
    moved = Ledger(tmp_path / "new")
    assert moved.verify().plan(PLAN).rounds == 7
    assert moved.epsilon("d", DELTA) == pytest.approx(cost(7))


@pytest.mark.parametrize("releases", [0, 1, 3])
def test_an_older_file_in_its_place_is_noticed(releases: int, ledger: Ledger, folder: Path) -> None:
    """Without any witness: the newest entry is noted beside the file."""
    spend(ledger, *range(1, releases + 1))
    ledger.head() if releases else ledger.note_opened(OTHER, 1)
    chain.close_all()
    old, older = (folder / "ledger.db").read_bytes(), ledger.receipt("site", ME)
    chain.close_all()
    spend(ledger, 7)
    receipt = ledger.receipt("site", ME)
    chain.close_all()
    (folder / "ledger.db").write_bytes(old)
    for action in (
        lambda: Ledger(folder).verify(),
        lambda: Ledger(folder).releases(PLAN),
        lambda: Ledger(folder).reserve(step(8)),
        lambda: release(Ledger(folder), step(8)),
        lambda: Ledger(folder).recover(older, ME),
    ):
        with pytest.raises(LedgerRolledBack, match=r"lacks entry .*ledger\.id names.*Copy the whole folder"):
            action()
    assert Ledger(folder).recover(receipt, ME)
    assert Ledger(folder).releases(PLAN).rounds == releases + 1


@pytest.mark.parametrize("content", [b"", b"\xff" * 115, b"0" * 32, b"a b c", bytes(115)])
def test_what_is_noted_beside_the_file_and_cannot_be_read_is_refused(
    content: bytes, ledger: Ledger, folder: Path
) -> None:
    spend(ledger, 1)
    (folder / "ledger.id").write_bytes(content)
    with pytest.raises(LedgerDamaged, match=r"ledger\.id cannot be read"):
        Ledger(folder).verify()


def test_a_reader_that_stays_stops_a_release_and_not_its_charge(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file alone would lack does not leave."""
    spend(ledger, 1)
    chain.close_all()
    monkeypatch.setattr(chain, "PATIENCE_S", 0.05)
    reader = sqlite3.connect(folder / "ledger.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM entries").fetchone()
    with pytest.raises(OutputError, match="another process"):
        release(ledger, step(2))
    reader.close()
    assert Ledger(folder).releases(PLAN).rounds == 2
    release(ledger, step(3))


def test_what_costs_nothing_moves_no_head(ledger: Ledger) -> None:
    """An old copy came level with what peers had seen by requests that it refused itself."""
    spend(ledger, 1)
    head = ledger.head()
    for attempt in range(1, 20):
        ledger.reserve(step(2, attempt=attempt))
        ledger.note_attempt(PLAN, attempt)
        ledger.void(PLAN)
        ledger.check_plan("d", PLAN, FULL, 5)
        ledger.witness({"b": seen(attempt)})
        ledger.statement()
    assert ledger.head() == head
    assert ledger.releases(PLAN).repeats == 19


def test_recover_counts_what_an_old_copy_lacks(rolled_back: tuple[Ledger, Ledger]) -> None:
    old, new = rolled_back
    new.note_opened(PLAN, 4)
    spend(new, 1, plan=OTHER, dataset="e", event=None)
    receipt = new.receipt("site", ME)
    with pytest.raises(LedgerRolledBack):
        old.check_receipt(receipt, ME)
    assert old.recover(receipt, ME)
    old.check_receipt(receipt, ME)
    assert old.head().seq == receipt.seq + 1
    for dataset in ("d", "e"):
        assert old.spent(dataset) == new.spent(dataset)
    after = old.releases(PLAN)
    assert (after.rounds, after.last_round, after.last_attempt, after.opened_round) == (4, 4, 1, 4)
    assert after.events == new.releases(PLAN).events
    assert (after.last_model, after.last_update, after.last_cohort) == ("", "", ())  # nothing of round 4 is resent
    spend(old, 5)
    assert Ledger(old._chain.folder).verify().plan(PLAN).rounds == 5


def test_recover_twice_or_from_older_receipts_counts_nothing_twice(rolled_back: tuple[Ledger, Ledger]) -> None:
    old, new = rolled_back
    older, newer = old.receipt("site", ME), new.receipt("site", ME)
    assert old.recover(newer, ME)
    head = old.head()
    for receipt in (older, newer, old.receipt("site", ME)):
        assert not old.recover(receipt, ME)
        assert not new.recover(older, ME)
    assert old.head() == head
    assert old.epsilon("d", DELTA) == pytest.approx(cost(4))


def test_a_fork_counts_both_branches(rolled_back: tuple[Ledger, Ledger]) -> None:
    old, new = rolled_back
    spend(old, 3)  # two copies released a third round each: 2 + 2 + 1 releases
    assert old.recover(new.receipt("site", ME), ME)
    assert old.epsilon("d", DELTA) == pytest.approx(cost(5))
    assert old.releases(PLAN).rounds == 5
    spend(new, 5)
    assert old.recover(new.receipt("site", ME), ME)  # the other branch went on: one more
    assert old.epsilon("d", DELTA) == pytest.approx(cost(6))


def test_peers_that_saw_less_than_the_receipt_are_content(rolled_back: tuple[Ledger, Ledger]) -> None:
    old, new = rolled_back
    seen = [new.head()]
    for number in (5, 6):
        spend(new, number)
        seen.append(new.head())
    assert old.recover(new.receipt("site", ME), ME)
    for head in seen:
        old.check_witness(head)
    with pytest.raises(LedgerRolledBack):
        old.check_witness(Head(seen[0].seq, b"\x05" * 32))


def test_a_lost_disk_is_recovered_from_a_receipt(ledger: Ledger, folder: Path, tmp_path: Path) -> None:
    spend(Ledger(folder, datasets=[DataSet(name="d"), DataSet(name="e", derived_from="d")]), 1, 2)
    spend(ledger, 1, plan=OTHER, dataset="e")
    receipt = ledger.receipt("site", ME)
    fresh = Ledger(tmp_path / "new disk")
    with pytest.raises(LedgerRolledBack):
        fresh.check_receipt(receipt, ME)
    assert fresh.recover(receipt, ME)
    assert fresh.epsilon("e", DELTA) == pytest.approx(cost(3))  # lineage and all
    assert fresh.head().seq > receipt.seq
    assert fresh.verify().ledger != receipt.ledger


@pytest.mark.parametrize("gap", [5, chain.DENSE + 3, 5 * chain.DENSE])
def test_however_far_a_copy_is_behind_nothing_is_missed(gap: int, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "site", durable=False)
    for number in range(1, 4):
        release(ledger, step(number))
    old = Ledger(copy_of(tmp_path / "site", "old"), durable=False)
    for number in range(4, 4 + gap):
        release(ledger, step(number))
    assert old.recover(ledger.receipt("site", ME), ME)
    counted, true = old.spent("d").events[0].steps, 3 + gap
    assert true <= counted <= true + 3  # at most what the copy had is counted twice, never anything missed
    assert counted == true or gap > chain.DENSE


@settings(max_examples=25, deadline=None)
@given(
    history=st.lists(
        st.tuples(st.sampled_from(["release", "copy", "recover"]), st.integers(0, 2), st.integers(0, 2)), max_size=14
    )
)
def test_no_history_of_copies_and_receipts_under_counts(
    history: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three copies of one ledger that release, are overwritten by each other, and recover from each other."""
    root = tmp_path_factory.mktemp("copies")
    known: list[set[int]] = [set(), set(), set()]
    names = itertools.count()
    release(Ledger(root / "0", durable=False), step(1))
    for index in (1, 2):
        copy_of(root / "0", str(index))
    for action, one, two in [("release", 0, 0), *history]:
        if action == "release":
            last = Ledger(root / str(one), durable=False).releases(PLAN).last_round
            release(Ledger(root / str(one), durable=False), step(last + 1))
            known[one] = known[one] | {next(names)}
        elif one != two and action == "copy":
            chain.close_all()
            shutil.rmtree(root / str(two))
            copy_of(root / str(one), str(two))
            known[two] = set(known[one])
        elif one != two:
            receipt = Ledger(root / str(one), durable=False).receipt("site", ME)
            Ledger(root / str(two), durable=False).recover(receipt, ME)
            known[two] = known[one] | known[two]
        for index, releases in enumerate(known):
            counted = Ledger(root / str(index), durable=False).spent("d").events[0].steps
            assert counted >= 1 + len(releases)
    chain.close_all()


def test_only_the_site_itself_makes_and_reads_its_receipts(ledger: Ledger) -> None:
    spend(ledger, 1)
    receipt = ledger.receipt("site", ME)
    again = Receipt.from_json(receipt.to_json())
    assert again == receipt
    assert again.open(ME) == receipt.open(ME) != Account()
    assert PLAN not in receipt.to_json()
    receipt.verify(ME.keys)
    with pytest.raises(ProtocolError, match="does not verify"):
        receipt.verify(STRANGER.keys)
    for action in (ledger.recover, ledger.check_receipt):
        with pytest.raises(ProtocolError, match="does not verify"):
            action(ledger.receipt("site", STRANGER), ME)


def test_the_key_of_receipts_is_hkdf_of_the_site_s_own_seed() -> None:
    """RFC 5869 by hand: extract, then one block of expand."""

    def mac(key: bytes, data: bytes) -> bytes:
        return hmac.digest(key, data, "sha256")

    extracted = mac(b"accord/1/identity/derive", b"\x01" * 32)
    assert ME.derive(b"label") == mac(extracted, b"label\x01")
    assert len({ME.derive(b"label"), ME.derive(b"other"), STRANGER.derive(b"label")}) == 3


@pytest.mark.parametrize(
    "change", [{"site": "other"}, {"seq": 99}, {"hash": "0" * 64}, {"ledger": "0" * 32}, {"sealed": "AAAA"}]
)
def test_a_changed_receipt_does_not_verify(change: dict[str, Any], ledger: Ledger) -> None:
    spend(ledger, 1)
    receipt = ledger.receipt("site", ME).model_copy(update=change)
    for action in (lambda: receipt.verify(ME.keys), lambda: receipt.open(ME), lambda: ledger.recover(receipt, ME)):
        with pytest.raises(ProtocolError):
            action()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"site": "x"}', "\xff"])
def test_what_is_no_receipt_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="not a receipt"):
        Receipt.from_json(text)


def test_a_receipt_is_small_and_its_size_tells_little(ledger: Ledger) -> None:
    sizes = set()
    for number in range(1, 100):
        release(ledger, step(number))
        if number > 70:
            sizes.add(len(ledger.receipt("site", ME).to_json()))
    assert max(sizes) < 8192
    assert len(sizes) <= 2


# --- peers


def seen(number: int, fill: int = 1, session: int = 0) -> Seen:
    return Seen(bytes([session]) * 16, Head(number, bytes([fill]) * 32))


def test_a_peer_that_went_back_or_forked_is_refused(ledger: Ledger) -> None:
    one, two = seen(5), seen(7, 2)
    ledger.witness({"b": one, "c": one})
    ledger.witness({"b": two})
    ledger.witness({"b": two})
    for worse in (one, seen(7, 3), Seen(bytes(16), NO_LEDGER), seen(2**60, 3)):
        with pytest.raises(ProtocolError, match="the ledger of 'b'"):
            ledger.witness({"d": two, "b": worse})
    assert ledger.witnessed() == {"b": two.head, "c": one.head}


def test_sessions_that_overlap_may_lag_and_a_new_one_may_not(ledger: Ledger) -> None:
    """Two runs of one peer: each signs its head when it uploads, and is shown at its own next round."""
    ledger.witness({"b": seen(5, 1, session=1)})
    ledger.witness({"b": seen(6, 2, session=2)})
    ledger.witness({"b": seen(9, 3, session=1)})
    ledger.witness({"b": seen(8, 4, session=2)})  # behind the other session, not behind itself
    for back in (seen(7, 5, session=2), seen(8, 5, session=2), seen(8, 4, session=3), seen(9, 4, session=3)):
        with pytest.raises(LedgerBehind):
            ledger.witness({"b": back})
    ledger.witness({"b": seen(9, 3, session=3)})


def test_only_the_sessions_that_came_furthest_are_remembered(ledger: Ledger, folder: Path) -> None:
    for number in range(1, 60):
        ledger.witness({"b": seen(number, session=number)})
    with pytest.raises(LedgerBehind):
        ledger.witness({"b": seen(58, session=1)})
    rows = sqlite3.connect(folder / "ledger.db")
    assert rows.execute("SELECT count(*) FROM witnessed").fetchone() == (chain.MOST_SESSIONS,)
    rows.close()


def test_a_release_and_its_witnesses_are_one_step(ledger: Ledger, folder: Path) -> None:
    release(ledger, step(1), witnessed={"b": seen(5)})
    with pytest.raises(ProtocolError):
        release(ledger, step(2), witnessed={"a": seen(5), "b": seen(4, 2)})
    assert Ledger(folder).witnessed() == {"b": seen(5).head}
    assert Ledger(folder).releases(PLAN).rounds == 1


# --- processes and connections


def test_many_folders_need_few_connections(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0

    chain.close_all()
    before = descriptors()
    ledgers = [Ledger(tmp_path / str(index), durable=False) for index in range(chain.MOST_OPEN + 10)]
    for number in (1, 2):
        for each in ledgers:
            release(each, step(number))
    assert descriptors() - before <= 4 * chain.MOST_OPEN
    assert all(each.releases(PLAN).rounds == 2 for each in ledgers)
    chain.close_all()
    assert descriptors() == before


FORK = """
import os, sys
from pathlib import Path
from unit.test_ledger import *
ledger = Ledger(Path(sys.argv[1]))
spend(ledger, 1)
assert chain._POOL._open
child = os.fork()
assert not chain._POOL._open
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
spend(ledger, 3 if child else 2)
os._exit(0)
"""


def script(code: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=Path(__file__).parents[1])


def test_a_fork_takes_no_connection_along(folder: Path) -> None:
    assert script(FORK, str(folder)).wait(60) == 0
    assert Ledger(folder).verify().plan(PLAN).rounds == 3


SPENDER = """
import sys
from pathlib import Path
from unit.test_ledger import *
ledger = Ledger(Path(sys.argv[1]))
for number in range(40):
    release(ledger, step(1, plan=sys.argv[2] * 64, attempt=number))
"""


def test_two_processes_at_once(folder: Path) -> None:
    rivals = [script(SPENDER, str(folder), plan) for plan in "abc"]
    assert [rival.wait(60) for rival in rivals] == [0, 0, 0]
    balance = Ledger(folder).verify()
    assert [balance.plan(plan).rounds for plan in (PLAN, OTHER, THIRD)] == [40, 40, 40]
    assert balance.head.seq == 121
    assert balance.spent("d").events[0].steps == 120


ERRORS: list[Callable[[Ledger], object]] = [
    lambda ledger: ledger.note_attempt(PLAN, 2**60),
    lambda ledger: ledger.note_opened("no plan", 1),
]


@pytest.mark.parametrize("action", ERRORS)
def test_numbers_that_no_run_has_are_refused(action: Callable[[Ledger], object], ledger: Ledger) -> None:
    spend(ledger, 1)
    head = ledger.head()
    with pytest.raises(ProtocolError):
        action(ledger)
    assert ledger.head() == head
