"""The audit log: every administrative and round event, each entry bound to all before it by a hash.

Whoever can write to the database can write a whole new log; a hash that was kept elsewhere (`AuditLog.head`) tells.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue
from sqlalchemy import select
from sqlalchemy.orm import Session

from accord_server.database import AUDIT_START, AuditHead, AuditRow, Database
from accord_shared.canonical import canonical_bytes
from accord_shared.errors import AuditDamaged
from accord_shared.service.actor import actor

_PAGE = 1000
_ACTOR = "actor"
"""The fact that tells who did it."""


@dataclass(frozen=True)
class AuditEntry:
    """What happened."""

    seq: int
    time_us: int
    kind: str
    subject: str
    actor: str
    """`operator NAME`, `site NAME` or `coordinator`; empty in entries of versions that did not say."""
    facts: Mapping[str, Any]
    hash: str


class AuditLog:
    """Appends to the log and checks it; for any number of threads and processes."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock

    def note(self, kind: str, subject: str, **facts: JsonValue) -> None:
        """Append an entry, durably. Facts are JSON with finite numbers; no secret belongs among them."""
        with self._database.session() as session:
            self.add(session, kind, subject, **facts)

    def add(self, session: Session, kind: str, subject: str, **facts: JsonValue) -> None:
        """Append an entry within a transaction: it is there if and only if what it tells of happened."""
        head = _head(session, lock=True)
        row = AuditRow(
            seq=head.seq + 1,
            time_us=int(self._clock() * 1e6),
            kind=kind,
            subject=_printable(subject),
            facts=json.dumps(
                facts | {_ACTOR: actor() or "coordinator"}, sort_keys=True, separators=(",", ":"), allow_nan=False
            ),
            previous=head.hash,
        )
        row.hash = _hash(row)
        session.add(row)
        head.seq, head.hash = row.seq, row.hash
        session.flush()

    def verify(self) -> int:
        """Check every entry; their number.

        Raises:
            AuditDamaged: one was changed, removed, moved or added behind the log's back; it is named.
        """
        with self._database.session() as session:
            count = sum(1 for _ in _checked(session))
            head, last = _head(session), session.get(AuditRow, count)
            if (head.seq, head.hash) != (count, last.hash if last else AUDIT_START):
                raise AuditDamaged(f"the audit log ends at entry {count}, but its end was entry {head.seq}")
        return count

    def entries(self, newest: int | None = None) -> list[AuditEntry]:
        """The entries, oldest first; only the `newest` ones if given. They are not checked."""
        query = select(AuditRow).order_by(AuditRow.seq.desc())
        with self._database.session() as session:
            rows = session.scalars(query if newest is None else query.limit(newest)).all()
        return [_entry(row) for row in reversed(rows)]

    def head(self) -> tuple[int, str]:
        """Number and hash of the newest entry."""
        with self._database.session() as session:
            head = _head(session)
            return head.seq, head.hash


def _head(session: Session, *, lock: bool = False) -> AuditHead:
    head = session.get(AuditHead, 1, with_for_update=lock, populate_existing=lock)
    if head is None:
        raise AuditDamaged("the audit log's end was removed")
    return head


def _checked(session: Session) -> Iterator[AuditRow]:
    previous, expected = AUDIT_START, 1
    for row in _all(session):
        if row.seq != expected:
            raise AuditDamaged(f"entry {expected} of the audit log is missing")
        if row.previous != previous or row.hash != _hash(row):
            raise AuditDamaged(f"entry {row.seq} of the audit log is not what was written")
        yield row
        previous, expected = row.hash, expected + 1


def _all(session: Session) -> Iterator[AuditRow]:
    """In order of their numbers, a page at a time."""
    query = select(AuditRow).order_by(AuditRow.seq).limit(_PAGE)
    rows = session.scalars(query).all()
    while rows:
        yield from rows
        rows = session.scalars(query.where(AuditRow.seq > rows[-1].seq)).all()


def _hash(row: AuditRow) -> str:
    content = [row.seq, row.time_us, row.kind, row.subject, row.facts, row.previous]
    return hashlib.sha256(canonical_bytes(content)).hexdigest()


def _entry(row: AuditRow) -> AuditEntry:
    facts = json.loads(row.facts)
    return AuditEntry(row.seq, row.time_us, row.kind, row.subject, facts.pop(_ACTOR, ""), facts, row.hash)


def _printable(subject: str) -> str:
    """A subject may be what a stranger called itself."""
    return "".join(character if character.isprintable() else "?" for character in subject)[:128]
