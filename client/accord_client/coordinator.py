"""The coordinator's API as a site uses it: outbound calls over TLS, with the site's certificate."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from accord_client.enrolment import Enrolment
from accord_client.keystore import Keys, read_authorities
from accord_client.settings import SiteFolder, SiteSettings
from accord_client.store import SiteStore
from accord_shared import PROTOCOL_VERSION, __version__
from accord_shared.errors import (
    ClockSkew,
    ImpostorError,
    NotAdmitted,
    OutputError,
    PlanError,
    ProtocolError,
    Unreachable,
)
from accord_shared.files import make_folder, sha256_file, write_atomic
from accord_shared.plan import Plan
from accord_shared.roster import SignedRoster
from accord_shared.service import rpc
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc
from accord_shared.signatures import Endorsement, SignedModel
from accord_shared.vectors import Vector, check_finite, check_length

log = logging.getLogger(__name__)

CALL_S = 20.0
MODEL_S = 3600.0
MOST_DOCUMENT = 8 * 2**20
MOST_MODEL = 64 * 2**30
"""Longest tensors file, bytes: no coordinator fills the disk."""
MOST_ENDORSEMENTS = 100_000


@dataclass(frozen=True)
class Greeting:
    """What a Hello told."""

    reply: pb.HelloReply
    skew_s: float
    """How far this site's clock is ahead of the coordinator's."""


def check_skew(skew_s: float, most_s: float) -> None:
    """Compare the clocks; `skew_s` is how far this site's is ahead.

    Raises:
        ClockSkew: they differ by more than `most_s`.
    """
    if abs(skew_s) > most_s:
        where = "ahead of" if skew_s > 0 else "behind"
        raise ClockSkew(f"this site's clock is {abs(skew_s):.0f} s {where} the coordinator's")


@dataclass(frozen=True)
class OfferedRoster:
    """The coordinator's roster, if it has one (no signature is checked yet), and who endorses it."""

    signed: SignedRoster | None
    endorsements: tuple[Endorsement, ...] = ()


@dataclass(frozen=True)
class FetchedModel:
    """A finished model on this site's disk, verified."""

    document: SignedModel
    plan: Plan
    tensors: Path
    """A safetensors file with one tensor, `weights` [P] float32."""

    def weights(self, dimension: int) -> Vector:
        """The joint weights [P].

        Raises:
            ProtocolError: the file holds something else, or another number of them.
            NonFinite: NaN or infinity.
        """
        try:
            tensors = load_file(self.tensors)
        except (SafetensorError, OSError):
            tensors = {}
        weights = tensors.get("weights")
        if set(tensors) != {"weights"} or weights is None or weights.dtype != np.float32 or weights.ndim != 1:
            raise ProtocolError("the model's tensors file does not hold one vector of float32")
        check_length(weights, dimension)
        check_finite(weights, "the model's weights")
        return weights


class CoordinatorClient:
    """Calls of one site. Thread-safe; the channel reconnects by itself.

    All methods raise `Unreachable` where nobody answers, `NotAdmitted` where the coordinator does not know the site or
    has revoked it, and `IdentityError` without a certificate of the site's key.
    """

    def __init__(self, folder: SiteFolder, keys: Keys) -> None:
        self._folder = folder
        self._keys = keys
        self.enrolment = Enrolment.read(folder)
        self.proxy = SiteSettings.read(folder).coordinator.way_out(folder.path)
        """The way to the coordinator, for its API and for its fleet."""
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None

    @property
    def authorities(self) -> bytes:
        """PEM of every authority that is trusted now; see `trusted`."""
        return trusted(self._folder)

    def close(self) -> None:
        """Close the channel; the next call opens another."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def __enter__(self) -> CoordinatorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _stub(self) -> Iterator[Any]:
        address = self.enrolment.api_address
        with self._lock:
            if self._channel is None:
                self._channel = rpc.secure_channel(address, self.authorities, self._keys.pair(), self.proxy)
            channel = self._channel
        try:
            with rpc.typed_errors(f"the coordinator at {address}", self.proxy):
                yield accord_pb2_grpc.FederationStub(channel)
        except Unreachable:
            self._refuse_expired()
            raise

    def _refuse_expired(self) -> None:
        """TLS tells a client nothing of its own certificate."""
        expires = self._keys.expires
        if expires < datetime.now(UTC):
            raise NotAdmitted(
                f"this site's certificate expired on {expires:%Y-%m-%d %H:%M} UTC: get a new invitation and use "
                "`accord site enrol TOKEN --again`"
            ) from None

    # --- presence

    def hello(self, boot: str, state: str, roster: str) -> Greeting:
        """Say that this site is there, and learn what changed. New authorities are stored.

        `boot` is random and new at each start of the agent, `state` one of the words that
        accord.proto has for it, `roster` the hash of the accepted roster.

        Raises:
            ImpostorError: the authorities that came are none.
        """
        sent = time.time()
        request = pb.HelloRequest(
            boot=boot,
            version=__version__,
            protocol=PROTOCOL_VERSION,
            clock_us=int(sent * 1e6),
            state=state,
            roster=roster,
        )
        with self._stub() as stub:
            reply = stub.Hello(request, timeout=CALL_S)
        here = (sent + time.time()) / 2  # the answer was made between the two
        self._keep_authorities(reply.authorities)
        return Greeting(reply, here - reply.clock_us / 1e6)

    def _keep_authorities(self, pem: bytes) -> None:
        """Those that the coordinator names, if one of them is trusted already: its own rotation keeps both a while."""
        old = self.authorities
        if not pem or pem == old:
            return
        if not set(read_authorities(pem)) & set(read_authorities(old)):
            raise ImpostorError("none of the authorities that the coordinator names is trusted by this site")
        write_atomic(self._folder.authorities, pem, mode=0o600)
        log.info("the coordinator's authorities changed")
        self.close()

    def renew(self) -> None:
        """Get a certificate for a new node key. A renewal that failed is repeated with the same key.

        Raises:
            ImpostorError: what came is no certificate of that key.
        """
        name = self.enrolment.name
        request = self._keys.next_request(name)
        message = pb.RenewRequest(
            certificate_request=request, member_signature=self._keys.vouch(name, request), name=name
        )
        with self._stub() as stub:
            reply = stub.RenewCertificate(message, timeout=CALL_S)
        self._keep_authorities(reply.authorities)
        self._keys.adopt_next(reply.certificate, self.authorities, name)
        self.close()

    # --- rosters

    def roster(self) -> OfferedRoster:
        """The coordinator's roster.

        Raises:
            RosterError: it is malformed.
        """
        with self._stub() as stub:
            return _offered(stub.GetRoster(pb.Empty(), timeout=CALL_S))

    def endorse(self, endorsement: Endorsement) -> OfferedRoster:
        """Send this site's word for a roster."""
        with self._stub() as stub:
            return _offered(stub.EndorseRoster(pb.EndorseRequest(endorsement=endorsement.to_json()), timeout=CALL_S))

    # --- models

    def models(self) -> tuple[pb.ModelInfo, ...]:
        """Finished models of runs that this site took part in."""
        with self._stub() as stub:
            return tuple(stub.ListModels(pb.Empty(), timeout=CALL_S).models)

    def fetch_model(self, run: str) -> FetchedModel:
        """The finished model of a run, into `models/RUN/`, whole or not at all. One that is there is only checked.

        Raises:
            ImpostorError: it is not signed by the coordinator that this site enrolled with, or not what was signed.
            NotAdmitted: this site never joined its plan.
            OutputError: it cannot be written, or another model of the run is there.
        """
        folder = self._folder.model(run)
        if (folder / "model.json").exists():
            return self._checked(folder, run)
        make_folder(self._folder.models)
        with _temporary_folder(self._folder.models) as temporary:
            with self._stub() as stub:
                _receive(stub.GetModel(pb.ModelRequest(run=run), timeout=MODEL_S), temporary)
            self._checked(temporary, run)
            try:
                temporary.rename(folder)
            except OSError as error:
                if (folder / "model.json").exists():  # the agent, or a command, was faster
                    return self._checked(folder, run)
                raise OutputError(f"cannot write {folder}: {error.strerror}") from None
        return self._checked(folder, run)

    def _checked(self, folder: Path, run: str) -> FetchedModel:
        """The signature first: nothing else of the document counts before."""
        document = _document(folder / "model.json")
        document.check(self.enrolment.coordinator)
        if document.run != run:
            raise ImpostorError(f"the coordinator sent the model of run {document.run[:64]!r}, not of {run!r}")
        try:
            plan = Plan.from_json(document.plan)
        except PlanError:
            plan = None
        if plan is None or plan.hash != document.plan_hash:
            raise ImpostorError("the model's plan does not have the hash that was signed with it")
        if SiteStore(self._folder.path).plan_json(plan.hash) is None:
            raise NotAdmitted(f"this site never joined plan {plan.hash[:12]}…, whose model this is")
        tensors = folder / "weights.safetensors"
        if not tensors.is_file() or sha256_file(tensors) != document.digest:
            raise ImpostorError(f"the tensors of run {run!r} are not those that were signed")
        return FetchedModel(document, plan, tensors)


def trusted(folder: SiteFolder) -> bytes:
    """PEM of every authority that may have signed the coordinator's certificate.

    Raises:
        OutputError: the file is gone.
    """
    try:
        return folder.authorities.read_bytes()
    except OSError as error:
        raise OutputError(f"{folder.authorities} cannot be read: {error.strerror}") from None


def new_boot() -> str:
    """A random name of one start of an agent."""
    return secrets.token_hex(16)


def _offered(reply: pb.RosterReply) -> OfferedRoster:
    if not reply.roster:
        return OfferedRoster(None)
    endorsements = [Endorsement.from_json(text) for text in reply.endorsements[:MOST_ENDORSEMENTS]]
    return OfferedRoster(SignedRoster.from_json(reply.roster), tuple(endorsements))


def _document(path: Path) -> SignedModel:
    try:
        return SignedModel.from_json(path.read_bytes())
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None


def _receive(chunks: Iterator[pb.Chunk], folder: Path) -> None:
    """Write `model.json` and `weights.safetensors`, durably.

    Raises:
        ProtocolError: the document does not come first, or it is all too long.
        OutputError: the disk is full.
    """
    first = next(iter(chunks), None)
    if first is None or not first.document or len(first.document) > MOST_DOCUMENT:
        raise ProtocolError("the coordinator sent no document of the model")
    total = 0
    try:
        with (folder / "weights.safetensors").open("wb") as file:
            for chunk in _with_first(first, chunks):
                total += len(chunk.data)
                if total > MOST_MODEL:
                    raise ProtocolError(f"the model is longer than {MOST_MODEL} bytes")
                file.write(chunk.data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write the model to {folder.parent}: {error.strerror}") from None
    write_atomic(folder / "model.json", first.document.encode(), mode=0o600)


def _with_first(first: pb.Chunk, rest: Iterator[pb.Chunk]) -> Iterator[pb.Chunk]:
    yield first
    yield from rest


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside its later place; nothing of it is left unless it was moved there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix=".fetched-", dir=parent))
    except OSError as error:
        raise OutputError(f"cannot write to {parent}: {error.strerror}") from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
