"""Runs that hypothesis makes of real sites and a real collector: what opens is the plain sum, and no seed returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from accord_shared.errors import PlanError, ProtocolError, RoundAborted
from accord_shared.messages import IntroduceRequest, MaskRequest, Opened
from accord_shared.secagg import shamir
from accord_shared.secagg.collector import Collector
from accord_shared.secagg.keys import Attempt, RunTerms
from accord_shared.secagg.member import Member
from vectors.make_transcript import MODEL, PRIVATE, identity_of, roster_of, stream

NAMES = tuple("abcdef")
ROSTER = roster_of(NAMES)
DIMENSION = 3
MINIMUM = {"malicious": 4, "semi_honest": 5}
SUBSETS = st.sets(st.sampled_from(NAMES))
OFTEN_NOBODY = st.just(set[str]()) | SUBSETS.filter(lambda some: len(some) <= 2)


def terms_of(mode: str, bits: int) -> RunTerms:
    return RunTerms(
        run_id="stateful",
        plan_hash="cd" * 32,
        roster_hash=ROSTER.hash,
        mode=mode,  # type: ignore[arg-type]
        bits=bits,
        dimension=DIMENSION,
        minimum=MINIMUM[mode],
        colluders=0,
        size=len(NAMES),
        bound=1.0,
        own_noise=True,
    )


@dataclass
class Node:
    """A site in one session; `draws` is what it drew since it was last asked, `waiting` what it was not told yet."""

    name: str
    session: int
    terms: RunTerms
    opened: int = 0
    draws: list[bytes] = field(default_factory=list)
    waiting: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source = stream(f"{self.name} {self.session}")

        def draw(count: int) -> bytes:
            self.draws.append(source(count))
            return self.draws[-1]

        self.member = Member(self.name, identity_of(self.name), ROSTER, self.terms, random=draw)
        self.bundle = self.member.bundle


class Run(RuleBasedStateMachine):
    """One run. Rules are a restart and an attempt; the coordinator is honest, the network is not reliable."""

    mode, bits = "malicious", 20

    @initialize()
    def join(self) -> None:
        self.terms = terms_of(self.mode, self.bits)
        self.nodes: dict[str, Node] = {}
        self.round, self.attempt = 1, 0
        self.seeds: dict[bytes, object] = {}
        self.owners: dict[object, bytes] = {}
        self.sums = 0
        for name in NAMES:
            self.enter(name, 0)

    def enter(self, name: str, session: int) -> None:
        """A new session, introduced to everybody there is."""
        node = Node(name, session, self.terms)
        others = {peer: other for peer, other in self.nodes.items() if peer != name}
        if others:
            credentials = tuple(other.member.credential for other in others.values())
            reply = node.member.introduce(IntroduceRequest(self.terms.run_id, tuple(others), credentials))
            for other, introduction in zip(others.values(), reply.introductions, strict=True):
                other.waiting[name] = (node.member.credential, introduction)
        self.nodes[name] = node

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        self.enter(name, self.nodes[name].session + 1)

    @rule(
        data=st.data(),
        left_out=OFTEN_NOBODY,
        same_round=st.booleans(),
        drops=st.tuples(OFTEN_NOBODY, OFTEN_NOBODY, OFTEN_NOBODY),
    )
    def try_to_sum(
        self, data: st.DataObject, left_out: set[str], same_round: bool, drops: tuple[set[str], ...]
    ) -> None:
        self.round, self.attempt = (self.round, self.attempt + 1) if same_round else (self.round + 1, 1)
        cohort = tuple(name for name in NAMES if name not in left_out)
        if len(cohort) < self.terms.minimum:
            return
        attempt = Attempt(
            self.terms,
            self.round,
            self.attempt,
            cohort,
            tuple(self.nodes[name].bundle for name in cohort),
            self.request(cohort, {}).model_hash,
            PRIVATE.public_key().public_bytes_raw(),
        )
        collector = Collector(attempt, ROSTER, PRIVATE)
        inputs, uploads = self.ask(attempt, data)
        late = [index for index in uploads if cohort[index] in drops[0]]
        for index in data.draw(st.permutations([index for index in uploads if index not in late])):
            collector.add_upload(index, uploads[index])
            self.nodes[cohort[index]].bundle = uploads[index].next_bundle
        try:
            openings = self.finish(collector, cohort, drops)
        except RoundAborted:
            assert not self.enough(collector, cohort, drops)
            return
        assert self.enough(collector, cohort, drops)
        total = [sum(inputs[index][i] for index in collector.survivors) for i in range(DIMENSION)]
        assert collector.finish().tolist() == [value % (1 << self.bits) for value in total]
        self.sums += 1
        self.check_shares(attempt, collector, openings, data)

    def request(self, cohort: tuple[str, ...], told: dict[str, tuple[bytes, bytes]]) -> MaskRequest:
        return MaskRequest(
            protocol=1,
            run_id=self.terms.run_id,
            plan_hash=self.terms.plan_hash,
            roster_hash=self.terms.roster_hash,
            round=self.round,
            attempt=self.attempt,
            cohort=cohort,
            bundles=tuple(self.nodes[name].bundle for name in cohort),
            coordinator=PRIVATE.public_key().public_bytes_raw(),
            peers=tuple(told),
            credentials=tuple(entry[0] for entry in told.values()),
            introductions=tuple(entry[1] for entry in told.values()),
            weights=MODEL,
        )

    def ask(self, attempt: Attempt, data: st.DataObject) -> tuple[dict[int, list[int]], dict[int, Any]]:
        """Trip 1: what each site that does not refuse has, and uploads."""
        inputs, uploads = {}, {}
        values = st.lists(st.integers(0, (1 << self.bits) - 1), min_size=DIMENSION, max_size=DIMENSION)
        for index, name in enumerate(attempt.cohort):
            node = self.nodes[name]
            request = self.request(attempt.cohort, node.waiting)
            if node.opened == self.round:
                with pytest.raises(ProtocolError, match=r"^R2: round"):
                    node.member.accept(request, request.model_hash)
                continue
            node.member.accept(request, request.model_hash)
            node.waiting, node.draws[:] = {}, []
            inputs[index] = data.draw(values)
            uploads[index] = node.member.mask(np.array(inputs[index], dtype=np.uint32))
            self.note_seeds(attempt, index, node)
        return inputs, uploads

    def note_seeds(self, attempt: Attempt, own: int, node: Node) -> None:
        """Every key and seed has one owner for ever; both ends of a pair have the same."""
        self.note((attempt.context, "self", own), node.draws[0])
        current = node.member._current
        assert current is not None
        for index, keys in current.pairs.items():
            pair = frozenset((own, index))
            for purpose in ("mask_seed", "seal_up", "seal_down"):
                self.note((attempt.context, purpose, pair), getattr(keys, purpose))

    def note(self, owner: object, seed: bytes) -> None:
        assert len(seed) == 32
        assert self.seeds.setdefault(seed, owner) == owner
        assert self.owners.setdefault(owner, seed) == seed

    def finish(self, collector: Collector, cohort: tuple[str, ...], drops: tuple[set[str], ...]) -> dict[int, Opened]:
        """Trips 2 and 3."""
        certified, openings = collector.close(), {}
        for index in collector.survivors if self.mode == "malicious" else ():
            if cohort[index] not in drops[1]:
                collector.add_signature(index, self.nodes[cohort[index]].member.sign(certified))
        for index, request in collector.open_requests().items():
            if cohort[index] in drops[2] | (drops[1] if self.mode == "malicious" else set()):
                continue
            node = self.nodes[cohort[index]]
            openings[index] = node.member.open(request)
            node.opened = self.round
            collector.add_opening(index, openings[index])
        collector_check(collector, len(openings), self.terms.thresholds(len(cohort)).share)
        return openings

    def enough(self, collector: Collector, cohort: tuple[str, ...], drops: tuple[set[str], ...]) -> bool:
        """Whether the protocol's thresholds are met: PROTOCOL.md, section 4, a second time."""
        n, alive = len(cohort), {cohort[index] for index in collector.survivors}
        signers = alive - drops[1]
        openers = (signers if self.mode == "malicious" else alive) - drops[2]
        if n == 4:
            return len(openers) == 4
        sign, share = {5: (4, 3), 6: (5, 4)}[n]
        if self.mode == "semi_honest":
            return len(alive) >= 5 and len(openers) >= {5: 4, 6: 5}[n]
        return len(alive) >= 4 and len(signers) >= sign and len(openers) >= share

    def check_shares(
        self, attempt: Attempt, collector: Collector, openings: dict[int, Opened], data: st.DataObject
    ) -> None:
        """Any t_share openers rebuild a self-mask seed; one fewer make nothing that fits."""
        sender = data.draw(st.sampled_from(collector.survivors))
        place, least = collector.survivors.index(sender), self.terms.thresholds(len(attempt.cohort)).share
        some = data.draw(st.permutations(sorted(openings)))[:least]
        rows = np.stack([shamir.from_bytes(openings[index].shares[place])[:1] for index in some])
        seed = self.owners[(attempt.context, "self", sender)]
        assert shamir.rebuild(rows, some).tobytes() == seed
        assert not rebuilds(rows[1:], some[1:], seed)

    @invariant()
    def secrets_are_gone(self) -> None:
        """A site that opened keeps nothing of the attempt."""
        for node in getattr(self, "nodes", {}).values():
            assert node.opened < self.round or node.member._current is None


def rebuilds(rows: Any, holders: list[int], seed: bytes) -> bool:
    try:
        return shamir.rebuild(rows, holders).tobytes() == seed
    except ProtocolError:
        return False


def collector_check(collector: Collector, given: int, least: int) -> None:
    """Too few openings are a typed abort."""
    if given < least:
        collector.finish()
        raise AssertionError("a sum came of too few shares")


class SemiHonest(Run):
    mode, bits = "semi_honest", 32


@pytest.mark.parametrize("machine", [Run, SemiHonest])
def test_runs(machine: type[Run]) -> None:
    opened: list[int] = []

    class Counted(machine):  # type: ignore[valid-type, misc]
        def teardown(self) -> None:
            opened.append(getattr(self, "sums", 0))

    profile = settings(
        max_examples=30,
        stateful_step_count=6,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Counted, settings=profile)
    assert sum(opened) > 10  # most runs open something: the checks above were reached


@pytest.mark.parametrize("count", [2, 3])
def test_cohorts_below_the_minimum_are_refused(count: int) -> None:
    node = Node("a", 0, terms_of("malicious", 20))
    run = Run()
    run.join()
    request = run.request(NAMES[:count], {})
    with pytest.raises(PlanError, match=r"cohort\.minimum"):
        node.member.accept(request, request.model_hash)
