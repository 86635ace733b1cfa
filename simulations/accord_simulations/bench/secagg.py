"""`secagg`: what one sum under secure aggregation costs a client and the coordinator, beside Flower's SecAgg+.

One process runs the real `Member`s and the real `Collector` through an attempt of a run in its steady state: everybody
has joined and was introduced (`bootstrap_client_cpu_s`, once a run). Sites that drop out do not upload, as the peer's
do not once they have shared their keys. Transport is free on both sides, and so is training. `malicious` mode: three
trips, all signatures made and verified. All times are CPU seconds of one process.

- **Client**: accept, encode (from float32), mask, sign, open; the median over the surviving clients of each attempt,
  then over `repeats` attempts.
- **Server**: all of `Collector`, and decoding the sum; the median over the attempts.
- **Floor**: the AES keystream that the masks are made of, at this machine's AES rate. Words of b bits are drawn from
  words of 8, 16, 32 or 64 bits; a client draws n keystreams of d words, the coordinator one for each survivor
  and one for each pair of a survivor and a dropped site.
- **Peak**: what the coordinator's part allocates (`tracemalloc`, which sees numpy), the upload that it is
  taking in included; in an attempt of its own, since tracing is slow.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.common.serde import recorddict_to_proto
from pydantic import Field

from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import NoiseShares
from accord_shared.errors import Aborted, PlanError
from accord_shared.identity import Identity
from accord_shared.messages import IntroduceRequest, MaskedUpload, MaskRequest
from accord_shared.quantize import decode, encode
from accord_shared.roster import Roster
from accord_shared.secagg.collector import Collector
from accord_shared.secagg.keys import Attempt, RunTerms
from accord_shared.secagg.masking import Words, word_type
from accord_shared.secagg.member import Member
from accord_shared.secagg.thresholds import COMPLETE_MAX, SMALL_MAX
from accord_shared.wire import encode as to_wire
from accord_simulations.bench._aes import aes_rate_bytes_per_s
from accord_simulations.bench._settings import BenchSettings
from accord_simulations.resources import versions

_BOUND = 1.0
_MODEL_HASH = "00" * 32
_TRIPS = 3


class SecaggSettings(BenchSettings):
    """Settings of `secagg`. Masks run between all pairs, up to 128 sites."""

    clients: int = Field(default=10, ge=3, le=COMPLETE_MAX)
    dim: int = Field(default=100_000, ge=1, le=10**9)
    drop: int = Field(default=0, ge=0)
    bits: int = Field(default=24, ge=8, le=62)
    repeats: int = Field(default=5, ge=1, le=1000)
    peer: Literal["flower", "none"] = "flower"
    peer_shares: int | None = Field(default=None, ge=3)
    """Neighbours of a client of the peer, itself included; without it all are neighbours of all, as Accord's are."""

    @property
    def minimum(self) -> int:
        """More than two thirds must upload, as the peer's threshold says; of a small cohort all."""
        return self.clients if self.clients <= SMALL_MAX else 2 * self.clients // 3 + 1

    @property
    def colluders(self) -> int:
        """A tenth of the sites."""
        return self.clients // 10


def measure(settings: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Raises:
        PlanError: a setting is unknown or out of range.
        Aborted: Flower gave up.
    """
    chosen = SecaggSettings.read(settings)
    if chosen.clients - chosen.drop < chosen.minimum:
        raise PlanError(f"drop = {chosen.drop}: of {chosen.clients} clients {chosen.minimum} must upload")
    progress(f"secagg: Accord, {chosen.clients} clients join")
    federation = Federation(chosen)
    first = federation.attempt(CpuMeter())
    progress(f"secagg: Accord, {chosen.repeats} attempts of {chosen.dim} values, {chosen.drop} clients drop out")
    attempts = [federation.attempt(CpuMeter()) for _ in range(chosen.repeats)]
    peak = federation.peak_bytes()
    client = statistics.median(attempt.client_cpu_s for attempt in attempts)
    server = statistics.median(attempt.server_cpu_s for attempt in attempts)
    return {
        "client_cpu_s": client,
        "server_cpu_s": server,
        **_beside_peer(chosen, client, server, progress),
        "upload_bytes_per_parameter": attempts[-1].upload_bytes / chosen.dim,
        "trips": _TRIPS,
        "exact": all(attempt.exact for attempt in (first, *attempts)),
        "server_peak_bytes": peak,
        **_beside_floor(chosen, client, server),
        "bootstrap_client_cpu_s": federation.bootstrap_cpu_s,
        "n": chosen.clients,
        "d": chosen.dim,
        **chosen.model_dump(include={"drop", "bits", "repeats", "peer"}),
        "versions": versions(),
    }


def _beside_peer(
    settings: SecaggSettings, client: float, server: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The peer's costs and how many times less ours are; None without a peer."""
    keys = ("client_cpu_s", "server_cpu_s", "upload_bytes_per_parameter")
    if settings.peer == "none":
        return dict.fromkeys((*(f"peer_{key}" for key in keys), "client_speedup", "server_speedup", "peer_shares"))
    from accord_simulations.bench._flower_secagg import measure_flower_secagg  # noqa: PLC0415

    shares = settings.peer_shares
    progress(f"secagg: Flower's SecAgg+, {'all pairs' if shares is None else f'{shares} shares'}")
    peer = measure_flower_secagg(settings.clients, settings.dim, settings.drop, shares=shares)
    return {
        **{f"peer_{key}": getattr(peer, key) for key in keys},
        "client_speedup": round(peer.client_cpu_s / client, 3),
        "server_speedup": round(peer.server_cpu_s / server, 3),
        "peer_shares": "all pairs" if shares is None else shares,
    }


def _beside_floor(settings: SecaggSettings, client: float, server: float) -> dict[str, float]:
    """The least time that drawing the masks takes, and how many times more was spent in all."""
    per_stream = settings.dim * word_type(settings.bits).itemsize / aes_rate_bytes_per_s()
    client_floor = settings.clients * per_stream
    server_floor = (settings.clients - settings.drop) * (1 + settings.drop) * per_stream
    return {
        "client_floor_s": client_floor,
        "server_floor_s": server_floor,
        "client_over_floor": round(client / client_floor, 3),
        "server_over_floor": round(server / server_floor, 3),
    }


class _Meter(Protocol):
    """Measures the coordinator's part, block by block."""

    def running(self) -> Any:
        """A context in which the coordinator works."""

    def receive(self, upload: MaskedUpload) -> MaskedUpload:
        """An upload as the coordinator gets it."""


class CpuMeter:
    """CPU seconds of this process in the blocks of one party."""

    def __init__(self) -> None:
        self.cpu_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block that counts."""
        started = time.process_time()
        yield
        self.cpu_s += time.process_time() - started

    def receive(self, upload: MaskedUpload) -> MaskedUpload:
        """The upload itself: transport is free."""
        return upload


class _MemoryMeter:
    """Memory that is allocated in the blocks of one party: what it still holds, and its peak."""

    def __init__(self) -> None:
        self._held = self.peak = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block that counts."""
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        yield
        after, peak = tracemalloc.get_traced_memory()
        self.peak = max(self.peak, self._held + peak - before)
        self._held += after - before

    def receive(self, upload: MaskedUpload) -> MaskedUpload:
        """A copy: over a network the coordinator's memory would hold it."""
        sealed = tuple(bytes(bytearray(blob)) for blob in upload.sealed)
        return replace(upload, payload=upload.payload.copy(), sealed=sealed)


class _Site:
    """A site, its vector and its meters."""

    def __init__(self, name: str, identity: Identity, roster: Roster, terms: RunTerms) -> None:
        self.name, self._terms, self._generator = name, terms, SecureGenerator()
        self.bootstrap, self.cpu = CpuMeter(), CpuMeter()
        with self.bootstrap.running():
            self.member = Member(name, identity, roster, terms)
        self.bundle = self.member.bundle

    def upload(self, request: MaskRequest, vector: npt.NDArray[np.float32]) -> tuple[MaskedUpload, Words]:
        """Trip 1, and the words before they were masked. Accepting introductions is a part of joining."""
        with (self.bootstrap if request.peers else self.cpu).running():
            self.member.accept(request, _MODEL_HASH)
        with self.cpu.running():
            words = encode(vector, self._terms.encoding, self._generator)
        plain = words.copy()
        with self.cpu.running():
            upload = self.member.mask(words)
        self.bundle = upload.next_bundle
        return upload, plain


@dataclass(frozen=True)
class _Cost:
    """What one attempt took, and whether its sum was that of the survivors' words."""

    client_cpu_s: float
    server_cpu_s: float
    upload_bytes: float
    exact: bool


class Federation:
    """Sites that have joined a run; `attempt` is one sum. With `noise` their words carry shares of it."""

    def __init__(self, settings: SecaggSettings, noise: NoiseShares | None = None) -> None:
        self._settings = settings
        identities = {f"site-{index:03}": Identity.generate() for index in range(settings.clients)}
        self._roster = Roster.made(
            {
                "federation": "bench",
                "serial": 1,
                "minimum": settings.minimum,
                "colluders": settings.colluders,
                "members": tuple(identity.public(name) for name, identity in identities.items()),
            }
        )
        self._terms = RunTerms(
            run_id="bench",
            plan_hash="00" * 32,
            roster_hash=self._roster.hash,
            mode="malicious",
            bits=noise.bits if noise else settings.bits,
            dimension=settings.dim,
            minimum=settings.minimum,
            colluders=settings.colluders,
            size=settings.clients,
            bound=_BOUND,
            own_noise=False,
            noise=noise,
        )
        self._sites = [_Site(name, identity, self._roster, self._terms) for name, identity in identities.items()]
        self._waiting = self._introduce()
        self._round = 0
        self._private = X25519PrivateKey.generate()

    def _introduce(self) -> dict[str, dict[str, bytes]]:
        """Each site introduces itself to those before it; the introductions by receiver and sender."""
        waiting: dict[str, dict[str, bytes]] = {site.name: {} for site in self._sites}
        for index, site in enumerate(self._sites):
            peers = self._sites[:index]
            names = tuple(peer.name for peer in peers)
            request = IntroduceRequest("bench", names, tuple(peer.member.credential for peer in peers))
            with site.bootstrap.running():
                reply = site.member.introduce(request)
            for name, introduction in zip(names, reply.introductions, strict=True):
                waiting[name][site.name] = introduction
        return waiting

    @property
    def bootstrap_cpu_s(self) -> float:
        """The median over clients of joining: keys, introductions made and accepted."""
        return statistics.median(site.bootstrap.cpu_s for site in self._survivors)

    @property
    def _survivors(self) -> list[_Site]:
        return self._sites[: len(self._sites) - self._settings.drop]

    def peak_bytes(self) -> int:
        """The coordinator's peak in one attempt."""
        meter = _MemoryMeter()
        tracemalloc.start()
        try:
            self._run(meter)
        finally:
            tracemalloc.stop()
        return meter.peak

    def attempt(self, server: CpuMeter) -> _Cost:
        """One attempt on the clocks."""
        for site in self._sites:
            site.cpu.cpu_s = 0.0
        exact, upload_bytes = self._run(server)
        return _Cost(
            client_cpu_s=statistics.median(site.cpu.cpu_s for site in self._survivors),
            server_cpu_s=server.cpu_s,
            upload_bytes=upload_bytes,
            exact=exact,
        )

    def _run(self, server: _Meter) -> tuple[bool, float]:
        """One attempt: whether its sum is exact, and the mean size of an upload."""
        self._round += 1
        cohort = tuple(site.name for site in self._sites)
        bundles = tuple(site.bundle for site in self._sites)
        with server.running():
            attempt = Attempt(
                self._terms, self._round, 1, cohort, bundles, _MODEL_HASH, self._private.public_key().public_bytes_raw()
            )
            collector = Collector(attempt, self._roster, self._private)
        plain, sizes = np.zeros(self._settings.dim, dtype=np.int64), []
        for index, site in enumerate(self._survivors):
            upload, words = site.upload(self._request(attempt, site.name), self._vector(index))
            plain += _signed(words, self._terms.bits)
            sizes.append(recorddict_to_proto(to_wire(upload)).ByteSize())
            with server.running():
                collector.add_upload(index, server.receive(upload))
        self._certify(collector, server)
        with server.running():
            total = decode(collector.finish(), self._terms.encoding, len(self._survivors))
        return bool(np.array_equal(total, plain / self._terms.encoding.scale)), statistics.mean(sizes)

    def _certify(self, collector: Collector, server: _Meter) -> None:
        """Trips 2 and 3."""
        with server.running():
            closed = collector.close()
        if closed.survivors != tuple(range(len(self._survivors))):
            raise Aborted(f"{len(closed.survivors)} uploads arrived, {len(self._survivors)} were due")
        for index, site in enumerate(self._survivors):
            with site.cpu.running():
                signed = site.member.sign(closed)
            with server.running():
                collector.add_signature(index, signed)
        with server.running():
            requests = collector.open_requests()
        for index, site in enumerate(self._survivors):
            with site.cpu.running():
                opened = site.member.open(requests[index])
            with server.running():
                collector.add_opening(index, opened)

    def _request(self, attempt: Attempt, name: str) -> MaskRequest:
        """Trip 1's request, with what the site has not been told yet. Its model is free, as the peer's is."""
        told: Mapping[str, bytes] = self._waiting.pop(name, {})
        return MaskRequest(
            protocol=PROTOCOL_VERSION,
            run_id=self._terms.run_id,
            plan_hash=self._terms.plan_hash,
            roster_hash=self._terms.roster_hash,
            round=attempt.round,
            attempt=attempt.attempt,
            cohort=attempt.cohort,
            bundles=attempt.bundles,
            coordinator=attempt.coordinator,
            peers=tuple(told),
            credentials=tuple(site.member.credential for site in self._sites if site.name in told),
            introductions=tuple(told.values()),
            weights=np.zeros(0, dtype=np.float32),
        )

    def _vector(self, index: int) -> npt.NDArray[np.float32]:
        """A site's update: never clamped, another one in each attempt."""
        generator = np.random.default_rng((self._round, index))
        return generator.uniform(-_BOUND, _BOUND, self._settings.dim).astype(np.float32)


def _signed(words: Words, bits: int) -> npt.NDArray[np.int64]:
    """Words mod 2^`bits` as integers around zero; not by the code that is measured."""
    half = 1 << (bits - 1)
    return (words.astype(np.int64) + half) % (2 * half) - half
