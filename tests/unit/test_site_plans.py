"""The book of offered plans: no plan begins without a yes, no yes outlives the policy, damage is said."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from accord_client import plans
from accord_client.plans import PlanBook
from accord_shared.errors import BadInput, OutputError, PlanNotApproved, PolicyRefused, SettingsError
from accord_shared.plan import Plan
from conftest import plan_of
from coordinator_lab import at_once

ME, OTHER = "a" * 64, "b" * 64
PLAN = plan_of()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def book(tmp_path: Path) -> PlanBook:
    return PlanBook(tmp_path / "plans", clock=Clock())


def test_the_first_use_waits_for_the_operator(book: PlanBook) -> None:
    offered = book.offer(PLAN, ME, None)
    assert (offered.state, offered.signer, offered.seen_us) == ("waiting", ME, 1_001_000_000)
    assert "epsilon 8" in offered.detail
    assert "noise site" in offered.detail
    for _ in range(2):
        with pytest.raises(PlanNotApproved, match=f"{PLAN.hash[:12]}… waits for this site's operator"):
            book.require(PLAN.hash)
    assert book.approve(PLAN.hash).state == "approved"
    book.require(PLAN.hash)


@pytest.mark.parametrize("asked", ["c" * 64, "", "../../etc/passwd", PLAN.hash[:12], PLAN.hash.upper()])
def test_a_plan_that_was_never_offered_is_refused(asked: str, book: PlanBook) -> None:
    book.offer(PLAN, ME, None, automatic=True)
    with pytest.raises(PlanNotApproved, match="never offered"):
        book.require(asked)


def test_what_is_said_is_durable(book: PlanBook, tmp_path: Path) -> None:
    book.offer(PLAN, ME, None)
    book.approve(PLAN.hash)
    again = PlanBook(tmp_path / "plans")
    again.require(PLAN.hash)
    assert again.records() == book.records()
    (path,) = (tmp_path / "plans").glob("*.json")
    assert path.name == f"{PLAN.hash}.json"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_plan_outside_the_policy_cannot_be_approved(book: PlanBook) -> None:
    refused = book.offer(PLAN, ME, "privacy.noise: too little", automatic=True)
    assert (refused.state, refused.detail) == ("refused", "privacy.noise: too little")
    for call in (book.approve, book.require):
        with pytest.raises(PolicyRefused, match="too little"):
            call(PLAN.hash)


def test_a_policy_that_became_stricter_stands_above_an_approval(book: PlanBook) -> None:
    book.offer(PLAN, ME, None)
    book.approve(PLAN.hash)
    book.offer(PLAN, ME, "run.rounds: too many")
    with pytest.raises(PolicyRefused):
        book.require(PLAN.hash)
    book.offer(PLAN, ME, None)
    book.require(PLAN.hash)  # the operator's yes was to this very plan


def test_what_a_refused_plan_was_not_given_it_does_not_get_later(book: PlanBook) -> None:
    book.offer(PLAN, ME, "run.rounds: too many", automatic=True)
    book.offer(PLAN, ME, None)
    with pytest.raises(PlanNotApproved):
        book.require(PLAN.hash)


def test_a_policy_may_approve(book: PlanBook) -> None:
    assert book.offer(PLAN, ME, None, automatic=True).state == "approved"
    book.require(PLAN.hash)


def test_one_plan_is_one_entry(book: PlanBook) -> None:
    first = book.offer(PLAN, ME, None)
    again = book.offer(PLAN, OTHER, None)
    assert (again.seen_us, again.signer) == (first.seen_us, OTHER)
    assert len(book.records()) == 1


def test_plans_are_found_by_their_first_digits(book: PlanBook) -> None:
    book.offer(PLAN, ME, None)
    other = plan_of({"run.rounds": 5})
    book.offer(other, ME, None)
    assert book.find(PLAN.hash[:8]).hash == book.find(PLAN.hash).hash == PLAN.hash
    assert [record.hash for record in book.records()] == [PLAN.hash, other.hash]
    for wrong in ("c" * 64, "c" * 8):
        with pytest.raises(BadInput, match="no plans of hash"):
            book.find(wrong)
    for wrong in (PLAN.hash[:7], "", "*", "../plans", "ABCDEFGH", f"{PLAN.hash}0"):
        with pytest.raises(BadInput, match="no plan hash"):
            book.approve(wrong)


def test_the_whole_plan_is_kept(book: PlanBook) -> None:
    info = book.offer(PLAN, ME, None).info()
    assert Plan.from_json(info.plan) == PLAN
    assert (info.hash, info.state, info.signer, info.seen_us) == (PLAN.hash, "waiting", ME, 1_001_000_000)


@pytest.mark.parametrize("damage", ["cut", "empty", "other plan", "unknown key", "not a plan", "binary"])
def test_a_damaged_file_allows_nothing(damage: str, book: PlanBook, tmp_path: Path) -> None:
    book.offer(PLAN, ME, None, automatic=True)
    path = tmp_path / "plans" / f"{PLAN.hash}.json"
    text = path.read_text()
    other = json.loads(text) | {"plan": plan_of({"privacy.epsilon": 100.0}).to_json()}
    path.write_bytes(
        {
            "cut": text[:-9].encode(),
            "empty": b"",
            "other plan": json.dumps(other).encode(),
            "unknown key": json.dumps(json.loads(text) | {"more": 1}).encode(),
            "not a plan": json.dumps(json.loads(text) | {"plan": "{}"}).encode(),
            "binary": b"\xff\x00",
        }[damage]
    )
    for call in (
        lambda: book.require(PLAN.hash),
        lambda: book.approve(PLAN.hash),
        lambda: book.offer(PLAN, ME, None),
        book.records,
    ):
        with pytest.raises(SettingsError, match=r"is damaged") as refused:
            call()
        assert str(path) in str(refused.value)


def test_a_flood_of_plans_ends(book: PlanBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST_PLANS", 2)
    for rounds in (4, 5):
        book.offer(plan_of({"run.rounds": rounds}), ME, None)
    with pytest.raises(PolicyRefused, match="2 plans were offered already"):
        book.offer(plan_of({"run.rounds": 6}), ME, None)
    book.offer(plan_of({"run.rounds": 5}), ME, None, automatic=True)  # known ones are not hit
    monkeypatch.setattr(plans, "MOST_BYTES", 100)
    monkeypatch.setattr(plans, "MOST_PLANS", 9)
    with pytest.raises(PolicyRefused, match="longer"):
        book.offer(plan_of({"run.rounds": 6}), ME, None)
    assert len(book.records()) == 2


def test_a_folder_open_to_others_is_refused(book: PlanBook, tmp_path: Path) -> None:
    book.offer(PLAN, ME, None)
    (tmp_path / "plans").chmod(0o755)
    with pytest.raises(OutputError, match="closed to others"):
        book.approve(PLAN.hash)


def test_an_approval_is_not_lost_to_an_offer_at_the_same_time(book: PlanBook) -> None:
    book.offer(PLAN, ME, None)
    begin = threading.Barrier(4)

    def offer() -> None:
        begin.wait(10)
        for _ in range(10):
            book.offer(PLAN, ME, None)
            book.offer(PLAN, OTHER, None)

    def approve() -> None:
        begin.wait(10)
        book.approve(PLAN.hash)

    at_once(offer, offer, offer, approve)
    book.require(PLAN.hash)
