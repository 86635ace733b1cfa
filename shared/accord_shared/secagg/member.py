"""A site's side of secure aggregation: a state machine without I/O, clock or training (PROTOCOL.md, sections 6 to 8).

`Member` lives in memory for one run in one process: a restarted site makes a new one and is introduced again. Each
refusal names the rule R1 to R10 that said no. What a member does not check, nobody checks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.noise import fresh_bytes
from accord_shared.errors import ProtocolError
from accord_shared.identity import Identity, verify
from accord_shared.messages import (
    Introduced,
    IntroduceRequest,
    MaskedUpload,
    MaskRequest,
    Opened,
    OpenRequest,
    SurvivorsRequest,
    SurvivorsSigned,
)
from accord_shared.quantize import pack
from accord_shared.receipts import NO_LEDGER, Head, Seen
from accord_shared.roster import Roster
from accord_shared.secagg import shamir
from accord_shared.secagg.choices import Edges, check_choice, own_choice
from accord_shared.secagg.dealing import dealt, opened_part
from accord_shared.secagg.keys import (
    KEM_SEED_BYTES,
    SESSION_BYTES,
    Attempt,
    Bundle,
    Credential,
    PairKeys,
    Party,
    RunTerms,
    accept_introduction,
    introduce,
    pair_keys,
    seal,
    unseal,
    upload_key,
    upload_tag,
)
from accord_shared.secagg.masking import SEED_BYTES, Words, add_masks, reduce_words
from accord_shared.secagg.thresholds import SMALL_MAX, Thresholds

Random = Callable[[int], bytes]


@dataclass(frozen=True)
class _Peer:
    """An introduced peer: its session, and the post-quantum secret that only the two of us have."""

    session: bytes
    kem_secret: bytes
    choice: bytes
    """Sparse graph: whom it chose, as it signed."""

    def __repr__(self) -> str:
        return "_Peer(…)"


@dataclass
class _Round:
    """The secrets of one attempt. `Member` drops it when the attempt is opened or another begins."""

    attempt: Attempt
    thresholds: Thresholds
    own: int
    partners: tuple[int, ...]
    """Mask partners M_u, ascending cohort indices."""
    holders: tuple[int, ...]
    """Holders of this site's secrets, itself included, ascending."""
    pairs: Mapping[int, PairKeys] = field(repr=False)
    upload_key: bytes = field(repr=False)
    own_share: bytes = field(default=b"", repr=False)
    """This site's shares of its own secrets, as it seals them for the other holders."""
    masked: bool = False
    survivors: tuple[int, ...] | None = None
    opening: OpenRequest | None = None
    """The request of trip 3 that was checked: its signatures are verified once."""


class Member:
    """One site in one run.

    `random` is the operating system's; tests inject another. No private key, seed or share is ever printed or leaves,
    but for what trip 3 opens.
    """

    def __init__(
        self,
        name: str,
        identity: Identity,
        roster: Roster,
        terms: RunTerms,
        *,
        head: Head = NO_LEDGER,
        random: Random = fresh_bytes,
    ) -> None:
        if roster.hash != terms.roster_hash:
            raise ProtocolError("R1: the run has another roster than this site accepted")
        place, sites = roster.place(name), len(roster.members)
        if terms.sparse and terms.members != sites:
            raise ProtocolError(f"R1: the run's graph spans {terms.members} sites, the roster has {sites}")
        self._name, self._identity, self._roster, self._terms, self._random = name, identity, roster, terms, random
        self._head = head
        self._session = random(SESSION_BYTES)
        self._kem = MLKEM768PrivateKey.from_seed_bytes(random(KEM_SEED_BYTES))
        self._keys: dict[int, X25519PrivateKey] = {}
        self._peers: dict[str, _Peer] = {}
        names = (terms.roster_hash, terms.plan_hash)
        self._choice = own_choice(identity, *names, place, sites, terms.degree) if terms.sparse else b""
        self._last = (0, 0)
        self._opened_round = 0
        self._current: _Round | None = None
        public = self._kem.public_key().public_bytes_raw()
        self.credential = Credential(self._session, public, self._choice).issue(terms, name, identity)
        self._bundles: dict[int, bytes] = {}
        self._renew()

    def __repr__(self) -> str:
        return f"Member({self._name!r})"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a member holds secrets and stays in its process")

    @property
    def bundle(self) -> bytes:
        """The newest bundle."""
        return self._bundles[max(self._bundles)]

    # Joining a run (section 6)

    def tell_ledger(self, head: Head) -> None:
        """A fresh bundle where the site's ledger went on (another run's releases): peers may have seen it."""
        if head != self._head:
            self._head = head
            self._renew()

    def introduce(self, request: IntroduceRequest) -> Introduced:
        """Encapsulate to each peer.

        Raises:
            ProtocolError: another run, an unknown peer, or a credential that is not its own.
        """
        self._check_run(request.run_id)
        if len(request.names) != len(request.credentials):
            raise ProtocolError("R5: as many credentials as peers were due")
        made: dict[str, _Peer] = {}
        sent: list[bytes] = []
        for name, data in zip(request.names, request.credentials, strict=True):
            credential = self._credential(name, data)
            own, peer = Party(self._name, self._session), Party(name, credential.session)
            introduction, secret = introduce(self._terms, self._identity, own, peer, credential.kem_public)
            sent.append(introduction)
            made[name] = _Peer(credential.session, secret, credential.choice)
        self._peers.update(made)
        return Introduced(run_id=request.run_id, introductions=tuple(sent))

    # Trip 1

    def accept(self, request: MaskRequest, model_hash: str) -> dict[str, Seen]:
        """Check a request (R1 to R5) and derive the attempt's keys; the site trains after it.

        `model_hash` is of the weights that the site received; the request's own weights are not looked at. Returns the
        heads of the partners' privacy ledgers, as they signed them: R11 is the site's, whose disk remembers them.

        Raises:
            ProtocolError: a rule says no; the attempt is burned.
        """
        self._check_run(request.run_id)
        self._check_run_names(request)
        thresholds = self._check_cohort(request)
        self._current = None  # whatever was open is abandoned, its secrets dropped
        self._last = (request.round, request.attempt)
        self._learn(request)
        attempt = Attempt(
            terms=self._terms,
            round=request.round,
            attempt=request.attempt,
            cohort=request.cohort,
            bundles=request.bundles,
            model_hash=model_hash,
            coordinator=request.coordinator,
            choices=request.choices,
        )
        own = request.cohort.index(self._name)
        partners, holders = self._edges(request, own)
        private = self._own_key(request.bundles[own])
        self._current = _Round(
            attempt=attempt,
            upload_key=upload_key(attempt, private, request.coordinator, self._name),
            thresholds=thresholds,
            own=own,
            partners=partners,
            holders=holders,
            pairs={index: self._pair(attempt, own, index, private) for index in partners},
        )
        bundles = {request.cohort[index]: Bundle.parse(request.bundles[index]) for index in partners}
        return {name: Seen(bundle.session, bundle.head) for name, bundle in bundles.items()}

    def mask(self, words: Words, head: Head = NO_LEDGER, *, threads: int = 1) -> MaskedUpload:
        """Mask the encoded update `words` [d] (consumed), deal and seal the shares. `head` is of the site's ledger now.

        Raises:
            ProtocolError: nothing was accepted, it was masked before, or the length is another.
        """
        current = self._state(masked=False)
        if words.shape != (self._terms.dimension,):
            raise ProtocolError(f"R6: {words.shape} words came where {self._terms.dimension} were due")
        current.masked = True
        self._head = head
        attempt, own, partners = current.attempt, current.own, current.partners
        self_mask = self._random(SEED_BYTES)
        seeds = {index: current.pairs[index].mask_seed for index in partners}
        plus = [self_mask, *(seeds[index] for index in partners if index > own)]
        add_masks(words, plus, [seeds[index] for index in partners if index < own], threads=threads)
        noise_seeds = self._add_components(words)
        reduce_words(words, self._terms.bits)
        sealed = self._deal(current, [self_mask, *(seeds[index] for index in partners), *noise_seeds])
        payload = pack(words, self._terms.bits)
        next_bundle = self.bundle if len(self._bundles) > 1 else self._renew()  # a lost upload's is offered again
        return MaskedUpload(
            run_id=self._terms.run_id,
            round=attempt.round,
            attempt=attempt.attempt,
            payload=payload,
            sealed=sealed,
            next_bundle=next_bundle,
            tag=upload_tag(current.upload_key, payload.data, sealed, next_bundle),
        )

    def _add_components(self, words: Words) -> list[bytes]:
        """Add the removable components of this site's noise; returns their seeds (section 13)."""
        noises = self._terms.noise.component_noise if self._terms.noise else ()
        seeds = [self._random(SEED_BYTES) for _ in noises]
        for noise, seed in zip(noises, seeds, strict=True):
            noise.add(words, seed)
        return seeds

    def _deal(self, current: _Round, secrets: Sequence[bytes]) -> tuple[bytes, ...]:
        """Shamir shares of `secrets`, sealed for each other holder in ascending order; keeps the own ones."""
        shares = shamir.deal(
            np.frombuffer(b"".join(secrets), dtype=np.uint8).reshape(len(secrets), SEED_BYTES),
            current.holders,
            current.thresholds.share,
            self._random,
        )
        sealed: list[bytes] = []
        for holder, row in zip(current.holders, shares, strict=True):
            plain = dealt(current.partners, len(current.attempt.cohort), row)
            if holder == current.own:
                current.own_share = plain
                continue
            keys = current.pairs[holder]
            key = keys.seal_up if current.own < holder else keys.seal_down
            sealed.append(seal(key, plain, current.attempt.shares_data(current.own, holder)))
        return tuple(sealed)

    # Trip 2

    def sign(self, request: SurvivorsRequest) -> SurvivorsSigned:
        """Sign the survivor set (R7), one set per attempt.

        Raises:
            ProtocolError: a rule says no, or a set was signed before.
        """
        current = self._current_for(request)
        if current.survivors is not None:
            raise ProtocolError("R9: a survivor set was signed already")
        self._check_survivors(current, request.survivors)
        current.survivors = request.survivors
        return SurvivorsSigned(
            run_id=request.run_id,
            round=request.round,
            attempt=request.attempt,
            signature=self._identity.sign(current.attempt.survivors_bytes(request.survivors)),
        )

    # Trip 3

    def check_opening(self, request: OpenRequest) -> str:
        """R7 and R8; the site makes R10 durable between this and `open`. Returns the hash of the run's plan.

        Raises:
            ProtocolError: the set is not certified.
        """
        current = self._current_for(request)
        if self._terms.mode == "malicious":
            if current.survivors is None or request.survivors != current.survivors:
                raise ProtocolError("R8: this is not the survivor set that was signed")
            self._check_certificate(current, request)
        else:
            self._check_survivors(current, request.survivors)
        if len(request.sealed) != len(request.survivors):
            raise ProtocolError(f"R8: {len(request.sealed)} sealed shares for {len(request.survivors)} survivors")
        current.opening = request
        return self._terms.plan_hash

    def open(self, request: OpenRequest) -> Opened:
        """Open one kind of share of each secret that it holds, then forget the attempt.

        Raises:
            ProtocolError: a rule says no; nothing is opened.
        """
        current = self._current_for(request)
        if current.opening != request:
            self.check_opening(request)
        pairs = zip(request.survivors, request.sealed, strict=True)
        removed = self._terms.removed(len(request.survivors), len(request.signers))
        shares = tuple(self._share(current, sender, blob, request.survivors, removed) for sender, blob in pairs)
        self._opened_round = current.attempt.round
        self._current = None
        return Opened(run_id=request.run_id, round=request.round, attempt=request.attempt, shares=shares)

    def _share(
        self, current: _Round, sender: int, blob: bytes, survivors: Sequence[int], removed: Sequence[int]
    ) -> bytes:
        """The part of what `sender` dealt that may be opened: b of a survivor, seeds of its pairs with the dropped.

        Empty where nothing was dealt, or what came is not the sender's: a corrupt site must not stop the round.
        """
        plain: bytes | None = current.own_share
        if sender != current.own:
            keys = current.pairs.get(sender)
            if keys is None or not blob:
                return b""
            key = keys.seal_down if current.own < sender else keys.seal_up
            plain = unseal(key, blob, current.attempt.shares_data(sender, current.own))
        count, components = len(current.attempt.cohort), self._terms.components
        return opened_part(plain or b"", count, survivors, components, removed)

    # Rules (section 8)

    def _check_run(self, run_id: str) -> None:
        if run_id != self._terms.run_id:
            raise ProtocolError("R1: a message of another run")

    def _check_run_names(self, request: MaskRequest) -> None:
        if request.protocol != PROTOCOL_VERSION:
            raise ProtocolError(f"R1: the coordinator speaks protocol {request.protocol}, this site {PROTOCOL_VERSION}")
        if (request.roster_hash, request.plan_hash) != (self._terms.roster_hash, self._terms.plan_hash):
            raise ProtocolError("R1: the plan or roster is not the one that this site joined")
        if (request.round, request.attempt) <= self._last:
            raise ProtocolError(f"R2: attempt {request.attempt} of round {request.round} is past")
        if request.round <= self._opened_round:
            raise ProtocolError(f"R2: round {request.round} was opened")

    def _check_names(self, names: Sequence[str]) -> None:
        if list(names) != sorted(set(names)):
            raise ProtocolError("R3: names are not ascending and distinct")
        for name in names:
            self._roster.member(name)
        if self._name not in names:
            raise ProtocolError("R3: this site is not in the cohort")

    def _check_cohort(self, request: MaskRequest) -> Thresholds:
        self._check_names(request.cohort)
        count = len(request.cohort)
        if count > self._terms.size:
            raise ProtocolError(f"R3: a cohort of {count}, the plan says {self._terms.size}")
        if len(request.bundles) != count:
            raise ProtocolError(f"R4: {len(request.bundles)} bundles for {count} sites")
        if self._terms.sparse and count < self._terms.minimum:
            raise ProtocolError(f"R3: a cohort of {count}, cohort.minimum is {self._terms.minimum}")
        return self._terms.thresholds(count)

    def _learn(self, request: MaskRequest) -> None:
        """Verify and keep the introductions that came along."""
        if not len(request.peers) == len(request.credentials) == len(request.introductions):
            raise ProtocolError("R5: peers, credentials and introductions differ in number")
        own, learned = Party(self._name, self._session), dict[str, _Peer]()
        for name, data, introduction in zip(request.peers, request.credentials, request.introductions, strict=True):
            credential = self._credential(name, data)
            peer = Party(name, credential.session)
            member = self._roster.member(name)
            secret = accept_introduction(self._terms, introduction, member, peer, own, self._kem)
            learned[name] = _Peer(credential.session, secret, credential.choice)
        self._peers.update(learned)

    def _credential(self, name: str, data: bytes) -> Credential:
        if name == self._name:
            raise ProtocolError("R5: a site is not its own peer")
        return Credential.read(data, self._terms, self._roster, name)

    def _edges(self, request: MaskRequest, own: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """M_u and the holders of this site's secrets, as cohort indices; R5."""
        places = [self._roster.place(name) for name in request.cohort]
        self._check_choices(request, own, places)
        partners, holders = Edges(request.choices, places).of(own)
        for index in partners:
            name = request.cohort[index]
            if name not in self._peers:
                raise ProtocolError(f"R5: {name!r} was never introduced")
            if request.choices and request.choices[index] != self._peers[name].choice:
                raise ProtocolError(f"R5: {name!r} signed another choice than is shown")
        return partners, holders

    def _check_choices(self, request: MaskRequest, own: int, places: Sequence[int]) -> None:
        """Choices of others need no signature: whoever is shown something untrue has another context than they."""
        terms = self._terms
        if len(request.choices) != (len(places) if terms.sparse else 0):
            raise ProtocolError(f"R5: {len(request.choices)} choices for {len(places)} sites")
        for name, place, choice in zip(request.cohort, places, request.choices, strict=False):
            check_choice(choice, name, place, terms.members, terms.degree)
        if request.choices and request.choices[own] != self._choice:
            raise ProtocolError("R5: this site chose others than is shown")

    def _own_key(self, bundle: bytes) -> X25519PrivateKey:
        """The private key of one's own bundle (R4); older ones are forgotten."""
        generation = next((g for g, own in self._bundles.items() if own == bundle), None)
        if generation is None:
            raise ProtocolError("R4: this is not a bundle of this site's session")
        for older in [g for g in self._keys if g < generation]:
            del self._keys[older], self._bundles[older]
        return self._keys[generation]

    def _pair(self, attempt: Attempt, own: int, index: int, private: X25519PrivateKey) -> PairKeys:
        name = attempt.cohort[index]
        bundle = Bundle.read(attempt.bundles[index], self._terms, self._roster.member(name))
        peer = self._peers[name]
        if bundle.session != peer.session:
            raise ProtocolError(f"R4: {name!r} has another session than was introduced")
        pair = (self._name, name) if own < index else (name, self._name)
        return pair_keys(attempt, private, bundle.public, peer.kem_secret, pair)

    def _check_survivors(self, current: _Round, survivors: Sequence[int]) -> None:
        count = len(current.attempt.cohort)
        if list(survivors) != sorted(set(survivors)) or not all(0 <= index < count for index in survivors):
            raise ProtocolError("R7: survivors are not ascending indices of the cohort")
        if current.own not in survivors:
            raise ProtocolError("R7: this site is said to have dropped out")
        least = count if count <= SMALL_MAX else self._terms.minimum
        if len(survivors) < least:
            raise ProtocolError(f"R7: {len(survivors)} survivors, at least {least} are needed")

    def _check_certificate(self, current: _Round, request: OpenRequest) -> None:
        signers = request.signers
        if len(signers) != len(request.signatures) or list(signers) != sorted(set(signers)):
            raise ProtocolError("R8: signers are not ascending, or not as many as signatures")
        if len(signers) < current.thresholds.sign:
            raise ProtocolError(f"R8: {len(signers)} signatures, {current.thresholds.sign} are needed")
        signed = current.attempt.survivors_bytes(request.survivors)
        for index, signature in zip(signers, request.signatures, strict=True):
            if not 0 <= index < len(current.attempt.cohort):
                raise ProtocolError("R8: a signer outside the cohort")
            verify(self._roster.member(current.attempt.cohort[index]), signed, signature)

    def _state(self, *, masked: bool) -> _Round:
        if self._current is None or self._current.masked is not masked:
            raise ProtocolError("R9: a message out of order")
        return self._current

    def _current_for(self, request: SurvivorsRequest | OpenRequest) -> _Round:
        self._check_run(request.run_id)
        current = self._state(masked=True)
        if (request.round, request.attempt) != (current.attempt.round, current.attempt.attempt):
            raise ProtocolError("R9: a message of another attempt")
        return current

    def _renew(self) -> bytes:
        """A fresh X25519 key; the one before stays until the coordinator uses the new one, older ones go (R4)."""
        generation = max(self._bundles, default=-1) + 1
        for older in [g for g in self._keys if g < generation - 1]:
            del self._keys[older], self._bundles[older]
        private = X25519PrivateKey.from_private_bytes(self._random(32))
        public = private.public_key().public_bytes_raw()
        self._keys[generation] = private
        self._bundles[generation] = Bundle(self._session, generation, public, self._head).issue(
            self._terms, self._name, self._identity
        )
        return self._bundles[generation]
