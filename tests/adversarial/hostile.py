"""A hostile coordinator around real members and sites, and the oracle that says what it learned.

`Run` sends whatever a test tells it to and never stops at a refusal: it notes it and goes on. `Oracle` has every byte
that was received and the whole state of the corrupt members; it derives and rebuilds every seed it can, strips the
masks, and claims a sum only if the result equals the true one exactly.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import AccordError, ProtocolError
from accord_shared.identity import BOTH_SIGNATURES, Identity
from accord_shared.messages import (
    IntroduceRequest,
    MaskedUpload,
    MaskRequest,
    Message,
    Opened,
    OpenRequest,
    SurvivorsRequest,
    SurvivorsSigned,
)
from accord_shared.quantize import unpack
from accord_shared.roster import Roster
from accord_shared.secagg import member as member_module
from accord_shared.secagg import shamir
from accord_shared.secagg.choices import Edges, chose
from accord_shared.secagg.dealing import map_bytes
from accord_shared.secagg.keys import (
    KEM_PUBLIC_BYTES,
    SESSION_BYTES,
    Attempt,
    Bundle,
    Credential,
    RunTerms,
    unseal,
)
from accord_shared.secagg.masking import add_masks, reduce_words, word_type
from accord_shared.secagg.member import Member

PLAN, DIMENSION = "5" * 64, 24
NAMES = tuple("abcdefg")
COORDINATOR = X25519PrivateKey.from_private_bytes(b"coordinator".ljust(32)).public_key().public_bytes_raw()


@lru_cache(maxsize=512)
def identity_of(name: str) -> Identity:
    """A name's identity, the same in every test."""
    seeds = [hashlib.sha256(f"{kind} {name}".encode()).digest() for kind in ("ed25519", "ml_dsa_65")]
    return Identity.from_seeds(*seeds)


def stream(seed: str) -> Callable[[int], bytes]:
    """A deterministic generator of bytes."""
    generator = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    return generator.bytes


@dataclass(frozen=True)
class Setting:
    """Who is there: seven sites, one of them corrupt, unless a test says otherwise."""

    names: tuple[str, ...] = NAMES
    corrupt: tuple[str, ...] = ("c",)
    minimum: int = 5
    colluders: int = 1
    size: int = 0
    """0: as many as there are names."""
    bits: int = 24
    mode: Any = "malicious"
    own_noise: bool = False

    @property
    def honest(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.corrupt)

    @property
    def allowed(self) -> int:
        """Honest sites that any sum must cover."""
        return max(2, self.minimum - len(self.corrupt))

    def roster(self) -> Roster:
        members = tuple(identity_of(name).public(name) for name in self.names)
        return Roster(federation="f", serial=1, minimum=2, colluders=0, members=members)

    def terms(self, run_id: str, roster: Roster) -> RunTerms:
        return RunTerms(
            run_id=run_id,
            plan_hash=PLAN,
            roster_hash=roster.hash,
            mode=self.mode,
            bits=self.bits,
            dimension=DIMENSION,
            minimum=self.minimum,
            colluders=self.colluders,
            size=self.size or len(self.names),
            bound=1.5,
            own_noise=self.own_noise,
            members=len(self.names),
        )

    def update(self, name: str, round_number: int) -> Any:
        """The encoded update [d] of a site in a round: the same in all its attempts."""
        draw = stream(f"update {name} {round_number}")
        words = np.frombuffer(draw(8 * DIMENSION), dtype="<u8") & ((1 << self.bits) - 1)
        return words.astype(word_type(self.bits))


class Station(Protocol):
    """A site as the coordinator reaches it."""

    def join(self, run: Run) -> tuple[bytes, bytes]: ...

    def ask(self, message: Message) -> Message: ...

    def truth(self, round_number: int) -> Any: ...


class MemberStation:
    """The real `Member`, one a run, without training and disk."""

    def __init__(self, setting: Setting, roster: Roster, name: str) -> None:
        self.setting, self.roster, self.name, self.starts = setting, roster, name, 0
        self.members: dict[str, Member] = {}

    def join(self, run: Run) -> tuple[bytes, bytes]:
        """A fresh session, as after a restart."""
        self.starts += 1
        random = stream(f"{self.name} {run.terms.run_id} {self.starts}")
        member = Member(self.name, identity_of(self.name), self.roster, run.terms, random=random)
        self.members[run.terms.run_id] = member
        return member.credential, member.bundle

    def ask(self, message: Any) -> Message:
        member = self.members[message.run_id]
        if isinstance(message, MaskRequest):
            member.accept(message, message.model_hash)
            return member.mask(self.truth(message.round))
        return {
            IntroduceRequest: member.introduce,
            SurvivorsRequest: member.sign,
            OpenRequest: member.open,
        }[type(message)](message)

    def truth(self, round_number: int) -> Any:
        return self.setting.update(self.name, round_number)


@dataclass
class Upload:
    """An honest site's upload, with the attempt as that site saw it."""

    attempt: Attempt
    name: str
    partners: tuple[int, ...]
    holders: tuple[int, ...]
    """Those of its secrets, but for itself, in the order of the sealed shares."""
    message: MaskedUpload
    truth: Any

    @property
    def own(self) -> int:
        return self.attempt.cohort.index(self.name)


@dataclass
class Opening:
    """A holder's answer."""

    context: bytes
    holder: int
    survivors: tuple[int, ...]
    shares: tuple[bytes, ...]


class World:
    """What runs share: sites, what was received, what the corrupt members know."""

    def __init__(self, setting: Setting | None = None, stations: Mapping[str, Station] | None = None) -> None:
        self.setting = setting or Setting()
        self.roster = self.setting.roster()
        self.stations: dict[str, Station] = {
            name: MemberStation(self.setting, self.roster, name) for name in self.setting.names
        }
        self.stations.update(stations or {})
        self.uploads: list[Upload] = []
        self.openings: list[Opening] = []
        self.refusals: list[AccordError] = []
        self.private: dict[bytes, X25519PrivateKey] = {}
        """By public key: those of corrupt members and the coordinator's own."""
        self.kem: dict[frozenset[tuple[str, bytes]], list[bytes]] = {}

    def run(self, run_id: str = "run") -> Run:
        return Run(self, self.setting.terms(run_id, self.roster))

    def harvest(self) -> None:
        """Everything that corrupt members have in memory now."""
        for name in self.setting.corrupt:
            station = self.stations[name]
            assert isinstance(station, MemberStation)
            for member in station.members.values():
                for private in member._keys.values():
                    self.private[private.public_key().public_bytes_raw()] = private
                for peer, entry in member._peers.items():
                    self.know_kem((name, member._session), (peer, entry.session), entry.kem_secret)

    def know_kem(self, one: tuple[str, bytes], other: tuple[str, bytes], secret: bytes) -> None:
        known = self.kem.setdefault(frozenset({one, other}), [])
        if secret not in known:
            known.append(secret)

    def refused(self, kind: type[AccordError], says: str) -> bool:
        """Whether somebody refused with this class and these words."""
        return any(type(error) is kind and says in str(error) for error in self.refusals)

    @property
    def oracle(self) -> Oracle:
        return Oracle(self)


class Run:
    """The coordinator's side of one run id; it keeps no rule."""

    def __init__(self, world: World, terms: RunTerms) -> None:
        self.world, self.terms = world, terms
        self.credentials: dict[str, bytes] = {}
        self.bundles: dict[str, bytes] = {}
        self.waiting: dict[str, dict[str, tuple[bytes, bytes]]] = {name: {} for name in world.setting.names}
        self.told: dict[str, set[str]] = {name: set() for name in world.setting.names}
        self.attempts: dict[tuple[str, int, int], Attempt] = {}
        self.sealed: dict[tuple[bytes, str], dict[int, bytes]] = {}
        self.signatures: dict[tuple[bytes, tuple[int, ...]], dict[int, bytes]] = {}
        self.choices: dict[str, bytes] = {}
        """Sparse graph: whom each site chose, as its credential says."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.world.setting.names

    def ask(self, name: str, message: Message) -> Any:
        """The reply, or None where the site refuses."""
        try:
            return self.world.stations[name].ask(message)
        except AccordError as error:
            self.world.refusals.append(error)
            return None
        finally:
            self.world.harvest()

    # Joining

    def join(self, names: Sequence[str] = ()) -> Run:
        """Everybody joins; then all pairs are introduced that have to be."""
        names = names or self.names
        for name in names:
            self.enter(name)
        for place, name in enumerate(names):
            self.introduce(name, [peer for peer in names[:place] if self.linked(name, peer)])
        return self

    def enter(self, name: str) -> None:
        """A (new) session."""
        self.credentials[name], self.bundles[name] = self.world.stations[name].join(self)
        self.choices[name] = self.credentials[name][SESSION_BYTES + KEM_PUBLIC_BYTES : -BOTH_SIGNATURES]
        self.told[name], self.waiting[name] = set(), {}
        self.world.harvest()

    def chosen(self, name: str) -> set[str]:
        """Whom a site chose."""
        return {peer for peer in self.names if chose(self.choices[name], self.world.roster.place(peer))}

    def choosers(self, name: str) -> set[str]:
        """Who chose a site."""
        return {peer for peer in self.choices if chose(self.choices[peer], self.world.roster.place(name))}

    def linked(self, name: str, peer: str) -> bool:
        return not self.terms.sparse or peer in self.chosen(name) or name in self.chosen(peer)

    def introduce(self, name: str, peers: Sequence[str]) -> None:
        """`name` encapsulates to the peers."""
        message = IntroduceRequest(self.terms.run_id, tuple(peers), tuple(self.credentials[peer] for peer in peers))
        reply = self.ask(name, message)
        for peer, introduction in zip(peers, reply.introductions if reply else (), strict=False):
            self.told[name].add(peer)
            self.waiting[peer][name] = (self.credentials[name], introduction)
            if peer in self.world.setting.corrupt:  # it reads at once, and keeps what it reads
                told = SimpleNamespace(
                    peers=(name,), credentials=(self.credentials[name],), introductions=(introduction,)
                )
                self.world.stations[peer].members[self.terms.run_id]._learn(told)  # type: ignore[attr-defined]
                self.world.harvest()

    def restart(self, name: str) -> None:
        """The site lost its memory: it joins again and is introduced to all."""
        self.enter(name)
        self.introduce(name, [peer for peer in self.credentials if peer != name])

    # Trip 1

    def mask_request(
        self,
        name: str,
        attempt: int = 1,
        *,
        round_number: int = 1,
        cohort: Sequence[str] = (),
        bundles: Mapping[str, bytes] | None = None,
        choices: Mapping[str, bytes] | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> MaskRequest:
        members = tuple(cohort or self.names)
        choosing = {**self.choices, **(choices or {})}
        waiting = self.waiting.get(name, {})
        shown = {**self.bundles, **(bundles or {})}
        request = MaskRequest(
            protocol=PROTOCOL_VERSION,
            run_id=self.terms.run_id,
            plan_hash=self.terms.plan_hash,
            roster_hash=self.terms.roster_hash,
            round=round_number,
            attempt=attempt,
            cohort=members,
            bundles=tuple(shown.get(member, b"") for member in members),
            coordinator=COORDINATOR,
            peers=tuple(waiting),
            credentials=tuple(entry[0] for entry in waiting.values()),
            introductions=tuple(entry[1] for entry in waiting.values()),
            weights=self.weights(seed),
            choices=tuple(choosing.get(member, b"") for member in members) if self.terms.sparse else (),
        )
        return replace(request, **changes)

    def weights(self, seed: int) -> Any:
        return np.full(self.terms.dimension, seed, dtype=np.float32)

    def upload(self, name: str, attempt: int = 1, **options: Any) -> MaskedUpload | None:
        return self.send_mask(name, self.mask_request(name, attempt, **options))

    def send_mask(self, name: str, request: MaskRequest) -> MaskedUpload | None:
        reply: MaskedUpload | None = self.ask(name, request)
        if reply is None:
            return None
        self.told[name] |= set(request.peers)
        view = Attempt(
            terms=self.terms,
            round=request.round,
            attempt=request.attempt,
            cohort=request.cohort,
            bundles=request.bundles,
            model_hash=request.model_hash,
            coordinator=request.coordinator,
            choices=request.choices,
        )
        self.attempts[name, request.round, request.attempt] = view
        own, places = request.cohort.index(name), [self.world.roster.place(peer) for peer in request.cohort]
        edges = [
            [i for i in ends if request.cohort[i] in self.told[name]] for ends in Edges(request.choices, places).of(own)
        ]
        partners, holders = map(tuple, edges)
        self.sealed[view.context, name] = dict(zip(holders, reply.sealed, strict=True))
        if name not in self.world.setting.corrupt:
            truth = self.world.stations[name].truth(request.round)
            self.world.uploads.append(Upload(view, name, partners, holders, reply, truth))
        return reply

    def uploads(self, attempt: int = 1, *, who: Sequence[str] = (), keep_bundles: bool = False, **options: Any) -> None:
        """Trip 1 to the whole cohort, or to `who` of it; new bundles and introductions are taken as read after it."""
        asked = tuple(who or options.get("cohort") or self.names)
        replies = {name: self.upload(name, attempt, **options) for name in asked}
        for name, reply in replies.items():
            if reply is not None:
                self.waiting[name] = {}
                if not keep_bundles:
                    self.bundles[name] = reply.next_bundle

    # Trips 2 and 3

    def sign(self, name: str, survivors: Sequence[int], attempt: int = 1, *, round_number: int = 1) -> None:
        """An honest site is asked; a corrupt one signs anything."""
        view = self.attempts.get((name, round_number, attempt))
        if view is None:
            return
        if name in self.world.setting.corrupt:
            signature = identity_of(name).sign(view.survivors_bytes(survivors))
        else:
            message = SurvivorsRequest(self.terms.run_id, round_number, attempt, tuple(survivors))
            reply: SurvivorsSigned | None = self.ask(name, message)
            if reply is None:
                return
            signature = reply.signature
        own = view.cohort.index(name)
        self.signatures.setdefault((view.context, tuple(survivors)), {})[own] = signature

    def open_request(
        self, name: str, survivors: Sequence[int], attempt: int = 1, *, round_number: int = 1, **changes: Any
    ) -> OpenRequest:
        """With all signatures on the set, and what each survivor sealed for the site."""
        view = self.attempts[name, round_number, attempt]
        own = view.cohort.index(name)
        certificate = self.signatures.get((view.context, tuple(survivors)), {})
        sealed = [
            self.sealed.get((view.context, view.cohort[sender]), {}).get(own, b"") if sender < len(view.cohort) else b""
            for sender in survivors
        ]
        request = OpenRequest(
            run_id=self.terms.run_id,
            round=round_number,
            attempt=attempt,
            survivors=tuple(survivors),
            signers=tuple(sorted(certificate)),
            signatures=tuple(certificate[index] for index in sorted(certificate)),
            sealed=tuple(sealed),
        )
        return replace(request, **changes)

    def open(self, name: str, survivors: Sequence[int], attempt: int = 1, **options: Any) -> Opened | None:
        round_number = options.get("round_number", 1)
        view = self.attempts.get((name, round_number, attempt))
        if view is None or name in self.world.setting.corrupt:
            return None  # what a corrupt holder has is known anyway
        reply: Opened | None = self.ask(name, self.open_request(name, survivors, attempt, **options))
        if reply is not None:
            own = view.cohort.index(name)
            self.world.openings.append(Opening(view.context, own, tuple(survivors), reply.shares))
        return reply

    def finish(self, survivors: Sequence[int], attempt: int = 1, *, who: Sequence[str] = (), **options: Any) -> None:
        """Trips 2 and 3, to all survivors or to `who`."""
        cohort = next((view.cohort for key, view in self.attempts.items() if key[2] == attempt), ())
        asked = who or [cohort[index] for index in sorted(set(survivors)) if index < len(cohort)]
        for name in asked:
            self.sign(name, survivors, attempt, **options)
        for name in asked:
            self.open(name, survivors, attempt, **options)


@dataclass(frozen=True)
class Sum:
    """The oracle knows exactly what these honest sites uploaded in the round, summed."""

    round: int
    names: frozenset[str]


@dataclass
class Oracle:
    """Everything the coordinator has, put to use."""

    world: World
    plain: list[Sum] = field(default_factory=list)

    @property
    def smallest(self) -> int:
        """Fewest honest sites in a sum, or in a difference of two sums of one round; 0 if there is no sum at all."""
        sums = self.sums()
        sizes = [len(each.names) for each in sums]
        for one, other in combinations(sums, 2):
            if one.round == other.round and one.names != other.names:
                sizes.append(len(one.names ^ other.names))
        return min(sizes, default=0)

    @property
    def wins(self) -> bool:
        """Whether it knows of fewer honest sites than any sum has to cover."""
        return 0 < self.smallest < self.world.setting.allowed

    def sums(self) -> list[Sum]:
        """All sums that it can compute, each equal to the true one."""
        self.world.harvest()
        contexts = {upload.attempt.context: upload.attempt for upload in self.world.uploads}
        found = list(self.plain)
        for context in contexts:
            for tried in self._latest([each for each in self.world.uploads if each.attempt.context == context]):
                found += self._sums_of(tried, {})
                found += self._sums_of(tried, self._carried(context))
        return list(dict.fromkeys(found))

    def _carried(self, context: bytes) -> dict[frozenset[str], bytes]:
        """Seeds of pairs in other contexts, should they be the same in this one."""
        found = {}
        for upload in self.world.uploads:
            if upload.attempt.context != context:
                for index, seed in self._seeds(upload)[1].items():
                    found[frozenset({upload.name, upload.attempt.cohort[index]})] = seed
        return found

    @staticmethod
    def _latest(uploads: list[Upload]) -> Iterator[list[Upload]]:
        """A site that was made to upload twice in one context: the first and the last of each."""
        yield list({each.name: each for each in uploads}.values())
        if len({each.name for each in uploads}) < len(uploads):
            yield list({each.name: each for each in reversed(uploads)}.values())

    def _sums_of(self, uploads: list[Upload], carried: Mapping[frozenset[str], bytes]) -> list[Sum]:
        nodes: dict[int, tuple[Upload, Any, set[int]]] = {}
        for upload in uploads:
            own_seed, known = self._seeds(upload)
            names = {index: upload.attempt.cohort[index] for index in upload.partners}
            elsewhere = {index: carried.get(frozenset({upload.name, name})) for index, name in names.items()}
            known = {index: seed for index, seed in elsewhere.items() if seed is not None} | known
            words = unpack(upload.message.payload, upload.attempt.terms.bits, upload.attempt.terms.dimension)
            minus = [*([own_seed] if own_seed else []), *(seed for index, seed in known.items() if index > upload.own)]
            add_masks(words, [seed for index, seed in known.items() if index < upload.own], minus)
            nodes[upload.own] = (upload, words, set(upload.partners) - set(known))
        return [each for part in _parts(nodes) if (each := self._claim([nodes[index] for index in part]))]

    @staticmethod
    def _claim(part: list[tuple[Upload, Any, set[int]]]) -> Sum | None:
        attempt = part[0][0].attempt
        total = sum((words for _, words, _ in part[1:]), start=part[0][1].copy())
        true = sum((upload.truth for upload, _, _ in part[1:]), start=part[0][0].truth.copy())
        for vector in (total, true):
            reduce_words(vector, attempt.terms.bits)
        if not np.array_equal(total, true):
            return None
        return Sum(attempt.round, frozenset(upload.name for upload, _, _ in part))

    def _seeds(self, upload: Upload) -> tuple[bytes | None, dict[int, bytes]]:
        """The upload's own seed if known, and the known seeds of its pairs."""
        shares: dict[int, dict[int, bytes]] = {index: {} for index in (upload.own, *upload.partners)}
        order = (upload.own, *upload.partners)
        known: dict[int, bytes] = {}
        for index in upload.partners:
            for keys in self._derived(upload, index):
                plain = self._unsealed(upload, index, keys)
                if plain is not None or self._ends(upload, index) in self.world.kem:
                    known[index] = keys.mask_seed
                if plain is not None:
                    dealt = plain[map_bytes(len(upload.attempt.cohort)) :]  # those of noise come last
                    self._take(shares, order, index, dealt[: shamir.SHARE_BYTES * len(order)])
                    break
        for opening in self.world.openings:
            if opening.context == upload.attempt.context and upload.own in opening.survivors:
                part = opening.shares[opening.survivors.index(upload.own)]
                opened = [upload.own, *(index for index in upload.partners if index not in opening.survivors)]
                whole = len(part) == shamir.SHARE_BYTES * len(order)
                self._take(shares, order if whole else opened, opening.holder, part)
        rebuilt = {index: seed for index, held in shares.items() if (seed := _rebuild(held)) is not None}
        own_seed = rebuilt.pop(upload.own, None)
        return own_seed, {**rebuilt, **known, **self._from_the_other_end(upload, rebuilt.keys() | known.keys())}

    def _from_the_other_end(self, upload: Upload, known: set[int]) -> dict[int, bytes]:
        """Seeds that the partner dealt and that holders opened."""
        found = {}
        for peer in self.world.uploads:
            if peer.attempt.context != upload.attempt.context or peer.own not in upload.partners or peer.own in known:
                continue
            if upload.own not in peer.partners:  # where a rule is missing: masks of one end alone
                continue
            held: dict[int, bytes] = {}
            for opening in self.world.openings:
                survivors = opening.survivors
                if opening.context != peer.attempt.context or peer.own not in survivors or upload.own in survivors:
                    continue
                opened = [peer.own, *(index for index in peer.partners if index not in survivors)]
                part = opening.shares[survivors.index(peer.own)]
                if len(part) == shamir.SHARE_BYTES * len(opened) and upload.own in opened:
                    at = shamir.SHARE_BYTES * opened.index(upload.own)
                    held[opening.holder] = part[at : at + shamir.SHARE_BYTES]
            for index in peer.partners:
                for keys in self._derived(peer, index):
                    plain = self._unsealed(peer, index, keys)
                    if plain is not None:
                        at = shamir.SHARE_BYTES * (1 + peer.partners.index(upload.own))
                        held[index] = plain[map_bytes(len(peer.attempt.cohort)) :][at : at + shamir.SHARE_BYTES]
            if (seed := _rebuild(held)) is not None:
                found[peer.own] = seed
        return found

    def _unsealed(self, upload: Upload, index: int, keys: Any) -> bytes | None:
        blob = self._sealed(upload).get(index)
        key = keys.seal_up if upload.own < index else keys.seal_down
        return unseal(key, blob, upload.attempt.shares_data(upload.own, index)) if blob else None

    def _derived(self, upload: Upload, index: int) -> Iterator[Any]:
        """The pair's keys, where the other end's private key and the post-quantum secret are known."""
        attempt = upload.attempt
        name, bundle = attempt.cohort[index], Bundle.parse(attempt.bundles[index])
        own = Bundle.parse(attempt.bundles[upload.own])
        private = self.world.private.get(bundle.public)
        if private is None:
            return
        pair = (upload.name, name) if upload.own < index else (name, upload.name)
        for secret in self.world.kem.get(self._ends(upload, index), [b""]):
            yield member_module.pair_keys(attempt, private, own.public, secret, pair)

    @staticmethod
    def _ends(upload: Upload, index: int) -> frozenset[tuple[str, bytes]]:
        """Both names with their sessions."""
        sessions = (Bundle.parse(upload.attempt.bundles[place]).session for place in (upload.own, index))
        return frozenset(zip((upload.name, upload.attempt.cohort[index]), sessions, strict=True))

    @staticmethod
    def _sealed(upload: Upload) -> dict[int, bytes]:
        return dict(zip(upload.holders, upload.message.sealed, strict=True))

    @staticmethod
    def _take(shares: dict[int, dict[int, bytes]], order: Sequence[int], holder: int, data: bytes) -> None:
        if len(data) != shamir.SHARE_BYTES * len(order):
            return
        for place, index in enumerate(order):
            shares[index][holder] = data[shamir.SHARE_BYTES * place : shamir.SHARE_BYTES * (place + 1)]


def _rebuild(held: Mapping[int, bytes]) -> bytes | None:
    """The secret, tried with all shares there are: too few give digits out of range, but for 1 in 2^23."""
    if not held:
        return None
    try:
        rows = np.stack([shamir.from_bytes(share, 1) for share in held.values()])
        return shamir.rebuild(rows, list(held))[0].tobytes()
    except ProtocolError:
        return None


def _parts(nodes: Mapping[int, tuple[Upload, Any, set[int]]]) -> list[list[int]]:
    """What the masks that are left reach from each site, without what hangs on a site with nothing to add.

    Where one end of a pair masks and the other does not, the other's part is less than the first one's.
    """
    parts: list[list[int]] = []
    for start in nodes:
        part, edge = set[int](), {start}
        while edge:
            index = edge.pop()
            part.add(index)
            edge |= nodes[index][2] - part if index in nodes else set()
        if part <= set(nodes) and sorted(part) not in parts:
            parts.append(sorted(part))
    return parts


# Rules removed


@dataclass(frozen=True)
class Removal:
    """A check taken out of the product: in the source of `owner.attribute`, `old` (once) becomes `new`."""

    owner: Any
    attribute: str
    old: str
    new: str

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the time of a test."""
        static = inspect.getattr_static(self.owner, self.attribute)
        plain = static.__func__ if isinstance(static, staticmethod) else static
        plain = getattr(plain, "__wrapped__", plain)
        source = textwrap.dedent(inspect.getsource(plain))
        assert source.count(self.old) == 1, f"{self.attribute} has {source.count(self.old)} times {self.old!r}"
        names: dict[str, Any] = {}
        code = "from __future__ import annotations\n" + source.replace(self.old, self.new)
        exec(code, plain.__globals__, names)  # noqa: S102
        monkeypatch.setattr(self.owner, self.attribute, names[self.attribute])


def impostor(run: Run, victim: str, signer: str | None) -> MaskRequest:
    """A request to `victim` in which the coordinator plays all honest peers, with keys of its own making.

    Signed by the corrupt `signer`, or with zeros where it is None.
    """
    from accord_shared.secagg import keys

    world, terms = run.world, run.terms
    identity = identity_of(signer) if signer else None
    own = keys.Party(victim, run.credentials[victim][:SESSION_BYTES])
    member = world.stations[victim].members[terms.run_id]  # type: ignore[attr-defined]
    public = member._kem.public_key().public_bytes_raw()  # it is in the victim's credential
    assert public in run.credentials[victim]
    waiting, bundles = dict[str, tuple[bytes, bytes]](), dict[str, bytes]()
    for name in world.setting.honest:
        if name == victim:
            continue
        forger = identity or _Zeros()
        session = hashlib.sha256(name.encode()).digest()[:16]
        private = X25519PrivateKey.from_private_bytes(hashlib.sha256(b"x" + name.encode()).digest())
        point = private.public_key().public_bytes_raw()
        introduction, secret = keys.introduce(terms, forger, keys.Party(name, session), own, public)  # type: ignore[arg-type]
        credential = Credential(session, public).issue(terms, name, forger)  # type: ignore[arg-type]
        bundles[name] = Bundle(session, 0, point).issue(terms, name, forger)  # type: ignore[arg-type]
        waiting[name] = (credential, introduction)
        world.private[point] = private
        world.know_kem((name, session), (victim, own.session), secret)
    run.waiting[victim] = {**run.waiting[victim], **waiting}
    return run.mask_request(victim, bundles=bundles)


class _Zeros:
    """Signs with zeros."""

    def sign(self, _: bytes) -> bytes:
        return bytes(64)

    def sign_both(self, _: bytes) -> bytes:
        return bytes(64 + 3309)
