"""Attacks on the real `Site`: its policy, its disk, and what it must not do over several runs and processes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_client import site as site_module
from accord_client.ledger.chain import Writing
from accord_client.members import MOST_RUNS, LocalMembers
from accord_client.site import Site
from accord_client.store import SiteStore
from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import PlanError, ProtocolError, RoundOpened
from accord_shared.messages import Enquiry, Joined, MaskRequest, Message, Refusal, SurvivorsRequest, TrainReply
from accord_shared.plan import Plan
from accord_shared.quantize import encode
from accord_shared.roster import Roster
from accord_shared.secagg import keys
from accord_shared.secagg.keys import RunTerms
from accord_shared.secagg.member import Member
from adversarial.hostile import MemberStation, Oracle, Removal, Run, Setting, Sum, World, identity_of
from conformance.lab import Lab, joint_weights, lab_plan, request

SIGMA = 2.0
SEVEN = Setting()
QUORUMS = Setting(names=tuple("abcdefghij"), corrupt=("c", "d", "e"), minimum=9, colluders=3)
"""Ten sites of which three are corrupt: 7 sign, 6 shares open, so two halves could open two sets."""
SUBSETS = Setting(names=tuple("abcdefghij"), corrupt=("c", "d"), minimum=7, colluders=2)

OPENED = Removal(Site, "_mask", "if request.round <= spent.opened_round:", "if False:")
FIRST_COHORT = Removal(
    Site,
    "_mask",
    "if request.round == spent.last_round and not set(request.cohort) <= set(spent.last_cohort):",
    "if False:",
)
LATER = Removal(
    Site, "_mask", "if (request.round, request.attempt) <= (spent.last_round, spent.last_attempt):", "if False:"
)
PRESENT = Removal(
    Site, "_open", "if (request.round, request.attempt) != (spent.last_round, spent.last_attempt):", "if False:"
)
BEHIND = Removal(
    Writing, "witness", "if head.seq < before.seq or (head.seq == before.seq and head != before):", "if False:"
)
PLAN_SIZE = Removal(RunTerms, "thresholds", ", self.size, own_noise", ", own_noise")
ROSTER_MINIMUM = Removal(
    Site,
    "_join_secured",
    "if plan.cohort.minimum < roster.minimum or plan.cohort.colluders < roster.colluders:",
    "if False:",
)
ROSTER_HASH = Removal(Site, "_join_secured", "if enquiry.roster_hash != roster.hash:", "if False:")
PLAN_HASH = Removal(Site, "_join", "if plan.hash != enquiry.plan_hash:", "if False:")
NEVER_UNMASKED = Removal(Site, "_train", 'if plan.secure_aggregation.mode != "off":', "if False:")


class Still(SecureGenerator):
    """Coins that always fall the same way, so that an update is encoded the same in all attempts."""

    def uint64(self, count: int) -> Any:
        return np.zeros(count, dtype=np.uint64)


def plan_for(setting: Setting, **changes: Any) -> Plan:
    table = {
        "secure_aggregation.mode": "malicious",
        "cohort.size": setting.size or len(setting.names),
        "cohort.minimum": setting.minimum,
        "cohort.colluders": setting.colluders,
        "privacy.noise": "none",
        "privacy.epsilon": None,
    }
    return lab_plan({**table, **changes})


@dataclass
class SiteStation:
    """The deployed site on synthetic embeddings, with a disk."""

    name: str
    roster: Roster
    plan: Plan
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    words: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lab = Lab(self.folder / self.name, width=2, data_seed=ord(self.name[0]))
        self.restart()

    def restart(self) -> None:
        """A new process: only the disk is left."""
        self.members = LocalMembers(self.name, identity_of(self.name), self.roster)
        options: dict[str, Any] = {"least_secure_aggregation": "malicious", "members": self.members, **self.options}
        self.site = self.lab.site(self.name, **options)

    def join(self, run: Run) -> tuple[bytes, bytes]:
        enquiry = Enquiry(
            PROTOCOL_VERSION, run.terms.run_id, self.plan.to_json(), self.plan.hash, run.terms.roster_hash
        )
        reply = self.answer(enquiry)
        assert isinstance(reply, Joined)
        return reply.credential, reply.bundle

    def answer(self, message: Message) -> Message:
        reply = self.site.handle(message)
        if isinstance(reply, Refusal):
            raise reply.error()
        return reply

    def ask(self, message: Message) -> Message:
        reply = self.answer(message)
        if isinstance(message, MaskRequest):
            self.words[message.round] = Encoded.last
        return reply

    def truth(self, round_number: int) -> Any:
        return self.words[round_number].copy()


class Encoded:
    """What the site encoded last."""

    last: Any = None

    @staticmethod
    def encode(update: Any, encoding: Any, _: Any) -> Any:
        words = encode(update, encoding, Still())
        Encoded.last = words.copy()
        return words


class SiteWorld(World):
    """Honest sites are deployed ones; the corrupt stay members that the coordinator reads."""

    def __init__(self, folder: Path, setting: Setting = SEVEN, **changes: Any) -> None:
        self.plan = plan_for(setting, **changes)
        super().__init__(setting)
        for name in setting.honest:
            self.stations[name] = SiteStation(name, self.roster, self.plan, folder)

    def run(self, run_id: str = "run") -> SiteRun:
        dimension = len(self.plan.task.labels) * 2
        return SiteRun(self, RunTerms.of(self.plan, run_id, self.roster.hash, len(self.roster.members), dimension, 0.0))

    def site(self, name: str) -> SiteStation:
        station = self.stations[name]
        assert isinstance(station, SiteStation)
        return station


class SiteRun(Run):
    """A run in which a site may restart."""

    def restart(self, name: str) -> None:
        station = self.world.stations[name]
        if isinstance(station, SiteStation):
            station.restart()
        super().restart(name)


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module, "encode", Encoded.encode)
    monkeypatch.setattr(MemberStation, "truth", lambda self, number: np.zeros(10, dtype=np.uint32))


# Two sums of one round

Play = Callable[[SiteWorld], None]


def two_runs_of_one_plan(world: SiteWorld) -> None:
    """Two run ids, both uploaded before either is opened; the sums differ by d's update alone."""
    one, other = world.run("one").join(), world.run("other").join()
    one.uploads()
    other.uploads(2)
    other.finish((0, 1, 2, 4, 5, 6), 2)
    one.finish(range(7))


def two_runs_one_opened_first(world: SiteWorld) -> None:
    """The same, and the first run's sum is opened before the other's."""
    one, other = world.run("one").join(), world.run("other").join()
    one.uploads()
    other.uploads(2)
    one.finish(range(7))
    other.finish((0, 1, 2, 4, 5, 6), 2)


def two_runs_each_opened_by_one_half(world: SiteWorld) -> None:
    """No site opens twice: the corrupt sites and one half open each run's sum."""
    runs = [world.run("one").join(), world.run("other").join()]
    everybody, but_one = tuple(range(10)), tuple(index for index in range(10) if index != 9)
    for attempt, (run, survivors, group) in enumerate(zip(runs, (everybody, but_one), ("abf", "ghi"), strict=True), 1):
        run.uploads(attempt)
        for name in run.names:
            run.sign(name, survivors, attempt)
        run.group = group  # type: ignore[attr-defined]
    for attempt, (run, survivors) in enumerate(zip(runs, (everybody, but_one), strict=True), 1):
        for name in run.group:  # type: ignore[attr-defined]
            run.open(name, survivors, attempt)


def attempts_backwards_after_a_restart(world: SiteWorld) -> None:
    """Sites that uploaded in attempt 2 and lost their memory upload in attempt 1 and open it; the others go on to 2.

    Nobody opens twice, and everybody is right in its own session.
    """
    run = world.run().join()
    late, rest = "hij", "abfg"
    bundles, introduced = dict(run.bundles), {name: dict(run.waiting[name]) for name in rest}
    everybody, but_one = tuple(range(10)), tuple(range(1, 10))
    for name in late:
        run.upload(name, 2)
    for name in late:
        run.restart(name)
    for name in (*rest, *late):
        run.upload(name, 1)
    for name in "cde":
        run.attempts[name, 1, 1] = run.attempts["a", 1, 1]
    for name in run.names:
        run.sign(name, but_one, 1)
    for name in rest:
        run.waiting[name] = introduced[name]
        run.upload(name, 2, bundles=bundles)
    if ("a", 1, 2) in run.attempts:
        for name in "cde":
            run.attempts[name, 1, 2] = run.attempts["a", 1, 2]
    for name in (*rest, *"cde"):
        run.sign(name, everybody, 2)
    for name in late:
        run.open(name, but_one, 1)
    for name in rest:
        run.open(name, everybody, 2)


def rerun_without_one(world: SiteWorld) -> None:
    """The sum of all is opened; all sites restart, so that no memory is left; the round is run again without d."""
    run = world.run().join()
    run.uploads()
    run.finish(range(7))
    for name in world.setting.honest:
        world.site(name).restart()
    run = world.run().join()
    run.uploads(2, cohort=tuple("abcefg"))
    run.finish(range(6), 2)


def overlapping_cohorts(world: SiteWorld) -> None:
    """Of ten sites, seven are summed with the help of two honest ones; then seven others, five of them the same."""
    run = world.run().join()
    run.uploads(1)
    names = run.names
    cohort = tuple(names[:7])  # a b (c d) e f g: a and b open
    run.uploads(2, cohort=cohort)
    for name in cohort:
        run.sign(name, range(7), 2)
    for name in "ab":
        run.open(name, range(7), 2)
    rest = tuple(names[2:9])  # (c d) e f g h i
    run.uploads(3, cohort=rest)
    for name in rest:
        run.sign(name, range(7), 3)
    for name in rest:
        run.open(name, range(7), 3)


def another_first_cohort(world: SiteWorld) -> None:
    """Attempt 1 is never opened. Attempts 2 and 3 have cohorts that overlap in what was not all asked at first."""
    run = world.run().join()
    run.uploads(1, cohort=tuple("abcdefg"))
    run.uploads(2, cohort=tuple("abcdefghij"))


@dataclass(frozen=True)
class Replay:
    play: Play
    kind: type[Exception]
    says: str
    removed: tuple[Removal, ...]
    setting: Setting = SEVEN
    wins: bool = True

    @property
    def name(self) -> str:
        return self.play.__name__


REPLAYS = [
    Replay(two_runs_of_one_plan, ProtocolError, "R2: ", (PRESENT,)),
    Replay(two_runs_one_opened_first, ProtocolError, "R2: ", (PRESENT,)),
    Replay(two_runs_each_opened_by_one_half, ProtocolError, "R2: ", (PRESENT,), QUORUMS),
    Replay(attempts_backwards_after_a_restart, ProtocolError, "R2: ", (LATER, PRESENT, BEHIND), QUORUMS),
    Replay(rerun_without_one, RoundOpened, "was opened", (OPENED,)),
    Replay(another_first_cohort, ProtocolError, "R2: a further attempt", (FIRST_COHORT,), SUBSETS, wins=False),
]


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: replay.name)
def test_no_two_sums_of_one_round(replay: Replay, tmp_path: Path) -> None:
    world = SiteWorld(tmp_path, replay.setting)
    replay.play(world)
    assert not world.oracle.wins, world.oracle.sums()
    assert world.refused(replay.kind, replay.says), [str(error) for error in world.refusals]


@pytest.mark.parametrize("replay", [each for each in REPLAYS if each.wins], ids=lambda replay: replay.name)
def test_two_sums_without_the_check(replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for removal in replay.removed:
        removal.apply(monkeypatch)
    world = SiteWorld(tmp_path, replay.setting)
    replay.play(world)
    assert world.oracle.wins, ([str(error) for error in world.refusals], world.oracle.sums())


def test_cohorts_of_one_round_do_not_overlap_in_two_sums(tmp_path: Path) -> None:
    world = SiteWorld(tmp_path, SUBSETS)
    overlapping_cohorts(world)
    assert not world.oracle.wins, world.oracle.sums()


def test_cohorts_overlap_if_thresholds_look_at_the_cohort_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLAN_SIZE.apply(monkeypatch)
    world = SiteWorld(tmp_path, SUBSETS)
    overlapping_cohorts(world)
    assert world.oracle.wins, ([str(error) for error in world.refusals], world.oracle.sums())


# Policy and terms


def enquiry_of(world: SiteWorld, plan: Plan, **changes: Any) -> Enquiry:
    return replace(Enquiry(PROTOCOL_VERSION, "run", plan.to_json(), plan.hash, world.roster.hash), **changes)


WEAKER = {
    "minimum": ({"cohort.minimum": 5, "cohort.colluders": 1}, "weaker than the roster's"),
    "colluders": ({"cohort.colluders": 0, "cohort.minimum": 6}, "weaker than the roster's"),
    "off": ({"secure_aggregation.mode": "off"}, 'asks for "malicious"'),
    "semi_honest": ({"secure_aggregation.mode": "semi_honest", "cohort.minimum": 7}, 'asks for "malicious"'),
}


@pytest.fixture
def guarded(tmp_path: Path) -> SiteWorld:
    """Sites whose roster asks for six survivors and one colluder."""
    world = SiteWorld(tmp_path, replace(SEVEN, minimum=6))
    roster = world.roster.made({**dict(world.roster), "minimum": 6, "colluders": 1})
    world.roster = roster
    for name in world.setting.honest:
        station = world.site(name)
        station.roster = roster
        station.restart()
    return world


@pytest.mark.parametrize("what", WEAKER)
def test_weaker_terms_are_refused(what: str, guarded: SiteWorld) -> None:
    changes, says = WEAKER[what]
    plan = plan_for(guarded.setting, **changes)
    with pytest.raises(PlanError, match=says):
        guarded.site("d").answer(enquiry_of(guarded, plan))


@pytest.mark.parametrize("what", ["minimum", "colluders"])
def test_weaker_terms_without_the_check(what: str, guarded: SiteWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weaker sum opens: of five honest and corrupt sites where six were due."""
    ROSTER_MINIMUM.apply(monkeypatch)
    changes, _ = WEAKER[what]
    assert isinstance(guarded.site("d").answer(enquiry_of(guarded, plan_for(guarded.setting, **changes))), Joined)


@pytest.mark.parametrize("key", ["bits", "bound"])
def test_another_modulus_or_bound_is_another_plan(key: str, guarded: SiteWorld) -> None:
    """Neither can be changed under the hash that the others have, nor in a run that was joined."""
    plan = plan_for(guarded.setting)
    other = plan_for(guarded.setting, **{f"secure_aggregation.{key}": {"bits": 12, "bound": 0.001}[key]})
    site = guarded.site("d")
    with pytest.raises(ProtocolError, match="does not have the hash"):
        site.answer(enquiry_of(guarded, other, plan_hash=plan.hash))
    site.answer(enquiry_of(guarded, plan))
    with pytest.raises(ProtocolError, match="R1: the run was joined on other terms"):
        site.answer(enquiry_of(guarded, other))


def test_another_plan_under_the_hash_is_noticed(guarded: SiteWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAN_HASH.apply(monkeypatch)
    other = plan_for(guarded.setting, **{"secure_aggregation.bits": 12})
    reply = guarded.site("d").answer(enquiry_of(guarded, other, plan_hash=plan_for(guarded.setting).hash))
    assert isinstance(reply, Joined)
    assert reply.plan_hash == other.hash  # what it signs names the plan that it read: nobody else's verifies with it


@pytest.mark.parametrize("hash_", ["", "0" * 64])
def test_another_roster_is_refused(hash_: str, guarded: SiteWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchecked, the site still signs under its own roster's hash: what it joins is no run of the other roster's."""
    message = enquiry_of(guarded, plan_for(guarded.setting), roster_hash=hash_)
    with pytest.raises(ProtocolError, match="roster is not the one"):
        guarded.site("d").answer(message)
    ROSTER_HASH.apply(monkeypatch)
    reply = guarded.site("d").answer(message)
    assert isinstance(reply, Joined)
    terms = RunTerms.of(guarded.site("d").plan, "run", hash_, 7, 10, 0.0)
    with pytest.raises(ProtocolError, match="does not verify"):
        keys.Bundle.read(reply.bundle, terms, guarded.roster.member("d"))


def test_no_update_leaves_unmasked(guarded: SiteWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    station = guarded.site("d")
    plan = plan_for(guarded.setting)
    station.answer(enquiry_of(guarded, plan))
    message = request(plan, 1, joint_weights(plan, station.lab, 1))
    with pytest.raises(ProtocolError, match="no update leaves this site unmasked"):
        station.answer(message)
    NEVER_UNMASKED.apply(monkeypatch)
    assert isinstance(station.answer(message), TrainReply)
    assert Oracle(guarded, [Sum(1, frozenset("d"))]).wins  # an unmasked update is a sum of one


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"secure_aggregation.mode": "off"}, 'asks for "malicious"'),
        ({"secure_aggregation.mode": "off", "privacy.noise": "none", "privacy.epsilon": None}, "without privacy"),
    ],
    ids=["secure aggregation", "privacy"],
)
def test_a_plan_joined_on_looser_terms_is_not_served_on_stricter_ones(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """The plan is on disk from a time when the operator allowed it; the present process does not."""
    lab, plan = Lab(tmp_path), lab_plan(changes)
    lab.joined(plan)
    options = {"accept_without_privacy": False, "least_secure_aggregation": "malicious" if "mal" in says else "off"}
    message = request(plan, 1, joint_weights(plan, lab, 1))
    answer = lab.site(**options).handle(message)
    assert isinstance(answer, Refusal), "an update left without secure aggregation"
    assert answer.kind == "PlanError"
    assert says in answer.reason


# Memory


def test_a_forgotten_run_has_other_keys(tmp_path: Path) -> None:
    """Joining many runs drops the first one's secrets: a request for the first session is refused."""
    world = SiteWorld(tmp_path)
    run = world.run("first").join()
    for number in range(MOST_RUNS):
        world.stations["d"].join(world.run(f"run {number}"))
    assert run.upload("d") is None
    assert world.refusals[-1].__class__.__name__ == "SessionLost"
    world.stations["d"].join(run)
    run.upload("d")
    assert world.refused(ProtocolError, "does not verify")  # introductions were made for the session before


def test_two_threads_do_not_sign_two_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests meet between the check that nothing was signed and the note of what is."""
    world = SiteWorld(tmp_path)
    run = world.run().join()
    run.uploads()
    meeting = threading.Barrier(2)
    check = Member._check_survivors

    def slow(self: Member, current: Any, survivors: Any) -> None:
        check(self, current, survivors)
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.2)

    monkeypatch.setattr(Member, "_check_survivors", slow)
    replies: list[Message] = []
    site = world.site("d").site
    sets = (tuple(range(7)), tuple(range(6)))
    threads = [
        threading.Thread(target=lambda u=u: replies.append(site.handle(SurvivorsRequest("run", 1, 1, u)))) for u in sets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(reply).__name__ for reply in replies) == ["Refusal", "SurvivorsSigned"]


def test_what_was_opened_is_on_disk_before_shares_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: the disk says so at the moment that the member opens."""
    world = SiteWorld(tmp_path)
    run = world.run().join()
    run.uploads()
    noted: list[int] = []
    open_ = Member.open

    def watched(self: Member, message: Any) -> Any:
        store: SiteStore = world.site(self._name).lab.store()
        noted.append(store.releases(world.plan.hash).opened_round)
        return open_(self, message)

    monkeypatch.setattr(Member, "open", watched)
    run.finish(range(7))
    assert noted == [1] * 6


def test_a_second_attempt_opens_and_the_first_never_after_it(tmp_path: Path) -> None:
    """What the disk says of attempts is the last one: an honest repetition goes through, in any process."""
    world = SiteWorld(tmp_path)
    run = world.run().join()
    run.uploads(1)
    run.uploads(2)
    assert world.site("d").lab.store().releases(world.plan.hash).last_attempt == 2
    run.finish(range(7), 2)
    assert not world.refusals
    assert [len(each.names) for each in world.oracle.sums()] == [6]
