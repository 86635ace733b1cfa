"""Whom a site trusts: the first roster by a compared hash, later ones by a quorum that nobody can forge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from accord_client.rosters import Acceptance, RosterBook
from accord_client.settings import SiteFolder
from accord_shared.errors import BadInput, RosterError, SettingsError
from accord_shared.identity import Identity
from accord_shared.roster import Roster, SignedRoster, sign_roster
from accord_shared.signatures import Endorsement, quorum

FEDERATION = "Nord"
KEY, OTHER_KEY = (Identity.from_seeds(bytes([n]) * 32, b"\xf0" * 32) for n in (0xF1, 0xF2))
BANKS = {f"Bank {n:02d}": Identity.from_seeds(bytes([n]) * 32, bytes([100 + n]) * 32) for n in range(1, 8)}
ME = "Bank 01"


def roster(serial: int = 0, banks: Sequence[str] = tuple(BANKS)[:5], key: Identity = KEY, **more: Any) -> SignedRoster:
    members = tuple(BANKS[name].public(name) for name in sorted(banks))
    fields = {"federation": FEDERATION, "serial": serial, "minimum": 3, "colluders": 1, "members": members}
    return sign_roster(Roster.made(fields | more), key)


def word(offered: SignedRoster, name: str, identity: Identity | None = None, **more: Any) -> Endorsement:
    fields = {"federation": FEDERATION, "roster": offered.roster.hash, "name": name}
    return Endorsement(**(fields | more)).signed(identity or BANKS[name])


@pytest.fixture
def book(tmp_path: Path) -> RosterBook:
    return RosterBook(SiteFolder(tmp_path), BANKS[ME], ME, FEDERATION)


FIRST = roster()
NEXT = roster(1, (*tuple(BANKS)[:5], "Bank 06"))
NEEDED = quorum(FIRST.roster)
ENOUGH = [word(NEXT, name) for name in list(BANKS)[1 : 1 + NEEDED]]


@pytest.fixture
def trusting(book: RosterBook) -> RosterBook:
    """A site that accepted the first roster."""
    assert book.accept(FIRST.roster.hash, FIRST, []).adopted
    return book


def test_the_first_roster_is_adopted_by_its_hash(book: RosterBook, tmp_path: Path) -> None:
    assert (book.roster, book.hash) == (None, "")
    assert book.accept(FIRST.roster.hash, FIRST, []).adopted
    assert book.roster == FIRST.roster
    again = RosterBook(SiteFolder(tmp_path), BANKS[ME], ME, FEDERATION)
    assert (again.hash, again.accepted) == (FIRST.roster.hash, FIRST)
    assert (tmp_path / "roster.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("wanted", ["", "0" * 64, FIRST.roster.hash[:63], NEXT.roster.hash])
def test_another_hash_than_the_offered_one_is_not_adopted(wanted: str, book: RosterBook) -> None:
    with pytest.raises(BadInput, match=f"offers roster {FIRST.roster.hash}"):
        book.accept(wanted, FIRST, ENOUGH)
    assert book.roster is None


def test_the_first_roster_is_never_adopted_by_endorsements(book: RosterBook) -> None:
    assert not book.adopt_by_quorum(NEXT, [word(NEXT, name) for name in BANKS]).adopted
    assert book.roster is None


def test_a_quorum_is_all_colluders_and_most_of_the_others() -> None:
    assert NEEDED == 4
    assert len(ENOUGH) == NEEDED


def test_a_later_roster_needs_a_quorum(trusting: RosterBook) -> None:
    for count in range(NEEDED):
        assert trusting.adopt_by_quorum(NEXT, ENOUGH[:count]) == Acceptance(False, count, NEEDED)
        assert trusting.roster == FIRST.roster
    assert trusting.adopt_by_quorum(NEXT, ENOUGH) == Acceptance(True, NEEDED, NEEDED)
    assert trusting.roster == NEXT.roster


def test_the_operator_s_word_counts_once(trusting: RosterBook) -> None:
    wanted = NEXT.roster.hash
    assert trusting.accept(wanted, NEXT, ENOUGH[:2]) == Acceptance(False, 3, NEEDED)
    assert trusting.accept(wanted, NEXT, [*ENOUGH[:2], word(NEXT, ME)]) == Acceptance(False, 3, NEEDED)
    assert trusting.accept(wanted, NEXT, ENOUGH[:3]).adopted


def test_endorsing_adopts_nothing(trusting: RosterBook) -> None:
    made = trusting.endorse(NEXT.roster.hash, NEXT)
    assert made.verify(FIRST.roster).name == ME
    assert made.roster == NEXT.roster.hash
    assert trusting.roster == FIRST.roster


FORGED = {
    "signed by another": word(NEXT, "Bank 05", Identity.generate()),
    "of a member of the new roster alone": word(NEXT, "Bank 06"),
    "of a stranger": word(NEXT, "Bank 07"),
    "of another roster": word(FIRST, "Bank 05"),
    "of another federation": word(NEXT, "Bank 05", federation="Sued"),
    "unsigned": Endorsement(federation=FEDERATION, roster=NEXT.roster.hash, name="Bank 05"),
    "under another name": word(NEXT, "Bank 02").model_copy(update={"name": "Bank 05"}),
    "moved to this roster": word(FIRST, "Bank 05").model_copy(update={"roster": NEXT.roster.hash}),
    "counted before": ENOUGH[0],
    "only Ed25519": word(NEXT, "Bank 05").model_copy(
        update={"signature": word(NEXT, "Bank 05").signature[:128] + "00" * 3309}
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_endorsement_does_not_count(kind: str, trusting: RosterBook) -> None:
    given = [*ENOUGH[: NEEDED - 1], FORGED[kind]]
    assert trusting.adopt_by_quorum(NEXT, given) == Acceptance(False, NEEDED - 1, NEEDED)
    assert trusting.roster == FIRST.roster
    assert trusting.adopt_by_quorum(NEXT, [FORGED[kind], *ENOUGH]).adopted, "it stops no honest ones either"


REFUSED = {
    "other key": (roster(1, key=OTHER_KEY), "signed by key"),
    "equal serial": (roster(0, tuple(BANKS)[:4]), "serial 0"),
    "other federation": (roster(1, federation="Sued"), "federation 'Sued'"),
    "without this site": (roster(1, tuple(BANKS)[1:6]), "not on the roster"),
    "other keys for this site": (
        sign_roster(
            FIRST.roster.without(ME).added(Identity.generate().public(ME)),
            KEY,
        ),
        "other keys",
    ),
    "altered": (NEXT.model_copy(update={"roster": roster(9).roster}), "does not verify"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_roster_that_cannot_follow_is_refused_whoever_endorses(kind: str, trusting: RosterBook) -> None:
    offered, line = REFUSED[kind]
    everybody = [word(offered, name) for name in BANKS]
    for call in (
        lambda: trusting.adopt_by_quorum(offered, everybody),
        lambda: trusting.accept(offered.roster.hash, offered, everybody),
        lambda: trusting.endorse(offered.roster.hash, offered),
    ):
        with pytest.raises(RosterError, match=line):
            call()
    assert trusting.roster == FIRST.roster


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind not in ("other key", "equal serial")])
def test_a_first_roster_is_checked_too(kind: str, book: RosterBook) -> None:
    offered, line = REFUSED[kind]
    with pytest.raises(RosterError, match=line):
        book.accept(offered.roster.hash, offered, [])
    assert book.roster is None


def test_a_lower_serial_is_refused_after_an_adoption(trusting: RosterBook) -> None:
    trusting.adopt_by_quorum(NEXT, ENOUGH)
    with pytest.raises(RosterError, match="serial 0 of the roster is not above the accepted, 1"):
        trusting.accept(FIRST.roster.hash, FIRST, [word(FIRST, name) for name in BANKS])


def test_what_is_adopted_is_adopted_again(trusting: RosterBook) -> None:
    assert trusting.accept(FIRST.roster.hash, FIRST, []).adopted
    assert trusting.adopt_by_quorum(FIRST, []).adopted


def test_what_another_process_adopts_is_seen(trusting: RosterBook, tmp_path: Path) -> None:
    """The operator's command writes the file while the agent runs."""
    assert trusting.hash == FIRST.roster.hash
    command = RosterBook(SiteFolder(tmp_path), BANKS[ME], ME, FEDERATION)
    assert command.adopt_by_quorum(NEXT, ENOUGH).adopted
    assert trusting.hash == NEXT.roster.hash
    (tmp_path / "roster.json").unlink()
    assert trusting.roster is None


@pytest.mark.parametrize("damage", ["cut", "empty", "altered", "binary"])
def test_a_damaged_roster_is_trusted_no_more(damage: str, trusting: RosterBook, tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    text = path.read_text()
    path.write_bytes(
        {
            "cut": text[:-9].encode(),
            "empty": b"",
            "altered": text.replace('"minimum":3', '"minimum":2').encode(),
            "binary": b"\xff",
        }[damage]
    )
    with pytest.raises(SettingsError, match=r"roster\.json is damaged"):
        _ = trusting.roster
    with pytest.raises(SettingsError, match="is damaged"):
        trusting.adopt_by_quorum(NEXT, ENOUGH)
