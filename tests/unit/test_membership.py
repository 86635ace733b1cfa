"""Who the coordinator takes for a member: sessions, introductions, and what a site still has to be told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from accord_server.membership import Membership
from accord_shared.messages import Enquiry, Introduced, IntroduceRequest, Joined, Message
from accord_shared.secagg import keys
from accord_shared.secagg.choices import chose
from accord_shared.secagg.keys import Credential
from accord_shared.secagg.thresholds import Thresholds
from conformance.federation import Federation, identity, names_of, secure_plan

ALL = tuple(names_of(4))


def federation(size: int = 4, **changes: Any) -> Federation:
    return Federation(secure_plan(size, changes), size)


def step(made: Federation, membership: Membership) -> dict[str, Message]:
    """One side trip in which everybody answers; returns what was asked."""
    wanted = membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry)
    for name, request in wanted.items():
        reply = made.participants[name](request)
        if isinstance(reply, Joined):
            made.exchange.joined[name] = reply
        membership.hear(name, request, reply)
    return wanted


def test_each_pair_is_introduced_once_by_the_greater_name() -> None:
    made = federation()
    membership = Membership(made.roster)
    asked = step(made, membership)
    assert (
        {name: request.names for name, request in asked.items()}
        == {  # type: ignore[union-attr]
            name: ALL[:index] for index, name in enumerate(ALL) if index
        }
    )
    assert membership.ready(ALL) == ALL
    assert step(made, membership) == {}
    for index, name in enumerate(ALL):
        waiting = membership[name].waiting
        assert {peer: entry[0] for peer, entry in waiting.items()} == {
            peer: membership[peer].credential for peer in ALL[index + 1 :]
        }


def test_a_later_site_introduces_itself_to_all() -> None:
    made = federation()
    late = made.exchange.joined.pop(ALL[0])
    membership = Membership(made.roster)
    step(made, membership)
    assert membership.ready(ALL) == ALL[1:]
    made.exchange.joined[ALL[0]] = late
    asked = step(made, membership)
    assert list(asked) == [ALL[0]]
    assert asked[ALL[0]].names == ALL[1:]  # type: ignore[union-attr]
    assert membership.ready(ALL) == ALL


def test_a_lost_session_is_asked_for_until_it_is_answered() -> None:
    made = federation()
    membership = Membership(made.roster)
    step(made, membership)
    made.participants[ALL[2]].restart()
    membership.lose(ALL[2])
    old = made.exchange.joined[ALL[2]].credential
    for _ in range(3):  # nobody answers
        wanted = membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry)
        assert wanted == {ALL[2]: made.exchange.enquiry}
        assert membership.ready(ALL) == (*ALL[:2], ALL[3])
    assert isinstance(step(made, membership)[ALL[2]], Enquiry)
    assert isinstance(step(made, membership)[ALL[2]], IntroduceRequest)
    assert membership.ready(ALL) == ALL
    assert membership[ALL[2]].credential != old
    assert all(membership[name].waiting[ALL[2]][0] == membership[ALL[2]].credential for name in ALL if name != ALL[2])


def spoil(joined: Joined, **changes: Any) -> Joined:
    return replace(joined, **changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda own, other: spoil(own, credential=b""),
        lambda own, other: spoil(own, credential=own.credential[:-1] + bytes([own.credential[-1] ^ 1])),
        lambda own, other: spoil(own, credential=other.credential),
        lambda own, other: spoil(own, bundle=b""),
        lambda own, other: spoil(own, bundle=other.bundle),
        lambda own, other: spoil(own, bundle=own.bundle[:-1] + bytes([own.bundle[-1] ^ 1])),
    ],
    ids=["no-credential", "bad-credential", "another-s-credential", "no-bundle", "another-s-bundle", "bad-bundle"],
)
def test_keys_that_do_not_verify_are_not_taken_in(change: Any) -> None:
    made = federation()
    joined = made.exchange.joined
    joined[ALL[1]] = change(joined[ALL[1]], joined[ALL[2]])
    membership = Membership(made.roster)
    step(made, membership)
    assert membership.ready(ALL) == (ALL[0], *ALL[2:])


def test_credential_and_bundle_of_two_sessions_are_not_taken_in() -> None:
    made = federation()
    first = made.exchange.joined[ALL[1]]
    made.participants[ALL[1]].restart()
    second = made.participants[ALL[1]](made.exchange.enquiry)
    assert isinstance(second, Joined)
    made.exchange.joined[ALL[1]] = replace(first, bundle=second.bundle)
    membership = Membership(made.roster)
    step(made, membership)
    assert ALL[1] not in membership.ready(ALL)


def test_a_stranger_is_not_taken_in() -> None:
    made = federation()
    made.exchange.joined["stranger"] = made.exchange.joined[ALL[0]]
    membership = Membership(made.roster)
    step(made, membership)
    assert membership.ready((*ALL, "stranger")) == ALL


def test_an_introduction_to_a_session_that_is_gone_is_made_again() -> None:
    """A peer restarted while it was being introduced to."""
    made = federation()
    membership = Membership(made.roster)
    wanted = membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry)
    made.participants[ALL[0]].restart()
    again = made.participants[ALL[0]](made.exchange.enquiry)
    assert isinstance(again, Joined)
    made.exchange.joined[ALL[0]] = again
    membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry)
    for name, request in wanted.items():
        membership.hear(name, request, made.participants[name](request))
    assert ALL[1] not in membership.ready(ALL)
    for _ in range(2):
        step(made, membership)
    assert membership.ready(ALL) == ALL
    told = membership[ALL[0]].waiting
    assert {name: told[name][0] for name in told} == {name: membership[name].credential for name in ALL[1:]}


@pytest.mark.parametrize("count", [0, 1, 9])
def test_introductions_of_another_number_are_not_heard(count: int) -> None:
    made = federation()
    membership = Membership(made.roster)
    wanted = membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry)
    request = wanted[ALL[2]]
    membership.hear(ALL[2], request, Introduced(made.terms.run_id, (b"x",) * count))
    assert ALL[2] not in membership.ready(ALL)
    membership.hear(ALL[2], request, made.participants[ALL[2]](request))
    assert ALL[2] in membership.ready(ALL)


@pytest.mark.parametrize("place", [0, -1])
def test_a_site_whose_introduction_a_peer_would_refuse_takes_no_part(place: int) -> None:
    made = federation()
    membership = Membership(made.roster)
    for name, request in membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry).items():
        reply = made.participants[name](request)
        if name == ALL[3] and isinstance(reply, Introduced):
            bad = bytearray(reply.introductions[place])
            bad[place] ^= 1
            changed = [*reply.introductions]
            changed[place] = bytes(bad)
            reply = replace(reply, introductions=tuple(changed))
        membership.hear(name, request, reply)
    assert membership.ready(ALL) == ALL[:3]
    assert step(made, membership) == {}
    assert membership.ready(ALL) == ALL[:3]


def test_answers_of_another_kind_change_nothing() -> None:
    made = federation()
    membership = Membership(made.roster)
    wanted = membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry)
    for name, request in wanted.items():
        membership.hear(name, request, request)
        membership.hear("stranger", request, Introduced(made.terms.run_id, ()))
    assert membership.ready(ALL) == (ALL[0],)  # who has nobody to introduce itself to


# --- sparse graphs


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> Federation:
    """Twelve sites that choose three each: real sparse graphs begin at 129."""
    monkeypatch.setattr(keys, "COMPLETE_MAX", 4)
    monkeypatch.setattr(keys, "sparse_thresholds", lambda sites, minimum, _: Thresholds(sites, minimum, 2, 3))
    return federation(12, **{"cohort.minimum": 10})


def edges(made: Federation) -> set[frozenset[str]]:
    """Pairs of which one chose the other, by the credentials alone."""
    names = made.names
    chosen = {
        name: Credential.read(joined.credential, made.terms, made.roster, name).choice
        for name, joined in made.exchange.joined.items()
    }
    return {frozenset((a, b)) for a in chosen for b in chosen if a != b and chose(chosen[a], names.index(b))}


def introduced(asked: dict[str, Message]) -> list[frozenset[str]]:
    return [
        frozenset((name, peer))
        for name, request in asked.items()
        if isinstance(request, IntroduceRequest)
        for peer in request.names
    ]


def test_exactly_the_edges_of_the_graph_are_introduced_in_one_trip(sparse: Federation) -> None:
    made = sparse
    membership = Membership(made.roster)
    pairs = introduced(step(made, membership))
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == edges(made)
    assert membership.ready(made.names) == made.names


def test_a_site_that_comes_late_is_introduced_to_those_that_chose_it_too(sparse: Federation) -> None:
    made = sparse
    late = made.exchange.joined.pop(made.names[7])
    membership = Membership(made.roster)
    step(made, membership)
    made.exchange.joined[made.names[7]] = late
    asked = step(made, membership)
    assert set(asked) == {made.names[7]}
    assert set(introduced(asked)) == {edge for edge in edges(made) if made.names[7] in edge}


def test_a_site_that_restarts_has_the_same_neighbours(sparse: Federation) -> None:
    made = sparse
    before = edges(made)
    for site in made.participants.values():
        site.restart()
    made.exchange.join()
    assert edges(made) == before


def test_a_site_that_chooses_anew_in_a_run_is_not_taken_in_again(sparse: Federation) -> None:
    """Two choices of one site would give its peers two contexts: the round would fail for all of them."""
    made = sparse
    membership, name = Membership(made.roster), made.names[3]
    step(made, membership)
    first = Credential.read(made.exchange.joined[name].credential, made.terms, made.roster, name)
    other = np.roll(np.unpackbits(np.frombuffer(first.choice, dtype=np.uint8))[:12], 1)
    other[[2, 3, 4]] = np.sort(other[[2, 3, 4]])[[1, 0, 2]]  # its own place stays free
    forged = replace(first, choice=np.packbits(other).tobytes())
    assert forged.choice != first.choice
    made.participants[name].restart()
    membership.lose(name)
    bundle = made.participants[name](made.exchange.enquiry).bundle  # type: ignore[union-attr]
    forged = replace(forged, session=bundle[:16])
    lied = Joined(name, 1, made.plan.hash, forged.issue(made.terms, name, identity(name)), bundle)
    membership.hear(name, made.exchange.enquiry, lied)
    made.exchange.joined[name] = lied
    membership.take_in(made.terms, made.exchange.joined)
    assert name not in membership.ready(made.names)
    honest = made.participants[name](made.exchange.enquiry)
    assert isinstance(honest, Joined)
    made.exchange.joined[name] = honest
    step(made, membership)
    assert name in membership.ready(made.names)


@pytest.mark.parametrize("change", ["one more", "one less", "itself", "padding", "longer", "none"])
def test_a_choice_that_is_none_is_not_taken_in(change: str, sparse: Federation) -> None:
    made = sparse
    name, joined = made.names[3], made.exchange.joined
    credential = Credential.read(joined[name].credential, made.terms, made.roster, name)
    flags = np.unpackbits(np.frombuffer(credential.choice, dtype=np.uint8))
    ones, zeros = np.flatnonzero(flags), np.flatnonzero(flags[:12] == 0)
    free = next(int(place) for place in zeros if place != 3)
    flags[ones[0]] = change not in ("one less", "itself", "padding")
    flags[{"one more": free, "itself": 3, "padding": 13}.get(change, ones[1])] = 1
    choice = {"longer": credential.choice + b"\0", "none": b""}.get(change, np.packbits(flags).tobytes())
    forged = replace(credential, choice=choice).issue(made.terms, name, identity(name))
    joined[name] = replace(joined[name], credential=forged)
    membership = Membership(made.roster)
    step(made, membership)
    assert name not in membership.ready(made.names)
    assert len(membership.ready(made.names)) == 11
