"""Rounds of secure aggregation between real members and the real coordinator, with every kind of loss."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from accord_server.rounds import Coordinator, RoundReport
from accord_shared.errors import BudgetExhausted, Interrupted, RoundAborted
from accord_shared.messages import IntroduceRequest, MaskedUpload, MaskRequest, Message, Opened, SurvivorsSigned
from accord_shared.plan import Plan
from accord_shared.secagg import keys
from accord_shared.secagg.thresholds import Thresholds
from accord_shared.vectors import Vector
from conformance.federation import RUN, Federation, secure_plan

MODES = ("malicious", "semi_honest")
STEADY = {"malicious": 3, "semi_honest": 2}


def plan_in(mode: str, size: int, **changes: Any) -> Plan:
    return secure_plan(size, {"secure_aggregation.mode": mode, **changes})


@pytest.mark.parametrize("bits", [8, 20, 24, 32, 40])
@pytest.mark.parametrize("mode", MODES)
def test_the_sum_is_that_of_the_encoded_updates(mode: str, bits: int) -> None:
    federation = Federation(plan_in(mode, 6, **{"secure_aggregation.bits": bits}), 6, dimension=33)
    for number in (1, 2, 3):
        aggregate = federation.collect(number)
        assert aggregate.survivors == federation.names
        assert aggregate.failures == {}
        assert not aggregate.forfeited
        assert aggregate.trips == STEADY[mode] + (number == 1)  # introductions, once
        federation.check(aggregate, number)
    updates = sum(site.update.astype(np.float64) for site in federation.participants.values())
    np.testing.assert_allclose(aggregate.total, updates, atol=6 / federation.terms.encoding.scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [3, 4])
def test_small_cohorts_take_everybody_or_nothing(size: int, mode: str) -> None:
    federation = Federation(plan_in(mode, size), size)
    federation.check(federation.collect(1), 1)
    for trip in (1, 2, 3) if mode == "malicious" else (1, 3):
        federation.lose({federation.names[0]: trip})
        assert federation.collect(1 + trip).survivors == ()
    federation.lose({})
    federation.check(federation.collect(9), 9)


def test_two_sites_sum_only_if_each_brings_its_own_noise() -> None:
    noisy = {"privacy.noise": "site", "privacy.epsilon": 8.0, "local.clip_norm": 1.0, "cohort.minimum": 2}
    federation = Federation(secure_plan(3, {"cohort.size": 2, **noisy}), 2)
    federation.check(federation.collect(1), 1)


def losses(size: int, mode: str) -> list[tuple[int, int, int]]:
    """How many sites to lose at each trip: every trip and every pair of trips, up to what is tolerated."""
    plan = plan_in(mode, size)
    federation_terms = Federation(plan, size).terms.thresholds(size)
    at_upload = size - plan.cohort.minimum
    at_signing = size - federation_terms.sign if mode == "malicious" else 0
    at_opening = size - federation_terms.share
    triples = itertools.product(range(size), repeat=3)
    return [
        (a, b, c)
        for a, b, c in triples
        if a <= at_upload and (a + b <= at_signing or b == 0) and a + b + c <= at_opening and 0 in (a, b, c)
    ]


@pytest.mark.parametrize("replies", [False, True], ids=["requests", "replies"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [5, 7, 10])
def test_losses_at_every_trip_and_pair_of_trips_down_to_the_thresholds(size: int, mode: str, replies: bool) -> None:
    federation = Federation(plan_in(mode, size), size)
    federation.collect(1)
    cases = losses(size, mode)
    assert len(cases) >= 3
    for number, (a, b, c) in enumerate(cases, start=2):
        names = np.random.default_rng([size, number]).permutation(federation.names).tolist()
        trips = [1] * a + [2] * b + [3] * c
        federation.lose(dict(zip(names, trips, strict=False)), replies=replies)
        aggregate = federation.collect(number)
        assert aggregate.survivors == tuple(sorted(names[a:])), (a, b, c)
        assert aggregate.trips == STEADY[mode], (a, b, c)
        federation.check(aggregate, number)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [5, 7, 10])
def test_one_loss_too_many_opens_nothing_and_the_next_attempt_succeeds(size: int, mode: str) -> None:
    federation = Federation(plan_in(mode, size), size)
    federation.collect(1)
    thresholds = federation.terms.thresholds(size)
    most = {1: size - federation.plan.cohort.minimum, 3: size - thresholds.share}
    if mode == "malicious":
        most[2] = size - thresholds.sign
    for number, (trip, tolerated) in enumerate(most.items(), start=2):
        federation.lose(dict.fromkeys(federation.names[: tolerated + 1], trip))
        aggregate = federation.collect(number)
        assert aggregate.survivors == ()
        assert aggregate.failures["the attempt"].startswith("RoundAborted: ")
        assert aggregate.forfeited == (trip == 3)
        federation.lose({})
        if trip < 3:
            again = federation.collect(number, attempt=2)
            assert again.survivors == federation.names
            federation.check(again, number, attempt=2)
        else:  # those who opened take part in no other attempt of the round
            again = federation.collect(number, attempt=2)
            assert (again.survivors, again.forfeited) == ((), False)
    federation.check(federation.collect(9), 9)


@pytest.mark.parametrize(("mode", "size", "rounds"), [*((mode, 10, 200) for mode in MODES), ("malicious", 30, 12)])
def test_thirty_percent_losses_a_round_leave_the_trips_alone(mode: str, size: int, rounds: int) -> None:
    federation = Federation(plan_in(mode, size), size, dimension=2)
    federation.collect(1)
    generator, complete = np.random.default_rng(size), 0
    trips = [1, 2, 3] if mode == "malicious" else [1, 3]
    for number in range(2, rounds + 2):
        lost = generator.permutation(federation.names)[: round(0.3 * size)].tolist()
        federation.lose({name: int(generator.choice(trips)) for name in lost}, replies=bool(generator.integers(2)))
        aggregate = federation.collect(number)
        assert aggregate.trips == STEADY[mode]
        if aggregate.survivors:
            complete += 1
            federation.check(aggregate, number)
    assert complete >= 0.95 * rounds


# --- who comes, goes and comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_site_that_restarted_is_back_in_the_round_after_next(mode: str) -> None:
    federation = Federation(plan_in(mode, 6), 6)
    federation.check(federation.collect(1), 1)
    federation.participants["site-002"].restart()
    survivors = []
    for number in (2, 3, 4):
        aggregate = federation.collect(number)
        federation.check(aggregate, number)
        assert aggregate.trips == STEADY[mode]
        survivors.append(aggregate.survivors)
    assert survivors[0] == tuple(name for name in federation.names if name != "site-002")
    assert survivors[-1] == federation.names


@pytest.mark.parametrize("mode", MODES)
def test_a_joiner_takes_part_in_the_round_after_next(mode: str) -> None:
    federation = Federation(plan_in(mode, 7), 7, absent=frozenset({"site-000", "site-006"}))
    federation.check(federation.collect(1), 1)
    for name in sorted(federation.absent):
        federation.exchange.add(name, federation.participants[name])
    for number in (2, 3):
        aggregate = federation.collect(number)
        federation.check(aggregate, number)
        assert aggregate.trips == STEADY[mode]
    assert aggregate.survivors == federation.names


def test_sites_that_restart_again_and_again_do_not_slow_the_others() -> None:
    federation = Federation(plan_in("malicious", 10), 10)
    federation.collect(1)
    for number in range(2, 30):
        restarted = federation.names[number % 10]
        federation.participants[restarted].restart()
        aggregate = federation.collect(number)
        federation.check(aggregate, number)
        assert aggregate.trips == 3
        assert len(aggregate.survivors) >= 8
        assert set(aggregate.failures) <= {restarted}


def test_a_coordinator_that_starts_again_introduces_everybody_anew() -> None:
    federation = Federation(plan_in("malicious", 5), 5)
    federation.check(federation.collect(1), 1)
    federation.aggregation = federation.new_aggregation()
    federation.exchange.join()
    federation.check(federation.collect(2), 2)


@pytest.mark.parametrize("mode", MODES)
def test_partial_cohorts_cost_no_trips(mode: str) -> None:
    federation = Federation(plan_in(mode, 6), 11)
    federation.collect(1, cohort=federation.names[:6])
    generator = np.random.default_rng(1)
    for number in range(2, 22):
        cohort = tuple(sorted(generator.permutation(federation.names)[:6].tolist()))
        aggregate = federation.collect(number, cohort=cohort)
        assert (aggregate.survivors, aggregate.trips) == (cohort, STEADY[mode])
        federation.check(aggregate, number)


def test_a_reply_to_joining_that_is_lost_is_asked_for_again() -> None:
    federation = Federation(plan_in("malicious", 5, **{"cohort.minimum": 4}), 5)
    heard: list[str] = []

    def lost(name: str, message: Message) -> bool:
        heard.append(name)
        return isinstance(message, IntroduceRequest) and name == "site-003" and heard.count(name) == 1

    federation.exchange.lost = lost
    first = federation.collect(1)
    assert first.survivors == tuple(name for name in federation.names if name != "site-003")
    federation.check(first, 1)
    second = federation.collect(2)
    assert (second.survivors, second.trips) == (federation.names, 3)


# --- the coordinator's rounds ---------------------------------------------------------------------------------------


def coordinate(federation: Federation, **options: Any) -> tuple[Coordinator, list[RoundReport]]:
    reports: list[RoundReport] = []

    def observe(report: RoundReport, _: Vector) -> None:
        reports.append(report)

    initial = np.zeros(federation.dimension, dtype=np.float32)
    coordinator = Coordinator(
        federation.plan, RUN, initial, aggregation=federation.aggregation, observer=observe, **options
    )
    return coordinator, reports


def test_a_run_moves_by_the_mean_update() -> None:
    federation = Federation(plan_in("malicious", 5, **{"run.rounds": 4}), 5)
    coordinator, reports = coordinate(federation)
    weights = coordinator.run(federation.exchange)
    mean = np.mean([site.update for site in federation.participants.values()], axis=0)
    np.testing.assert_allclose(weights, 4 * mean, atol=4 / federation.terms.encoding.scale)
    assert [report.trips for report in reports] == [4, 3, 3, 3]
    assert all(report.aborted_attempts == 0 for report in reports)


@pytest.mark.parametrize("trip", [1, 2])
def test_an_attempt_that_nobody_opened_is_repeated_within_the_round(trip: int) -> None:
    federation = Federation(plan_in("malicious", 5, **{"run.rounds": 2}), 5)

    def lost(name: str, message: Message) -> bool:
        request = {1: MaskRequest, 2: type(None)}[trip]
        first = isinstance(message, MaskRequest | type(None)) and message.attempt == 1
        return name < "site-002" and first and isinstance(message, request)

    def reply_lost(name: str, message: Message) -> bool:
        return trip == 2 and name < "site-002" and getattr(message, "attempt", 0) == 1 and not_mask(message)

    federation.exchange.lost, federation.exchange.reply_lost = lost, reply_lost
    coordinator, reports = coordinate(federation)
    coordinator.run(federation.exchange)
    assert [report.aborted_attempts for report in reports] == [1, 1]
    assert all(report.survivors == federation.names for report in reports)


def not_mask(message: Message) -> bool:
    return not isinstance(message, MaskRequest)


@pytest.mark.parametrize("kind", ["IntroduceRequest", "MaskRequest", "SurvivorsRequest", "OpenRequest"])
def test_who_asks_to_stop_is_heard_at_every_trip(kind: str) -> None:
    """Found: a stop within a round counted as a failed attempt, and the run ended as aborted."""
    federation = Federation(plan_in("malicious", 5, **{"run.rounds": 3}), 5)

    def stops(name: str, message: Message) -> bool:
        if type(message).__name__ == kind:
            raise Interrupted("asked to stop")
        return False

    federation.exchange.lost = stops
    coordinator, _ = coordinate(federation)
    with pytest.raises(Interrupted):
        coordinator.run(federation.exchange)


def opening_fails(rounds: Callable[[int], bool]) -> Callable[[str, Message], bool]:
    def lost(name: str, message: Message) -> bool:
        return type(message).__name__ == "OpenRequest" and rounds(message.round) and name != "site-000"  # type: ignore[union-attr]

    return lost


def test_a_forfeited_round_leaves_the_weights_and_is_told() -> None:
    federation = Federation(plan_in("malicious", 5, **{"run.rounds": 3}), 5)
    federation.exchange.lost = opening_fails(lambda number: number == 2)
    seen: list[Vector] = []
    coordinator, reports = coordinate(federation)
    coordinator._observer = lambda report, weights: (reports.append(report), seen.append(weights))  # type: ignore[assignment]
    coordinator.run(federation.exchange)
    assert [len(report.survivors) for report in reports] == [5, 0, 5]
    assert [report.aborted_attempts for report in reports] == [0, 1, 0]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert (seen[2] != seen[1]).any()
    assert coordinator.history[1]["survivors"] in ((), [])
    assert coordinator.finished_rounds == 3


def test_too_many_forfeited_rounds_in_a_row_end_the_run() -> None:
    federation = Federation(plan_in("malicious", 5, **{"run.rounds": 30, "run.max_extra_attempts": 2}), 5)
    federation.exchange.lost = opening_fails(lambda number: (number > 1 and number % 4 != 0) or number > 8)
    coordinator, _ = coordinate(federation)
    with pytest.raises(RoundAborted, match="4 rounds in a row could not be opened"):
        coordinator.run(federation.exchange)
    assert coordinator.finished_rounds == 11  # three in a row at 5 to 7 pass, the fourth from 9 on does not


def test_sites_without_budget_are_left_out_and_the_run_ends_early() -> None:
    federation = Federation(plan_in("malicious", 7, **{"run.rounds": 12, "run.rounds_per_site": 3}), 7)
    for index, site in enumerate(federation.participants.values()):
        federation.exchange._handlers[site.name] = with_budget(site, 3 + index)
    coordinator, reports = coordinate(federation)
    coordinator.run(federation.exchange)
    assert [len(report.survivors) for report in reports] == [7, 7, 7, 6, 5]  # five is cohort.minimum
    assert coordinator.finished_rounds == 5
    asked_again = {name for report in reports for name in report.survivors if report.round > 3}
    assert "site-000" not in asked_again


def with_budget(handler: Callable[[Message], Message], rounds: int) -> Callable[[Message], Message]:
    def handle(message: Message) -> Message:
        if isinstance(message, MaskRequest) and message.round > rounds:
            raise BudgetExhausted("all rounds are released")
        return handler(message)

    return handle


# --- sites that do not do as they should ----------------------------------------------------------------------------


def spoiled(kind: type[Message], change: Callable[[Any], Message], culprit: str = "site-001") -> Any:
    def changed(name: str, reply: Message) -> Message:
        return change(reply) if name == culprit and isinstance(reply, kind) else reply

    return changed


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


UPLOADS: dict[str, Callable[[MaskedUpload], Message]] = {
    "short payload": lambda reply: replace(reply, payload=reply.payload[:-1]),
    "long payload": lambda reply: replace(reply, payload=np.append(reply.payload, np.uint8(0))),
    "no payload": lambda reply: replace(reply, payload=reply.payload[:0]),
    "flipped payload": lambda reply: replace(reply, payload=reply.payload ^ np.uint8(1)),
    "another round": lambda reply: replace(reply, round=reply.round + 1),
    "another attempt": lambda reply: replace(reply, attempt=reply.attempt + 1),
    "bad tag": lambda reply: replace(reply, tag=flipped(reply.tag)),
    "no tag": lambda reply: replace(reply, tag=b""),
    "flipped share": lambda reply: replace(reply, sealed=(flipped(reply.sealed[0]), *reply.sealed[1:])),
    "swapped shares": lambda reply: replace(reply, sealed=reply.sealed[::-1]),
    "a share fewer": lambda reply: replace(reply, sealed=reply.sealed[1:]),
    "a share more": lambda reply: replace(reply, sealed=(*reply.sealed, reply.sealed[0])),
    "a longer share": lambda reply: replace(reply, sealed=(reply.sealed[0] + b"x", *reply.sealed[1:])),
    "no bundle": lambda reply: replace(reply, next_bundle=b""),
    "another bundle": lambda reply: replace(reply, next_bundle=flipped(reply.next_bundle)),
    "another message": lambda reply: SurvivorsSigned(reply.run_id, reply.round, reply.attempt, reply.tag),
}


@pytest.mark.parametrize("change", UPLOADS.values(), ids=UPLOADS.keys())
def test_a_malformed_upload_drops_its_site_alone(change: Callable[[MaskedUpload], Message]) -> None:
    federation = Federation(plan_in("malicious", 5), 5)
    federation.exchange.changed = spoiled(MaskedUpload, change)
    aggregate = federation.collect(1)
    assert set(aggregate.failures) == {"site-001"}
    assert aggregate.failures["site-001"].startswith("ProtocolError")
    assert aggregate.survivors == tuple(name for name in federation.names if name != "site-001")
    federation.check(aggregate, 1)
    federation.exchange.changed = spoiled(Opened, lambda reply: reply)
    again = federation.collect(2)
    assert again.survivors == federation.names
    federation.check(again, 2)


SIGNATURES: dict[str, Callable[[SurvivorsSigned], Message]] = {
    "bad": lambda reply: replace(reply, signature=flipped(reply.signature)),
    "empty": lambda reply: replace(reply, signature=b""),
    "another attempt": lambda reply: replace(reply, attempt=9),
}


@pytest.mark.parametrize("change", SIGNATURES.values(), ids=SIGNATURES.keys())
def test_a_bad_signature_of_the_set_is_not_counted(change: Callable[[SurvivorsSigned], Message]) -> None:
    federation = Federation(plan_in("malicious", 5), 5)
    federation.exchange.changed = spoiled(SurvivorsSigned, change)
    aggregate = federation.collect(1)
    assert set(aggregate.failures) == {"site-001"}
    federation.check(aggregate, 1)


OPENINGS: dict[str, Callable[[Opened], Message]] = {
    "a part fewer": lambda reply: replace(reply, shares=reply.shares[1:]),
    "a longer part": lambda reply: replace(reply, shares=(reply.shares[0] + bytes(4), *reply.shares[1:])),
    "another round": lambda reply: replace(reply, round=9),
    "nothing": lambda reply: replace(reply, shares=(b"",) * len(reply.shares)),
}


@pytest.mark.parametrize("change", OPENINGS.values(), ids=OPENINGS.keys())
def test_a_malformed_opening_is_not_used(change: Callable[[Opened], Message]) -> None:
    federation = Federation(plan_in("malicious", 5), 5)
    federation.exchange.changed = spoiled(Opened, change)
    aggregate = federation.collect(1)
    assert set(aggregate.failures) <= {"site-001"}
    assert aggregate.survivors == federation.names
    federation.check(aggregate, 1)


def test_wrong_shares_end_the_attempt_and_never_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that lies about a share: the sum that would come of it is out of range, or a digit is."""
    federation = Federation(plan_in("malicious", 5), 5, dimension=64)
    federation.exchange.changed = spoiled(
        Opened, lambda reply: replace(reply, shares=tuple(bytes(len(part)) for part in reply.shares)), "site-000"
    )
    aggregate = federation.collect(1)
    assert aggregate.survivors == ()
    assert aggregate.forfeited
    assert "cannot be rebuilt" in aggregate.failures["the attempt"] or "range" in aggregate.failures["the attempt"]


def test_a_site_that_seals_garbage_ends_the_attempt_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from accord_shared.secagg import member as member_module

    federation = Federation(plan_in("malicious", 5), 5)
    culprit = federation.participants["site-003"]
    honest = member_module.seal

    def garbage(key: bytes, plaintext: bytes, data: bytes) -> bytes:
        return honest(bytes(32), plaintext, data)

    def handle(message: Message) -> Message:
        with monkeypatch.context() as patch:
            patch.setattr(member_module, "seal", garbage)
            return culprit(message)

    federation.exchange._handlers["site-003"] = handle
    aggregate = federation.collect(1)
    assert aggregate.survivors == ()
    assert aggregate.forfeited
    assert "'site-003'" in aggregate.failures["the attempt"]
    assert aggregate.failures["the attempt"].startswith("RoundAborted")


def test_a_site_that_deals_shares_that_do_not_fit_ends_the_attempt_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from accord_shared.secagg import shamir

    federation = Federation(plan_in("malicious", 5), 5)
    culprit, honest = federation.participants["site-003"], shamir.deal

    def unrelated(*arguments: Any) -> Any:
        return np.random.default_rng(4).integers(0, 2**30, honest(*arguments).shape, dtype=np.uint32)

    def handle(message: Message) -> Message:
        with monkeypatch.context() as patch:
            patch.setattr(shamir, "deal", unrelated)
            return culprit(message)

    federation.exchange._handlers["site-003"] = handle
    aggregate = federation.collect(1)
    assert aggregate.survivors == ()
    assert "what 'site-003' shared cannot be rebuilt" in aggregate.failures["the attempt"]


def test_a_sum_that_no_honest_sites_can_have_is_refused() -> None:
    """One site adds a number that the modulus holds but the plan's bound does not: of four of five sites it shows."""
    federation = Federation(plan_in("malicious", 5), 5)
    for site in federation.participants.values():
        site.update[:] = 0.0
    federation.lose({"site-004": 1})
    liar = federation.participants["site-001"]
    reach = federation.terms.encoding.reach

    def handle(message: Message) -> Message:
        if not isinstance(message, MaskRequest):
            return liar(message)
        liar.members.accept(message, message.model_hash)
        words = np.full(federation.dimension, 4 * reach + 9, dtype=federation.terms.encoding.word)
        return liar.members.mask(message.run_id, words)

    federation.exchange._handlers["site-001"] = handle
    aggregate = federation.collect(1)
    assert aggregate.survivors == ()
    assert aggregate.forfeited
    assert "out of range" in aggregate.failures["the attempt"]


def test_a_bundle_of_another_session_does_not_stop_the_others() -> None:
    """A corrupt site signs its next bundle for a session that nobody was introduced to."""
    from accord_shared.secagg.keys import Bundle
    from conformance.federation import identity

    federation = Federation(plan_in("malicious", 5), 5)
    culprit = federation.participants["site-001"]

    def handle(message: Message) -> Message:
        member = culprit.members._members[RUN][1] if RUN in culprit.members._members else None
        if isinstance(message, MaskRequest) and member is not None and message.round == 1:
            member._renew = lambda: Bundle(bytes(16), 1, bytes([9] * 32)).issue(  # type: ignore[method-assign]
                federation.terms, "site-001", identity("site-001")
            )
        return culprit(message)

    federation.exchange._handlers["site-001"] = handle
    first = federation.collect(1)
    assert "another session" in first.failures["site-001"]
    for number in (1, 2):
        aggregate = first if number == 1 else federation.collect(number)
        assert len(aggregate.survivors) >= 4
        federation.check(aggregate, number)


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_sparse_graph_sums_exactly_with_five_percent_lost(mode: str) -> None:
    federation = Federation(plan_in(mode, 140, **{"cohort.minimum": 126}), 140, dimension=3)
    lost = np.random.default_rng(2).permutation(federation.names)[:7].tolist()
    federation.lose({name: 1 + index % 3 for index, name in enumerate(lost)})
    aggregate = federation.collect(1)
    assert len(aggregate.survivors) >= 133
    assert aggregate.trips == STEADY[mode] + 1  # introductions, once
    federation.check(aggregate, 1)


def test_on_a_sparse_graph_noise_is_taken_away_for_those_who_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve survive and eleven sign: as much noise stays as eleven need, and the sum opens."""
    monkeypatch.setattr(keys, "COMPLETE_MAX", 4)
    monkeypatch.setattr(keys, "sparse_thresholds", lambda sites, minimum, _: Thresholds(sites, minimum, 2, 3))
    noise = {"privacy.noise": "cohort", "privacy.epsilon": 1.0, "local.clip_norm": 1.0, "cohort.minimum": 10}
    federation = Federation(plan_in("malicious", 12, **{"secure_aggregation.bound": None, **noise}), 12, sigma=1.0)
    shares = federation.terms.noise
    assert shares is not None
    assert (federation.terms.degree, len(shares.components)) == (3, 2)
    whole = federation.collect(1)
    federation.check(whole, 1)  # all signed: nothing but what sites encoded is left
    federation.lose({"site-004": 2})
    aggregate = federation.collect(2)
    assert aggregate.survivors == federation.names
    left = np.abs(aggregate.total - federation.expected(federation.names, 2)) * federation.terms.encoding.scale
    assert left.max() > 0
    assert left.max() < 8 * float(12 * shares.components[0]) ** 0.5


def test_the_coordinator_s_memory_does_not_grow_with_the_uploads() -> None:
    """Uploads are added as they arrive: beside one upload and the sum nothing of length d is kept."""
    dimension = 400_000

    def peak(size: int) -> int:
        federation = Federation(plan_in("malicious", size), size, dimension=dimension)
        federation.collect(1)
        for site in federation.participants.values():
            site.words = _Forgetful()
        return _peak_of(federation)

    small, large = peak(5), peak(10)
    assert large - small < dimension  # bytes: a single upload has three times as many


class _Forgetful(dict[Any, Any]):
    """What the participants encoded is not the coordinator's."""

    def __setitem__(self, key: Any, value: Any) -> None:
        del key, value


def _peak_of(federation: Federation) -> int:
    tracemalloc.start()
    try:
        federation.collect(2)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
