"""Rolled-back ledgers: the coordinator and every peer notice, and the site recovers from what they kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from accord_client.ledger.receipts import Receipt
from accord_server.witness import Witness
from accord_shared.errors import CheckpointError, LedgerRolledBack, ProtocolError
from accord_shared.messages import Joined, MaskRequest, Refusal
from accord_shared.receipts import Head
from conformance.federation import identity
from conformance.secure_lab import SecureLab, secure_lab_plan

SIZE = 5


@pytest.fixture
def lab(tmp_path: Path) -> SecureLab:
    plan = secure_lab_plan(
        SIZE, **{"privacy.noise": "cohort", "run.max_extra_attempts": 4, "cohort.minimum": 4, "run.rounds": 8}
    )
    made = SecureLab(tmp_path, plan, SIZE)
    made.exchange.join()
    assert len(made.collect(1).survivors) == SIZE
    return made


def set_back(lab: SecureLab, name: str, saved: Path) -> None:
    """The site's disk is what it was, its process starts anew."""
    folder = lab.labs[name].folder / "site"
    shutil.rmtree(folder)
    shutil.copytree(saved, folder)
    lab.start(name)


def save(lab: SecureLab, name: str) -> Path:
    target = lab.labs[name].folder / "backup"
    shutil.copytree(lab.labs[name].folder / "site", target)
    return target


def test_receipts_arrive_with_every_upload(lab: SecureLab) -> None:
    witness = lab.aggregation._membership.witness
    for name in lab.names:
        receipt = Receipt.from_json(witness.receipt(name))
        assert receipt.head == witness.head(name)
        assert receipt.head.seq >= 2
        account = receipt.open(identity(name))
        assert account.costs
        assert str(account.costs[0].plan) not in witness.receipt(name).decode()  # sealed


def test_the_coordinator_does_not_take_in_an_old_copy_and_tells_the_site(lab: SecureLab) -> None:
    name = lab.names[0]
    saved = save(lab, name)
    assert len(lab.collect(2).survivors) == SIZE
    set_back(lab, name, saved)
    lab.exchange.joined[name] = lab.sites[name].handle(lab.enquiry)  # type: ignore[assignment]
    assert len(lab.collect(3).survivors) == SIZE - 1
    told = [reply for reply in lab.replies[name] if isinstance(reply, Refusal)]
    assert told[-1].kind == "LedgerRolledBack"
    kept = sorted((lab.labs[name].folder / "site").glob("receipt-*.json"))
    assert kept, "the receipt is kept for the operator"
    store = lab.labs[name].store()
    before = store.releases(lab.plan.hash).rounds
    assert store.ledger.recover(Receipt.from_json(kept[-1].read_text()), identity(name))
    assert store.releases(lab.plan.hash).rounds == before + 1
    lab.start(name)
    lab.exchange.joined[name] = lab.sites[name].handle(lab.enquiry)  # type: ignore[assignment]
    survivors = [lab.collect(number).survivors for number in (4, 5)]
    assert name not in survivors[0]  # introduced beside the others' trips
    assert name in survivors[1]


def test_a_coordinator_that_forgot_is_no_way_around_the_peers(lab: SecureLab) -> None:
    """R11: the coordinator colludes, but each honest partner has the newest head on its own disk."""
    name = lab.names[0]
    saved = save(lab, name)
    assert len(lab.collect(2).survivors) == SIZE
    assert len(lab.collect(3).survivors) == SIZE  # the heads of round 2 are seen by the peers
    set_back(lab, name, saved)
    for other in lab.names[1:]:
        lab.start(other)  # restarted: what they remember is on disk
    fresh = lab.new_aggregation()
    for each in lab.names:
        lab.exchange.joined[each] = lab.sites[each].handle(lab.enquiry)  # type: ignore[assignment]
    aggregate = fresh.collect(lab.request(4), lab.names, lab.exchange)
    assert not aggregate.survivors
    refusals = {site: reason for site, reason in aggregate.failures.items() if "ledger" in reason}
    assert set(refusals) == set(lab.names[1:]), aggregate.failures
    assert all(lab.rounds(other) == 3 for other in lab.names[1:])  # and nothing was charged


def test_a_forged_or_foreign_receipt_is_refused(lab: SecureLab) -> None:
    name, other = lab.names[:2]
    witness = lab.aggregation._membership.witness
    data = witness.receipt(name)
    foreign = replace(lab.enquiry, receipt=witness.receipt(other))
    answer = lab.sites[name].handle(foreign)
    assert isinstance(answer, Refusal)
    assert answer.kind == "ProtocolError"
    newer = Receipt.from_json(data).model_copy(update={"seq": 99})
    answer = lab.sites[name].handle(replace(lab.enquiry, receipt=newer.to_json().encode()))
    assert isinstance(answer, Refusal)
    assert answer.kind == "ProtocolError"
    assert isinstance(lab.sites[name].handle(replace(lab.enquiry, receipt=data)), Joined)  # its own, up to date


def test_a_witness_survives_a_restart(lab: SecureLab) -> None:
    kept: list[str] = []
    witness = lab.aggregation._membership.witness
    witness._on_change = kept.append
    witness.keep()
    again = Witness(lab.roster)
    again.restore(kept[-1])
    name = lab.names[0]
    assert again.head(name) == witness.head(name)
    with pytest.raises(LedgerRolledBack, match="went back"):
        again.see(name, Head(1, bytes(32)))
    with pytest.raises(LedgerRolledBack):
        again.see(name, Head(witness.head(name).seq, bytes(32)))
    with pytest.raises(CheckpointError):
        again.restore(kept[-1].replace('"seq\\":', '"seq\\":1'))
    with pytest.raises(ProtocolError):
        again.see(name, Head(10**6, bytes(32)), b"{}")


def test_the_head_is_signed_into_every_bundle(lab: SecureLab) -> None:
    request = lab.last(lab.names[0], MaskRequest)
    from accord_shared.secagg.keys import Bundle

    assert len(lab.collect(2).survivors) == SIZE
    request = lab.last(lab.names[0], MaskRequest)
    heads = [Bundle.parse(bundle).head for bundle in request.bundles]
    assert all(head.seq >= 2 for head in heads)
    name = lab.names[1]
    bundle = bytearray(request.bundles[1])
    bundle[16 + 4 + 32 + 7] ^= 1
    with pytest.raises(ProtocolError):
        Bundle.read(bytes(bundle), lab.terms, lab.roster.member(name))


def test_two_runs_of_the_same_sites_may_overlap(lab: SecureLab, tmp_path: Path) -> None:
    """Each run's bundles lag behind what the other run has released since: one attempt is lost to that, not the run."""
    other = SecureLab(tmp_path, lab.plan.revised({"run.name": "other"}), SIZE)
    other.exchange.join()
    for number in (2, 3, 4):
        assert len(lab.collect(number).survivors) == SIZE
    attempts = [other.collect(1, attempt) for attempt in (1, 2, 3)]
    assert any("LedgerBehind" in reason for reason in attempts[0].failures.values())
    assert [len(each.survivors) for each in attempts if each.survivors] == [SIZE]
    for number in (5, 6, 7):
        assert len(lab.collect(number).survivors) == SIZE
        assert len(other.collect(number).survivors) == SIZE
