"""Trips over Flower's grid: who is asked, who is waited for, who is given up."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from flwr.app import Message as FlowerMessage
from flwr.app.metadata import Metadata
from flwr.supercore.task_identity import TaskIdentity

from accord_server.app import FlowerExchange, Timing
from accord_server.exchange import Failure
from accord_shared.errors import (
    AccordError,
    Interrupted,
    OutputError,
    PlanNotApproved,
    PrivacyError,
    ProtocolError,
    RoundAborted,
    RoundOpened,
    SessionLost,
)
from accord_shared.messages import Enquiry, Joined, Message, Refusal, SurvivorsRequest
from accord_shared.wire import decode, encode

ENQUIRY = Enquiry(1, "run", "{}", "a" * 64, "")
QUICK = Timing(trip_timeout_s=5.0, join_timeout_s=5.0, grace_s=0.0, ask_again_s=0.05)


@dataclass
class Nodes:
    """A grid whose nodes answer at once, by functions, or (None) never."""

    answers: dict[int, Any]
    sent: list[tuple[int, Message]] = field(default_factory=list)
    waiting: dict[str, FlowerMessage] = field(default_factory=dict)
    count: Any = field(default_factory=lambda: itertools.count(1))

    def get_node_ids(self) -> list[int]:
        return sorted(self.answers)

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: FlowerMessage) -> str:
        identity, node = f"m{next(self.count)}", message.metadata.dst_node_id
        request = decode(message.content)
        self.sent.append((node, request))
        answer = self.answers[node](request) if self.answers[node] is not None else None
        if answer is not None:
            self.waiting[identity] = _reply(encode(answer), identity, node)
        return identity

    def pull_messages(self, identities: Iterable[str]) -> list[FlowerMessage]:
        return [self.waiting.pop(one) for one in list(identities) if one in self.waiting]


def _reply(content: Any, to: str, node: int) -> FlowerMessage:
    from flwr.app.message import make_message

    metadata = Metadata(
        run_id=1, message_id="x", src_node_id=node, dst_node_id=1, reply_to_message_id=to, group_id="", created_at=0.0,
        ttl=1.0, message_type="train",
    )  # fmt: skip
    return make_message(metadata=metadata, content=content)


@dataclass
class Known:
    """What is known of the sites."""

    names: dict[int, str]
    boots: dict[str, str]
    away: set[str] = field(default_factory=set)
    hellos: dict[str, float] = field(default_factory=dict)

    def name_of(self, node: int) -> str:
        return self.names.get(node, "")

    def boot(self, site: str) -> str:
        return self.boots.get(site, "")

    def is_there(self, site: str) -> bool:
        return site in self.boots and site not in self.away

    def heard(self, site: str) -> float:
        return self.hellos.get(site, 0.0)

    def wait(self, seconds: float) -> bool:
        time.sleep(seconds)
        return False

    def hello(self, site: str) -> None:
        self.hellos[site] = time.monotonic()


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def joins(name: str) -> Any:
    def answer(request: Message) -> Message:
        return Joined(name, 1, "a" * 64) if isinstance(request, Enquiry) else request

    return answer


def exchange(nodes: Nodes, known: Known, timing: Timing = QUICK, **options: Any) -> FlowerExchange:
    return FlowerExchange(nodes, timing, options.pop("stopping", lambda: False), ENQUIRY, known, **options)  # type: ignore[arg-type]


def three() -> tuple[Nodes, Known]:
    names = {1: "a", 2: "b", 3: "c"}
    return Nodes({node: joins(name) for node, name in names.items()}), Known(names, dict.fromkeys("abc", "boot"))


REQUEST = SurvivorsRequest("run", 1, 1, (0, 1))


def test_all_join_and_answer() -> None:
    nodes, known = three()
    trips = exchange(nodes, known)
    trips.join(3, 3)
    assert sorted(trips.sites()) == ["a", "b", "c"]
    assert dict(trips.send(dict.fromkeys("abc", REQUEST))) == dict.fromkeys("abc", REQUEST)
    assert not trips.restarted()


def test_who_claims_another_name_than_it_was_admitted_under_does_not_join() -> None:
    nodes, known = three()
    nodes.answers[3] = joins("a")
    trips = exchange(nodes, known, replace(QUICK, join_timeout_s=0.3))
    with pytest.raises(RoundAborted, match=r"2 of .* sites joined.*another name"):
        trips.join(3)
    assert sorted(trips.sites()) == ["a", "b"]


def test_a_node_that_was_not_admitted_is_not_even_asked() -> None:
    nodes, known = three()
    nodes.answers[4] = joins("d")
    trips = exchange(nodes, known)
    trips.join(3, 3)
    assert {node for node, _ in nodes.sent} == {1, 2, 3}


def test_who_refused_is_asked_again_until_its_operator_approves() -> None:
    nodes, known = three()
    asked: list[Message] = []

    def hesitates(request: Message) -> Message:
        asked.append(request)
        return Refusal.of(PlanNotApproved("waits")) if len(asked) < 3 else joins("c")(request)

    nodes.answers[3] = hesitates
    trips = exchange(nodes, known)
    trips.join(3, 3)
    assert len(asked) == 3
    assert not trips.refusals


def test_who_refused_is_asked_again_at_once_when_something_changes() -> None:
    nodes, known = three()
    nodes.answers[3] = lambda _: Refusal.of(PlanNotApproved("waits"))
    trips = exchange(nodes, known)
    trips.join(2)
    trips._refused_at[3] -= 600  # it refuses for ten minutes: the next question is a minute away
    trips._changed_at -= 600
    came = threading.Event()

    def wait(seconds: float) -> bool:
        changed = came.wait(seconds)
        came.clear()
        return changed

    known.wait = wait  # type: ignore[method-assign]

    def approve() -> None:
        nodes.answers[3] = joins("c")
        came.set()

    timer = threading.Timer(0.2, approve)
    timer.start()
    began = time.monotonic()
    trips.join(3)
    timer.join()
    assert time.monotonic() - began < 3


def test_without_a_time_to_ask_again_a_refusal_ends_the_wait() -> None:
    nodes, known = three()
    nodes.answers[3] = lambda _: Refusal.of(PlanNotApproved("waits"))
    with pytest.raises(RoundAborted, match=r"2 of 3 sites joined, cohort.minimum is 3: PlanNotApproved: waits"):
        exchange(nodes, known, replace(QUICK, ask_again_s=None)).join(3)


def test_who_never_answers_keeps_no_run_from_its_start() -> None:
    nodes, known = three()
    nodes.answers[3] = None
    trips = exchange(nodes, known, replace(QUICK, trip_timeout_s=0.2))
    trips.join(2, 3)
    assert sorted(trips.sites()) == ["a", "b"]


def test_who_is_away_is_not_asked_and_not_waited_for() -> None:
    nodes, known = three()
    trips = exchange(nodes, known)
    trips.join(3, 3)
    known.away.add("b")
    nodes.sent.clear()
    replies = dict(trips.send(dict.fromkeys("abc", REQUEST)))
    assert isinstance(replies["b"], Failure)
    assert "not connected" in replies["b"].reason
    assert {node for node, _ in nodes.sent} == {1, 3}
    assert sorted(trips.present()) == ["a", "c"]
    assert sorted(trips.sites()) == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["restarted", "not connected any more", "not admitted any more"])
def test_who_goes_in_mid_trip_is_given_up(how: str) -> None:
    nodes, known = three()
    trips = exchange(nodes, known, replace(QUICK, trip_timeout_s=60.0))
    trips.join(3, 3)
    nodes.answers[2] = None

    def go() -> None:
        if how == "restarted":
            known.boots["b"] = "another"
        elif how == "not admitted any more":  # revoked, or with a new key
            known.names[2] = ""
        else:
            known.away.add("b")

    timer = threading.Timer(0.2, go)
    timer.start()
    replies = dict(trips.send(dict.fromkeys("abc", REQUEST)))
    timer.join()
    assert isinstance(replies["b"], Failure)
    assert how in replies["b"].reason
    assert replies["a"] == REQUEST
    assert trips.restarted() == (frozenset("b") if how == "restarted" else frozenset())


def test_who_answers_too_late_has_failed() -> None:
    nodes, known = three()
    trips = exchange(nodes, known, replace(QUICK, trip_timeout_s=0.2))
    trips.join(3, 3)
    nodes.answers[2] = None
    replies = dict(trips.send(dict.fromkeys("abc", REQUEST)))
    assert replies["b"] == Failure("no reply within 0.2 s")


def test_an_attempt_waits_until_enough_are_there() -> None:
    nodes, known = three()
    trips = exchange(nodes, known)
    trips.join(3, 3)
    known.away.update("bc")
    timer = threading.Timer(0.3, known.away.clear)
    timer.start()
    trips.ready(3)
    timer.join()
    assert len(trips.present()) == 3
    known.away.update("bc")
    with pytest.raises(RoundAborted, match="1 of 3 sites joined"):
        exchange_with(trips, join_timeout_s=0.2).ready(3)


def exchange_with(trips: FlowerExchange, **changes: Any) -> FlowerExchange:
    trips._timing = replace(trips._timing, **changes)
    return trips


def test_a_whole_cohort_gets_a_time_of_grace() -> None:
    nodes, known = three()
    known.away.add("c")
    timer = threading.Timer(0.2, known.away.clear)
    timer.start()
    trips = exchange(nodes, known, replace(QUICK, grace_s=5.0))
    trips.join(2, 3)
    timer.join()
    assert len(trips.present()) == 3
    known.away.add("c")
    few = exchange(nodes, known, replace(QUICK, grace_s=0.1))
    few.join(2, 3)
    assert sorted(few.sites()) == ["a", "b"]


def test_waiting_ends_at_once_when_asked_to_stop_or_to_drain() -> None:
    nodes, known = three()
    known.away.update("abc")
    with pytest.raises(Interrupted):
        exchange(nodes, known, stopping=lambda: True).join(3)
    with pytest.raises(Interrupted):
        exchange(nodes, known, draining=lambda: True).join(3)


def test_draining_takes_a_trip_to_its_end() -> None:
    nodes, known = three()
    trips = exchange(nodes, known)
    trips.join(3, 3)
    trips._draining = lambda: True
    assert dict(trips.send(dict.fromkeys("abc", REQUEST))) == dict.fromkeys("abc", REQUEST)


def test_who_failed_counts_again_once_it_was_heard_of_and_joined_anew() -> None:
    nodes, known = three()
    trips = exchange(nodes, known, replace(QUICK, trip_timeout_s=0.2))
    trips.join(3, 3)
    nodes.answers[2] = None
    assert isinstance(dict(trips.send(dict.fromkeys("abc", REQUEST)))["b"], Failure)
    nodes.answers[2] = joins("b")
    nodes.sent.clear()
    for _ in range(3):
        assert sorted(trips.present()) == ["a", "c"]
        assert dict(trips.send({"a": REQUEST})) == {"a": REQUEST}
    assert {node for node, _ in nodes.sent} == {1}  # a site that says nothing is not asked either
    known.hello("b")
    dict(trips.send({"a": REQUEST}))
    assert sorted(trips.present()) == ["a", "b", "c"]
    assert [type(request) for node, request in nodes.sent if node == 2] == [Enquiry]


@pytest.mark.parametrize("kind", [PrivacyError, OutputError])
def test_who_cannot_work_counts_again_once_it_can(kind: type[AccordError]) -> None:
    """Its disk is full, say: it says hello, and would spoil each attempt."""
    nodes, known = three()
    trips = exchange(nodes, known)
    trips.join(3, 3)
    nodes.answers[2] = lambda request: Refusal.of(kind("no"))
    assert isinstance(dict(trips.send(dict.fromkeys("abc", REQUEST)))["b"], Failure)
    for _ in range(3):
        known.hello("b")
        dict(trips.send({"a": REQUEST}))
        assert sorted(trips.present()) == ["a", "c"]
    nodes.answers[2] = joins("b")
    time.sleep(0.1)
    dict(trips.send({"a": REQUEST}))
    assert sorted(trips.present()) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [ProtocolError, RoundOpened, SessionLost])
def test_who_refuses_one_attempt_alone_goes_on_counting(kind: type[AccordError]) -> None:
    nodes, known = three()
    trips = exchange(nodes, known)
    trips.join(3, 3)
    nodes.answers[2] = lambda request: Refusal.of(kind("not this one"))
    assert isinstance(dict(trips.send(dict.fromkeys("abc", REQUEST)))["b"], Failure)
    assert sorted(trips.present()) == ["a", "b", "c"]


def test_who_says_goodbye_is_neither_asked_nor_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accord_server.app.GOODBYE_S", 0.2)
    nodes, known = three()
    trips = exchange(nodes, known, replace(QUICK, trip_timeout_s=60.0))
    trips.join(3, 3)
    nodes.answers[2] = None
    timer = threading.Timer(0.2, lambda: nodes.answers.pop(2))  # Flower lists it no more
    timer.start()
    replies = dict(trips.send(dict.fromkeys("abc", REQUEST)))
    timer.join()
    assert replies["b"] == Failure("the site said goodbye")
    nodes.sent.clear()
    assert dict(trips.send(dict.fromkeys("abc", REQUEST)))["b"] == Failure("the site is not connected")
    assert {node for node, _ in nodes.sent} == {1, 3}


def test_a_round_that_only_some_may_finish_waits_for_these_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accord_server.app.COME_BACK_S", 0.3)
    nodes, known = three()
    trips = exchange(nodes, known)
    trips.join(3, 3)
    assert trips.ready(2, {"a", "b"})
    known.away.add("b")
    timer = threading.Timer(0.1, known.away.clear)
    timer.start()
    assert trips.ready(2, {"a", "b"})
    timer.join()
    known.away.add("b")
    assert not trips.ready(2, {"a", "b"})  # a and c are there to go on without it
    known.away.add("c")
    with pytest.raises(RoundAborted, match="1 of 3 sites joined"):
        exchange_with(trips, join_timeout_s=0.5).ready(2, {"a", "b"})


def test_rest_between_attempts_grows_and_ends_at_once_when_asked_to_stop() -> None:
    nodes, known = three()
    trips = exchange(nodes, known, replace(QUICK, rest_s=0.1))
    pauses = []
    for in_vain in (0, 1, 3):
        began = time.monotonic()
        trips.rest(in_vain)
        pauses.append(time.monotonic() - began)
    assert pauses[0] < 0.04 < pauses[1] < 0.19 < pauses[2]
    exchange(nodes, known).rest(9)  # a simulation does not wait
    with pytest.raises(Interrupted):
        exchange(nodes, known, replace(QUICK, rest_s=60.0), stopping=lambda: True).rest(1)
    with pytest.raises(Interrupted):
        exchange(nodes, known, replace(QUICK, rest_s=60.0), draining=lambda: True).rest(1)


def test_a_wait_for_sites_looks_rarely_and_ends_when_they_come() -> None:
    nodes, known = three()
    known.away.update("bc")
    trips = exchange(nodes, known)
    trips.join(1)
    trips._changed_at -= 3600  # for an hour nobody came
    looks = 0
    online = nodes.get_node_ids

    def counted() -> list[int]:
        nonlocal looks
        looks += 1
        return online()

    nodes.get_node_ids = counted  # type: ignore[method-assign]
    came = threading.Event()

    def wait(seconds: float) -> bool:
        return came.wait(seconds)

    known.wait = wait  # type: ignore[method-assign]

    def come() -> None:
        known.away.clear()
        came.set()

    timer = threading.Timer(1.0, come)
    timer.start()
    began = time.monotonic()
    trips.join(3)
    timer.join()
    assert time.monotonic() - began < 1.9
    assert looks < 12


def test_a_greeting_that_a_dead_process_took_is_repeated() -> None:
    nodes, known = three()
    nodes.answers[3] = None
    trips = exchange(nodes, known)

    def revive() -> None:
        nodes.answers[3] = joins("c")
        known.boots["c"] = "another"

    timer = threading.Timer(0.2, revive)
    timer.start()
    trips.join(3, 3)
    timer.join()
    assert sorted(trips.sites()) == ["a", "b", "c"]
