"""Keys of a run and of an attempt: who signs what, and every derivation (PROTOCOL.md, sections 5 to 7).

Everything that is signed or derived from goes through `frame` under a label of its own.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from accord_shared import PROTOCOL_VERSION
from accord_shared.canonical import decimal_string
from accord_shared.dp.sharing import NoiseShares
from accord_shared.errors import PlanError, ProtocolError
from accord_shared.frames import frame, hash_frame
from accord_shared.identity import BOTH_SIGNATURES, ED25519_SIGNATURE, Identity, Member, verify, verify_both
from accord_shared.plan import Plan
from accord_shared.quantize import DEFAULT_BITS, Encoding, default_bound
from accord_shared.receipts import NO_LEDGER, Head
from accord_shared.roster import Roster
from accord_shared.secagg.choices import check_choice
from accord_shared.secagg.dealing import map_bytes
from accord_shared.secagg.graph import sparse_thresholds
from accord_shared.secagg.thresholds import COMPLETE_MAX, Mode, Thresholds, thresholds

SESSION_BYTES, KEM_PUBLIC_BYTES, KEM_SEED_BYTES, CIPHERTEXT_BYTES = 16, 1184, 64, 1088
CREDENTIAL_BYTES = SESSION_BYTES + KEM_PUBLIC_BYTES + BOTH_SIGNATURES
HEAD_BYTES = 8 + 32
BUNDLE_BYTES = SESSION_BYTES + 4 + 32 + HEAD_BYTES + ED25519_SIGNATURE
INTRODUCTION_BYTES = CIPHERTEXT_BYTES + BOTH_SIGNATURES
TAG_BYTES = 16
_BUNDLE = f">{SESSION_BYTES}sI32sQ32s{ED25519_SIGNATURE}s"


@dataclass(frozen=True)
class RunTerms:
    """What all parties of a run agree on beforehand; all public. `dimension` d counts extra coordinates too."""

    run_id: str
    plan_hash: str
    roster_hash: str
    mode: Mode
    bits: int
    dimension: int
    minimum: int
    colluders: int
    size: int
    bound: float
    """A of the encoding."""
    own_noise: bool
    """Whether every update carries its full noise: then even two sites may sum."""
    noise: NoiseShares | None = None
    """How noise is divided, where the sites of a sum share it."""
    members: int = 0
    """Members of the roster: what a sparse graph spans, whoever is in a run or a cohort."""

    @staticmethod
    def of(
        plan: Plan, run_id: str, roster_hash: str, members: int, dimension: int, noise_multiplier: float
    ) -> RunTerms:
        """What a plan says of a model of `dimension` trainable parameters, on a roster of so many members.

        Raises:
            PlanError: the plan does without secure aggregation, or `Plan.check_roster` says no.
        """
        spec = plan.secure_aggregation
        if spec.mode == "off":
            raise PlanError("the plan does without secure aggregation")
        coordinates = dimension + plan.extra_coordinates
        noise = NoiseShares.of(plan, coordinates, noise_multiplier) if plan.shared_noise else None
        plan.check_roster(members)
        return RunTerms(
            run_id=run_id,
            plan_hash=plan.hash,
            roster_hash=roster_hash,
            mode=spec.mode,
            bits=noise.bits if noise else spec.bits or DEFAULT_BITS,
            dimension=coordinates,
            minimum=plan.cohort.minimum,
            colluders=plan.cohort.colluders,
            size=plan.cohort.size,
            bound=noise.bound if noise else spec.bound or default_bound(plan, noise_multiplier),
            own_noise=plan.privacy.noise == "site",
            noise=noise,
            members=members,
        )

    @property
    def sparse(self) -> bool:
        """Whether sites choose neighbours (section 9) or all are each other's."""
        return self.size > COMPLETE_MAX

    @property
    def degree(self) -> int:
        """k of the sparse graph; 0 of a complete one."""
        return self.thresholds(self.size).degree or 0 if self.sparse else 0

    def thresholds(self, sites: int) -> Thresholds:
        """For a cohort of `sites`; in a sparse graph from the roster's members, whatever the cohort.

        Raises:
            PlanError: too few sites for the plan's minimum and colluders.
        """
        if self.sparse:
            return sparse_thresholds(self.members, self.minimum, self.colluders)
        return thresholds(sites, self.minimum, self.colluders, self.mode, self.size, own_noise=self.own_noise)

    @property
    def encoding(self) -> Encoding | NoiseShares:
        """How updates become words: no sum of `size` of them can wrap."""
        return self.noise or Encoding(bits=self.bits, sites=self.size, bound=self.bound)

    @property
    def components(self) -> int:
        """Removable components of each site's noise."""
        return len(self.noise.components) if self.noise else 0

    @property
    def counts_signers(self) -> bool:
        """Whether noise is removed for those who signed, not for all of the set.

        On a complete graph the masks of a survivor that was shown something else stop the sum. On a sparse one only
        its partners' do, so such survivors are no part of the sum; honest signers saw the same, and are.
        """
        return self.noise is not None and self.sparse and self.mode == "malicious"

    def removed(self, survivors: int, signers: int) -> tuple[int, ...]:
        """Which components are opened of a set of `survivors` under so many signatures."""
        return self.noise.removed(signers if self.counts_signers else survivors) if self.noise else ()

    @property
    def names(self) -> tuple[str, str, str]:
        """Run, roster and plan, as they begin everything that is signed for the run."""
        return (self.run_id, self.roster_hash, self.plan_hash)


def _exactly(data: bytes, length: int, what: str) -> bytes:
    if len(data) != length:
        raise ProtocolError(f"{what} has {len(data)} bytes, {length} were due")
    return data


@dataclass(frozen=True)
class Credential:
    """A site's session in a run and its ML-KEM-768 key, signed with both identity keys."""

    session: bytes
    kem_public: bytes
    choice: bytes = b""
    """Sparse graph: whom the site chose, a bit map over the roster."""

    def signed_bytes(self, terms: RunTerms, name: str) -> bytes:
        """What is signed."""
        choice = (self.choice,) if self.choice else ()
        return frame("accord/1/credential", *terms.names, name, self.session, self.kem_public, *choice)

    def issue(self, terms: RunTerms, name: str, identity: Identity) -> bytes:
        """The credential as it travels."""
        return self.session + self.kem_public + self.choice + identity.sign_both(self.signed_bytes(terms, name))

    @staticmethod
    def read(data: bytes, terms: RunTerms, roster: Roster, name: str) -> Credential:
        """Parse and verify.

        Raises:
            ProtocolError: wrong length, a choice that is none, or a signature that is not the member's.
        """
        length = CREDENTIAL_BYTES + (map_bytes(terms.members) if terms.sparse else 0)
        _exactly(data, length, f"the credential of {name!r}")
        end, place = SESSION_BYTES + KEM_PUBLIC_BYTES, roster.place(name)
        choice = data[end:-BOTH_SIGNATURES]
        if terms.sparse:
            check_choice(choice, name, place, terms.members, terms.degree)
        credential = Credential(session=data[:SESSION_BYTES], kem_public=data[SESSION_BYTES:end], choice=choice)
        verify_both(roster.members[place], credential.signed_bytes(terms, name), data[-BOTH_SIGNATURES:])
        return credential


_LOW_ORDER = frozenset(
    point.to_bytes(32, "little")
    for base in (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        2**255 - 20,
        2**255 - 19,
        2**255 - 18,
    )
    for point in (base, base + 2**255)
    if point < 2**256
)
"""Points whose product with any key is zero (RFC 7748, section 6.1; the list of Bernstein, "Curve25519", and its
non-canonical forms): one signed bundle with such a key would make every peer refuse the whole cohort."""


@dataclass(frozen=True)
class Bundle:
    """A site's X25519 key of one generation, signed for its session, with the head of its privacy ledger."""

    session: bytes
    generation: int
    public: bytes
    head: Head = NO_LEDGER

    def signed_bytes(self, terms: RunTerms, name: str) -> bytes:
        """What is signed."""
        own = (self.session, self.generation, self.public, self.head.to_bytes())
        return frame("accord/1/bundle", *terms.names, name, *own)

    def issue(self, terms: RunTerms, name: str, identity: Identity) -> bytes:
        """The bundle as it travels."""
        body = self.session + struct.pack(">I", self.generation) + self.public + self.head.to_bytes()
        return body + identity.sign(self.signed_bytes(terms, name))

    @staticmethod
    def parse(data: bytes) -> Bundle:
        """Parse without verifying: for what one made oneself, and for sizes.

        Raises:
            ProtocolError: wrong length.
        """
        _exactly(data, BUNDLE_BYTES, "a bundle")
        session, generation, public, seq, digest, _ = struct.unpack(_BUNDLE, data)
        return Bundle(session=session, generation=generation, public=public, head=Head(seq, digest))

    @staticmethod
    def read(data: bytes, terms: RunTerms, member: Member) -> Bundle:
        """Parse and verify.

        Raises:
            ProtocolError: wrong length or a signature that is not the member's.
        """
        bundle = Bundle.parse(data)
        if bundle.public in _LOW_ORDER:
            raise ProtocolError(f"the X25519 key of {member.name!r} has low order")
        verify(member, bundle.signed_bytes(terms, member.name), data[-ED25519_SIGNATURE:])
        return bundle


@dataclass(frozen=True)
class Party:
    """One end of an introduction: name and session."""

    name: str
    session: bytes


def introduce(terms: RunTerms, identity: Identity, own: Party, peer: Party, kem_public: bytes) -> tuple[bytes, bytes]:
    """Encapsulate to a peer (FIPS 203): the introduction as it travels, and the pair's secret of the run.

    Raises:
        ProtocolError: the peer's key is not an ML-KEM-768 key.
    """
    try:
        shared, ciphertext = MLKEM768PublicKey.from_public_bytes(kem_public).encapsulate()
    except ValueError:
        raise ProtocolError(f"the ML-KEM-768 key of {peer.name!r} is malformed") from None
    signature = identity.sign_both(_introduction_bytes(terms, own, peer, ciphertext))
    return ciphertext + signature, _kem_secret(terms, own, peer, ciphertext, shared)


def accept_introduction(
    terms: RunTerms, data: bytes, member: Member, peer: Party, own: Party, key: MLKEM768PrivateKey
) -> bytes:
    """The pair's secret of the run, from the introduction that `peer` made.

    Raises:
        ProtocolError: wrong length, or a signature that is not the peer's.
    """
    ciphertext = verify_introduction(terms, data, member, peer, own)
    return _kem_secret(terms, peer, own, ciphertext, key.decapsulate(ciphertext))


def verify_introduction(terms: RunTerms, data: bytes, member: Member, sender: Party, receiver: Party) -> bytes:
    """The ciphertext of an introduction that `sender` made for `receiver`.

    Raises:
        ProtocolError: wrong length, or a signature that is not the sender's.
    """
    _exactly(data, INTRODUCTION_BYTES, f"the introduction by {sender.name!r}")
    ciphertext = data[:CIPHERTEXT_BYTES]
    verify_both(member, _introduction_bytes(terms, sender, receiver, ciphertext), data[CIPHERTEXT_BYTES:])
    return ciphertext


def _introduction_bytes(terms: RunTerms, sender: Party, receiver: Party, ciphertext: bytes) -> bytes:
    parties = (sender.name, sender.session, receiver.name, receiver.session)
    return frame("accord/1/introduction", *terms.names, *parties, ciphertext)


def _kem_secret(terms: RunTerms, sender: Party, receiver: Party, ciphertext: bytes, shared: bytes) -> bytes:
    parties = (sender.name, sender.session, receiver.name, receiver.session)
    info = frame("accord/1/kem", terms.run_id, *parties, hashlib.sha256(ciphertext).digest())
    return _hkdf(shared, b"", info, 32)


@dataclass(frozen=True)
class Attempt:
    """One attempt as a party sees it: everything that its masks depend on."""

    terms: RunTerms
    round: int
    attempt: int
    cohort: tuple[str, ...]
    bundles: tuple[bytes, ...]
    model_hash: str
    coordinator: bytes
    """The coordinator's X25519 public key."""
    choices: tuple[bytes, ...] = ()
    """Sparse graph: whom each site of the cohort chose."""

    @cached_property
    def context(self) -> bytes:
        """`ctx`, 32 bytes: parties that were shown anything different have nothing in common."""
        t = self.terms
        numbers = (self.round, self.attempt, t.roster_hash, t.plan_hash, t.mode, t.bits, decimal_string(t.bound))
        shown = (t.dimension, self.model_hash, self.coordinator, self.choices, self.cohort, self.bundles)
        noise = (t.noise.facts,) if t.noise else ()
        return hash_frame("accord/1/context", PROTOCOL_VERSION, t.run_id, *numbers, *shown, *noise)

    def survivors_bytes(self, survivors: Sequence[int]) -> bytes:
        """What a site signs in trip 2."""
        return frame("accord/1/survivors", self.context, struct.pack(f">{len(survivors)}I", *survivors))

    def shares_data(self, sender: int, receiver: int) -> bytes:
        """Additional data of the shares that `sender` seals for `receiver`."""
        return frame("accord/1/shares", self.context, sender, receiver)


@dataclass(frozen=True)
class PairKeys:
    """What two sites derive for one attempt. Only `mask_seed` may ever be shared."""

    mask_seed: bytes
    seal_up: bytes
    """Seals from the lower index to the higher."""
    seal_down: bytes

    def __repr__(self) -> str:
        return "PairKeys(…)"


def _exchange(private: X25519PrivateKey, public: bytes, whose: str) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError(f"an X25519 key of {whose} has low order or another length") from None


def pair_keys(
    attempt: Attempt, private: X25519PrivateKey, public: bytes, kem_secret: bytes, pair: Sequence[str]
) -> PairKeys:
    """Derive the keys of a pair; `pair` names the lower cohort index first.

    Raises:
        ProtocolError: the peer's point has low order (RFC 7748, section 6.1).
    """
    shared = _exchange(private, public, " or ".join(map(repr, pair)))
    okm = _hkdf(shared + kem_secret, attempt.context, frame("accord/1/pair", *pair), 96)
    return PairKeys(mask_seed=okm[:32], seal_up=okm[32:64], seal_down=okm[64:])


def upload_key(attempt: Attempt, private: X25519PrivateKey, public: bytes, name: str) -> bytes:
    """The key that authenticates the upload of the site `name` to the coordinator: either end derives it.

    Raises:
        ProtocolError: the other's point has low order.
    """
    shared = _exchange(private, public, "the upload")
    return _hkdf(shared, attempt.context, frame("accord/1/upload", name), 32)


def upload_tag(key: bytes, payload: memoryview, sealed: Sequence[bytes], next_bundle: bytes) -> bytes:
    """AES-256-GMAC (NIST SP 800-38D) of an upload under a key that authenticates nothing else.

    A signature would need a collision-resistant hash of the payload, which is fifteen times slower.
    """
    mac = Cipher(algorithms.AES256(key), modes.GCM(_ONCE)).encryptor()
    mac.authenticate_additional_data(frame("accord/1/tag", len(payload), list(sealed), next_bundle))
    mac.authenticate_additional_data(payload)
    mac.finalize()
    return mac.tag


_ONCE = bytes(12)
"""Nonce of keys that seal one message in their life."""


def seal(key: bytes, plaintext: bytes, data: bytes) -> bytes:
    """AES-256-GCM under a key that seals nothing else (NIST SP 800-38D)."""
    return AESGCM(key).encrypt(_ONCE, plaintext, data)


def unseal(key: bytes, sealed: bytes, data: bytes) -> bytes | None:
    """The plaintext, or None if it was not sealed by the other holder of the key for this purpose."""
    try:
        return AESGCM(key).decrypt(_ONCE, sealed, data)
    except InvalidTag:
        return None


def _hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(hashes.SHA256(), length, salt, info).derive(secret)
