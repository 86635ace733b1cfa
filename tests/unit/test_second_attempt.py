"""A recorded attempt, whole, by the second implementation alone: a site's bytes, and the coordinator's sum.

`tests/vectors/second.py` follows PROTOCOL.md and shares no code with the product, which recorded the attempts.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from vectors import second
from vectors.make_transcript import stream

Json = dict[str, Any]
FILE = Path(second.__file__).with_name("transcripts.json")
TABLES: dict[str, Json] = {table["name"]: table for table in json.loads(FILE.read_text())}
NAMES = ("a", "b", "c", "d", "e")
PLAN: Json = {
    "run": {"name": "shared", "rounds": 9, "max_extra_attempts": 0},
    "model": {"source": "path:m"},
    "task": {"labels": ["a", "b"]},
    "local": {"expected_records": 1, "clip_norm": 1},
    "privacy": {"noise": "cohort", "epsilon": 1},
    "cohort": {"size": 5, "minimum": 4, "colluders": 1},
    "secure_aggregation": {"bits": 20, "bound": 1.5},
}
"""Of the attempt named `shared`: one component, on a grid of 64 steps."""


class Site:
    """The secrets of a site, in the order in which it draws them."""

    def __init__(self, name: str) -> None:
        identity = stream(f"identity {name}")
        self.ed25519_seed, self.ml_dsa_seed = identity(32), identity(32)
        self.draw: Callable[[int], bytes] = stream(f"site {name}")
        self.session, self.kem_seed, self.x25519 = self.draw(16), self.draw(64), self.draw(32)


@dataclass
class Attempt:
    """A transcript, read by the second implementation."""

    table: Json

    def get(self, value: Any) -> bytes:
        """A byte string of the file."""
        named = value.startswith("@")
        return base64.b64decode(self.table["blobs"][value]) if named else bytes.fromhex(value)

    @cached_property
    def shares(self) -> second.Shares | None:
        return second.Shares(PLAN, 5, 1.0, 64, 1) if self.table["terms"]["noise"] else None

    @cached_property
    def terms(self) -> Json:
        terms = self.table["terms"]
        kept = {key: terms[key] for key in ("run_id", "roster_hash", "plan_hash", "mode", "bits", "dimension")}
        noise = self.shares.facts(terms["bits"]) if self.shares else None
        return {**kept, "bound": second.decimal_text(terms["bound"]), "noise": noise}

    @cached_property
    def ctx(self) -> bytes:
        request = self.table["request"]
        shown = {key: request[key] for key in ("round", "attempt", "coordinator", "cohort", "bundles")}
        model = second.sha256(self.get(request["weights"])).hex()
        return second.context(self.terms, {**shown, "model_hash": model, "choices": []})

    @property
    def threshold(self) -> int:
        terms = self.table["terms"]
        own = terms["own_noise"]
        return second.thresholds(5, terms["minimum"], terms["colluders"], terms["mode"], 5, own_noise=own)[1]

    def pairs(self, site: Site) -> dict[int, tuple[bytes, bytes, bytes]]:
        """What the first site shares with each other one, from the introductions that it was sent."""
        request, found = self.table["request"], {}
        for peer, credential, introduction in zip(
            request["peers"], request["credentials"], request["introductions"], strict=True
        ):
            parties = [peer, self.get(credential)[:16], "a", site.session]
            kem = second.kem_secret(self.terms["run_id"], parties, self.get(introduction)[:1088], site.kem_seed)
            index = NAMES.index(peer)
            public = self.get(request["bundles"][index])[20:52]
            found[index] = second.pair_keys(site.x25519, public, kem, self.ctx, "a", peer)
        return found

    def components(self) -> list[Any]:
        return self.shares.components if self.shares else []

    def removed(self) -> list[int]:
        return self.shares.removed(len(self.survivors)) if self.shares else []

    @property
    def survivors(self) -> list[int]:
        found: list[int] = self.table["expected"]["survivors"]
        return found


@pytest.fixture(params=list(TABLES))
def attempt(request: pytest.FixtureRequest) -> Attempt:
    return Attempt(TABLES[request.param])


def test_the_context(attempt: Attempt) -> None:
    assert attempt.ctx.hex() == attempt.table["expected"]["context"]


def test_the_first_site_answers_the_recorded_bytes(attempt: Attempt) -> None:
    site, bits = Site("a"), attempt.terms["bits"]
    upload = attempt.table["uploads"]["0"]
    pairs = attempt.pairs(site)
    words = [(31 * i - 17) % (1 << bits) for i in range(5)]
    self_mask = site.draw(32)
    seeds = [site.draw(32) for _ in attempt.components()]
    for variance, seed in zip(attempt.components(), seeds, strict=True):
        words = [(a + b) % (1 << bits) for a, b in zip(words, second.noise(variance, seed, 5), strict=True)]
    masked = second.masked(words, bits, [self_mask, *(pairs[index][0] for index in sorted(pairs))], [])
    payload = second.pack(masked, bits)
    assert payload == attempt.get(upload["payload"])

    secrets = [self_mask, *(pairs[index][0] for index in sorted(pairs)), *seeds]
    random = site.draw(4 * 9 * len(secrets) * (attempt.threshold - 1))
    shares = second.deal(secrets, range(5), attempt.threshold, random)
    plain = [second.dealt(sorted(pairs), 5, data) for data in shares]
    sealed = [second.seal(pairs[w][1], plain[w], second.shares_data(attempt.ctx, 0, w)) for w in range(1, 5)]
    assert sealed == [attempt.get(blob) for blob in upload["sealed"]]

    private = site.draw(32)
    public = second.X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    following = second.bundle(attempt.terms, "a", site.session, 1, public, bytes(40), site.ed25519_seed)
    assert following == attempt.get(upload["next_bundle"])
    key = second.upload_key(site.x25519, attempt.get(attempt.table["request"]["coordinator"]), attempt.ctx, "a")
    assert second.upload_tag(key, payload, sealed, following) == attempt.get(upload["tag"])

    if attempt.terms["mode"] == "malicious":
        signed = second.survivors_bytes(attempt.ctx, attempt.survivors)
        signer = second.Ed25519PrivateKey.from_private_bytes(site.ed25519_seed)
        assert signer.sign(signed) == attempt.get(attempt.table["signed"]["0"]["signature"])

    opening = attempt.table["opening"]
    answers = []
    for sender, blob in zip(opening["survivors"], opening["sealed"], strict=True):
        given = plain[0]
        if sender:
            given = second.unseal(pairs[sender][2], attempt.get(blob), second.shares_data(attempt.ctx, sender, 0))
        answers.append(second.opened(given, 5, attempt.survivors, len(attempt.components()), attempt.removed()))
    assert answers == [attempt.get(item) for item in attempt.table["opened"]["0"]["shares"]]


def rebuilt(attempt: Attempt) -> Iterator[tuple[int, list[bytes]]]:
    """Of each survivor what t_share holders open."""
    opened = {int(index): each["shares"] for index, each in attempt.table["opened"].items()}
    holders = sorted(opened)[: attempt.threshold]
    for place, sender in enumerate(attempt.survivors):
        yield sender, second.rebuild([attempt.get(opened[holder][place]) for holder in holders], holders)


def test_the_coordinator_s_sum(attempt: Attempt) -> None:
    bits, survivors = attempt.terms["bits"], attempt.survivors
    dropped = [index for index in range(5) if index not in survivors]
    total = [0] * 5
    for index in survivors:
        words = second.unpack(attempt.get(attempt.table["uploads"][str(index)]["payload"]), bits, 5)
        total = [(a + b) % (1 << bits) for a, b in zip(total, words, strict=True)]
    for sender, secrets in rebuilt(attempt):
        pairs = dict(zip(dropped, secrets[1 : 1 + len(dropped)], strict=True))
        minus = [secrets[0], *(seed for index, seed in pairs.items() if index > sender)]
        total = second.masked(total, bits, [seed for index, seed in pairs.items() if index < sender], minus)
        for index, seed in zip(attempt.removed(), secrets[1 + len(dropped) :], strict=True):
            taken = second.noise(attempt.components()[index], seed, 5)
            total = [(a - b) % (1 << bits) for a, b in zip(total, taken, strict=True)]
    assert total == attempt.table["expected"]["sum"]
