"""Recorded attempts, replayed: the same bytes are accepted, answered and summed, and one change is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_shared import errors
from accord_shared.errors import AccordError, ProtocolError, RoundAborted
from accord_shared.messages import MaskRequest
from accord_shared.receipts import Head
from accord_shared.secagg import shamir
from accord_shared.secagg.collector import Collector
from accord_shared.secagg.keys import Bundle
from accord_shared.secagg.member import Member
from vectors.make_transcript import (
    BITS,
    FILE,
    Blobs,
    attempt_of,
    collector_of,
    from_json,
    identity_of,
    record,
    roster_of,
    stream,
    terms_of,
    words_of,
)

TABLES: dict[str, dict[str, Any]] = {table["name"]: table for table in json.loads(FILE.read_text())}
REFUSALS: list[dict[str, Any]] = json.loads(Path(FILE).with_name("refusals.json").read_text())
ROSTER = roster_of()
STAGES = ("accept", "sign", "open")


@dataclass
class Replay:
    """A transcript, with the first site and the collector built again."""

    table: dict[str, Any]

    def __post_init__(self) -> None:
        self.blobs = Blobs(self.table["blobs"])
        self.terms = terms_of(self.table["name"], ROSTER)
        self.request: MaskRequest = self.message("request")
        self.site = Member("a", identity_of("a"), ROSTER, self.terms, random=stream("site a"))
        self.collector: Collector = collector_of(self.terms, ROSTER, self.request)

    def message(self, kind: str, index: int | None = None) -> Any:
        table = self.table[kind] if index is None else self.table[kind][str(index)]
        return from_json(table, self.blobs)

    def every(self, kind: str) -> dict[int, Any]:
        return {int(index): self.message(kind, int(index)) for index in self.table[kind]}

    @property
    def secured(self) -> bool:
        return self.table["terms"]["mode"] == "malicious"

    def drive(self, until: str) -> None:
        """The first site, up to the message `until`."""
        if until == "accept":
            return
        self.site.accept(self.request, self.request.model_hash)
        self.site.mask(words_of(0))
        if until == "open" and self.secured:
            self.site.sign(self.message("survivors"))

    def collect(self, until: str) -> None:
        """The collector, up to the first site's reply `until`."""
        if until == "upload":
            return
        for index, upload in self.every("uploads").items():
            self.collector.add_upload(index, upload)
        self.collector.close()
        for index, signed in self.every("signed").items() if until != "signed" else ():
            self.collector.add_signature(index, signed)


@pytest.fixture(params=list(TABLES))
def replay(request: pytest.FixtureRequest) -> Replay:
    return Replay(TABLES[request.param])


def test_the_files_are_small_and_have_both_modes() -> None:
    assert set(TABLES) == {"malicious", "semi_honest", "shared"}
    assert sum(path.stat().st_size for path in FILE.parent.glob("*.json")) < 450_000


def test_the_context_is_the_frozen_one(replay: Replay) -> None:
    assert attempt_of(replay.terms, replay.request).context.hex() == replay.table["expected"]["context"]


def test_a_collector_comes_to_the_frozen_sum(replay: Replay) -> None:
    replay.collect("opened")
    expected = replay.table["expected"]
    assert list(replay.collector.survivors) == expected["survivors"]
    asked = replay.collector.open_requests()
    assert asked[0] == replay.message("opening")
    for index, opened in replay.every("opened").items():
        replay.collector.add_opening(index, opened)
    total = replay.collector.finish()
    assert total.tolist() == expected["sum"]
    plain = sum(words_of(index).astype(object) for index in expected["survivors"])
    assert [int(value) % (1 << BITS) for value in plain] == expected["sum"]


def test_one_opening_less_is_a_typed_abort(replay: Replay) -> None:
    replay.collect("opened")
    for index, opened in list(replay.every("opened").items())[1:]:
        replay.collector.add_opening(index, opened)
    with pytest.raises(RoundAborted, match="are needed"):
        replay.collector.finish()


def test_a_site_answers_the_frozen_bytes(replay: Replay) -> None:
    site, upload = replay.site, replay.message("uploads", 0)
    site.accept(replay.request, replay.request.model_hash)
    found = site.mask(words_of(0))
    assert found.payload.tobytes() == upload.payload.tobytes()
    assert replace(found, payload=b"") == replace(upload, payload=b"")  # type: ignore[arg-type]
    if replay.secured:
        assert site.sign(replay.message("survivors")) == replay.message("signed", 0)
    assert site.open(replay.message("opening")) == replay.message("opened", 0)


def test_what_is_opened_are_the_seeds_that_masked(replay: Replay) -> None:
    """The first site's own seeds, by Shamir from the frozen openings, give its frozen payload."""
    replay.drive("sign")
    assert replay.site._current is not None
    survivors = replay.table["expected"]["survivors"]
    opened = replay.every("opened")
    rows = np.stack([shamir.from_bytes(each.shares[0], 2) for each in opened.values()])
    own, second = shamir.rebuild(rows, list(opened))
    drawn = after(stream("site a"), 16 + 64 + 32)
    assert own.tobytes() == drawn(32)
    if replay.terms.noise is not None:  # nobody dropped out: the seed of the component that is taken away
        assert second.tobytes() == drawn(32)
        return
    dropped = next(index for index in range(5) if index not in survivors)
    assert second.tobytes() == replay.site._current.pairs[dropped].mask_seed


def after(draw: Callable[[int], bytes], used: int) -> Callable[[int], bytes]:
    draw(used)
    return draw


# --- one change


def changed(message: Any, vector: dict[str, Any]) -> Any:
    """The message with what the vector says."""
    for name, value in vector.get("set", {}).items():
        message = replace(message, **{name: like(getattr(message, name), value)})
    for name, count in vector.get("cut", {}).items():
        message = replace(message, **{name: getattr(message, name)[:count]})
    for name, (one, other) in vector.get("swap", {}).items():
        items = list(getattr(message, name))
        items[one], items[other] = items[other], items[one]
        message = replace(message, **{name: tuple(items)})
    for name, (item, at) in vector.get("flip", {}).items():
        message = replace(message, **{name: flipped(getattr(message, name), item, at)})
    return message


def like(old: Any, value: Any) -> Any:
    """A JSON value in the form of the field."""
    if isinstance(old, bytes):
        return bytes.fromhex(value)
    if not isinstance(old, tuple):
        return value
    return tuple(bytes.fromhex(item) for item in value) if isinstance(old[0], bytes) else tuple(value)


def flipped(old: Any, item: int, at: int) -> Any:
    """One bit of one byte string flipped."""
    data = bytearray(old.tobytes() if isinstance(old, np.ndarray) else old[item])
    data[at] ^= 1
    if isinstance(old, np.ndarray):
        return np.frombuffer(bytes(data), dtype=old.dtype)
    return (*old[:item], bytes(data), *old[item + 1 :])


def at_site(replay: Replay, to: str) -> tuple[Any, Callable[[Any], object]]:
    message = {"accept": replay.request, "sign": replay.message("survivors"), "open": replay.message("opening")}[to]
    answer = {"accept": lambda m: replay.site.accept(m, m.model_hash), "sign": replay.site.sign}
    return message, answer.get(to, replay.site.open)


def at_collector(replay: Replay, to: str) -> tuple[Any, Callable[[Any], object]]:
    kind = {"upload": "uploads", "signed": "signed", "opened": "opened"}[to]
    collector = replay.collector
    add = {"upload": collector.add_upload, "signed": collector.add_signature, "opened": collector.add_opening}[to]
    return replay.message(kind, 0), lambda message: add(0, message)


@pytest.mark.parametrize("vector", REFUSALS, ids=lambda v: f"{v['of'][:4]}-{v['to']}-{v['says']}")
def test_one_change_is_refused(vector: dict[str, Any]) -> None:
    """And nothing but the change was wrong: where the refusal does not burn the attempt, what came is taken."""
    replay, to = Replay(TABLES[vector["of"]]), vector["to"]
    (replay.drive if to in STAGES else replay.collect)(to)
    message, give = (at_site if to in STAGES else at_collector)(replay, to)
    with pytest.raises(getattr(errors, vector["error"])) as refused:
        give(changed(message, vector))
    assert type(refused.value).__name__ == vector["error"]
    assert re.search(vector["says"], str(refused.value)), str(refused.value)
    if to != "accept":
        give(message)


def test_a_refused_request_of_rules_4_and_5_burns_its_attempt() -> None:
    replay = Replay(TABLES["malicious"])
    with pytest.raises(AccordError, match="R5"):
        replay.site.accept(replace(replay.request, introductions=()), replay.request.model_hash)
    with pytest.raises(AccordError, match=r"^R2"):
        replay.site.accept(replay.request, replay.request.model_hash)


def test_only_the_newest_two_generations_of_a_bundle_are_taken(replay: Replay) -> None:
    """R4. A site whose ledger went on five times without an upload took its first bundle: an old head, an old key."""
    bundles = [replay.site.bundle]
    for number in range(1, 6):
        replay.site.tell_ledger(Head(number, bytes(32)))
        bundles.append(replay.site.bundle)
    assert [Bundle.parse(bundle).generation for bundle in bundles] == [0, 1, 2, 3, 4, 5]
    for attempt, generation in enumerate((0, 3), start=1):
        request = replace(replay.request, attempt=attempt, bundles=(bundles[generation], *replay.request.bundles[1:]))
        with pytest.raises(ProtocolError, match="R4: this is not a bundle"):
            replay.site.accept(request, request.model_hash)
    request = replace(replay.request, attempt=3, bundles=(bundles[4], *replay.request.bundles[1:]))
    replay.site.accept(request, request.model_hash)


def test_the_next_attempt_of_an_opened_round_is_refused(replay: Replay) -> None:
    replay.drive("open")
    replay.site.open(replay.message("opening"))
    again = replace(replay.request, attempt=2)
    with pytest.raises(AccordError, match=r"^R2: round 1 was opened"):
        replay.site.accept(again, again.model_hash)


def test_the_recorder_still_records_this() -> None:
    """A fresh recording differs in what the library draws only: ML-DSA signatures and ciphertexts."""
    made, frozen = record("malicious", silent=3, leaves=(1,)), TABLES["malicious"]
    assert made["expected"]["sum"] == frozen["expected"]["sum"]
    assert made["expected"]["survivors"] == frozen["expected"]["survivors"]
    assert made["terms"] == frozen["terms"]
    assert made["request"]["bundles"] == frozen["request"]["bundles"]
    assert made["expected"]["context"] == frozen["expected"]["context"]
