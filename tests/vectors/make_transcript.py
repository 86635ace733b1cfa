"""Records one attempt of secure aggregation: `python tests/vectors/make_transcript.py` writes transcripts.json.

Sites draw from fixed streams, so that each of them can be built again. ML-DSA signatures and encapsulations are
drawn by the library: only the site that joined first, which encapsulates to nobody, answers the same bytes again from
public messages alone. All seeds here are public: they guard nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from accord_shared import messages as kinds
from accord_shared.dp.sharing import NoiseShares
from accord_shared.identity import Identity
from accord_shared.messages import IntroduceRequest, MaskRequest
from accord_shared.roster import Roster
from accord_shared.secagg.collector import Collector
from accord_shared.secagg.keys import Attempt, RunTerms
from accord_shared.secagg.member import Member

FILE = Path(__file__).with_name("transcripts.json")
NAMES = ("a", "b", "c", "d", "e")
DIMENSION, BITS = 5, 20
PRIVATE = X25519PrivateKey.from_private_bytes(bytes(range(32)))
"""The coordinator's."""
MODEL = np.arange(DIMENSION, dtype=np.float32) / 8


def stream(label: str) -> Callable[[int], bytes]:
    """SHA-256 of the label and a counter, as bytes to draw from."""
    buffer, counter = bytearray(), 0

    def draw(count: int) -> bytes:
        nonlocal counter
        while len(buffer) < count:
            buffer.extend(hashlib.sha256(label.encode() + counter.to_bytes(4, "big")).digest())
            counter += 1
        taken = bytes(buffer[:count])
        del buffer[:count]
        return taken

    return draw


def identity_of(name: str) -> Identity:
    """A site's identity."""
    draw = stream(f"identity {name}")
    return Identity.from_seeds(draw(32), draw(32))


def roster_of(names: tuple[str, ...] = NAMES) -> Roster:
    """The sites' roster."""
    members = tuple(identity_of(name).public(name) for name in names)
    return Roster.made({"federation": "vectors", "serial": 1, "minimum": 3, "colluders": 0, "members": members})


SHARES = NoiseShares(
    multiplier=1.0,
    sites=5,
    minimum=4,
    colluders=1,
    dimension=DIMENSION,
    steps=64,
    clip=1.0,
    bound=1.5,
    bits=BITS,
    draws=9,
)
"""How noise is divided in the transcript named `shared`: one removable component."""


def terms_of(name: str, roster: Roster) -> RunTerms:
    """The run's terms: n = 5, n_min = 4, c = 1."""
    mode, noise = ("malicious", SHARES) if name == "shared" else (name, None)
    return RunTerms(
        run_id="17",
        plan_hash="ab" * 32,
        roster_hash=roster.hash,
        mode=mode,  # type: ignore[arg-type]
        bits=BITS,
        dimension=DIMENSION,
        minimum=4,
        colluders=1,
        size=len(NAMES),
        bound=1.5,
        own_noise=noise is None,
        noise=noise,
    )


def words_of(index: int) -> np.ndarray[Any, Any]:
    """What a site uploads: below the modulus, near both of its ends."""
    return (np.arange(DIMENSION) * 31 - 17 * (index + 1)).astype(np.uint32) % np.uint32(1 << BITS)


def complete(count: int) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """Partners and holders of a complete graph."""
    everyone = tuple(range(count))
    return {i: tuple(j for j in everyone if j != i) for i in everyone}, dict.fromkeys(everyone, everyone)


# --- messages as JSON: long byte strings are named by the SHA-256 they are filed under


@dataclass
class Blobs:
    """Byte strings, each stored once."""

    known: dict[str, str]

    def put(self, data: bytes) -> str:
        """Its hexadecimal, or the name it is filed under."""
        if len(data) <= 256:
            return data.hex()
        name = "@" + hashlib.sha256(data).hexdigest()[:12]
        self.known[name] = base64.b64encode(data).decode()
        return name

    def get(self, text: str) -> bytes:
        """The bytes."""
        return base64.b64decode(self.known[text]) if text.startswith("@") else bytes.fromhex(text)


def to_json(message: Any, blobs: Blobs) -> dict[str, Any]:
    """A message of `accord_shared.messages`."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return blobs.put(value.tobytes())
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return blobs.put(value) if isinstance(value, bytes) else value

    return {"message": type(message).__name__} | {f.name: plain(getattr(message, f.name)) for f in fields(message)}


def from_json(table: dict[str, Any], blobs: Blobs) -> Any:
    """The message again."""
    kind = getattr(kinds, table["message"])
    values = {}
    for field in fields(kind):
        value, form = table[field.name], str(field.type)
        if form in ("Vector", "Octets"):
            value = np.frombuffer(blobs.get(value), dtype="<f4" if form == "Vector" else np.uint8)
        elif form == "tuple[bytes, ...]":
            value = tuple(blobs.get(item) for item in value)
        elif form.startswith("tuple"):
            value = tuple(value)
        values[field.name] = blobs.get(value) if form == "bytes" else value
    return kind(**values)


# --- recording


def introductions(members: dict[str, Member], terms: RunTerms) -> dict[str, dict[str, bytes]]:
    """By receiver, then sender; the greater name encapsulates."""
    told: dict[str, dict[str, bytes]] = {name: {} for name in members}
    for name, member in members.items():
        peers = tuple(peer for peer in members if peer < name)
        if peers:
            reply = member.introduce(
                IntroduceRequest(terms.run_id, peers, tuple(members[peer].credential for peer in peers))
            )
            for peer, data in zip(peers, reply.introductions, strict=True):
                told[peer][name] = data
    return told


def mask_requests(
    members: dict[str, Member], terms: RunTerms, told: dict[str, dict[str, bytes]], where: tuple[int, int]
) -> list[MaskRequest]:
    """Trip 1 for a cohort."""
    cohort = tuple(members)
    return [
        MaskRequest(
            protocol=1,
            run_id=terms.run_id,
            plan_hash=terms.plan_hash,
            roster_hash=terms.roster_hash,
            round=where[0],
            attempt=where[1],
            cohort=cohort,
            bundles=tuple(member.bundle for member in members.values()),
            coordinator=PRIVATE.public_key().public_bytes_raw(),
            peers=tuple(told.get(name, {})),
            credentials=tuple(members[peer].credential for peer in told.get(name, {})),
            introductions=tuple(told.get(name, {}).values()),
            weights=MODEL,
        )
        for name in cohort
    ]


def attempt_of(terms: RunTerms, request: MaskRequest) -> Attempt:
    """The attempt that a request begins."""
    shown = (request.cohort, request.bundles, request.model_hash, request.coordinator)
    return Attempt(terms, request.round, request.attempt, *shown)


def collector_of(terms: RunTerms, roster: Roster, request: MaskRequest) -> Collector:
    """The coordinator's side of it, on a complete graph."""
    count = len(request.cohort)
    return Collector(attempt_of(terms, request), roster, terms.thresholds(count), *complete(count), PRIVATE)


def record(name: str, silent: int | None, leaves: tuple[int, ...] = ()) -> dict[str, Any]:
    """One attempt in which `silent` never uploads, and `leaves` do not open."""
    roster, blobs = roster_of(), Blobs({})
    terms = terms_of(name, roster)
    mode = terms.mode
    members = {each: Member(each, identity_of(each), roster, terms, random=stream(f"site {each}")) for each in NAMES}
    told = introductions(members, terms)
    requests = mask_requests(members, terms, told, (1, 1))
    sites = list(members.values())
    collector = collector_of(terms, roster, requests[0])
    uploads, signed, openings = {}, {}, {}
    for index, request in enumerate(requests):
        sites[index].accept(request, request.model_hash)
        if index != silent:
            uploads[index] = sites[index].mask(words_of(index))
            collector.add_upload(index, uploads[index])
    survivors = collector.close()
    for index in collector.survivors if mode == "malicious" else ():
        signed[index] = sites[index].sign(survivors)
        collector.add_signature(index, signed[index])
    asked = collector.open_requests()
    for index, request in asked.items():
        if index not in leaves:
            openings[index] = sites[index].open(request)
            collector.add_opening(index, openings[index])
    return {
        "name": name,
        "terms": asdict(terms),
        "request": to_json(requests[0], blobs),
        "uploads": {index: to_json(each, blobs) for index, each in uploads.items()},
        "survivors": to_json(survivors, blobs),
        "signed": {index: to_json(each, blobs) for index, each in signed.items()},
        "opening": to_json(asked[0], blobs),
        "opened": {index: to_json(each, blobs) for index, each in openings.items()},
        "expected": {
            "context": attempt_of(terms, requests[0]).context.hex(),
            "survivors": list(collector.survivors),
            "sum": collector.finish().tolist(),
        },
        "blobs": blobs.known,
    }


def main() -> None:
    """Write the file."""
    table = [record("malicious", silent=3, leaves=(1,)), record("semi_honest", silent=1)]
    table.append(record("shared", silent=None, leaves=(2, 3)))
    FILE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
