"""Where simulated participants keep the secrets of secure aggregation: Ray actors that hold what a site's memory would.

Flower's workers are interchangeable, so a participant's `Member` cannot live in one of them. A vault holds the members
of every `shards`-th participant and runs the deployed code on them; a vault that dies loses them, as a site would.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from accord_client.ledger.receipts import Statement
from accord_client.members import LocalMembers, SideRequest
from accord_shared.errors import AccordError
from accord_shared.files import make_private, write_atomic
from accord_shared.identity import SEED, Identity
from accord_shared.messages import MaskedUpload, MaskRequest, Message, Opened, OpenRequest, Refusal
from accord_shared.plan import Plan
from accord_shared.receipts import Seen
from accord_shared.roster import Roster, SignedRoster, sign_roster
from accord_shared.secagg.keys import RunTerms
from accord_shared.secagg.masking import Words

_EMPTY = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class VaultAddress:
    """Where the vaults of a run are. Small: it travels with every message."""

    folder: Path
    prefix: str
    shards: int

    @property
    def roster_file(self) -> Path:
        """The signed roster, as every site would have it on its disk."""
        return self.folder / "roster.json"


@dataclass(frozen=True)
class SimulatedRoster:
    """A roster made on the fly, with the seeds of its members' identities."""

    signed: SignedRoster
    seeds: tuple[tuple[bytes, bytes], ...] = field(repr=False)

    @staticmethod
    def make(plan: Plan, names: Sequence[str]) -> SimulatedRoster:
        """Identities for `names`, a roster of them as strict as the plan, and a key that signs it and is forgotten."""
        seeds = tuple((secrets.token_bytes(SEED), secrets.token_bytes(SEED)) for _ in names)
        members = [Identity.from_seeds(*pair).public(name) for name, pair in zip(names, seeds, strict=True)]
        roster = Roster(
            federation="simulation",
            serial=1,
            minimum=plan.cohort.minimum,
            colluders=plan.cohort.colluders,
            members=tuple(sorted(members, key=lambda member: member.name)),
        )
        return SimulatedRoster(signed=sign_roster(roster, Identity.generate()), seeds=seeds)


class Vault:
    """The members of some participants; a refusal is returned, not raised, so that it crosses processes as it is."""

    def __init__(self, roster_file: Path, identities: dict[int, tuple[str, bytes, bytes]]) -> None:
        roster = _roster(roster_file)
        self._members = {
            index: LocalMembers(name, Identity.from_seeds(ed25519, ml_dsa_65), roster)
            for index, (name, ed25519, ml_dsa_65) in identities.items()
        }

    def call(self, index: int, method: str, *arguments: Any) -> Any:
        """Call a method of the participant's members."""
        own = [argument.copy() if isinstance(argument, np.ndarray) else argument for argument in arguments]
        try:
            return getattr(self._members[index], method)(*own)
        except AccordError as error:
            return Refusal.of(error)


@contextmanager
def vaults(address: VaultAddress, roster: SimulatedRoster, names: Sequence[str]) -> Iterator[None]:
    """Run the vaults for the participants `names`, in their order."""
    import ray  # noqa: PLC0415

    make_private(address.folder)
    write_atomic(address.roster_file, roster.signed.to_json().encode(), mode=0o600, durable=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Vault)
    handles: list[Any] = []  # actors live as long as their handles
    for shard in range(address.shards):
        own = {index: (names[index], *roster.seeds[index]) for index in range(shard, len(names), address.shards)}
        options: dict[str, Any] = {"name": f"{address.prefix}-{shard}", "namespace": address.prefix}
        handles.append(actor.options(**options).remote(address.roster_file, own))
    yield


def make_address(folder: Path) -> VaultAddress:
    """A fresh address: one vault a core."""
    return VaultAddress(folder=folder, prefix=f"accord-vault-{secrets.token_hex(8)}", shards=os.cpu_count() or 1)


@lru_cache(maxsize=4)
def _roster(path: Path) -> Roster:
    return SignedRoster.from_json(path.read_text()).verify()


@lru_cache(maxsize=64)
def _vault(prefix: str, shard: int) -> Any:
    import ray  # noqa: PLC0415

    return ray.get_actor(f"{prefix}-{shard}", namespace=prefix)


@dataclass(frozen=True)
class VaultMembers:
    """`accord_client.members.Members` of one participant, in its vault."""

    address: VaultAddress
    index: int

    @property
    def roster(self) -> Roster:
        """The roster that every participant accepts."""
        return _roster(self.address.roster_file)

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray  # noqa: PLC0415

        vault = _vault(self.address.prefix, self.index % self.address.shards)
        result = ray.get(vault.call.remote(self.index, method, *arguments))
        if isinstance(result, Refusal):
            raise result.error()
        return result

    def join(self, terms: RunTerms, ledger: Statement) -> tuple[bytes, bytes, bytes]:
        """Credential, newest bundle and receipt."""
        credential, bundle, receipt = self._call("join", terms, ledger)
        return credential, bundle, receipt

    def answer(self, request: SideRequest) -> Message:
        """Choose neighbours, introduce, or sign."""
        reply: Message = self._call("answer", request)
        return reply

    def accept(self, request: MaskRequest, model_hash: str) -> dict[str, Seen]:
        """Trip 1, before training; the weights stay here."""
        heads: dict[str, Seen] = self._call("accept", replace(request, weights=_EMPTY), model_hash)
        return heads

    def mask(self, run_id: str, words: Words, ledger: Statement) -> MaskedUpload:
        """Trip 1, after training."""
        upload: MaskedUpload = self._call("mask", run_id, words, ledger)
        return upload

    def check_receipt(self, data: bytes) -> None:
        """Raise `ProtocolError` unless these bytes are a receipt that this site made."""
        self._call("check_receipt", data)

    def check_opening(self, request: OpenRequest) -> str:
        """Trip 3, before it is noted on disk; the hash of the run's plan."""
        return str(self._call("check_opening", request))

    def open(self, request: OpenRequest) -> Opened:
        """Trip 3."""
        opened: Opened = self._call("open", request)
        return opened
