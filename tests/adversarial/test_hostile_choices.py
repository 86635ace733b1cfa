"""Sparse graphs under attack: choices that are drawn again, withheld, faked, or shown differently (section 9).

A test named `…control` takes one check out and shows that the same attack then succeeds.
"""

from __future__ import annotations

import inspect
import itertools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from accord_client.members import MOST_RUNS, LocalMembers
from accord_shared.dp.sharing import NoiseShares
from accord_shared.errors import PlanError, ProtocolError
from accord_shared.roster import Roster
from accord_shared.secagg import keys
from accord_shared.secagg import member as member_module
from accord_shared.secagg.choices import check_choice, chose, own_choice
from accord_shared.secagg.graph import most_left_out, sparse_thresholds
from accord_shared.secagg.keys import Credential, RunTerms
from accord_shared.secagg.member import Member
from accord_shared.secagg.thresholds import Thresholds
from adversarial.hostile import DIMENSION, Removal, Run, Setting, World, identity_of

SPARSE = Setting(names=tuple("abcdefgh"), corrupt=("c",), minimum=6, colluders=1)
"""Thresholds are small ones of the tests' own where real ones, from 129 sites on, show nothing more."""


def with_graph(patch: pytest.MonkeyPatch, share: int, degree: int) -> None:
    patch.setattr(keys, "COMPLETE_MAX", 4)
    patch.setattr(keys, "sparse_thresholds", lambda sites, minimum, _: Thresholds(sites, minimum, share, degree))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Eight sites that choose four each; everybody has joined and is introduced."""
    with_graph(monkeypatch, 3, 4)
    return World(SPARSE).run().join()


def bitmap(run: Run, names: set[str]) -> bytes:
    return np.packbits([name in names for name in run.names]).tobytes()


# --- an honest round, and what a choice is


def test_an_honest_round_opens_one_sum(small: Run) -> None:
    small.uploads()
    small.finish(range(8))
    assert not small.world.refusals
    assert [len(each.names) for each in small.world.oracle.sums()] == [7]


def test_partners_are_those_of_either_choice_and_holders_those_of_its_own(small: Run) -> None:
    small.uploads()
    for upload in small.world.uploads:
        chosen = small.chosen(upload.name)
        assert {small.names[index] for index in upload.partners} == chosen | small.choosers(upload.name)
        assert {small.names[index] for index in upload.holders} == chosen
        assert len(upload.message.sealed) == 4


def test_choices_are_uniform_over_sites_and_plans() -> None:
    seen: Counter[int] = Counter()
    for plan in range(140):
        choice = own_choice(identity_of("d"), "00" * 32, f"{plan:064x}", 3, 8, 4)
        check_choice(choice, "d", 3, 8, 4)
        seen.update(place for place in range(8) if chose(choice, place))
    assert set(seen) == set(range(8)) - {3}
    assert all(50 < count < 110 for count in seen.values())


def test_a_choice_is_of_the_identity_the_roster_and_the_plan_and_of_nothing_else() -> None:
    """One bit map is frozen: another key, roster or plan gives another one."""
    made = own_choice(identity_of("d"), "00" * 32, "11" * 32, 3, 1000, 30)
    others = [
        own_choice(identity_of("e"), "00" * 32, "11" * 32, 3, 1000, 30),
        own_choice(identity_of("d"), "01" * 32, "11" * 32, 3, 1000, 30),
        own_choice(identity_of("d"), "00" * 32, "12" * 32, 3, 1000, 30),
    ]
    assert len({made, *others}) == 4
    assert made == own_choice(identity_of("d"), "00" * 32, "11" * 32, 3, 1000, 30)


@pytest.mark.parametrize("change", ["one more", "one less", "itself", "padding", "longer", "shorter", "none"])
def test_what_is_no_choice_is_refused(change: str) -> None:
    flags = np.zeros(16, dtype=np.uint8)
    flags[[0, 1, 2, 5]] = 1
    check_choice(np.packbits(flags).tobytes(), "d", 3, 12, 4)
    flags[1] = change not in ("one less", "itself", "padding")
    flags[{"one more": 7, "itself": 3, "padding": 12}.get(change, 0)] = 1
    choice = np.packbits(flags).tobytes()
    bad = {"longer": choice + b"\0", "shorter": choice[:1], "none": b""}.get(change, choice)
    with pytest.raises(ProtocolError, match="R5: the choice of 'd' is not of 4 others among 12"):
        check_choice(bad, "d", 3, 12, 4)


# --- nothing is drawn anew


def test_rejoining_restarting_and_other_runs_draw_nothing_new(small: Run) -> None:
    first = dict(small.choices)
    for number in range(20):
        small.enter("d")
        other = small.world.run(f"run {number}")
        other.enter("d")
        assert other.choices["d"] == small.choices["d"] == first["d"]
    assert small.world.run("another process").join().choices == first


def test_a_session_that_eight_other_runs_pushed_out_chooses_the_same(small: Run) -> None:
    """Attack 1 of the first version: it drew anew, as often as the coordinator liked."""
    world = small.world
    members = LocalMembers("d", identity_of("d"), world.roster)
    credentials = [members.join(small.terms)[0]]
    for number in range(MOST_RUNS + 2):
        members.join(replace(small.terms, run_id=f"other {number}"))
    credentials.append(members.join(small.terms)[0])
    assert credentials[0] != credentials[1]  # another session
    made = [Credential.read(each, small.terms, world.roster, "d").choice for each in credentials]
    assert made == [small.choices["d"]] * 2


def halves(run: Run, names: Sequence[str], most: int) -> dict[str, int]:
    """Makes every site rejoin until all that it chose are in its own half; how often each had to, or `most`."""
    tries: dict[str, int] = {}
    for place, name in enumerate(names):
        half = set(names[: len(names) // 2] if place < len(names) // 2 else names[len(names) // 2 :])
        for attempt in range(most):
            tries[name] = attempt
            run.enter(name)
            if run.chosen(name) <= half:
                break
    return tries


REDRAWN = Removal(
    member_module.Member,
    "__init__",
    "own_choice(identity, *names, place, sites, terms.degree)",
    "own_choice(Identity.from_seeds(random(32), random(32)), *names, place, sites, terms.degree)",
)
SIXTEEN = Setting(names=tuple("abcdefghijklmnop"), corrupt=(), minimum=16, colluders=0)


def two_sums(most: int) -> World:
    """Attack 1: two halves of a certified set, each summed alone."""
    world = World(SIXTEEN)
    run = world.run()
    halves(run, run.names, most)
    for place, name in enumerate(run.names):
        run.introduce(name, [peer for peer in run.names[:place] if run.linked(name, peer)])
    run.uploads()
    run.finish(range(16))
    return world


def test_a_certified_set_is_one_sum_however_often_sites_rejoin(monkeypatch: pytest.MonkeyPatch) -> None:
    with_graph(monkeypatch, 2, 3)
    world = two_sums(most=3)
    assert not world.refusals
    assert [len(each.names) for each in world.oracle.sums()] == [16]


def test_redraws_cut_a_certified_set_into_two_sums_control(monkeypatch: pytest.MonkeyPatch) -> None:
    with_graph(monkeypatch, 2, 3)
    REDRAWN.apply(monkeypatch)
    world = two_sums(most=400)
    assert not world.refusals
    assert sorted(len(each.names) for each in world.oracle.sums()) == [8, 8]


# --- no short lists


def test_the_graph_is_over_the_roster_whoever_has_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack 1's other half: k and t_share followed from a list of as few as n_min names."""
    setting = Setting(names=tuple(f"{index:03d}" for index in range(130)), corrupt=(), minimum=125, colluders=0)
    world = World(setting)
    few = world.run()
    for name in few.names[:3]:
        few.enter(name)
    rule = sparse_thresholds(130, 125, 0)
    assert (rule.degree, rule.share) == (7, 3)
    assert all(len(few.chosen(name)) == 7 for name in few.names[:3])
    assert few.terms.thresholds(125) == rule


def test_terms_of_another_number_of_members_are_refused(small: Run) -> None:
    with pytest.raises(ProtocolError, match="R1: the run's graph spans 7 sites, the roster has 8"):
        Member("d", identity_of("d"), small.world.roster, replace(small.terms, members=7))


def test_a_cohort_below_the_minimum(small: Run) -> None:
    """R3; four or fewer sites would otherwise be a whole cohort to R7."""
    small.upload("d", cohort=tuple("abcd"))
    assert small.world.refused(ProtocolError, "R3: a cohort of 4")


@pytest.mark.parametrize(
    ("size", "minimum", "colluders", "members", "says"),
    [
        (1000, 700, 0, 1051, "1051 sites with 0 colluders need 701 to sign, more than cohort.minimum = 700"),
        (130, 125, 0, 1000, "1000 sites with 0 colluders need 667 to sign"),
        (130, 125, 0, 124, "cohort.minimum = 125, but the roster has 124 members"),
        (200, 180, 60, 300, "300 sites with 60 colluders need 201 to sign"),
    ],
)
def test_plans_that_no_graph_over_the_roster_serves_are_refused(
    size: int, minimum: int, colluders: int, members: int, says: str
) -> None:
    from conformance.federation import secure_plan

    changes = {"cohort.minimum": minimum, "cohort.colluders": colluders, "privacy.noise": "none"}
    plan = secure_plan(size, changes)
    RunTerms.of(plan, "run", "0" * 64, size, DIMENSION, 0.0)
    with pytest.raises(PlanError, match=f"^(above 128 sites the graph spans the roster: )?{says}"):
        RunTerms.of(plan, "run", "0" * 64, members, DIMENSION, 0.0)


# --- both ends of an edge


def test_no_partner_can_be_withheld(small: Run) -> None:
    """R5, whichever of the two chose: attack 2 of the first version withheld the choosers."""
    for victim, one_sided in itertools.product("abdefgh", (True, False)):
        run = World(SPARSE).run().join()
        waiting, own = run.waiting[victim], run.chosen(victim)
        for peer in sorted(run.choosers(victim) - own if one_sided else own):
            if peer in waiting:
                del waiting[peer]
                run.upload(victim)
                assert run.world.refused(ProtocolError, f"R5: '{peer}' was never introduced")
                break


def test_introductions_of_others_add_neither_partners_nor_holders(small: Run) -> None:
    others = [name for name in small.names if not small.linked("d", name) and name != "d"]
    assert others
    small.introduce("d", others)
    small.uploads()
    own = next(upload for upload in small.world.uploads if upload.name == "d")
    assert not {small.names[index] for index in own.partners} & set(others)
    assert len(own.message.sealed) == 4


def test_a_credential_with_another_choice_than_was_signed(small: Run) -> None:
    own, names = small.credentials["a"], "bcdefgh"
    other = next(set(four) for four in itertools.combinations(names, 4) if set(four) != small.chosen("a"))
    small.credentials["a"] = own[: 16 + 1184] + bitmap(small, other) + own[-3373:]
    small.introduce("d", ["a"])
    assert small.world.refused(ProtocolError, "the Ed25519 signature of 'a' does not verify")


@pytest.mark.parametrize("chosen", ["abd", "abdef", "abcd"], ids=["three", "five", "itself"])
def test_a_credential_with_what_is_no_choice(small: Run, chosen: str) -> None:
    """Signed by the corrupt site itself; and one without a choice."""
    own = Credential.read(small.credentials["c"], small.terms, small.world.roster, "c")
    false = replace(own, choice=bitmap(small, set(chosen)))
    small.credentials["c"] = false.issue(small.terms, "c", identity_of("c"))
    small.introduce("d", ["c"])
    assert small.world.refused(ProtocolError, "R5: the choice of 'c' is not of 4 others among 8")
    small.credentials["c"] = replace(own, choice=b"").issue(small.terms, "c", identity_of("c"))
    small.introduce("d", ["c"])
    assert small.world.refused(ProtocolError, "the credential of 'c' has 4573 bytes, 4574 were due")


@pytest.mark.parametrize("count", [0, 7, 9])
def test_every_choice_of_the_cohort_is_shown(small: Run, count: int) -> None:
    request = small.mask_request("d")
    small.send_mask("d", replace(request, choices=(*request.choices, request.choices[0])[:count]))
    assert small.world.refused(ProtocolError, f"R5: {count} choices for 8 sites")


def test_a_complete_graph_has_no_choices() -> None:
    run = World().run().join()
    run.send_mask("d", replace(run.mask_request("d"), choices=(b"\x40",) * 7))
    assert run.world.refused(ProtocolError, "R5: 7 choices for 7 sites")


def test_a_site_is_not_told_that_it_chose_others(small: Run) -> None:
    small.upload("d", choices={"d": bitmap(small, set("abce"))})
    small.upload("d", attempt=2, choices={"d": bitmap(small, set("efgh"))})
    assert small.world.refused(ProtocolError, "R5: this site chose others than is shown")


def test_a_shown_choice_is_the_one_that_the_partner_signed(small: Run) -> None:
    partner = next(name for name in small.names if name != "d" and small.linked("d", name) and name != "c")
    threes = map(set, itertools.combinations(sorted(set(small.names) - {partner, "d"}), 3))
    false = next(three | {"d"} for three in threes if three | {"d"} != small.chosen(partner))
    small.upload("d", choices={partner: bitmap(small, false)})
    assert small.world.refused(ProtocolError, f"R5: '{partner}' signed another choice than is shown")


@pytest.mark.parametrize("false", ["abcd", "a", "abcde", "", "abcfgh"], ids=["itself", "1", "5", "none", "6"])
def test_a_shown_choice_that_is_none_is_refused(small: Run, false: str) -> None:
    small.upload("e", choices={"d": bitmap(small, set(false))})
    assert small.world.refused(ProtocolError, "R5: the choice of 'd' is not of 4 others among 8")


# --- one view of all choices


@dataclass(frozen=True)
class Graph(Setting):
    """Twelve sites that choose three each, under a plan with which a test's attack is possible at all."""

    names: tuple[str, ...] = tuple("abcdefghijkl")
    corrupt: tuple[str, ...] = ()
    colluders: int = 0
    plan: int = 0
    noise: NoiseShares | None = None

    def terms(self, run_id: str, roster: Roster) -> RunTerms:
        terms = super().terms(run_id, roster)
        return replace(terms, plan_hash=f"{self.plan:064x}", noise=self.noise, bits=20 if self.noise else 24)


def graphs(setting: Graph) -> Iterator[tuple[int, list[frozenset[int]]]]:
    """Whom the sites choose under one plan after the other."""
    roster, count = setting.roster().hash, len(setting.names)
    for plan in itertools.count():
        drawn = [
            own_choice(identity_of(name), roster, f"{plan:064x}", i, count, 3) for i, name in enumerate(setting.names)
        ]
        yield plan, [frozenset(place for place in range(count) if chose(choice, place)) for choice in drawn]


@lru_cache(maxsize=1)
def closed() -> tuple[Graph, set[str], set[str]]:
    """A plan, at most six sites that chose each other and the dead alone, and the two dead."""
    setting = Graph(minimum=10)
    for plan, chosen in graphs(setting):
        for dead in map(set, itertools.combinations(range(12), 2)):
            for start in set(range(12)) - dead:
                part, edge = {start}, [start]
                while edge:
                    new = chosen[edge.pop()] - dead - part
                    part |= new
                    edge += new
                if len(part) <= 6 and all(chosen[index] & part for index in part):
                    names = setting.names
                    return replace(setting, plan=plan), {names[i] for i in part}, {names[i] for i in dead}
    raise AssertionError


def part_alone() -> World:
    """The sites of a closed part are shown choices of the others that leave them out; the others see the truth.

    Where choices are no part of the context, all are in one: all sign, and the part's masks cancel in it alone.
    """
    setting, part, dead = closed()
    run = World(setting).run().join()
    rest = set(run.names) - part
    false = {name: bitmap(run, set(sorted(rest - {name})[:3])) for name in rest - dead}
    alive = [name for name in run.names if name not in dead]
    for name in alive:
        run.upload(name, choices=false if name in part else None)
    run.finish([run.names.index(name) for name in alive])
    return run.world


def test_a_part_that_is_shown_other_choices_has_nothing_in_common_with_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_graph(monkeypatch, 2, 3)
    world = part_alone()
    assert len({upload.attempt.context for upload in world.uploads}) == 2
    assert world.refused(ProtocolError, "R8: ")  # neither view gathers a certificate
    assert world.oracle.sums() == []


def test_a_part_is_summed_alone_where_choices_are_not_in_the_context_control(monkeypatch: pytest.MonkeyPatch) -> None:
    with_graph(monkeypatch, 2, 3)
    own = "self.coordinator, self.choices, self.cohort"
    bare = property(_without_choices(keys.Attempt.__dict__["context"].func, own))
    monkeypatch.setattr(keys.Attempt, "context", bare)
    world = part_alone()
    assert not world.refusals
    assert [len(each.names) for each in world.oracle.sums()] == [len(closed()[1])]
    assert world.oracle.wins


def _without_choices(function: Callable[..., bytes], what: str) -> Callable[..., bytes]:
    source = textwrap.dedent(inspect.getsource(function)).replace("@cached_property\n", "")
    assert source.count(what) == 1
    names: dict[str, Any] = {}
    exec(source.replace("self.choices", "()"), function.__globals__, names)  # noqa: S102
    made: Callable[..., bytes] = names["context"]
    return made


def test_a_corrupt_site_that_signs_two_choices_spoils_the_sum_and_learns_nothing(small: Run) -> None:
    """Both are properly signed; the two halves that saw one each share neither a context nor a certificate."""
    own = Credential.read(small.credentials["c"], small.terms, small.world.roster, "c")
    everyone = set(map(frozenset, itertools.combinations("abdefgh", 4)))
    other = bitmap(small, set(min(everyone - {frozenset(small.chosen("c"))}, key=sorted)))
    second = replace(own, choice=other).issue(small.terms, "c", identity_of("c"))
    for name in "efgh":
        small.credentials["c"] = second
        if "c" in small.waiting[name]:
            small.waiting[name]["c"] = (second, small.waiting[name]["c"][1])
        else:
            small.introduce(name, ["c"])
    for name in small.names:
        small.upload(name, choices={"c": other} if name in "efgh" else None)
    assert len({upload.attempt.context for upload in small.world.uploads}) == 2
    small.finish(range(8))
    assert small.world.refused(ProtocolError, "R8: ")
    assert small.world.oracle.sums() == []


# --- whom a sum misses


@lru_cache(maxsize=2)
def few_choosers(dead: int) -> tuple[Graph, str, set[str]]:
    """A plan under which at most `dead` sites chose the last one, and `dead` sites with them."""
    setting = Graph(minimum=12 - dead)
    for plan, chosen in graphs(setting):
        choosers = {index for index in range(11) if 11 in chosen[index]}
        if len(choosers) <= dead and not choosers & chosen[11]:
            others = [index for index in range(11) if index not in choosers | chosen[11]]
            dying = choosers | set(others[: dead - len(choosers)])
            return replace(setting, plan=plan), "l", {setting.names[index] for index in dying}
    raise AssertionError


def left_out_by_silence() -> World:
    """Attack 2: the choosers of a site die, and those that it chose are never told: they have no mask with it."""
    setting, victim, dead = few_choosers(3)
    run = World(setting).run().join()
    alive = [name for name in run.names if name not in dead]
    for name in alive:  # the last name encapsulates to all others
        run.waiting[name].pop(victim, None)
    for name in alive:
        run.upload(name)
    run.finish([run.names.index(name) for name in alive])
    return run.world


def test_nobody_is_left_out_by_withholding_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    with_graph(monkeypatch, 2, 3)
    world = left_out_by_silence()
    assert world.refused(ProtocolError, "R5: 'l' was never introduced")
    assert not world.oracle.wins


def test_a_sum_below_the_minimum_opens_where_choosers_may_be_withheld_control(monkeypatch: pytest.MonkeyPatch) -> None:
    with_graph(monkeypatch, 2, 3)
    Removal(
        Member,
        "_edges",
        "    for index in partners:\n",
        "    partners = tuple(index for index in partners if request.cohort[index] in self._peers)\n"
        "    for index in partners:\n",
    ).apply(monkeypatch)
    world = left_out_by_silence()
    assert not world.refusals
    assert [len(each.names) for each in world.oracle.sums()] == [8]  # one less than cohort.minimum
    assert world.oracle.wins


SHARED = NoiseShares(
    multiplier=1.0,
    sites=12,
    minimum=8,
    colluders=0,
    dimension=DIMENSION,
    steps=64,
    clip=1.0,
    bound=1.5,
    bits=20,
    draws=9,
)


def said_to_be_alive(noise: NoiseShares | None) -> World:
    """Nobody asks the victim; its choosers are dead, the others see a false choice of it, and it is in the set.

    A choice of others is not signed for the receiver. What saves the noise is that the victim does not sign either.
    """
    setting, victim, dead = few_choosers(3)
    setting = replace(setting, minimum=8, noise=noise, bits=20 if noise else 24)
    run = World(setting).run().join()
    alive = [name for name in run.names if name not in dead]
    others = [name for name in alive if name != victim]
    for name in others:
        run.upload(name, choices={victim: bitmap(run, dead)})
    run.finish([run.names.index(name) for name in alive], who=others)
    return run.world


def test_a_survivor_that_did_not_sign_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the sum is over signers but for `most_left_out`; never over fewer than the minimum of them."""
    with_graph(monkeypatch, 2, 3)
    world = said_to_be_alive(None)
    assert not world.refusals
    assert [len(each.names) for each in world.oracle.sums()] == [8]
    assert {len(each.survivors) for each in world.openings} == {9}
    assert not world.oracle.wins


@pytest.mark.parametrize("by_signers", [True, False], ids=["signers", "survivors control"])
def test_noise_is_removed_for_those_who_signed(by_signers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine are said to have survived and eight are in the sum: noise for nine would be too little."""
    with_graph(monkeypatch, 2, 3)
    if not by_signers:
        monkeypatch.setattr(RunTerms, "counts_signers", property(lambda self: False))
    world = said_to_be_alive(SHARED)
    assert not world.refusals
    assert len(world.openings) == 8
    counted = 8 if by_signers else 9
    setting, _, dead = few_choosers(3)
    for opening in world.openings:
        for place, sender in enumerate(opening.survivors):
            part = opening.shares[place]
            upload = next((each for each in world.uploads if each.own == sender), None)
            if not part or upload is None:
                continue
            dropped = sum(setting.names[index] in dead for index in upload.partners)
            assert len(part) == 36 * (1 + dropped + len(SHARED.removed(counted)))
    stays = SHARED.base + 9 + sum(SHARED.components[i] for i in SHARED.kept(counted))
    assert (8 * stays >= SHARED.variance) is by_signers


# --- with the numbers of the protocol


@pytest.mark.slow
def test_killing_the_choosers_of_a_site_leaves_nobody_out_of_130() -> None:
    """n_min = 125: attack 2 left three out; `most_left_out` is 0, so the sum is over every signer, the victim too."""
    names = tuple(f"{index:03d}" for index in range(130))
    setting = Setting(names=names, corrupt=(), minimum=125, colluders=0)
    assert most_left_out(130, 125, 0, sparse_thresholds(130, 125, 0).degree or 0) == 0
    run = World(setting).run().join()
    victim = min(names, key=lambda name: len(run.choosers(name)))
    dead = run.choosers(victim)
    assert 0 < len(dead) <= 5
    alive = [name for name in names if name not in dead]
    for name in alive:
        run.upload(name)
    run.finish([names.index(name) for name in alive])
    assert not run.world.refusals
    assert [each.names for each in run.world.oracle.sums()] == [frozenset(alive)]
