"""Who the coordinator takes for a member: sessions, introductions, and what a site still has to be told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from accord_server.membership import Membership
from accord_shared.messages import Enquiry, Introduced, IntroduceRequest, Joined, Message, NeighbourRequest, Neighbours
from conformance.federation import Federation, names_of, secure_plan

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
    for name, other in ((a, b) for a in ALL for b in ALL if a != b):
        assert membership[name].is_partner(other, membership[other].id)
        assert not membership[name].is_partner(other, bytes(16))
    assert set(membership[ALL[0]].waiting) == set(ALL[1:])


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
    assert all(membership[name].is_partner(ALL[2], membership[ALL[2]].id) for name in ALL if name != ALL[2])


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
    assert all(membership[name].is_partner(ALL[0], membership[ALL[0]].id) for name in ALL[1:])


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


def test_neighbours_are_chosen_before_anybody_is_introduced() -> None:
    made = federation(129, **{"cohort.minimum": 125})
    membership = Membership(made.roster)
    names = tuple(made.participants)
    wanted = membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry)
    assert wanted == dict.fromkeys(names, NeighbourRequest(made.terms.run_id, names))
    membership.hear(names[0], wanted[names[0]], Neighbours(made.terms.run_id, (999,)))  # no such site
    assert membership[names[0]].chosen is None
    for name, request in wanted.items():
        membership.hear(name, request, made.participants[name](request))
    introductions = membership.requests(made.terms, made.exchange.joined, made.exchange.enquiry)
    degree = made.terms.thresholds(129).degree
    assert degree is not None
    pairs = {
        frozenset((name, peer))
        for name, request in introductions.items()
        if isinstance(request, IntroduceRequest)
        for peer in request.names
    }
    for name in names:
        chosen = membership[name].chosen
        assert chosen is not None
        assert len(chosen) == degree
        assert name not in chosen
        assert all(frozenset((name, peer)) in pairs for peer in chosen)
