"""A site's memory of what it has spent: whole, its own, or refused."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from accord_client.ledger import chain
from accord_client.store import Releases, SiteStore
from accord_shared.dp.events import SampledGaussian
from accord_shared.errors import PrivacyError, ProtocolError
from accord_shared.messages import Refusal
from conformance.lab import Lab, ask, lab_plan

HASH = "0123456789abcdef" * 4
EVENT = SampledGaussian(2.0, 0.5, 3)
UPDATE = np.array([1.0, -2.5, 3e-39], dtype=np.float32)


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore(tmp_path / "site")


def test_nothing_is_spent_at_first(store: SiteStore, tmp_path: Path) -> None:
    assert store.releases(HASH) == Releases()
    assert store.releases(HASH).steps == 0
    assert store.plan_json(HASH) is None
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("durable", [True, False])
def test_releases_add_up_and_survive(durable: bool, tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "site", durable=durable)
    for number in (1, 3, 4):
        after = store.release(HASH, number, f"model {number}", UPDATE * number, EVENT)
    again = SiteStore(tmp_path / "site").releases(HASH)
    assert again == after == store.releases(HASH)
    assert (again.rounds, again.last_round, again.last_model, again.steps) == (3, 4, "model 4", 9)
    assert again.events == (SampledGaussian(2.0, 0.5, 9),)
    assert store.last_update(again).tobytes() == (UPDATE * 4).tobytes()


def test_attempts_of_one_round_are_releases_of_the_first_one_s_cohort(store: SiteStore) -> None:
    store.release(HASH, 1, "m", None, EVENT, ("a", "b", "c"), 1)
    again = store.release(HASH, 1, "m", None, EVENT, ("a", "b"), 2)
    assert (again.rounds, again.last_round, again.last_attempt, again.steps) == (2, 1, 2, 6)
    assert again.last_cohort == ("a", "b", "c")
    assert store.release(HASH, 2, "m", None, EVENT, ("b",), 1).last_cohort == ("b",)


def test_what_is_never_resent_is_not_kept(store: SiteStore, tmp_path: Path) -> None:
    releases = store.release(HASH, 1, "m", None, EVENT)
    assert (releases.last_update, releases.last_digest) == ("", "")
    assert not list((tmp_path / "site").glob("*.f32"))
    with pytest.raises(PrivacyError, match="not sent again"):
        store.last_update(releases)


def test_notes_survive(store: SiteStore, tmp_path: Path) -> None:
    store.release(HASH, 2, "m", UPDATE, EVENT, ("a", "b"), 1)
    store.note_attempt(HASH, 5)
    store.note_opened(HASH, 2)
    store.note_opened(HASH, 1)  # an older round does not close what is open
    again = SiteStore(tmp_path / "site").releases(HASH)
    assert (again.rounds, again.last_attempt, again.opened_round) == (1, 5, 2)


def test_no_round_is_released_after_a_later_one(store: SiteStore) -> None:
    store.release(HASH, 2, "m", UPDATE, EVENT)
    with pytest.raises(ProtocolError, match="round 1 is past"):
        store.release(HASH, 1, "m", UPDATE, EVENT)
    assert store.releases(HASH).rounds == 1


def test_the_update_before_stays_until_the_next_is_paid(store: SiteStore, tmp_path: Path) -> None:
    last = 0
    for number in (1, 3, 5, 8, 10):  # rounds of one parity, as after dropouts
        before = store.releases(HASH)
        store.release(HASH, number, "model", UPDATE * number, EVENT)
        if before.rounds:
            assert store.last_update(before).tobytes() == (UPDATE * last).tobytes()
        last = number
        assert len(list((tmp_path / "site").glob("*.f32"))) <= 2


def test_state_and_updates_are_the_owner_s_alone(store: SiteStore, tmp_path: Path) -> None:
    store.release(HASH, 1, "model", UPDATE, EVENT)
    names = {path.name for path in (tmp_path / "site").iterdir()}
    assert names >= {"ledger.db", "ledger.db-wal", "ledger.id"}
    for path in (tmp_path / "site").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


def test_no_temporary_files_stay(store: SiteStore, tmp_path: Path) -> None:
    store.keep_plan(HASH, "{}")
    store.release(HASH, 1, "model", UPDATE, EVENT)
    chain.close_all()
    names = {path.name for path in (tmp_path / "site").iterdir()}
    assert names == {"ledger.db", "ledger.id", f"plan-{HASH}.plan", f"plan-{HASH}-0.f32"}


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"SQLite format 3\0", "gone"], ids=str)
def test_a_damaged_state_stops_the_site(damage: bytes | str, tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    ask(lab.joined(plan), plan, lab, 1)
    chain.close_all()
    path = tmp_path / "site" / "ledger.db"
    path.unlink() if isinstance(damage, str) else path.write_bytes(damage)
    with pytest.raises(PrivacyError):
        lab.store().releases(plan.hash)
    for number in (1, 2):
        answer = ask(lab.site(), plan, lab, number)
        assert isinstance(answer, Refusal)
        assert answer.kind == "LedgerDamaged"


@pytest.mark.parametrize("damage", ["gone", "short", "flipped"])
def test_a_damaged_update_is_never_resent(damage: str, tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    ask(lab.joined(plan), plan, lab, 1)
    (path,) = (tmp_path / "site").glob("*.f32")
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(data[:40] if damage == "short" else data)
    answer = ask(lab.site(), plan, lab, 1)
    assert isinstance(answer, Refusal)
    assert answer.kind == "PrivacyError"
