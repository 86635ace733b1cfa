"""Frozen vectors of sparse graphs: numbers, choices, and the first site's side of an attempt of 88."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from accord_shared.errors import ProtocolError
from accord_shared.frames import frame
from accord_shared.identity import Identity
from accord_shared.messages import MaskRequest
from accord_shared.secagg.choices import Edges, own_choice
from accord_shared.secagg.graph import most_left_out, sparse_thresholds
from accord_shared.secagg.keys import CREDENTIAL_BYTES, Credential
from accord_shared.secagg.member import Member
from vectors import second
from vectors.make_transcript import (
    MANY,
    SPARSE_FILE,
    Blobs,
    attempt_of,
    from_json,
    graph_vectors,
    identity_of,
    roster_of,
    stream,
    terms_of,
    words_of,
)

TABLE: dict[str, Any] = json.loads(SPARSE_FILE.read_text())
TRANSCRIPT: dict[str, Any] = TABLE["transcript"]
ROSTER = roster_of(MANY)
TERMS = terms_of("sparse", ROSTER)


def message(kind: str, index: int | None = None) -> Any:
    table = TRANSCRIPT[kind] if index is None else TRANSCRIPT[kind][str(index)]
    return from_json(table, Blobs(TRANSCRIPT["blobs"]))


def first_site() -> Member:
    return Member("a", identity_of("a"), ROSTER, TERMS, random=stream("site a"))


def test_the_file_is_what_its_maker_makes() -> None:
    assert {key: TABLE[key] for key in ("thresholds", "choices")} == graph_vectors()


@pytest.mark.parametrize("row", TABLE["thresholds"], ids=lambda row: f"{row['members']}-{row['minimum']}")
def test_numbers_of_a_graph(row: dict[str, int]) -> None:
    graph = (row["members"], row["minimum"], row["colluders"])
    rule = sparse_thresholds(*graph)
    assert (rule.degree, rule.share, rule.sign) == (row["degree"], row["share"], row["sign"])
    assert most_left_out(*graph, row["degree"]) == row["most_left_out"]


def test_a_choice_follows_from_the_seed() -> None:
    table = TABLE["choices"]
    seed, hashes = bytes.fromhex(table["ed25519_seed"]), (table["roster_hash"], table["plan_hash"])
    identity = Identity.from_seeds(seed, bytes(32))  # ML-DSA has no part in it
    assert identity.derive(frame("accord/1/neighbours", *hashes)).hex() == table["key"]
    for row in table["drawn"]:
        made = own_choice(identity, *hashes, row["place"], row["members"], row["degree"])
        assert made.hex() == row["choice"]
        assert second.choice(seed, *hashes, row["place"], row["members"], row["degree"]) == made


def test_the_edges_and_the_context_follow_from_the_request() -> None:
    request, expected = message("request"), TRANSCRIPT["expected"]
    assert len(request.choices) == 88
    assert {len(choice) for choice in request.choices} == {11}
    partners, holders = Edges(request.choices, range(88)).of(0)
    assert (list(partners), list(holders)) == (expected["partners"], expected["holders"])
    for place in range(88):
        both = Edges(request.choices, range(88)).of(place)
        assert second.edges(request.choices, range(88), place) == tuple(map(list, both))
    assert set(request.peers) == {MANY[index] for index in partners}  # a site introduces itself to nobody before it
    assert attempt_of(TERMS, request).context.hex() == expected["context"]


def test_credentials_carry_the_choice_under_both_signatures() -> None:
    request = message("request")
    for peer, data in zip(request.peers, request.credentials, strict=True):
        assert len(data) == CREDENTIAL_BYTES + 11
        assert Credential.read(data, TERMS, ROSTER, peer).choice == request.choices[MANY.index(peer)]
        forged = bytearray(data)
        forged[16 + 1184] ^= 0x11  # one neighbour more, one less, or another
        with pytest.raises(ProtocolError):
            Credential.read(bytes(forged), TERMS, ROSTER, peer)


def test_a_site_answers_the_frozen_bytes() -> None:
    site, request, upload = first_site(), message("request"), message("uploads", 0)
    site.accept(request, request.model_hash)
    found = site.mask(words_of(0))
    assert found.payload.tobytes() == upload.payload.tobytes()
    assert replace(found, payload=b"") == replace(upload, payload=b"")  # type: ignore[arg-type]
    assert len(found.sealed) == 4
    assert site.sign(message("survivors")) == message("signed", 0)
    assert site.open(message("opening")) == message("opened", 0)


def other_choice(request: MaskRequest, index: int) -> tuple[bytes, ...]:
    """Of one site: its first neighbour is another one, and not `a` or itself."""
    bits = int.from_bytes(request.choices[index])
    taken = [88 - 1 - place for place in range(88) if bits >> place & 1]
    free = next(place for place in range(1, 88) if place not in (*taken, index))
    gone = max(taken)
    changed = bits ^ (1 << 87 - gone) ^ (1 << 87 - free)
    return (*request.choices[:index], changed.to_bytes(11), *request.choices[index + 1 :])


PARTNER, STRANGER = TRANSCRIPT["expected"]["partners"][0], 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: {"choices": ()}, "^R5: 0 choices for 88 sites"),
        (lambda r: {"choices": r.choices[:87]}, "^R5: 87 choices for 88 sites"),
        (lambda r: {"choices": (bytes(11), *r.choices[1:])}, "^R5: the choice of 'a' is not of 4 others among 88"),
        (lambda r: {"choices": (*r.choices[:87], r.choices[87] + b"\0")}, "^R5: the choice of 'b86'"),
        (lambda r: {"choices": other_choice(r, 0)}, "^R5: this site chose others than is shown"),
        (lambda r: {"choices": other_choice(r, PARTNER)}, "^R5: 'b14' signed another choice than is shown"),
        (
            lambda r: {name: getattr(r, name)[1:] for name in ("peers", "credentials", "introductions")},
            "^R5: 'b14' was never introduced",
        ),
    ],
)  # fmt: skip
def test_one_change_of_the_graph_is_refused(change: Any, says: str) -> None:
    request = message("request")
    with pytest.raises(ProtocolError, match=says):
        first_site().accept(replace(request, **change(request)), request.model_hash)


def test_another_choice_of_a_stranger_is_another_context() -> None:
    """Nobody has to sign it for `a`: the stranger itself is in another context then, and nothing it shares cancels."""
    request = message("request")
    shown = replace(request, choices=other_choice(request, STRANGER))
    first_site().accept(shown, shown.model_hash)
    assert attempt_of(TERMS, shown).context != attempt_of(TERMS, request).context
    assert re.fullmatch(r"[0-9a-f]{64}", attempt_of(TERMS, shown).context.hex())
