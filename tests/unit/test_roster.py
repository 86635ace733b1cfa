"""The roster: a frozen hash, every refusal, and signatures of which each alone refuses."""

from __future__ import annotations

import hashlib
import json
from functools import cache

import pytest

from accord_shared.canonical import canonical_bytes
from accord_shared.errors import ProtocolError, RosterError
from accord_shared.frames import frame
from accord_shared.identity import Identity, Member
from accord_shared.roster import (
    Roster,
    RosterDraft,
    RosterFile,
    RosterKey,
    RosterSignature,
    SignedRoster,
    sign_roster,
)


@cache
def key_of(number: int) -> Identity:
    return Identity.from_seeds(bytes([number]) * 32, bytes([number + 100]) * 32)


def member_of(number: int, name: str | None = None) -> Member:
    return key_of(number).public(name or f"Bank {number:02d} (Nordkap)")


def roster_of(**changes: object) -> Roster:
    fields: dict[str, object] = {
        "federation": "Nordkap",
        "serial": 1,
        "minimum": 2,
        "colluders": 1,
        "members": tuple(member_of(number) for number in (1, 2, 3)),
    }
    return Roster.made({**fields, **changes})


ROSTER = roster_of()
OPERATOR = key_of(90)
SIGNED = sign_roster(ROSTER, OPERATOR)


def flipped(text: str, at: int) -> str:
    return text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :]


# --- hash


def test_frozen_hash() -> None:
    assert ROSTER.hash == "240df425de88756cdf7695428690cf9a02b646dbc74a958ade12f60ba9820cc5"


def test_hash_is_of_the_specified_json() -> None:
    members = [{"ed25519": m.ed25519, "ml_dsa_65": m.ml_dsa_65, "name": m.name} for m in ROSTER.members]
    table = {
        "colluders": 1,
        "federation": "Nordkap",
        "members": members,
        "minimum": 2,
        "serial": 1,
        "version": 1,
    }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    assert ROSTER.canonical() == text
    assert ROSTER.hash == hashlib.sha256(text).hexdigest()


def test_json_in_any_layout_has_one_hash() -> None:
    table = json.loads(ROSTER.to_json())
    backwards = dict(sorted(table.items(), reverse=True))
    again = Roster.from_json(json.dumps(backwards, indent=3))
    assert again == ROSTER
    assert again.hash == ROSTER.hash
    assert Roster.from_json(ROSTER.to_json(indent=2).encode()) == ROSTER


@pytest.mark.parametrize(
    "change",
    [
        {"federation": "Südkap"},
        {"serial": 2},
        {"minimum": 3},
        {"colluders": 0},
        {"members": ROSTER.members[:2]},
        {"members": (*ROSTER.members[:2], member_of(3, "Bank 04"))},
        {"members": (*ROSTER.members[:2], member_of(4, "Bank 03 (Nordkap)"))},
    ],
)
def test_every_field_is_in_the_hash(change: dict[str, object]) -> None:
    assert roster_of(**change).hash != ROSTER.hash


# --- refusals


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 2}, "version"),
        ({"federation": ""}, "name"),
        ({"federation": "a\nb"}, "name"),
        ({"serial": -1}, "serial"),
        ({"serial": 2**53}, "serial"),
        ({"serial": 1.0}, "serial"),
        ({"minimum": 1}, "minimum"),
        ({"minimum": 4}, "minimum = 4, but the roster has 3 members"),
        ({"minimum": "2"}, "minimum"),
        ({"colluders": -1}, "colluders"),
        ({"colluders": 2}, "colluders"),
        ({"members": ()}, "0 members"),
        ({"members": ROSTER.members[::-1]}, "ascending"),
        ({"members": (*ROSTER.members, ROSTER.members[2])}, "distinct"),
        ({"extra": 1}, "unknown key: extra"),
    ],
)
def test_refusals(change: dict[str, object], what: str) -> None:
    with pytest.raises(RosterError, match=what):
        roster_of(**change)


def test_one_key_under_two_names_is_refused() -> None:
    sybil = member_of(1, "Bank 09 (Südkap)")
    with pytest.raises(RosterError, match=r"'Bank 01 \(Nordkap\)' and 'Bank 09 \(Südkap\)' have the same ed25519 key"):
        ROSTER.added(sybil)


@pytest.mark.parametrize("kind", ["ed25519", "ml_dsa_65"])
def test_half_a_key_under_two_names_is_refused(kind: str) -> None:
    sybil = Member.made({**dict(member_of(4)), kind: getattr(member_of(1), kind)})
    with pytest.raises(RosterError, match=f"the same {kind} key"):
        ROSTER.added(sybil)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", b"\xfe", '{"version": 1}'])
def test_what_is_no_roster_is_refused(text: str | bytes) -> None:
    for kind in (Roster, RosterDraft, SignedRoster, RosterFile):
        with pytest.raises(RosterError):
            kind.from_json(text)


def test_order_is_by_code_point() -> None:
    names = ["Zeta", "alpha", "Ärger", "\U00010400"]
    members = tuple(member_of(number, name) for number, name in enumerate(names, start=1))
    assert [m.name for m in roster_of(members=members).members] == names
    assert roster_of(members=members[:2]).added(members[3], members[2]).members == members


# --- members and changes


def test_members_are_found_by_name() -> None:
    for member in ROSTER.members:
        assert ROSTER.member(member.name) == member
    for name in ("", "Bank 00", "Bank 01", "bank 01 (nordkap)", "zzz", "\n" * 1000):
        with pytest.raises(ProtocolError, match="not on the roster") as caught:
            ROSTER.member(name)
        assert str(caught.value).isprintable()


def test_changes_bump_the_serial_and_keep_the_order() -> None:
    larger = ROSTER.added(member_of(5, "Aurum"), member_of(4))
    assert isinstance(larger, Roster)
    assert [m.name for m in larger.members] == ["Aurum", *(f"Bank {n:02d} (Nordkap)" for n in (1, 2, 3, 4))]
    assert larger.serial == 2
    smaller = larger.without("Bank 02 (Nordkap)")
    assert (smaller.serial, len(smaller.members)) == (3, 4)
    assert roster_of() == ROSTER


def test_impossible_changes_are_refused() -> None:
    with pytest.raises(RosterError, match="distinct"):
        ROSTER.added(member_of(9, "Bank 01 (Nordkap)"))
    with pytest.raises(ProtocolError, match="not on the roster"):
        ROSTER.without("nobody")
    with pytest.raises(RosterError, match="2, but the roster has 1 members"):
        ROSTER.without("Bank 01 (Nordkap)").without("Bank 02 (Nordkap)")


# --- signatures


def test_a_signed_roster_verifies_after_a_round_trip() -> None:
    again = SignedRoster.from_json(SIGNED.to_json())
    assert again == SIGNED
    assert again.verify() == again.verify(ROSTER.hash) == ROSTER


def test_the_signed_bytes_are_the_specified_ones() -> None:
    message = frame("accord/1/roster", canonical_bytes(ROSTER.model_dump()))
    assert SIGNED.signature.ed25519 == OPERATOR.sign(message).hex()


def test_another_hash_than_the_pinned_is_refused() -> None:
    with pytest.raises(RosterError, match="not the pinned one"):
        SIGNED.verify("0" * 64)


def test_a_roster_of_another_key_is_refused_by_its_hash_alone() -> None:
    """Anybody can sign a roster with a key of his own: only the pinned hash tells."""
    forged = sign_roster(ROSTER.added(member_of(66, "Eve")), key_of(91))
    assert forged.verify()
    with pytest.raises(RosterError, match="not the pinned one"):
        forged.verify(ROSTER.hash)


@pytest.mark.parametrize(("kind", "words"), [("ed25519", "Ed25519"), ("ml_dsa_65", "ML-DSA-65")])
@pytest.mark.parametrize("where", ["head", "tail"])
def test_each_signature_alone_refuses(kind: str, words: str, where: str) -> None:
    value = getattr(SIGNED.signature, kind)
    bad = RosterSignature.made({**dict(SIGNED.signature), kind: flipped(value, 0 if where == "head" else -66)})
    with pytest.raises(RosterError, match=f"the {words} signature"):
        SignedRoster(roster=ROSTER, key=SIGNED.key, signature=bad).verify()


@pytest.mark.parametrize(("kind", "words"), [("ed25519", "Ed25519"), ("ml_dsa_65", "ML-DSA-65")])
def test_each_key_alone_refuses(kind: str, words: str) -> None:
    key = RosterKey.made({**dict(SIGNED.key), kind: getattr(key_of(91).keys, kind)})
    with pytest.raises(RosterError, match=f"the {words} signature"):
        SignedRoster(roster=ROSTER, key=key, signature=SIGNED.signature).verify()


@pytest.mark.parametrize(
    "change",
    [{"federation": "Sudkap"}, {"serial": 2}, {"minimum": 3}, {"colluders": 0}, {"members": ROSTER.members[1:]}],
)
def test_a_tampered_roster_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(RosterError, match="does not verify"):
        SignedRoster(roster=roster_of(**change), key=SIGNED.key, signature=SIGNED.signature).verify()


def test_a_swapped_member_key_is_refused() -> None:
    table = json.loads(SIGNED.to_json())
    table["roster"]["members"][1] |= {"ed25519": member_of(50).ed25519}
    with pytest.raises(RosterError, match="does not verify"):
        SignedRoster.from_json(json.dumps(table)).verify()


@pytest.mark.parametrize("change", [{"ed25519": "00"}, {"ml_dsa_65": "00"}, {"ed25519": "Z" * 128}])
def test_signatures_of_another_form_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(RosterError, match="signature"):
        RosterSignature.made({**dict(SIGNED.signature), **change})


# --- drafts


def test_a_draft_may_lack_members_but_not_be_signed() -> None:
    draft = RosterDraft.made({"federation": "x", "serial": 0, "minimum": 2, "colluders": 0})
    file = RosterFile(roster=draft, key=SIGNED.key)
    with pytest.raises(RosterError, match="not signed"):
        file.signed()
    with pytest.raises(RosterError, match="0 members"):
        RosterFile(roster=draft, key=SIGNED.key, signature=SIGNED.signature).signed()
    with pytest.raises(RosterError, match="same ml_dsa_65 key"):
        draft.added(member_of(1), Member.made({**dict(member_of(2)), "ml_dsa_65": member_of(1).ml_dsa_65}))


def test_a_signed_file_is_a_signed_roster() -> None:
    file = RosterFile.from_json(SIGNED.to_json())
    assert file.to_json() == SIGNED.to_json()
    assert file.signed() == SIGNED
    assert file.roster.hash == ROSTER.hash
