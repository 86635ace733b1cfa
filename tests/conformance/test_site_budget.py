"""Item 5, the `site` half: epsilon never shrinks, and a crash anywhere costs what one run without crashes costs."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_client import store as store_module
from accord_client.ledger.chain import Writing
from accord_client.site import Site
from accord_shared.dp.accounting import epsilon, plan_epsilon
from accord_shared.files import write_atomic
from accord_shared.messages import Refusal, TrainReply
from accord_shared.plan import Plan
from conformance.kill import kill_plan
from conformance.lab import Lab, ask, joint_weights, lab_plan, request, trained

ROUNDS = 4


class Crash(BaseException):
    """The process dies here: nothing catches it."""


def spent(site: Site, plan: Plan) -> float:
    return epsilon(site.releases(plan).events, plan.privacy.delta, plan.privacy.accountant)


def one_shot(plan: Plan) -> float:
    cost = plan_epsilon(plan, plan.rounds_per_site)
    assert cost is not None
    return cost


def test_epsilon_rises_round_by_round_to_the_plan_s(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    site, seen = lab.joined(plan), [0.0]
    for number in range(1, ROUNDS + 1):
        trained(ask(site, plan, lab, number))
        seen.append(spent(site, plan))
    assert all(earlier < later for earlier, later in itertools.pairwise(seen))
    assert seen[-1] == pytest.approx(one_shot(plan))
    assert plan.privacy.epsilon is not None
    assert 0.999 * plan.privacy.epsilon < seen[-1] <= plan.privacy.epsilon


def test_a_new_process_between_all_messages_changes_nothing(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    lab.joined(plan)
    for number in range(1, ROUNDS + 1):
        first = trained(ask(lab.site(), plan, lab, number))
        for attempt in (2, 3):
            again = trained(ask(lab.site(), plan, lab, number, attempt=attempt, run_id="another"))
            assert again.update.tobytes() == first.update.tobytes()
            assert (again.attempt, again.run_id) == (attempt, "another")
    assert spent(lab.site(), plan) == pytest.approx(one_shot(plan))


class Dying:
    """`write_atomic` that dies at its `at`-th call: before the write, within it, or just after."""

    def __init__(self, at: int, when: str) -> None:
        self.at, self.when, self.calls = at, when, 0

    def __call__(self, path: Path, data: bytes, **options: Any) -> None:
        self.calls += 1
        if self.calls != self.at:
            write_atomic(path, data, **options)
            return
        if self.when == "within":
            (path.parent / f".{path.name}.torn.tmp").write_bytes(data[: len(data) // 2])
        if self.when == "after":
            write_atomic(path, data, **options)
        raise Crash


def drive(lab: Lab, plan: Plan, rounds: tuple[int, ...], lose: Callable[[int, int], bool]) -> dict[int, set[bytes]]:
    """A coordinator that repeats each round until its reply arrives; returns all bytes that ever left, by round."""
    left: dict[int, set[bytes]] = {number: set() for number in rounds}
    site = None
    for number in rounds:
        for attempt in range(1, 9):
            try:
                site = site or lab.joined(plan)
                answer = ask(site, plan, lab, number, attempt=attempt)
            except Crash:
                site = None
                continue
            left[number].add(trained(answer).update.tobytes())
            if not lose(number, attempt):
                break
        else:
            raise AssertionError(f"round {number} never finished")
    return left


@pytest.mark.parametrize("when", ["before", "within", "after"])
@pytest.mark.parametrize("rounds", [(1, 2, 3, 4), (1, 3, 4)], ids=["all", "skipping"])
def test_a_crash_at_any_write_costs_nothing(
    when: str, rounds: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = lab_plan()
    for at in range(1, 2 * len(rounds) + 4):
        lab = Lab(tmp_path / f"{when}-{at}")
        monkeypatch.setattr(store_module, "write_atomic", Dying(at, when))
        left = drive(lab, plan, rounds, lose=lambda number, attempt: attempt == 1)
        assert all(len(updates) == 1 for updates in left.values())
        assert spent(lab.site(), plan) == pytest.approx(plan_epsilon(plan, len(rounds)) or 0.0)


@pytest.mark.parametrize("following", [2, 3, 4])
def test_a_crash_before_a_release_leaves_the_release_before_it_whole(
    following: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: two file names by the round's parity let round 3's unpaid update go out as round 1's."""
    lab, plan = Lab(tmp_path), lab_plan()
    first = trained(ask(lab.joined(plan), plan, lab, 1))
    append = Writing.append

    def die(self: Writing, kind: str, body: str, **options: Any) -> None:
        if kind == "release":  # the update is stored, its charge is not
            raise Crash
        append(self, kind, body, **options)

    monkeypatch.setattr(Writing, "append", die)
    with pytest.raises(Crash):
        ask(lab.site(), plan, lab, following)
    monkeypatch.setattr(Writing, "append", append)
    again = trained(ask(lab.site(), plan, lab, 1))
    assert again.update.tobytes() == first.update.tobytes()


def test_a_disk_that_is_full_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accord_shared.errors import OutputError

    lab, plan = Lab(tmp_path), lab_plan()
    site = lab.joined(plan)

    def full(path: Path, data: bytes, **options: Any) -> None:
        raise OutputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(store_module, "write_atomic", full)
    answer = ask(site, plan, lab, 1)
    assert isinstance(answer, Refusal)
    assert answer.kind == "OutputError"
    assert str(tmp_path) not in answer.reason
    assert site.releases(plan).rounds == 0


# --- what a coordinator may try -------------------------------------------------------------------------------------


def refused(answer: object, kind: str) -> Refusal:
    assert isinstance(answer, Refusal), answer
    assert answer.kind == kind
    return answer


def test_another_model_for_a_released_round_is_refused(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    site = lab.joined(plan)
    ask(site, plan, lab, 1)
    other = joint_weights(plan, lab, 1)
    other[0] = np.nextafter(other[0], np.float32(9.0))
    for fresh in (site, lab.site()):
        refused(fresh.handle(request(plan, 1, other)), "ProtocolError")
        refused(fresh.handle(request(plan, 1, other, run_id="other", attempt=9)), "ProtocolError")
    assert site.releases(plan).rounds == 1


def test_an_older_round_is_refused(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    site = lab.joined(plan)
    ask(site, plan, lab, 2)
    refused(ask(site, plan, lab, 1), "ProtocolError")
    assert site.releases(plan).rounds == 1


@pytest.mark.parametrize("number", [0, -1, ROUNDS + 1, 10**9])
def test_rounds_that_the_plan_does_not_have_are_refused(number: int, tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    weights = joint_weights(plan, lab, 1)
    refused(lab.joined(plan).handle(request(plan, number, weights)), "ProtocolError")


def test_the_budget_ends(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan({"run.rounds": 6, "run.rounds_per_site": 2})
    site = lab.joined(plan)
    trained(ask(site, plan, lab, 1))
    last = trained(ask(site, plan, lab, 4))
    refused(ask(site, plan, lab, 5), "BudgetExhausted")
    refused(ask(lab.site(), plan, lab, 6), "BudgetExhausted")
    assert trained(ask(site, plan, lab, 4)).update.tobytes() == last.update.tobytes()  # resent, not spent
    assert spent(site, plan) == pytest.approx(one_shot(plan))


def test_sigma_is_calibrated_to_the_rounds_of_a_site() -> None:
    long = lab_plan({"run.rounds": 40, "run.rounds_per_site": 4})
    assert plan_epsilon(long, 4) == plan_epsilon(lab_plan(), 4)
    assert long.steps == 4


def test_a_plan_that_was_never_joined_is_refused(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    refused(ask(lab.site(), plan, lab, 1), "ProtocolError")


def test_a_plan_that_is_not_its_hash_is_refused(tmp_path: Path) -> None:
    """Hashes that agree in their first digits are cheap to find: a stored plan is checked against the whole hash."""
    lab, plan = Lab(tmp_path), lab_plan()
    weaker = plan.revised({"privacy.epsilon": 1e6})
    lab.joined(plan)
    lab.store().keep_plan(plan.hash, weaker.to_json())
    answer = ask(lab.site(), plan, lab, 1)
    assert isinstance(answer, Refusal), "trained under another plan than the hash names"


def test_plans_whose_hashes_begin_alike_do_not_share_files(tmp_path: Path) -> None:
    one, two = "ab" * 32, "ab" * 16 + "cd" * 16
    store = Lab(tmp_path).store()
    store.keep_plan(one, "one")
    store.keep_plan(two, "two")
    assert store.plan_json(one) == "one"
    store.release(one, 1, "m", np.zeros(2, np.float32), None)
    assert store.releases(two).rounds == 0


def test_two_requests_at_once_are_charged_one_after_another(tmp_path: Path) -> None:
    """Two processes (here: sites on one folder) that train the same round must not both send."""
    lab, plan = Lab(tmp_path), lab_plan()
    answers: list[object] = []
    first, second = lab.joined(plan), lab.joined(plan)
    other = joint_weights(plan, lab, 1) + 1
    released = type(first._store).release

    def late(*arguments: Any, **options: Any) -> Any:  # another process is served between training and charge
        if not answers:
            answers.append(None)
            import threading

            rival = threading.Thread(target=lambda: answers.append(second.handle(request(plan, 1, other))))
            rival.start()
            rival.join(timeout=0.5)
            answers.append(rival)
        return released(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(first._store), "release", late)
        answers.append(ask(first, plan, lab, 1))
        for answer in answers:
            if hasattr(answer, "join"):
                answer.join()  # type: ignore[attr-defined]
    sent = [answer for answer in answers if isinstance(answer, TrainReply)]
    assert len(sent) == first.releases(plan).rounds == 1


# --- kill -9 --------------------------------------------------------------------------------------------------------

KILLS, MANY_ROUNDS = 8, 50


def test_kill_9_at_any_moment_costs_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "conformance.kill", str(tmp_path), str(KILLS), str(MANY_ROUNDS)]
    tests = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=300, check=True)
    exits = [int(line) for line in done.stdout.split()]
    assert exits[-1] == 0
    assert exits.count(-signal.SIGKILL) >= 2  # the machine may be fast, but not that fast
    updates: dict[str, set[str]] = {}
    for line in (tmp_path / "sent").read_text().splitlines():
        number, digest = line.split()
        updates.setdefault(number, set()).add(digest)
    assert len(updates) == MANY_ROUNDS
    assert all(len(digests) == 1 for digests in updates.values())
    plan = kill_plan(MANY_ROUNDS)
    assert spent(Lab(tmp_path / "lab").site(), plan) == pytest.approx(one_shot(plan))
