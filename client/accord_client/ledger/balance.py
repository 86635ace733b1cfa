"""What follows from a ledger's entries: a fold, so that replaying them always gives the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import assert_never

from accord_client.ledger.chain import Row
from accord_client.ledger.entries import (
    Account,
    Attempted,
    Cost,
    DataSet,
    Declared,
    Entry,
    Imported,
    Made,
    Note,
    Opened,
    Progress,
    Released,
    Reserved,
    Spent,
    read_entry,
    read_note,
)
from accord_shared.dp.events import Event, merge
from accord_shared.errors import LedgerDamaged
from accord_shared.receipts import NO_LEDGER, Head


@dataclass(frozen=True)
class Releases:
    """Releases under one plan: how many, the last one and the weights it was trained from, their cost."""

    rounds: int = 0
    """Releases. Under shared noise a repeated attempt is one more, so there may be more than rounds."""
    last_round: int = 0
    last_model: str = ""
    last_update: str = ""
    last_digest: str = ""
    """File name and SHA-256 of the update that was released last; empty where nothing is ever resent."""
    last_cohort: tuple[str, ...] = ()
    """Under secure aggregation: the cohort of the last round's first attempt."""
    last_attempt: int = 0
    """The last attempt of the last round that an update was masked for, in any run or process."""
    repeats: int = 0
    """How often the last round's update was masked again, for further attempts."""
    opened_round: int = 0
    """The last round of which this site helped to open a sum."""
    events: tuple[Event, ...] = field(default_factory=tuple)

    @property
    def steps(self) -> int:
        """Noisy steps that were charged."""
        return sum(event.steps for event in self.events)

    def released(self, entry: Released) -> Releases:
        """With one more release.

        Raises:
            LedgerDamaged: its round is before the last one.
        """
        if entry.round < self.last_round:
            raise LedgerDamaged(f"the ledger has a release of round {entry.round} after one of round {self.last_round}")
        return replace(
            self,
            rounds=self.rounds + 1,
            last_round=entry.round,
            last_model=entry.model,
            last_update=entry.update,
            last_digest=entry.digest,
            last_cohort=self.last_cohort if entry.round == self.last_round else entry.cohort,
            last_attempt=entry.attempt,
            repeats=0,
            events=merge([*self.events, *([entry.event] if entry.event else [])]),
        )

    def imported(self, progress: Progress) -> Releases:
        """As far as another copy of the ledger went. Of its last round nothing else is known, so nothing is resent."""
        opened = max(self.opened_round, progress.opened_round)
        after = replace(self, rounds=self.rounds + progress.releases, opened_round=opened)
        if progress.last_round < self.last_round:
            return after
        same = progress.last_round == self.last_round
        attempt = max(self.last_attempt, progress.last_attempt) if same else progress.last_attempt
        return replace(
            after,
            last_round=progress.last_round,
            last_attempt=attempt,
            last_model="",
            last_update="",
            last_digest="",
            last_cohort=(),
        )


class Balance:
    """The state after the entries so far. `apply` takes them in their order."""

    def __init__(self) -> None:
        self.head = NO_LEDGER
        self.entries = 0
        self.ledger = ""
        """The ledger's id, 16 bytes in hexadecimal."""
        self.declared: dict[str, DataSet] = {}
        self.imports: list[Imported] = []
        self._plans: dict[str, Releases] = {}
        self._spent: dict[tuple[str, str], Spent] = {}
        self._reserved: dict[str, Reserved] = {}
        self._attempted: dict[str, Attempted] = {}
        self._lineage: list[tuple[str, str]] = []

    def apply(self, row: Row) -> None:
        """Take in the next entry.

        Raises:
            LedgerDamaged: it is malformed, or cannot follow the entries so far.
        """
        entry = read_entry(row.kind, row.body)
        if (self.head.seq == 0) != isinstance(entry, Made):
            raise LedgerDamaged(f"entry {row.seq} of the ledger cannot be of kind {row.kind}")
        self._apply(entry)
        self.head = row.head
        self.entries += 1

    def remind(self, notes: Iterable[tuple[str, str]]) -> None:
        """Take in the notes, kind and body: all that there are now.

        Raises:
            LedgerDamaged: one is malformed.
        """
        read: list[Note] = [read_note(kind, body) for kind, body in notes]
        self._reserved = {note.plan: note for note in read if isinstance(note, Reserved)}
        self._attempted = {note.plan: note for note in read if isinstance(note, Attempted)}

    def _apply(self, entry: Entry) -> None:
        match entry:
            case Made():
                self.ledger = entry.ledger
            case Declared():
                self.declare(entry.dataset)
            case Released():
                self._release(entry)
            case Opened():
                before = self.plan(entry.plan)
                self._plans[entry.plan] = replace(before, opened_round=max(before.opened_round, entry.round))
            case Imported():
                self._import(entry)
            case _:
                assert_never(entry)

    def declare(self, dataset: DataSet) -> None:
        """The operator's newest word on a data set."""
        self.declared[dataset.name] = dataset
        if dataset.derived_from is not None:
            self._link(dataset.name, dataset.derived_from)

    def _link(self, one: str, other: str) -> None:
        if (one, other) not in self._lineage:
            self._lineage.append((one, other))

    def _release(self, entry: Released) -> None:
        self._plans[entry.plan] = self.plan(entry.plan).released(entry)
        self._add(entry.dataset, entry.plan, Spent.of(entry.event))

    def _add(self, dataset: str, plan: str, spent: Spent) -> None:
        key = (dataset, plan)
        self._spent[key] = self._spent.get(key, Spent()) + spent

    def _import(self, entry: Imported) -> None:
        self.imports.append(entry)
        for one, other in entry.account.lineage:
            self._link(one, other)
        for cost in entry.costs:
            self._add(cost.dataset, cost.plan, cost.spent)
            before = self.plan(cost.plan)
            self._plans[cost.plan] = replace(before, events=merge([*before.events, *cost.events]))
        for progress in entry.progress:
            self._plans[progress.plan] = self.plan(progress.plan).imported(progress)

    # --- what is asked

    def plan(self, plan_hash: str) -> Releases:
        """Releases under one plan."""
        found, note = self._plans.get(plan_hash, Releases()), self._attempted.get(plan_hash)
        if note is None or note.round != found.last_round:
            return found
        return replace(found, last_attempt=max(found.last_attempt, note.attempt), repeats=note.times)

    def reservation(self, plan_hash: str) -> Reserved | None:
        """The plan's open reservation."""
        return self._reserved.get(plan_hash)

    def lineage(self, dataset: str) -> frozenset[str]:
        """All data sets that share this one's budget: those of the same root, itself among them."""
        found, left = {dataset}, [dataset]
        while left:
            name = left.pop()
            near = {a if b == name else b for a, b in self._lineage if name in (a, b)} - found
            found |= near
            left += near
        return frozenset(found)

    def datasets(self) -> tuple[str, ...]:
        """All that were declared, used, or named as an origin."""
        origins = {name for link in self._lineage for name in link}
        return tuple(sorted({*self.declared, *origins, *(dataset for dataset, _ in self._spent)}))

    def by_plan(self, dataset: str) -> dict[str, Spent]:
        """What each plan spent of the data set itself."""
        return {plan: spent for (name, plan), spent in sorted(self._spent.items()) if name == dataset}

    def spent(self, dataset: str, plan_hash: str | None = None) -> Spent:
        """What is spent for ever of a data set and all of its lineage, by one plan or by all."""
        family = self.lineage(dataset)
        return Spent.sum(
            spent for (name, plan), spent in self._spent.items() if name in family and plan_hash in (None, plan)
        )

    def reserved_by_others(self, dataset: str, plan_hash: str) -> Spent:
        """Open reservations of other plans on the data set's lineage."""
        family = self.lineage(dataset)
        others = [entry for plan, entry in self._reserved.items() if plan != plan_hash and entry.dataset in family]
        return Spent.sum(Spent.of(entry.event) for entry in others)

    def account(self, trail: tuple[Head, ...] = ()) -> Account:
        """All that must not be forgotten."""
        costs = [
            Cost(dataset=dataset, plan=plan, events=spent.events, bare=spent.bare)
            for (dataset, plan), spent in sorted(self._spent.items())
        ]
        progress = [
            Progress(
                plan=plan,
                releases=releases.rounds,
                last_round=releases.last_round,
                last_attempt=releases.last_attempt,
                opened_round=releases.opened_round,
            )
            for plan, releases in sorted(self._plans.items())
        ]
        return Account(
            costs=tuple(costs),
            progress=tuple(progress),
            lineage=tuple(sorted(self._lineage)),
            trail=tuple((head.seq, head.hash.hex()) for head in trail),
        )


def lacking(account: Account, common: Account) -> tuple[tuple[Cost, ...], tuple[Progress, ...]]:
    """What `account` has beyond `common`, which is an earlier state of the same ledger."""
    known = {(cost.dataset, cost.plan): cost.spent for cost in common.costs}
    costs = []
    for cost in account.costs:
        more = cost.spent - known.get((cost.dataset, cost.plan), Spent())
        if more != Spent():
            costs.append(Cost(dataset=cost.dataset, plan=cost.plan, events=more.events, bare=more.bare))
    before = {progress.plan: progress for progress in common.progress}
    progress = [
        each.model_copy(update={"releases": max(0, each.releases - before[each.plan].releases)})
        if each.plan in before
        else each
        for each in account.progress
        if each != before.get(each.plan)
    ]
    return tuple(costs), tuple(progress)
