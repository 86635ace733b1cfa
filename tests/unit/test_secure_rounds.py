"""Deployed sites under secure aggregation: when they train, charge, mask, answer and refuse (PROTOCOL.md, 8)."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_client import members as members_module
from accord_client.members import LocalMembers
from accord_client.site import Site
from accord_server.checkpoint import CheckpointFolder
from accord_server.rounds import Coordinator
from accord_server.secagg import SecureAggregation
from accord_shared import PROTOCOL_VERSION
from accord_shared.canonical import decimal_string
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import AccordError, OutputError, Unreachable
from accord_shared.messages import (
    Enquiry,
    Joined,
    MaskedUpload,
    MaskRequest,
    Message,
    Opened,
    OpenRequest,
    Refusal,
    SurvivorsRequest,
)
from accord_shared.plan import Plan
from accord_shared.quantize import unpack
from accord_shared.roster import Roster
from accord_shared.secagg import member as member_module
from accord_shared.secagg.masking import Words
from accord_shared.secagg.member import Member
from accord_shared.wire import encode
from conformance.federation import RUN, LossyExchange, identity, names_of, roster_of
from conformance.lab import Lab, lab_plan
from conformance.secure_lab import SIZE, Crash, SecureLab, secure_lab_plan


@pytest.fixture
def lab(tmp_path: Path) -> SecureLab:
    made = SecureLab(tmp_path, secure_lab_plan())
    made.exchange.join()
    return made


def refused(answer: Message, kind: str, words: str) -> None:
    assert isinstance(answer, Refusal), answer
    assert answer.kind == kind
    assert words in answer.reason


# --- what leaves, and when ------------------------------------------------------------------------------------------


def test_the_sum_is_that_of_the_released_updates(lab: SecureLab) -> None:
    for number in (1, 2):
        aggregate = lab.collect(number)
        assert aggregate.survivors == lab.names
        expected = sum(lab.last_update(name).astype(np.float64) for name in lab.names)
        np.testing.assert_allclose(aggregate.total, expected, atol=SIZE / lab.terms.encoding.scale)
        assert [lab.rounds(name) for name in lab.names] == [number] * SIZE
    assert all(np.abs(lab.last_update(name)).max() < lab.terms.bound for name in lab.names)


def test_an_update_leaves_only_masked(lab: SecureLab) -> None:
    encoded: dict[str, Words] = {}
    for name, members in lab.members.items():
        members.before_mask = lambda words, name=name: encoded.update({name: words.copy()})  # type: ignore[misc]
    lab.collect(1)
    for name in lab.names:
        uploads = [reply for reply in lab.replies[name] if isinstance(reply, MaskedUpload)]
        assert len(uploads) == 1
        masked = unpack(uploads[0].payload, lab.terms.bits, lab.dimension)
        assert (masked == encoded[name]).mean() < 0.05
        update = lab.last_update(name).tobytes()
        everything = b"".join(raw(reply) for reply in lab.replies[name])
        assert update not in everything
        assert encoded[name].tobytes() not in everything


def raw(message: Message) -> bytes:
    content = encode(message)
    arrays = [array.data for record in content.array_records.values() for array in record.values()]
    scalars = [value for record in content.config_records.values() for value in record.values()]
    flat = [item for value in scalars for item in (value if isinstance(value, list) else [value])]
    return b"".join([*arrays, *(item if isinstance(item, bytes) else str(item).encode() for item in flat)])


def test_no_plain_update_under_a_secure_plan_and_no_masked_one_under_a_plain_plan(
    lab: SecureLab, tmp_path: Path
) -> None:
    refused(lab.sites[lab.names[0]].handle(lab.request(1)), "ProtocolError", "no update leaves this site unmasked")
    assert lab.rounds(lab.names[0]) == 0
    lab.collect(1)
    mask = lab.last(lab.names[0], MaskRequest)
    plain = lab_plan({"privacy.accountant": "rdp"})
    other = Lab(tmp_path / "plain").joined(plain)
    from dataclasses import replace

    refused(other.handle(replace(mask, plan_hash=plain.hash)), "ProtocolError", "without secure aggregation")
    assert other.releases(plain).rounds == 0


def test_an_update_is_charged_before_it_is_masked(lab: SecureLab) -> None:
    charged: list[int] = []
    name = lab.names[1]
    lab.members[name].before_mask = lambda words: charged.append(lab.rounds(name))
    lab.collect(1)
    lab.collect(2)
    assert charged == [1, 2]


def test_that_a_round_is_opened_is_on_disk_before_a_share_leaves(
    lab: SecureLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[int] = []
    store, opened = lab.labs[lab.names[0]].store(), Member.open

    def watched(member: Member, request: OpenRequest) -> Opened:
        noted.append(store.releases(lab.plan.hash).opened_round)
        return opened(member, request)

    monkeypatch.setattr(Member, "open", watched)
    lab.collect(1)
    assert noted == [1] * SIZE


def test_killed_between_release_and_mask_the_same_update_goes_out_at_no_cost(lab: SecureLab) -> None:
    victim = lab.names[1]

    def dies(words: Words) -> None:
        raise Crash

    lab.members[victim].before_mask = dies
    first = lab.collect(1)
    assert first.survivors == ()
    assert not first.forfeited
    assert lab.rounds(victim) == 1
    kept = lab.last_update(victim).tobytes()
    assert lab.collect(1, attempt=2).survivors == ()  # it says that it lost its session
    third = lab.collect(1, attempt=3)
    assert third.survivors == lab.names, third.failures
    assert lab.last_update(victim).tobytes() == kept
    assert [lab.rounds(name) for name in lab.names] == [1] * SIZE
    expected = sum(lab.last_update(name).astype(np.float64) for name in lab.names)
    np.testing.assert_allclose(third.total, expected, atol=SIZE / lab.terms.encoding.scale)


# --- what a coordinator may try -------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
def test_an_opened_round_is_never_opened_again(lab: SecureLab, restarted: bool) -> None:
    lab.collect(1)
    if restarted:
        for name in lab.names:
            lab.start(name)
        lab.exchange.join()
        lab.aggregation = SecureAggregation(lab.plan, lab.roster, lab.dimension, lab.sigma)
    again = lab.collect(1, attempt=2)
    assert again.survivors == ()
    assert again.forfeited  # another attempt would be refused too
    assert all(again.failures[name].startswith("RoundOpened") for name in lab.names)
    assert [lab.rounds(name) for name in lab.names] == [1] * SIZE
    assert lab.collect(2).survivors == lab.names


def test_a_further_attempt_asks_nobody_else(tmp_path: Path) -> None:
    lab = SecureLab(tmp_path, secure_lab_plan(4, **{"cohort.minimum": 3, "cohort.size": 3}), sites=5)
    lab.exchange.join()
    three = lab.names[:3]
    lab.exchange.lost = lambda name, message: isinstance(message, SurvivorsRequest)
    assert lab.collect(1, cohort=three).survivors == ()
    lab.exchange.lost = lambda name, message: False
    lab.aggregation._asked = (0, ())  # a coordinator that does not keep to it
    other = lab.collect(1, attempt=2, cohort=lab.names[1:4])
    assert other.survivors == ()
    for name in lab.names[1:3]:
        assert "asks sites that were not in the first" in other.failures[name]
    assert lab.rounds(lab.names[3]) == 1  # it released nothing in this round before
    lab.aggregation._asked = (1, three)
    same = lab.collect(1, attempt=3, cohort=three)
    assert same.survivors == three
    assert [lab.rounds(name) for name in three] == [1] * 3


def coordinate(lab: SecureLab) -> list[tuple[int, int]]:
    """Runs to the end; (attempts in vain, survivors) by round."""
    initial = np.zeros(lab.dimension, dtype=np.float32)
    coordinator = Coordinator(lab.plan, RUN, initial, aggregation=lab.aggregation)
    coordinator.run(lab.exchange)
    return [(entry["aborted_attempts"], len(entry["survivors"])) for entry in coordinator.history]


def test_further_attempts_of_a_partial_cohort_ask_the_same_sites(tmp_path: Path) -> None:
    """Found: each attempt drew a cohort of its own, which those who had released refused, to the end of the run."""
    lab = SecureLab(tmp_path, secure_lab_plan(5), sites=9)
    lab.exchange.join()
    lab.exchange.lost = lambda name, message: isinstance(message, SurvivorsRequest) and message.attempt == 1
    assert coordinate(lab) == [(1, 5)] * 4


def test_further_attempts_do_not_ask_who_joined_meanwhile(tmp_path: Path) -> None:
    lab = SecureLab(tmp_path, secure_lab_plan(6, **{"cohort.minimum": 5}), sites=6)
    late = lab.names[5]
    handler = lab.exchange._handlers.pop(late)
    lab.exchange.join()

    def lost(name: str, message: Message) -> bool:
        if not isinstance(message, SurvivorsRequest) or message.round > 1 or message.attempt > 2:
            return False
        if late not in lab.exchange._handlers:
            lab.exchange.add(late, handler)
        return True

    lab.exchange.lost = lost
    assert coordinate(lab) == [(2, 5), (0, 6), (0, 6), (0, 6)]


class ComingAndGoing(LossyExchange):
    """Sites that are not there are neither present nor answer. A wait for sites notes whom it is for."""

    away: frozenset[str] = frozenset()
    waits: list[frozenset[str] | None]

    def present(self) -> tuple[str, ...]:
        return tuple(name for name in self.sites() if name not in self.away)

    def ready(self, minimum: int, among: Any = None) -> bool:
        wanted = set(self.present()) if among is None else set(self.present()) & set(among)
        if len(wanted) < minimum:
            self.waits.append(among)
        return len(wanted) >= minimum


def coming_and_going(folder: Path) -> tuple[SecureLab, ComingAndGoing]:
    lab = SecureLab(folder, secure_lab_plan(6, **{"cohort.minimum": 5}), sites=6)
    made = ComingAndGoing(lab.exchange._handlers, lab.enquiry)
    made.waits = []
    lab.exchange = made
    made.join()
    return lab, made


def charged(lab: SecureLab) -> dict[str, int]:
    return {name: lab.rounds(name) for name in lab.names}


def test_no_update_is_asked_for_once_too_few_are_left(tmp_path: Path) -> None:
    """They leave between the choice of the cohort and the first request."""
    lab, exchange = coming_and_going(tmp_path)

    def begin(members: tuple[str, ...]) -> None:
        exchange.away = frozenset(lab.names[:2])

    aggregate = lab.aggregation.collect(lab.request(1), lab.names, exchange, begin)
    assert "a sum needs 5: none was asked" in aggregate.failures["the attempt"]
    assert not aggregate.survivors
    assert charged(lab) == dict.fromkeys(lab.names, 0)
    exchange.away = frozenset()
    assert lab.collect(1, attempt=2).survivors == lab.names


def test_too_few_that_are_ready_are_not_asked_and_it_is_no_attempt(tmp_path: Path) -> None:
    lab, exchange = coming_and_going(tmp_path)
    begun: list[tuple[str, ...]] = []
    aggregate = lab.aggregation.collect(lab.request(1), lab.names[:4], exchange, begun.append)
    assert (begun, aggregate.begun) == ([], False)
    assert "4 sites are ready, a sum needs 5" in aggregate.failures["the attempt"]
    assert charged(lab) == dict.fromkeys(lab.names, 0)


@pytest.mark.parametrize("error", [OutputError, Unreachable])
def test_a_fault_of_the_coordinator_is_no_failed_attempt(error: type[AccordError], tmp_path: Path) -> None:
    lab, exchange = coming_and_going(tmp_path)

    def begin(members: tuple[str, ...]) -> None:
        raise error("the database is away")

    with pytest.raises(error):
        lab.aggregation.collect(lab.request(1), lab.names, exchange, begin)
    assert charged(lab) == dict.fromkeys(lab.names, 0)
    assert lab.collect(1).survivors == lab.names


def test_a_round_whose_sites_do_not_come_back_costs_one_attempt_and_the_run_goes_on(tmp_path: Path) -> None:
    """One site restarts while another is lost for good: the round can only be finished by both, so it is given up."""
    lab, exchange = coming_and_going(tmp_path)
    restarting, lost = lab.names[4], lab.names[5]

    def fails(name: str, message: Message) -> bool:
        if message == lab.enquiry:
            return False
        first = isinstance(message, SurvivorsRequest) and message.round == 1
        if first and name == lab.names[0]:
            exchange.away = frozenset((lost,))  # the other one is back
        return first

    exchange.away, exchange.lost = frozenset((restarting,)), fails  # type: ignore[method-assign]
    assert coordinate(lab) == [(1, 0), (0, 5), (0, 5), (0, 5)]
    assert exchange.waits == [frozenset(set(lab.names) - {restarting})]
    wasted = {name: count - 3 for name, count in charged(lab).items() if name != lost}
    assert wasted == {name: 0 if name == restarting else 1 for name in wasted}


def test_a_coordinator_that_was_killed_knows_whom_a_further_attempt_may_ask(tmp_path: Path) -> None:
    """Found: it asked others, whom those that had answered refused, to the last attempt."""
    lab, exchange = coming_and_going(tmp_path / "sites")
    absent = lab.names[5]
    exchange.away = frozenset((absent,))

    def dies(name: str, message: Message) -> bool:
        if isinstance(message, SurvivorsRequest):
            raise KeyboardInterrupt
        return False

    exchange.lost = dies  # type: ignore[method-assign]
    initial, folder = np.zeros(lab.dimension, dtype=np.float32), CheckpointFolder(tmp_path / "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        Coordinator(lab.plan, RUN, initial, aggregation=lab.aggregation, checkpoints=folder).run(exchange)
    exchange.away, exchange.lost = frozenset(), lambda name, message: False  # type: ignore[method-assign]
    again = Coordinator(lab.plan, RUN, initial, aggregation=lab.new_aggregation(), checkpoints=folder)
    again.run(exchange)
    assert [(entry["aborted_attempts"], len(entry["survivors"])) for entry in again.history] == [
        (0, 5), (0, 6), (0, 6), (0, 6),
    ]  # fmt: skip


def test_an_attempt_is_answered_once_and_never_an_earlier_one(lab: SecureLab) -> None:
    lab.exchange.lost = lambda name, message: isinstance(message, SurvivorsRequest)
    lab.collect(1, attempt=5)
    name = lab.names[0]
    request = lab.last(name, MaskRequest)
    from dataclasses import replace

    for attempt in (5, 4, 1):
        refused(lab.sites[name].handle(replace(request, attempt=attempt)), "ProtocolError", "R2")
    assert lab.rounds(name) == 1
    lab.exchange.lost = lambda name, message: False
    assert lab.collect(1, attempt=6).survivors == lab.names


def test_other_weights_for_a_released_round_are_refused(lab: SecureLab) -> None:
    lab.exchange.lost = lambda name, message: isinstance(message, SurvivorsRequest)
    lab.collect(1)
    lab.exchange.lost = lambda name, message: False
    request = lab.request(1, attempt=2)
    request.weights[0] += 1
    aggregate = lab.aggregation.collect(request, lab.names, lab.exchange)
    assert aggregate.survivors == ()
    assert all("released before, from other weights" in aggregate.failures[name] for name in lab.names)
    assert lab.collect(1, attempt=3).survivors == lab.names


def test_the_budget_ends_under_secure_aggregation_too(tmp_path: Path) -> None:
    lab = SecureLab(tmp_path, secure_lab_plan(**{"run.rounds": 4, "run.rounds_per_site": 1}))
    lab.exchange.join()
    assert lab.collect(1).survivors == lab.names
    aggregate = lab.collect(2)
    assert aggregate.survivors == ()
    assert not aggregate.forfeited
    assert aggregate.exhausted == set(lab.names)
    assert [lab.rounds(name) for name in lab.names] == [1] * SIZE


# --- joining --------------------------------------------------------------------------------------------------------


def joining(lab: SecureLab, roster: Roster | None = None, plan: Plan | None = None, **options: Any) -> Message:
    """What a fresh site answers to the enquiry of a run with this roster and plan."""
    name = lab.names[0]
    options.setdefault("members", LocalMembers(name, identity(name), roster or lab.roster))
    site = lab.labs[name].site(name, **{"least_secure_aggregation": "malicious", **options})
    asked = plan or lab.plan
    return site.handle(Enquiry(PROTOCOL_VERSION, RUN, asked.to_json(), asked.hash, lab.roster.hash))


def test_a_run_with_the_roster_and_plan_that_a_site_accepts_is_joined(lab: SecureLab) -> None:
    answer = joining(lab)
    assert isinstance(answer, Joined)
    assert (len(answer.credential), len(answer.bundle)) == (4573, 156)  # PROTOCOL.md, section 6


def test_another_roster_is_refused(lab: SecureLab) -> None:
    other = roster_of(names_of(SIZE + 1), SIZE)
    refused(joining(lab, roster=other), "ProtocolError", "roster is not the one that this site accepted")


def test_a_plan_weaker_than_the_roster_is_refused(tmp_path: Path) -> None:
    strict = SecureLab(tmp_path, secure_lab_plan(7, **{"cohort.minimum": 7, "cohort.colluders": 1}), sites=7)
    for weaker in ({"cohort.minimum": 6}, {"cohort.colluders": 0}):
        refused(joining(strict, plan=strict.plan.revised(weaker)), "PlanError", "weaker than the roster's 7 and 1")
    assert isinstance(joining(strict), Joined)


@pytest.mark.parametrize(
    ("mode", "least", "joins"),
    [
        ("malicious", "malicious", True),
        ("semi_honest", "malicious", False),
        ("semi_honest", "semi_honest", True),
        ("malicious", "off", True),
        ("off", "malicious", False),
        ("off", "semi_honest", False),
        ("off", "off", True),
    ],
)
def test_a_mode_below_the_least_is_refused(lab: SecureLab, mode: str, least: str, joins: bool) -> None:
    plan = lab.plan.revised({"secure_aggregation.mode": mode})
    answer = joining(lab, plan=plan, least_secure_aggregation=least)
    if joins:
        assert isinstance(answer, Joined)
    else:
        refused(answer, "PlanError", f'secure_aggregation.mode = "{mode}": this site asks for "{least}"')


def test_the_least_is_malicious_where_nobody_says_otherwise(tmp_path: Path) -> None:
    made = Lab(tmp_path)
    site = Site(
        "site-a", store=made.store(), workspace_of=made.workspace, examples_of=lambda _: made.examples
    )  # fmt: skip
    plan = lab_plan()
    refused(site.handle(Enquiry(PROTOCOL_VERSION, RUN, plan.to_json(), plan.hash, "")), "PlanError", "asks for")


def test_a_site_without_members_joins_no_secure_run(lab: SecureLab) -> None:
    refused(joining(lab, members=None), "PlanError", "no identity and roster")


def test_another_noise_multiplier_is_told_before_the_first_round(lab: SecureLab) -> None:
    """Parties that calibrate differently derive other masks: every upload failed, and nobody said why."""
    site, enquiry = lab.sites[lab.names[0]], lab.enquiry
    own = decimal_string(noise_multiplier(lab.plan))
    assert isinstance(site.handle(replace(enquiry, noise_multiplier=own)), Joined)
    other = replace(enquiry, noise_multiplier=own + "1")
    refused(site.handle(other), "PlanError", f"is '{own}1', this site calibrated {own}: let the plan name it")


def test_a_run_is_not_joined_on_other_terms(lab: SecureLab) -> None:
    site = lab.sites[lab.names[0]]
    other = lab.plan.revised({"run.seed": 5})
    refused(
        site.handle(Enquiry(PROTOCOL_VERSION, RUN, other.to_json(), other.hash, lab.roster.hash)), "ProtocolError", "R1"
    )
    again = site.handle(lab.enquiry)
    assert isinstance(again, Joined)
    assert again.credential == lab.exchange.joined[lab.names[0]].credential  # the session stays


# --- secrets --------------------------------------------------------------------------------------------------------


class Recorder:
    """What members draw and derive, for tests that look for it elsewhere."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import os

        self.secrets: list[bytes] = []

        def random(count: int) -> bytes:
            drawn = os.urandom(count)
            if count in (32, 64):  # X25519 keys and self-mask seeds; ML-KEM seeds
                self.secrets.append(drawn)
            return drawn

        derived = member_module.pair_keys

        def pair_keys(*arguments: Any) -> Any:
            keys = derived(*arguments)
            self.secrets += [keys.mask_seed, keys.seal_up, keys.seal_down, arguments[3]]
            return keys

        monkeypatch.setattr(members_module, "Member", partial(Member, random=random))
        monkeypatch.setattr(member_module, "pair_keys", pair_keys)

    def found_in(self, text: str | bytes) -> bool:
        data = text.encode() if isinstance(text, str) else text
        forms = [form for secret in self.secrets for form in forms_of(secret)]
        return any(form in data for form in forms)


def forms_of(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), base64.b64encode(secret), repr(secret)[2:-1].encode()]


def test_secrets_are_nowhere_but_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    recorder = Recorder(monkeypatch)
    lab = SecureLab(tmp_path, secure_lab_plan())
    lab.exchange.join()
    lab.collect(1)
    lab.exchange.lost = lambda name, message: isinstance(message, SurvivorsRequest) and name == lab.names[0]
    aggregates = [lab.collect(2)]  # an attempt that fails leaves its secrets in the members
    name = lab.names[1]
    member = lab.members[name]._members[RUN][1]
    assert member._current is not None
    assert len(recorder.secrets) > 20
    assert recorder.found_in(recorder.secrets[7])  # it would be found
    everything = [lab.sites[name], lab.members[name], member, member._current, member._peers, *aggregates]
    assert not any(recorder.found_in(repr(thing)) for thing in everything)
    answers = [lab.sites[name].handle(message) for message in (lab.last(name, MaskRequest), lab.request(2))]
    assert all(isinstance(answer, Refusal) for answer in answers)
    assert not recorder.found_in(caplog.text)
    assert caplog.text
    sent = b"".join(raw(reply) for replies in lab.replies.values() for reply in [*replies, *answers])
    assert not recorder.found_in(sent)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or not recorder.found_in(path.read_bytes()), path
    for kind in ("ed25519", "ml-dsa"):
        import hashlib

        seed = hashlib.sha256(f"{kind} {name}".encode()).digest()
        assert not any(form in sent for form in forms_of(seed))


def test_members_stay_in_their_process(lab: SecureLab) -> None:
    import copy
    import pickle

    member = lab.members[lab.names[0]]._members[RUN][1]
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leave(member)


def test_nothing_is_written_to_flower_s_context(lab: SecureLab, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.app import Context, RecordDict
    from flwr.app import Message as FlowerMessage
    from flwr.supercore.task_identity import TaskIdentity

    from accord_client.app import client_app
    from accord_shared.wire import decode

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    contexts = {name: Context(1, 1, {}, RecordDict(), {}) for name in lab.names}

    def through_flower(name: str) -> Callable[[Message], Message]:
        app = client_app(lambda context: lab._handler(name))

        def handle(message: Message) -> Message:
            sent = FlowerMessage(encode(message), dst_node_id=1, message_type="train")
            return decode(app(sent, contexts[name]).content)

        return handle

    lab.exchange._handlers = {name: through_flower(name) for name in lab.names}
    assert lab.collect(1).survivors == lab.names
    for context in contexts.values():
        assert not dict(context.state)
        assert not context.node_config
        assert not context.run_config
