"""The coordinator as a witness of the sites' privacy ledgers: the newest head and receipt of each (PROTOCOL.md, 15)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

from accord_shared.errors import CheckpointError, LedgerRolledBack, ProtocolError
from accord_shared.receipts import NO_LEDGER, Head, Receipt
from accord_shared.roster import Roster


class Witness:
    """Remembers receipts, for any number of threads; `on_change` is told of all, as one text that `restore` reads.

    Receipts are signed and sealed by their sites: here they are compared and kept, never read.
    """

    def __init__(self, roster: Roster, on_change: Callable[[str], None] | None = None) -> None:
        self._roster, self._on_change = roster, on_change
        self._receipts: dict[str, Receipt] = {}
        self._lock = threading.RLock()

    def see(self, name: str, head: Head, receipt: bytes = b"") -> None:
        """Compare the head that a joining site signed with its newest receipt, and keep the receipt that came with it.

        Raises:
            LedgerRolledBack: the head is older than one that was seen, or another with the same number.
            ProtocolError: the receipt is not the site's, or of another head.
        """
        with self._lock:
            self._compare(name, head)
            behind = bool(receipt) and self.hear(name, receipt).seq < head.seq
        if behind:
            raise ProtocolError(f"a receipt that does not belong to the ledger of {name!r}")

    def hear(self, name: str, receipt: bytes) -> Head:
        """Keep a receipt that came with an upload; the head that it is of.

        Raises:
            LedgerRolledBack: it is older than one that was seen, or another with the same number.
            ProtocolError: it is not the site's.
        """
        made = Receipt.from_json(receipt)
        made.verify(self._roster.member(name))
        if made.site != name:
            raise ProtocolError(f"a receipt of {made.site!r} came from {name!r}")
        with self._lock:
            self._compare(name, made.head)
            self._receipts[name] = made
        return made.head

    def _compare(self, name: str, head: Head) -> None:
        known = self.head(name)
        if head.seq < known.seq or (head.seq == known.seq and head != known):
            raise LedgerRolledBack(f"the ledger of {name!r} went back to entry {head.seq}, entry {known.seq} was seen")

    def head(self, name: str) -> Head:
        """The newest head that was seen with a receipt."""
        return self._receipts[name].head if name in self._receipts else NO_LEDGER

    def receipt(self, name: str) -> bytes:
        """The newest receipt of a site; empty if there is none."""
        return self._receipts[name].to_json().encode() if name in self._receipts else b""

    def keep(self) -> None:
        """Tell `on_change`, if anybody listens: receipts of many sites are megabytes."""
        if self._on_change is not None:
            with self._lock:
                kept = {name: receipt.to_json() for name, receipt in sorted(self._receipts.items())}
            self._on_change(json.dumps(kept))

    def restore(self, text: str) -> None:
        """Read what `keep` told.

        Raises:
            CheckpointError: it is damaged, or not of this roster's sites.
        """
        try:
            receipts = {name: Receipt.from_json(value) for name, value in json.loads(text).items()}
            for name, receipt in receipts.items():
                receipt.verify(self._roster.member(name))
        except (ValueError, AttributeError, ProtocolError) as error:
            raise CheckpointError(f"the receipts of the sites' ledgers are damaged: {error}") from None
        self._receipts = receipts
