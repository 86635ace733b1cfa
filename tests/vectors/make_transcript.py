"""Records attempts of secure aggregation: `python tests/vectors/make_transcript.py` writes transcripts and sparse.json.

Sites draw from fixed streams, so that each of them can be built again. ML-DSA signatures and encapsulations are
drawn by the library: only the site that joined first, which encapsulates to nobody, answers the same bytes again from
public messages alone. All seeds here are public: they guard nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from accord_shared import messages as kinds
from accord_shared.dp.sharing import NoiseShares
from accord_shared.frames import frame
from accord_shared.identity import BOTH_SIGNATURES, Identity
from accord_shared.messages import IntroduceRequest, MaskRequest
from accord_shared.roster import Roster
from accord_shared.secagg.choices import Edges, own_choice
from accord_shared.secagg.collector import Collector
from accord_shared.secagg.graph import most_left_out, sparse_thresholds
from accord_shared.secagg.keys import KEM_PUBLIC_BYTES, SESSION_BYTES, Attempt, RunTerms
from accord_shared.secagg.member import Member

FILE = Path(__file__).with_name("transcripts.json")
SPARSE_FILE = Path(__file__).with_name("sparse.json")
NAMES = ("a", "b", "c", "d", "e")
MANY = ("a", *(f"b{index:02d}" for index in range(87)))
"""A roster on which a sparse graph is small: 88 members, of which 87 must survive, choose three each."""
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
    """The run's terms: n = 5, n_min = 4, c = 1; on the sparse graph N = 88, cohort.size = 129, n_min = 87, c = 0."""
    if name == "sparse":
        return replace(terms_of("malicious", roster), minimum=87, colluders=0, size=129, members=len(MANY))
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
        members=len(NAMES),
    )


def words_of(index: int) -> np.ndarray[Any, Any]:
    """What a site uploads: below the modulus, near both of its ends."""
    return (np.arange(DIMENSION) * 31 - 17 * (index + 1)).astype(np.uint32) % np.uint32(1 << BITS)


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
    names, edges = list(members), Edges(choices_of(members, terms), range(len(members)))
    for place, (name, member) in enumerate(members.items()):
        peers = tuple(names[peer] for peer in edges.of(place)[0] if peer < place)
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
            choices=choices_of(members, terms),
        )
        for name in cohort
    ]


def choices_of(members: dict[str, Member], terms: RunTerms) -> tuple[bytes, ...]:
    """Whom each chose, out of its credential."""
    ends = SESSION_BYTES + KEM_PUBLIC_BYTES, -BOTH_SIGNATURES
    return tuple(member.credential[slice(*ends)] for member in members.values()) if terms.sparse else ()


def attempt_of(terms: RunTerms, request: MaskRequest) -> Attempt:
    """The attempt that a request begins."""
    shown = (request.cohort, request.bundles, request.model_hash, request.coordinator)
    return Attempt(terms, request.round, request.attempt, *shown, request.choices)


def collector_of(terms: RunTerms, roster: Roster, request: MaskRequest) -> Collector:
    """The coordinator's side of it."""
    return Collector(attempt_of(terms, request), roster, PRIVATE)


def record(
    name: str, silent: int | None, leaves: tuple[int, ...] = (), names: tuple[str, ...] = NAMES
) -> dict[str, Any]:
    """One attempt in which `silent` never uploads, and `leaves` do not open."""
    roster, blobs = roster_of(names), Blobs({})
    terms = terms_of(name, roster)
    mode = terms.mode
    members = {each: Member(each, identity_of(each), roster, terms, random=stream(f"site {each}")) for each in names}
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
    kept = [0] if terms.sparse else range(len(names))  # of a large graph the first site's side

    def replies(made: dict[int, Any]) -> dict[int, Any]:
        return {index: to_json(each, blobs) for index, each in made.items() if index in kept}

    return {
        "name": name,
        "terms": asdict(terms),
        "request": to_json(requests[0], blobs),
        "uploads": replies(uploads),
        "survivors": to_json(survivors, blobs),
        "signed": replies(signed),
        "opening": to_json(asked[0], blobs),
        "opened": replies(openings),
        "expected": {
            "context": attempt_of(terms, requests[0]).context.hex(),
            "survivors": list(collector.survivors),
            "sum": collector.finish().tolist(),
        },
        "blobs": blobs.known,
    }


GRAPHS = (
    (88, 87, 0),
    (130, 125, 0),
    (130, 125, 2),
    (160, 148, 2),
    (200, 160, 0),
    (250, 238, 0),
    (400, 393, 2),
    (1000, 700, 0),
    (1000, 700, 10),
    (1000, 900, 0),
    (1000, 900, 100),
    (1000, 950, 0),
)
"""(N, n_min, c)."""


def graph_vectors() -> dict[str, Any]:
    """Numbers of graphs, and the choice of one identity at some places of rosters of some sizes."""
    rules = [(graph, sparse_thresholds(*graph)) for graph in GRAPHS]
    seed, hashes = bytes(range(32)), ("01" * 32, "ab" * 32)
    identity = Identity.from_seeds(seed, seed)
    drawn = [(0, 88, 3), (87, 88, 3), (12, 13, 12), (500, 1000, 89)]
    return {
        "thresholds": [
            {
                "members": rule.sites,
                "minimum": graph[1],
                "colluders": graph[2],
                "degree": rule.degree,
                "share": rule.share,
                "sign": rule.sign,
                "most_left_out": most_left_out(*graph, rule.degree or 0),
            }
            for graph, rule in rules
        ],
        "choices": {
            "ed25519_seed": seed.hex(),
            "roster_hash": hashes[0],
            "plan_hash": hashes[1],
            "key": identity.derive(frame("accord/1/neighbours", *hashes)).hex(),
            "drawn": [
                {
                    "place": own,
                    "members": sites,
                    "degree": degree,
                    "choice": own_choice(identity, *hashes, own, sites, degree).hex(),
                }
                for own, sites, degree in drawn
            ],
        },
    }


def record_sparse() -> dict[str, Any]:
    """The first site's side of an attempt on a sparse graph, with its edges."""
    made = record("sparse", silent=40, names=MANY)
    edges = Edges([bytes.fromhex(choice) for choice in made["request"]["choices"]], range(len(MANY)))
    partners, holders = edges.of(0)
    made["expected"] |= {"partners": list(partners), "holders": list(holders)}
    return made


def main() -> None:
    """Write the files."""
    SPARSE_FILE.write_text(json.dumps(graph_vectors() | {"transcript": record_sparse()}, indent=1) + "\n")
    table = [record("malicious", silent=3, leaves=(1,)), record("semi_honest", silent=1)]
    table.append(record("shared", silent=None, leaves=(2, 3)))
    FILE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
