"""The roster that a coordinator serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accord_server.audit import AuditLog
from accord_server.database import Database
from accord_server.rosters import Rosters
from accord_shared.errors import RosterError
from accord_shared.identity import Identity
from accord_shared.roster import Roster, SignedRoster, sign_roster
from accord_shared.signatures import Endorsement, quorum

NAMES = ("a", "b", "c", "d")
KEYS = {name: Identity.from_seeds(bytes([place]) * 32, bytes([place + 9]) * 32) for place, name in enumerate(NAMES)}
ROSTER_KEY = Identity.from_seeds(b"r" * 32, b"s" * 32)


def signed(
    serial: int = 1, names: tuple[str, ...] = NAMES[:3], key: Identity = ROSTER_KEY, **changes: object
) -> SignedRoster:
    members = tuple(KEYS[name].public(name) for name in names)
    fields = {"federation": "f", "serial": serial, "minimum": 2, "colluders": 1, "members": members, **changes}
    return sign_roster(Roster.made(fields), key)


@pytest.fixture
def rosters(tmp_path: Path) -> Rosters:
    return Rosters(tmp_path / "roster.json", "f", AuditLog(Database(f"sqlite:///{tmp_path / 'state.db'}")))


def endorsement(of: SignedRoster, name: str, key: Identity | None = None) -> str:
    made = Endorsement(federation="f", roster=of.roster.hash, name=name)
    return made.signed(key or KEYS[name]).to_json()


def test_a_roster_is_served_with_its_endorsements(rosters: Rosters) -> None:
    assert rosters.reply().roster == ""
    with pytest.raises(RosterError, match="no roster yet"):
        _ = rosters.roster
    first = signed()
    info = rosters.set(first.to_json())
    assert (info.hash, info.serial, info.members, info.quorum) == (first.roster.hash, 1, 3, quorum(first.roster))
    rosters.endorse("a", endorsement(first, "a"))
    rosters.endorse("a", endorsement(first, "a"))
    reply = rosters.reply()
    assert SignedRoster.from_json(reply.roster) == first
    assert [Endorsement.from_json(text).name for text in reply.endorsements] == ["a"]


def test_a_later_roster_begins_without_endorsements(rosters: Rosters) -> None:
    first, second = signed(), signed(2, NAMES)
    rosters.set(first.to_json())
    rosters.endorse("a", endorsement(first, "a"))
    assert rosters.set(first.to_json()).endorsements == 1  # the same once more changes nothing
    assert rosters.set(second.to_json()).endorsements == 0
    assert rosters.hash == second.roster.hash


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (signed(1, NAMES), "serial 1"),
        (signed(0), "serial 0"),
        (signed(2, key=Identity.from_seeds(b"x" * 32, b"y" * 32)), "another key"),
        (signed(2, federation="g"), "'g'"),
    ],
    ids=["same serial", "older", "another key", "another federation"],
)
def test_a_roster_that_does_not_follow_is_refused(rosters: Rosters, other: SignedRoster, why: str) -> None:
    rosters.set(signed().to_json())
    with pytest.raises(RosterError, match=why):
        rosters.set(other.to_json())
    assert rosters.hash == signed().roster.hash


def test_an_altered_roster_is_refused(rosters: Rosters) -> None:
    table = json.loads(signed().to_json())
    table["roster"]["minimum"] = 3
    with pytest.raises(RosterError, match="does not verify"):
        rosters.set(json.dumps(table))
    assert rosters.hash == ""


def test_an_endorsement_counts_for_its_site_and_roster_alone(rosters: Rosters) -> None:
    first = signed()
    with pytest.raises(RosterError):
        rosters.endorse("a", endorsement(first, "a"))  # of no roster
    rosters.set(first.to_json())
    for site, text in (
        ("b", endorsement(first, "a")),  # another's
        ("a", endorsement(signed(2, NAMES), "a")),  # of another roster
        ("a", endorsement(first, "a", KEYS["b"])),  # forged
        ("d", endorsement(first, "d")),  # of no member
        ("a", "{}"),
    ):
        with pytest.raises(RosterError):
            rosters.endorse(site, text)
    assert not rosters.endorsements()


def test_both_survive_a_restart(rosters: Rosters, tmp_path: Path) -> None:
    first = signed()
    rosters.set(first.to_json())
    rosters.endorse("b", endorsement(first, "b"))
    again = Rosters(tmp_path / "roster.json", "f", AuditLog(Database(f"sqlite:///{tmp_path / 'state.db'}")))
    assert again.reply() == rosters.reply()
