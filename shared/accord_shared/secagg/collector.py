"""The coordinator's side of one attempt: verify, sum as uploads arrive, certify a set, remove its masks.

A state machine without I/O or clock (PROTOCOL.md, section 7). Memory is O(d) for the sum, plus the sealed shares.
An honest coordinator's checks protect its result; what protects the sites is in `member`.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from accord_shared.errors import ProtocolError, RoundAborted
from accord_shared.identity import verify
from accord_shared.messages import (
    MaskedUpload,
    Opened,
    OpenRequest,
    SurvivorsRequest,
    SurvivorsSigned,
)
from accord_shared.quantize import add_packed, packed_bytes
from accord_shared.roster import Roster
from accord_shared.secagg import shamir
from accord_shared.secagg.choices import Edges
from accord_shared.secagg.dealing import map_bytes
from accord_shared.secagg.keys import TAG_BYTES, Attempt, Bundle, upload_key, upload_tag
from accord_shared.secagg.masking import Words, add_masks, reduce_words, word_type
from accord_shared.secagg.shamir import SHARE_BYTES
from accord_shared.secagg.thresholds import SMALL_MAX


class Collector:
    """One attempt. `private` is the key of `attempt.coordinator`."""

    def __init__(self, attempt: Attempt, roster: Roster, private: X25519PrivateKey) -> None:
        self._attempt, self._roster, self._private = attempt, roster, private
        terms, count = attempt.terms, len(attempt.cohort)
        self._thresholds = terms.thresholds(count)
        places = [roster.place(name) for name in attempt.cohort]
        edges = Edges(attempt.choices, places)
        self._edges = [edges.of(index) for index in range(count)]
        """Of each site, M_u and the holders of its secrets, as cohort indices."""
        self._total: Words = np.zeros(terms.dimension, dtype=word_type(terms.bits))
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._signatures: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}
        self._survivors: tuple[int, ...] | None = None
        self._dropped: dict[int, tuple[int, ...]] = {}
        """Of each survivor, its partners that did not upload; known once the set stands."""
        self._removed: tuple[int, ...] = ()
        """Noise components that every survivor's seeds are opened of; known once the set stands, or is certified."""

    @property
    def survivors(self) -> tuple[int, ...]:
        """Ascending indices of those whose upload is in the sum."""
        return self._survivors if self._survivors is not None else tuple(sorted(self._sealed))

    def add_upload(self, index: int, upload: MaskedUpload) -> Bundle:
        """Trip 1: verify and add; returns the site's next bundle.

        Raises:
            ProtocolError: it is malformed, late, or not the site's; it is not in the sum.
        """
        attempt, name = self._attempt, self._attempt.cohort[index]
        if self._survivors is not None or index in self._sealed:
            raise ProtocolError(f"an upload of {name!r} that is late or repeated")
        self._check_attempt(upload.round, upload.attempt)
        if upload.payload.shape != (packed_bytes(attempt.terms.bits, attempt.terms.dimension),):
            raise ProtocolError(f"an upload of {upload.payload.nbytes} bytes")
        partners, holders = self._edges[index]
        others = [holder for holder in holders if holder != index]
        secrets = 1 + len(partners) + attempt.terms.components
        length = map_bytes(len(attempt.cohort)) + SHARE_BYTES * secrets + TAG_BYTES
        if [len(blob) for blob in upload.sealed] != [length] * len(others):
            raise ProtocolError("sealed shares of another number or length than were due")
        used = Bundle.parse(attempt.bundles[index])
        key = upload_key(attempt, self._private, used.public, name)
        tag = upload_tag(key, np.ascontiguousarray(upload.payload).data, upload.sealed, upload.next_bundle)
        if not hmac.compare_digest(tag, upload.tag):
            raise ProtocolError(f"an upload that {name!r} did not make")
        next_bundle = Bundle.read(upload.next_bundle, attempt.terms, self._roster.member(name))
        if next_bundle.session != used.session:
            raise ProtocolError(f"the next bundle of {name!r} is of another session")  # all others would refuse it
        add_packed(self._total, upload.payload, attempt.terms.bits)
        self._sealed[index] = dict(zip(others, upload.sealed, strict=True))
        return next_bundle

    def close(self) -> SurvivorsRequest:
        """No more uploads: the survivor set stands.

        Raises:
            RoundAborted: too few sites uploaded.
        """
        self._survivors = tuple(sorted(self._sealed))
        self._dropped = {
            sender: tuple(partner for partner in self._edges[sender][0] if partner not in self._sealed)
            for sender in self._survivors
        }
        count = len(self._attempt.cohort)
        least = count if count <= SMALL_MAX else self._attempt.terms.minimum
        self._check_enough(len(self._survivors), least, "uploaded")
        terms, attempt = self._attempt.terms, self._attempt
        self._removed = terms.removed(len(self._survivors), len(self._survivors))
        return SurvivorsRequest(terms.run_id, attempt.round, attempt.attempt, self._survivors)

    def add_signature(self, index: int, reply: SurvivorsSigned) -> None:
        """Trip 2. Where none is needed beyond those that certify the set, it is not looked at.

        Raises:
            ProtocolError: it does not sign this set.
        """
        self._check_attempt(reply.round, reply.attempt)
        if len(self._signatures) >= self._needed:
            return
        member = self._roster.member(self._attempt.cohort[index])
        verify(member, self._attempt.survivors_bytes(self.survivors), reply.signature)
        self._signatures[index] = reply.signature

    @property
    def _needed(self) -> int:
        """Signatures of use: those that certify, or all where the noise that stays is counted by them."""
        return len(self._attempt.cohort) if self._attempt.terms.counts_signers else self._thresholds.sign

    def open_requests(self) -> dict[int, OpenRequest]:
        """Trip 3: what each survivor is asked.

        Raises:
            RoundAborted: too few signatures (malicious mode).
        """
        attempt, malicious = self._attempt, self._attempt.terms.mode == "malicious"
        if malicious:
            self._check_enough(len(self._signatures), self._thresholds.sign, "signed")
        signers = tuple(sorted(self._signatures)[: self._needed]) if malicious else ()
        self._removed = attempt.terms.removed(len(self.survivors), len(signers))
        signatures = tuple(self._signatures[index] for index in signers)
        return {
            receiver: OpenRequest(
                run_id=attempt.terms.run_id,
                round=attempt.round,
                attempt=attempt.attempt,
                survivors=self.survivors,
                signers=signers,
                signatures=signatures,
                sealed=tuple(self._sealed[sender].get(receiver, b"") for sender in self.survivors),
            )
            for receiver in self.survivors
        }

    def add_opening(self, index: int, reply: Opened) -> None:
        """Trip 3: keep a holder's shares.

        Raises:
            ProtocolError: they have another number or length than was due.
        """
        self._check_attempt(reply.round, reply.attempt)
        if self._survivors is None:
            raise ProtocolError("an opening came before the set stood")
        if len(reply.shares) != len(self.survivors):
            raise ProtocolError(f"shares of {len(reply.shares)} sites came where {len(self.survivors)} were due")
        for sender, part in zip(self.survivors, reply.shares, strict=True):
            holds = index == sender or index in self._sealed[sender]
            due = SHARE_BYTES * (1 + len(self._dropped[sender]) + len(self._removed))
            if part and not (holds and len(part) == due):
                raise ProtocolError(f"shares of {self._attempt.cohort[sender]!r} with another length than was due")
        for sender, part in zip(self.survivors, reply.shares, strict=True):
            if part:
                self._shares.setdefault(sender, {})[index] = part

    def finish(self, *, threads: int = 1) -> Words:
        """The sum [d] of the survivors' encoded updates modulo 2^b.

        Raises:
            RoundAborted: too few shares of some survivor, or shares that fit nothing.
        """
        plus: list[bytes] = []
        minus: list[bytes] = []
        excess: dict[int, list[bytes]] = {index: [] for index in self._removed}
        for senders, holders in self._openers():
            seeds = iter(self._rebuild(senders, holders))
            for sender in senders:
                minus.append(next(seeds))  # the self-mask was added by its owner: take it away
                for partner in self._dropped[sender]:
                    (minus if partner > sender else plus).append(next(seeds))
                for index in self._removed:
                    excess[index].append(next(seeds))
        add_masks(self._total, plus, minus, threads=threads)
        self._remove_noise(excess)
        reduce_words(self._total, self._attempt.terms.bits)
        return self._total

    def _remove_noise(self, excess: Mapping[int, Sequence[bytes]]) -> None:
        """Take the opened components away, which fewer dropouts than feared have made needless (section 13)."""
        noise = self._attempt.terms.noise
        for index, seeds in excess.items():
            for seed in seeds:
                if noise is not None:
                    noise.component_noise[index].add(self._total, seed, negative=True)

    def _openers(self) -> list[tuple[list[int], tuple[int, ...]]]:
        """(survivors, the holders whose shares rebuild their secrets): survivors with the same holders together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for sender in self.survivors:
            given = self._shares.get(sender, {})
            self._check_enough(
                len(given), self._thresholds.share, f"opened their shares of {self._attempt.cohort[sender]!r}"
            )
            groups.setdefault(tuple(sorted(given)[: self._thresholds.share]), []).append(sender)
        return [(senders, holders) for holders, senders in groups.items()]

    def _rebuild(self, senders: Sequence[int], holders: Sequence[int]) -> list[bytes]:
        """Of each sender its self-mask seed, those of its pairs with the dropped, those of removed noise."""
        try:
            parts = [b"".join(self._shares[sender][holder] for sender in senders) for holder in holders]
            secrets = shamir.rebuild(np.stack([shamir.from_bytes(part) for part in parts]), holders)
        except ProtocolError as error:
            if len(senders) > 1:  # find out whose
                return [seed for sender in senders for seed in self._rebuild([sender], holders)]
            name = self._attempt.cohort[senders[0]]
            raise RoundAborted(f"what {name!r} shared cannot be rebuilt: {error}") from None
        return [secret.tobytes() for secret in secrets]

    def _check_attempt(self, round_number: int, attempt: int) -> None:
        if (round_number, attempt) != (self._attempt.round, self._attempt.attempt):
            raise ProtocolError("a reply of another attempt")

    def _check_enough(self, count: int, least: int, what: str) -> None:
        if count < least:
            raise RoundAborted(f"{count} of {len(self._attempt.cohort)} sites {what}, {least} are needed")
