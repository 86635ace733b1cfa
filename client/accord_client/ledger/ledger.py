"""The privacy ledger of a site: what was spent of each data set, across plans and runs, and what may still be.

`reserve` comes before training, `release` before the first byte leaves; both are on the disk when they return. What
was released is spent for ever. A reservation is not: nothing left the machine, so it may be used again, or be
replaced; until then it counts against what other plans may spend of the same data set and its lineage.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accord_client.ledger.balance import Balance, Releases, lacking
from accord_client.ledger.chain import RECOVER, Chain, Reading, Writing
from accord_client.ledger.entries import (
    ATTEMPT,
    RESERVE,
    Account,
    Attempted,
    DataSet,
    Declared,
    Entry,
    Imported,
    Made,
    Note,
    Opened,
    Released,
    Reserved,
    Spent,
    kind_of,
    made,
)
from accord_client.ledger.limits import LimitCheck, epsilon_of
from accord_client.ledger.receipts import Receipt, Signer, Statement, make_receipt
from accord_shared.dp.events import Event
from accord_shared.errors import LedgerRolledBack, ProtocolError
from accord_shared.receipts import NO_LEDGER, Head, Seen


class Ledger:
    """The ledger in a folder, made when it is first written to.

    Other processes may write to it: every method reads on from where this process was. Besides their own, all methods
    raise the errors of `Chain`. `datasets` are declared before anything is written; if any data set was ever
    declared, others are refused.
    """

    def __init__(self, folder: Path, *, durable: bool = True, datasets: Sequence[DataSet] = ()) -> None:
        self._chain = Chain(folder, durable=durable)
        self._datasets = tuple(datasets)
        self._balance = Balance()
        self._limits = LimitCheck()
        self._accounted: frozenset[Head] = frozenset()
        """Entries that a receipt, which is being imported, accounts for."""

    # --- reading

    @contextmanager
    def _read(self) -> Iterator[tuple[Balance, Reading | None]]:
        """The newest state; no file to read from where there is no ledger yet."""
        with self._chain.locked():
            if not self._chain.exists():
                if self._balance.head.seq:
                    raise LedgerRolledBack(f"{self._chain.path.name} is gone; {RECOVER}")
                yield self._balance, None
                return
            with self._chain.reading() as reading:
                yield self._caught_up(reading), reading

    def _caught_up(self, reading: Reading) -> Balance:
        new = self._balance.head.seq == 0
        try:
            for row in reading.after(self._balance.head):
                self._balance.apply(row)
        except LedgerRolledBack:
            recovered = _replayed(reading)
            if not any(self._balance.head in _heads(entry) for entry in recovered.imports):
                raise
            self._balance, new = recovered, True  # `recover` counted all that this process knew
        if new:
            self._chain.check_owner(self._balance.ledger, reading, self._balance.head, self._accounted)
        self._balance.remind(reading.notes())
        return self._balance

    def releases(self, plan_hash: str) -> Releases:
        """What was released under a plan."""
        with self._read() as (balance, _):
            return balance.plan(plan_hash)

    def spent(self, dataset: str) -> Spent:
        """What was spent of a data set and its lineage."""
        with self._read() as (balance, _):
            return balance.spent(dataset)

    def epsilon(self, dataset: str, delta: float, accountant: str = "pld", *, colluding: bool = False) -> float:
        """ε of a data set and its lineage: against coordinator and public, or if all others collude."""
        return epsilon_of(self.spent(dataset), delta, accountant, colluding=colluding)

    def head(self) -> Head:
        """The newest entry; number 0 where there is no ledger yet."""
        with self._read() as (balance, _):
            return balance.head

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries as plain values, checked, oldest first."""
        with self._read() as (_, reading):
            rows = list(reading.after(NO_LEDGER)) if reading is not None else []
        for row in rows:
            fields = {"seq": row.seq, "time": row.time, "kind": row.kind, "body": json.loads(row.body)}
            yield {**fields, "nonce": row.nonce.hex(), "hash": row.hash.hex()}

    def verify(self) -> Balance:
        """Walk the whole chain, and have SQLite check its pages; the state that follows."""
        with self._read() as (balance, reading):
            if reading is None:
                return balance
            reading.check_pages()
            fresh = _replayed(reading)
            self._chain.check_owner(fresh.ledger, reading, fresh.head)
            fresh.remind(reading.notes())
            return fresh

    # --- writing

    @contextmanager
    def _write(self) -> Iterator[tuple[Balance, Writing]]:
        """One transaction on the newest state; what it appends is part of the state only once it is durable."""
        with self._chain.locked():
            self._make()
            self._declare()
            with self._chain.writing() as writing:
                yield self._caught_up(writing), writing
            with self._chain.reading() as reading:
                self._caught_up(reading)

    def _make(self) -> None:
        if not self._chain.exists():
            if self._balance.head.seq:
                raise LedgerRolledBack(f"{self._chain.path.name} is gone; {RECOVER}")
            self._chain.create("made", _body(Made(ledger=secrets.token_hex(16))))
        with self._chain.reading() as reading:  # and write down whose the folder is, before anything else
            self._caught_up(reading)

    def _declare(self) -> None:
        new = [dataset for dataset in self._datasets if self._balance.declared.get(dataset.name) != dataset]
        if new:
            with self._chain.writing() as writing:
                for dataset in new:
                    _append(writing, Declared(dataset=dataset))
            with self._chain.reading() as reading:
                self._caught_up(reading)
        self._datasets = ()  # once: the newest word holds, whoever said it

    def check_plan(self, dataset: str, plan_hash: str, event: Event | None, releases: int) -> None:
        """Before a plan is joined: may it release `releases` times (less those that it did), each costing `event`?

        Raises:
            LimitReached: not within the limits of the data set's lineage.
            PrivacyError: the data set is not declared.
        """
        with self._declared() as balance:
            left = max(0, releases - balance.plan(plan_hash).rounds)
            self._limits.check(balance, dataset, plan_hash, Spent.of(event, left))

    @contextmanager
    def _declared(self) -> Iterator[Balance]:
        with self._chain.locked():
            if self._datasets:
                self._make()
                self._declare()
            with self._read() as (balance, _):
                yield balance

    def reserve(self, entry: Reserved) -> None:
        """Before training. An equal open reservation is used again; any other of the plan is replaced.

        Raises:
            LimitReached: the step is not within the limits of the data set's lineage.
            PrivacyError: the data set is not declared.
        """
        with self._write() as (balance, writing):
            if balance.reservation(entry.plan) == entry:
                return
            self._limits.check(balance, entry.dataset, entry.plan, Spent.of(entry.event))
            writing.note(entry.plan, RESERVE, _body(entry))

    def release(
        self, step: Reserved, finish: Callable[[Releases], Released], witnessed: Mapping[str, Seen] | None = None
    ) -> Releases:
        """Before the first byte leaves: `step` is spent for ever.

        `finish` gets the plan's releases so far and gives the entry; it puts on the disk what must be there before,
        and is alone among all processes. Without a reservation of the same step the limits are checked here. Heads of
        peers in `witnessed` are remembered with it, or nothing is.

        Raises:
            LimitReached: no reservation, and not within the limits of the data set's lineage.
            ProtocolError: the round is past, or (`LedgerBehind`) the ledger of a peer went back or forked.
        """
        with self._write() as (balance, writing):
            before, reserved = balance.plan(step.plan), balance.reservation(step.plan)
            if step.round < before.last_round:
                raise ProtocolError(f"round {step.round} is past: round {before.last_round} was released")
            if reserved is None or not reserved.permits(step):
                self._limits.check(balance, step.dataset, step.plan, Spent.of(step.event))
            for peer, seen in (witnessed or {}).items():
                writing.witness(peer, seen)
            _append(writing, finish(before))
            if reserved is not None and reserved.round <= step.round:
                writing.forget(RESERVE, step.plan)
        return self.releases(step.plan)

    def note_attempt(self, plan_hash: str, attempt: int) -> None:
        """The update of the last round is masked for this attempt, so no earlier one is opened any more."""
        with self._write() as (balance, writing):
            last = balance.plan(plan_hash)
            note = made(Attempted, plan=plan_hash, round=last.last_round, attempt=attempt, times=last.repeats + 1)
            writing.note(plan_hash, ATTEMPT, _body(note))

    def note_opened(self, plan_hash: str, round_number: int) -> None:
        """This site helps to open a sum of the round, so it joins no other attempt of it."""
        entry = made(Opened, plan=plan_hash, round=round_number)
        with self._write() as (_, writing):
            _append(writing, entry)

    def void(self, plan_hash: str) -> None:
        """Give up the plan's open reservation, if it has one: its run has ended, and what was trained is gone."""
        with self._write() as (balance, writing):
            if balance.reservation(plan_hash) is not None:
                writing.forget(RESERVE, plan_hash)

    # --- witnesses: peers of this ledger, and this ledger as theirs

    def witness(self, heads: Mapping[str, Seen]) -> None:
        """Remember the newest heads of peers, in one transaction.

        Raises:
            LedgerBehind: the ledger of a peer went back or forked; then none is remembered.
        """
        with self._write() as (_, writing):
            for peer, seen in heads.items():
                writing.witness(peer, seen)

    def witnessed(self) -> dict[str, Head]:
        """The newest head that was seen of each peer."""
        with self._read() as (_, reading):
            return reading.witnessed() if reading is not None else {}

    def check_witness(self, seen: Head) -> None:
        """Compare with what a witness saw of this ledger.

        Raises:
            LedgerRolledBack: this ledger does not hold what the witness saw: it is an old copy, or went on from one.
        """
        with self._read() as (balance, reading):
            if seen in (NO_LEDGER, balance.head):
                return
            here = reading.hash_of(seen.seq) if reading is not None else None
            if here == seen.hash or any(seen in _heads(entry) for entry in balance.imports):
                return
            what = "is an old copy" if seen.seq > balance.head.seq else "went on from an old copy"
            raise LedgerRolledBack(
                f"this ledger {what}: a witness saw another entry {seen.seq} than it holds (of {balance.head.seq}); "
                "get the witness's receipt and use `accord site ledger recover`"
            )

    def check_receipt(self, receipt: Receipt, identity: Signer) -> None:
        """`check_witness`, by a receipt that a witness kept: a number without a signature proves nothing.

        Raises:
            ProtocolError: the receipt is not one of this identity.
            LedgerRolledBack: this ledger does not hold what the receipt names.
        """
        receipt.verify(identity.keys)
        self.check_witness(receipt.head)

    def statement(self) -> Statement:
        """What witnesses are told, before it is sealed and signed."""
        with self._chain.locked():
            self._make()
            with self._read() as (balance, reading):
                trail = reading.trail(balance.head) if reading is not None else ()
                return Statement(balance.ledger, balance.head, balance.account(trail))

    def receipt(self, site: str, identity: Signer) -> Receipt:
        """What witnesses keep."""
        return make_receipt(site, self.statement(), identity)

    def recover(self, receipt: Receipt, identity: Signer) -> bool:
        """Import what the receipt says was spent and this ledger lacks; whether there was anything to import.

        What both have in common, up to the newest entry that both name, is counted once; all else of both is counted.
        Afterwards this ledger goes on above the receipt's number.

        Raises:
            ProtocolError: the receipt is not one of this identity, or malformed.
        """
        account = receipt.open(identity)
        self._accounted = frozenset([receipt.head, *(Head(seq, bytes.fromhex(value)) for seq, value in account.trail)])
        with self._write() as (balance, writing):
            if receipt.head == balance.head or any(receipt.head in _heads(entry) for entry in balance.imports):
                return False
            if writing.hash_of(receipt.seq) == receipt.head.hash:
                return False
            costs, progress = lacking(account, _common(account, balance, writing))
            entry = Imported(
                ledger=receipt.ledger,
                seq=receipt.seq,
                head=receipt.hash,
                account=account,
                costs=costs,
                progress=progress,
            )
            _append(writing, entry, above=receipt.seq)
            writing.forget(RESERVE)  # what they were checked against is no longer what was spent
        return True


def _append(writing: Writing, entry: Entry, *, above: int = 0) -> None:
    writing.append(kind_of(entry), _body(entry), above=above)


def _body(entry: Entry | Note) -> str:
    """One spelling of the entry as JSON: it is what is hashed."""
    return json.dumps(entry.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _replayed(reading: Reading, last: int | None = None) -> Balance:
    balance = Balance()
    for row in reading.after(NO_LEDGER):
        if last is not None and row.seq > last:
            break
        balance.apply(row)
    return balance


def _heads(entry: Imported) -> list[Head]:
    """Entries of another copy that an import accounts for."""
    return [Head(seq, bytes.fromhex(value)) for seq, value in ((entry.seq, entry.head), *entry.account.trail)]


def _common(account: Account, balance: Balance, reading: Reading) -> Account:
    """The newest state that a receipt's ledger and this one (or one that it imported) both went through."""
    imported = {Head(entry.seq, bytes.fromhex(entry.head)): entry.account for entry in balance.imports}
    for seq, value in account.trail:
        head = Head(seq, bytes.fromhex(value))
        if reading.hash_of(seq) == head.hash:
            return _replayed(reading, seq).account()
        if head in imported:
            return imported[head]
    return Account()
