"""What is left of the list: rosters, contexts, sparse graphs, malformed messages, and that uploads are uniform."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ConfigRecord, RecordDict

from accord_shared.errors import ProtocolError, RosterError
from accord_shared.messages import MaskRequest, OpenRequest, SurvivorsRequest
from accord_shared.quantize import Encoding, decode, pack
from accord_shared.roster import Roster
from accord_shared.secagg import keys, masking
from accord_shared.secagg.dealing import opened_part
from accord_shared.secagg.keys import Attempt, Credential
from accord_shared.secagg.member import Member
from accord_shared.wire import decode as unwire
from accord_shared.wire import encode as wire
from adversarial.hostile import DIMENSION, NAMES, Setting, World, identity_of, stream

ALL = tuple(range(7))

# Rosters


def test_one_key_is_one_member() -> None:
    """Roster Sybil: the corrupt site under three names is within its c = 1, and is refused."""
    members = [identity_of(name).public(name) for name in "ab"]
    members += [identity_of("c").public(name) for name in "cde"]
    with pytest.raises(RosterError, match="have the same ed25519 key"):
        Roster.made({"federation": "f", "serial": 1, "minimum": 5, "colluders": 1, "members": tuple(members)})


def test_three_names_of_one_site_would_rebuild_all() -> None:
    """Control: with t_share = 3 of five, three names hold enough shares of a and b alone."""
    setting = Setting(names=tuple("abcde"), corrupt=("c", "d", "e"), minimum=5, colluders=1)
    world = World(setting)
    run = world.run().join()
    run.uploads()
    run.finish(tuple(range(5)))
    assert world.oracle.wins


# Contexts


@pytest.mark.parametrize("what", ["round", "attempt", "cohort", "bundles", "model_hash", "choices", "terms"])
def test_the_context_binds_everything(what: str) -> None:
    world = World()
    attempt = Attempt(world.run().terms, 1, 1, ("a", "b"), (b"1", b"2"), "0" * 64, b"\x09" + bytes(31), ())
    others: dict[str, list[Any]] = {
        "round": [2],
        "attempt": [2],
        "cohort": [("a", "c"), ("a",), ("ab",)],
        "bundles": [(b"2", b"1"), (b"12",)],
        "model_hash": ["1" * 64],
        "choices": [(b"a",), (b"",), (b"a", b"b"), (b"ab",)],
        "terms": [
            replace(attempt.terms, **{key: value})
            for key, value in {
                "run_id": "other",
                "roster_hash": "1" * 64,
                "plan_hash": "1" * 64,
                "mode": "semi_honest",
                "bits": 25,
                "bound": 1.25,
                "dimension": 25,
            }.items()
        ],
    }
    contexts = {attempt.context, *(replace(attempt, **{what: other}).context for other in others[what])}
    assert len(contexts) == 1 + len(others[what])


def test_garbage_is_out_of_range() -> None:
    """Masks that do not cancel: what the coordinator decodes of a sum of strangers' uploads is refused as a lie."""
    world = World()
    run = world.run().join()
    for name in NAMES:
        run.upload(name, seed="abd".count(name))
    total = sum(np.frombuffer(stream(name)(4 * DIMENSION), dtype="<u4") & 0xFFFFFF for name in NAMES) & 0xFFFFFF
    with pytest.raises(ProtocolError, match="out of range"):
        decode(total.astype(np.uint32), Encoding(bits=24, sites=100, bound=1.0), 2)
    assert not world.oracle.sums()


# Malformed and oversize messages


def mask_request() -> MaskRequest:
    return World().run().join().mask_request("d")


def tampered(message: Any, changes: dict[str, Any]) -> RecordDict:
    """The message's content with some scalars replaced, or left out where the value is None."""
    content = wire(message)
    scalars = dict(content.config_records["accord.fields"])
    scalars |= changes
    content["accord.fields"] = ConfigRecord({key: value for key, value in scalars.items() if value is not None})
    return content


SURVIVORS = SurvivorsRequest("run", 1, 1, ALL)
OPEN = OpenRequest("run", 1, 1, ALL, ALL, (bytes(64),) * 7, (b"",) * 7)
TAMPERED = {
    "negative survivor": (SURVIVORS, {"survivors": [-1, 0, 1, 2, 3]}),
    "huge survivor": (SURVIVORS, {"survivors": [2**60]}),
    "float survivor": (SURVIVORS, {"survivors": [0.5]}),
    "bool round": (SURVIVORS, {"round": True}),
    "negative attempt": (SURVIVORS, {"attempt": -1}),
    "round as text": (SURVIVORS, {"round": "1"}),
    "missing": (SURVIVORS, {"survivors": None}),
    "extra": (SURVIVORS, {"threshold": 2}),
    "other kind": (SURVIVORS, {"message": "OpenRequest"}),
    "no kind": (SURVIVORS, {"message": "Member"}),
    "long run id": (SURVIVORS, {"run_id": "r" * 129}),
    "too many survivors": (SURVIVORS, {"survivors": list(range(100_001))}),
    "long signature": (OPEN, {"signatures": [bytes(129)] * 7}),
    "signatures as texts": (OPEN, {"signatures": ["00"] * 7}),
    "long ciphertext": (OPEN, {"sealed": [bytes((1 << 20) + 1)] * 7}),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_malformed_messages_are_refused(what: str) -> None:
    message, changes = TAMPERED[what]
    with pytest.raises(ProtocolError):
        unwire(tampered(message, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"bundles": (b"",) * 7},
        {"bundles": (bytes(116),) * 7},
        {"peers": ("a",)},
        {"peers": ()},
        {"credentials": (b"",), "introductions": (b"",), "peers": ("a",)},
        {"credentials": (bytes(4573),), "introductions": (bytes(4461),), "peers": ("a",)},
        {"credentials": (bytes(4573),), "introductions": (bytes(4461),), "peers": ("d",)},
        {"credentials": (bytes(4573),), "introductions": (bytes(4461),), "peers": ("zz",)},
        {"cohort": ()},
        {"cohort": ("d",) * 7},
    ],
    ids=lambda changes: "+".join(changes) + f" {len(next(iter(changes.values())))}",
)
def test_malformed_requests_are_typed_refusals(changes: dict[str, Any]) -> None:
    """Whatever passes the wire and is nonsense: a typed refusal, never another exception."""
    run = World().run().join()
    message = replace(run.mask_request("d"), **changes)
    decoded = unwire(wire(message))
    assert isinstance(decoded, MaskRequest)
    assert run.send_mask("d", decoded) is None
    assert len(run.world.refusals) == 1
    assert {field.name for field in fields(message)} >= set(changes)


def test_a_vector_of_another_length_is_not_masked() -> None:
    """R6 at the member; the site checks the model's length and numbers before it trains."""
    run = World().run().join()
    station: Any = run.world.stations["d"]
    member = station.members["run"]
    request = run.mask_request("d")
    member.accept(request, request.model_hash)
    with pytest.raises(ProtocolError, match="R6: "):
        member.mask(np.zeros(DIMENSION + 1, dtype=np.uint32))


# Uniformity

LIMIT = 6.0
"""Standard deviations of a chi-square: a uniform upload exceeds it once in 10^9, and the generators here are fixed."""


def deviation(values: npt.NDArray[Any], classes: int) -> float:
    """Chi-square of the counts against uniform ones, in standard deviations from its mean."""
    expected = len(values) / classes
    counts = np.bincount(values.astype(np.int64), minlength=classes)
    square = float(((counts - expected) ** 2 / expected).sum())
    return (square - (classes - 1)) / (2 * (classes - 1)) ** 0.5


def uploads_of(monkeypatch: pytest.MonkeyPatch, rounds: int = 4) -> npt.NDArray[np.uint8]:
    """Payloads [rounds, bytes] of one site with the very same update, 20 bits a coordinate."""
    dimension = 1 << 14
    monkeypatch.setattr("adversarial.hostile.DIMENSION", dimension)
    monkeypatch.setattr(Setting, "update", lambda *_: (np.arange(dimension) % 7).astype("<u4"))
    run = World(Setting(names=tuple("abcde"), corrupt=(), colluders=0, minimum=4, bits=20)).run().join()
    payloads = []
    for number in range(1, rounds + 1):
        run.uploads(round_number=number)
        payloads.append(run.world.uploads[-1].message.payload)
    return np.stack(payloads)


def worst(payloads: npt.NDArray[np.uint8]) -> float:
    """The worst of: bytes of the low plane and of the high bits' planes, and of differences between rounds."""
    low = 2 << 14
    differences = payloads[1:] ^ payloads[:-1]
    parts = [part for block in (payloads, differences) for part in (block[:, :low], block[:, low:])]
    parts += [payloads[:, 0:low:2], payloads[:, 1:low:2]]
    return max(deviation(part.reshape(-1), 256) for part in parts)


def test_masked_uploads_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(uploads_of(monkeypatch)) < LIMIT


@pytest.mark.parametrize("mask", ["constant", "none"])
def test_the_test_of_uniformity_sees(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for all rounds, or no mask at all."""
    plus = [bytes(32)] if mask == "constant" else []
    monkeypatch.setattr(
        "accord_shared.secagg.member.add_masks",
        lambda words, *_, **__: masking.add_masks(words, plus, []),
    )
    assert worst(uploads_of(monkeypatch)) > LIMIT


def test_low_bits_alone_would_be_seen() -> None:
    """Masks of 16 bits in 20: the high planes give it away."""
    words = np.frombuffer(stream("low")(4 << 14), dtype="<u4") & 0xFFFF
    assert worst(np.stack([pack(words.copy(), 20)] * 2)) > LIMIT


def test_a_message_of_another_run_is_refused() -> None:
    """R1, at the member itself: a station finds members by their run."""
    run = World().run().join()
    station: Any = run.world.stations["d"]
    request = run.mask_request("d")
    with pytest.raises(ProtocolError, match="R1: a message of another run"):
        station.members["run"].accept(replace(request, run_id="other"), request.model_hash)


def test_a_run_of_another_roster_is_refused() -> None:
    world = World()
    terms = replace(world.run().terms, roster_hash="0" * 64)
    with pytest.raises(ProtocolError, match="R1: the run has another roster"):
        Member("d", identity_of("d"), world.roster, terms)


def test_a_cohort_of_four_must_survive_whole() -> None:
    """R7: of four, three would tell the fourth's neighbour too much; the thresholds suppose all."""
    setting = Setting(names=tuple("abcd"), corrupt=(), minimum=4, colluders=0)
    run = World(setting).run().join()
    run.uploads()
    run.finish((0, 1, 2))
    assert run.world.refused(ProtocolError, "R7: 3 survivors, at least 4")


def test_a_site_encapsulates_to_nobodys_key_but_the_peers() -> None:
    """R5: a's session with the coordinator's ML-KEM key; unchecked, d's secret with a would be the coordinator's."""
    run = World().run().join()
    own = Credential(run.credentials["a"][:16], run.credentials["c"][16:1200])
    run.credentials["a"] = own.issue(run.terms, "a", identity_of("c"))
    run.introduce("d", ["a"])
    assert run.world.refused(ProtocolError, "the Ed25519 signature of 'a' does not verify")


def test_a_site_is_not_its_own_peer() -> None:
    run = World().run().join()
    run.introduce("d", ["d"])
    assert run.world.refused(ProtocolError, "R5: a site is not its own peer")


def test_an_introduction_by_somebody_else_is_refused() -> None:
    """R5: e's true credential, and a ciphertext of the coordinator's: unchecked, it would know d's secret with e."""
    run = World().run().join()
    peer, own = keys.Party("e", run.credentials["e"][:16]), keys.Party("d", run.credentials["d"][:16])
    forged, _ = keys.introduce(run.terms, identity_of("c"), peer, own, run.credentials["d"][16:1200])
    run.waiting["d"]["e"] = (run.credentials["e"], forged)
    run.upload("d")
    assert run.world.refused(ProtocolError, "the Ed25519 signature of 'e' does not verify")


def test_trips_in_order() -> None:
    """R9: no signature before the upload, and no second upload under the same keys (one keystream, two updates)."""
    run = World().run().join()
    station: Any = run.world.stations["d"]
    member, request = station.members["run"], run.mask_request("d")
    member.accept(request, request.model_hash)
    with pytest.raises(ProtocolError, match="R9: a message out of order"):
        member.sign(SURVIVORS)
    member.mask(station.truth(1))
    with pytest.raises(ProtocolError, match="R9: a message out of order"):
        member.mask(station.truth(2))


@pytest.mark.parametrize(
    "plain", [b"", b"\xff", bytes(37), b"\x01" + bytes(36), b"\x40" + bytes(71), bytes(1 + 72)], ids=len
)
def test_a_corrupt_senders_shares_open_to_nothing(plain: bytes) -> None:
    """A bit map that names nobody of the cohort, or another number of shares than it announces."""
    assert opened_part(plain, 7, ALL) == (bytes(36) if plain == bytes(37) else b"")
