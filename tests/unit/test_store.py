"""A site's memory of what it has spent: whole, its own, or refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_client.store import Releases, SiteStore
from accord_shared.dp.events import SampledGaussian
from accord_shared.errors import PrivacyError
from accord_shared.messages import Refusal
from conformance.lab import Lab, ask, lab_plan

HASH = "0123456789abcdef" * 4
EVENT = SampledGaussian(2.0, 0.5, 3)
UPDATE = np.array([1.0, -2.5, 3e-39], dtype=np.float32)


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore(tmp_path / "site")


def state_file(folder: Path) -> Path:
    (path,) = folder.rglob("plan-*.json")
    return path


def test_nothing_is_spent_at_first(store: SiteStore) -> None:
    assert store.releases(HASH) == Releases()
    assert store.releases(HASH).steps == 0
    assert store.plan_json(HASH) is None


def test_releases_add_up_and_survive(store: SiteStore, tmp_path: Path) -> None:
    for number in (1, 3, 4):
        store.release(HASH, number, f"model {number}", UPDATE * number, EVENT)
    again = SiteStore(tmp_path / "site").releases(HASH)
    assert (again.rounds, again.last_round, again.last_model, again.steps) == (3, 4, "model 4", 9)
    assert again.events == (SampledGaussian(2.0, 0.5, 9),)
    assert store.last_update(again).tobytes() == (UPDATE * 4).tobytes()


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
    for path in (tmp_path / "site").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


def test_no_temporary_files_stay(store: SiteStore, tmp_path: Path) -> None:
    store.keep_plan(HASH, "{}")
    store.release(HASH, 1, "model", UPDATE, EVENT)
    assert not list((tmp_path / "site").glob("*.tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"null",
        b"7",
        b"[]",
        b'"text"',
        b"{}",
        b"\xff\xfe",
        b'{"plan_hash": "another"}',
        {"rounds": None},
        {"rounds": "1"},
        {"rounds": -1},
        {"rounds": 1.5},
        {"rounds": True},
        {"last_round": -3},
        {"last_round": "1"},
        {"events": None},
        {"events": 3},
        {"events": [None]},
        {"events": [{}]},
        {"events": [{**EVENT.to_json(), "noise_multiplier": float("inf")}]},
        {"events": [{**EVENT.to_json(), "steps": -3}]},
        {"events": [{**EVENT.to_json(), "kind": "nothing"}]},
        {"surprise": 1},
        {"last_model": None},
        {"last_update": "../../secret"},
        {"last_update": 3},
    ],
    ids=str,
)
def test_a_damaged_state_stops_the_site(damage: bytes | dict[str, Any], tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    ask(lab.joined(plan), plan, lab, 1)
    path = state_file(tmp_path / "site")
    state = json.loads(path.read_text())
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps({**state, **damage}).encode())
    with pytest.raises(PrivacyError):
        lab.store().releases(plan.hash)
    for number in (1, 2):
        answer = ask(lab.site(), plan, lab, number)
        assert isinstance(answer, Refusal)


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


def test_damage_to_one_plan_leaves_others_alone(store: SiteStore, tmp_path: Path) -> None:
    other = "f" * 64
    store.release(HASH, 1, "m", UPDATE, EVENT)
    state_file(tmp_path / "site").write_bytes(b"{")
    store.release(other, 1, "m", UPDATE, EVENT)
    assert store.releases(other).rounds == 1
    with pytest.raises(PrivacyError):
        store.release(HASH, 2, "m", UPDATE, EVENT)
