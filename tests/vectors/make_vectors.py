"""Writes `steps/*.json`: every derivation of PROTOCOL.md step by step: `python -m vectors.make_vectors` in tests.

Everything comes from the product and from fixed seeds. What the library draws itself (ML-DSA signatures, the ciphertext
of an encapsulation) is kept from the files as long as it still verifies, so a second run writes the same bytes.
All seeds here are public: they guard nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Array, ConfigRecord, RecordDict

from accord_client.ledger.chain import _hash
from accord_client.ledger.entries import Account
from accord_client.ledger.receipts import _KEY, Receipt, Statement, make_receipt
from accord_shared import messages as kinds
from accord_shared import wire
from accord_shared.canonical import canonical_bytes, decimal_string
from accord_shared.dp.discrete import (
    DiscreteGaussian,
    _centred_table,
    _levels,
    _reach,
    _thresholds,
    round_to_integers,
)
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import NoiseShares, clip_in_updates, sensitivity
from accord_shared.dp.sharing import default_bound as shared_bound
from accord_shared.errors import AccordError
from accord_shared.exact import nearest, rounded_up
from accord_shared.frames import frame
from accord_shared.identity import ed25519_verifies, ml_dsa_65_verifies
from accord_shared.plan import Plan, make_plan
from accord_shared.quantize import Encoding, default_bound, encode, pack
from accord_shared.receipts import Head
from accord_shared.roster import Roster, RosterKey, RosterSignature, SignedRoster, _message
from accord_shared.secagg import shamir
from accord_shared.secagg.dealing import dealt, opened_part
from accord_shared.secagg.keys import (
    Attempt,
    Bundle,
    Credential,
    Party,
    RunTerms,
    _introduction_bytes,
    _kem_secret,
    introduce,
    pair_keys,
    seal,
    upload_key,
    upload_tag,
)
from accord_shared.secagg.masking import add_masks, reduce_words, word_type
from accord_shared.secagg.thresholds import thresholds
from accord_shared.signatures import Endorsement, PlanSignature, SignedModel, Vouched, quorum
from vectors.make_transcript import identity_of, roster_of, stream

FOLDER = Path(__file__).with_name("steps")
Json = dict[str, Any]


def run_seeds(name: str) -> tuple[bytes, bytes, bytes]:
    """Session, ML-KEM seed and X25519 private key of a site in the run."""
    draw = stream(f"site {name}")
    return draw(16), draw(64), draw(32)


def refusal(act: Callable[[], object]) -> str:
    """The class of the refusal."""
    try:
        act()
    except AccordError as error:
        return type(error).__name__
    raise AssertionError("nothing was refused")


# --- section 2: numbers, canonical JSON, frames


def numbers(_: Json) -> Json:
    """Decimals, rounding, frames."""
    doubles = (
        1.0,
        0.1,
        1e-5,
        1e22,
        -0.0,
        -2.5,
        120.0,
        1 / 3,
        5e-324,
        2.0**-20,
        123456789012345680.0,
        0.1 + 0.2,
    )
    roundings = (("0.7942781370654667", 3), ("2.57", 3), ("2.5700000000000000001", 3), ("999.1", 3), ("0.00012301", 4))
    values: list[Any] = [
        {"b": 1, "a": [True, None, 1.0, 1e-7, -3], "ä": 'é\n"\\', "A": {}},
        [],
        "\u007f\u2028 /",
        {"size": 10, "sampling_rate": 0.125},
    ]
    frames: list[list[Any]] = [
        ["accord/1/example"],
        ["accord/1/example", "", ["bytes", ""], 0],
        ["accord/1/example", "café", 2**63, ["bytes", "00ff"]],
        ["accord/1/example", ["list"]],
        ["accord/1/example", ["list", "a", 7, ["list", ["bytes", "01"]]], "b"],
    ]
    return {
        "decimal": [{"double": repr(value), "text": decimal_string(value)} for value in doubles],
        "rounded_up": [
            {"value": value, "digits": digits, "text": decimal_string(rounded_up(_decimal(value), digits))}
            for value, digits in roundings
        ],
        "canonical": [
            {
                "value": value,
                "bytes": canonical_bytes(value).hex(),
                "sha256": sha256(canonical_bytes(value)).hexdigest(),
            }
            for value in values
        ],
        "frame": [
            {"parts": parts, "bytes": made.hex(), "sha256": sha256(made).hexdigest()}
            for parts in frames
            for made in [frame(parts[0], *map(part_of, parts[1:]))]
        ],
        "refused": [
            {"frame": parts, "error": refusal(lambda parts=parts: frame("accord/1/example", *parts))}  # type: ignore[misc]
            for parts in ([2**64], [-1], [True], [None], [1.5])
        ],
    }


def _decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(text)


def part_of(value: Any) -> Any:
    """A part of a frame from JSON: `["bytes", hex]` and `["list", …]` are marked, texts and integers are themselves."""
    if isinstance(value, list):
        return bytes.fromhex(value[1]) if value[0] == "bytes" else [part_of(item) for item in value[1:]]
    return value


# --- section 3 and 16: documents

LEAST_PLAN: Json = {
    "run": {"name": "least", "rounds": 1},
    "model": {"source": "path:m"},
    "task": {"labels": ["a", "b"]},
    "local": {"expected_records": 100, "clip_norm": 1},
    "privacy": {"epsilon": 1},
    "cohort": {"size": 10},
}
PLANS: dict[str, Json] = {
    "least": LEAST_PLAN,
    "lora": {**LEAST_PLAN, "adapter": {"depth": "lora", "rank": 4}, "version": 1},
    "plain": {
        **LEAST_PLAN,
        "privacy": {"noise": "none"},
        "local": {"expected_records": 7, "momentum": 0.9, "steps_per_round": 12},
        "secure_aggregation": {"mode": "off"},
    },
    "named": {**LEAST_PLAN, "privacy": {"epsilon": 1e3, "noise_multiplier": 0.50}, "cohort": {"size": 3}},
    "adam": {
        **LEAST_PLAN,
        "local": {"expected_records": 5, "clip_norm": 2.5e-3, "optimizer": "adam", "steps_per_round": 30},
    },
    "momentum": {
        **LEAST_PLAN,
        "local": {
            "expected_records": 1000,
            "clip_norm": 0.3,
            "momentum": 0.9,
            "steps_per_round": 20,
            "learning_rate": 0.07,
            "sampling_rate": 0.05,
        },
    },
    "exact": {**LEAST_PLAN, "privacy": {"noise": "none"}, "local": {"expected_records": 7, "learning_rate": 0.32}},
    "cohort": {
        **LEAST_PLAN,
        "run": {"name": "cohort", "rounds": 10, "max_extra_attempts": 1},
        "local": {"expected_records": 1000, "clip_norm": 0.2},
        "privacy": {"noise": "cohort", "epsilon": 1},
    },
    "counted": {
        **LEAST_PLAN,
        "run": {"name": "counted", "rounds": 30},
        "local": {"expected_records": 90_000, "clip_norm": 0.7, "learning_rate": 3, "sampling_rate": 0.01},
        "privacy": {"noise": "cohort", "epsilon": 8, "delta": 1e-6},
        "cohort": {"size": 100, "minimum": 70, "colluders": 5},
        "evaluation": {"released_fraction": 0.5},
    },
    "wide": {
        **LEAST_PLAN,
        "local": {"expected_records": 2000, "clip_norm": 0.2},
        "privacy": {"noise": "cohort", "epsilon": 2},
        "cohort": {"size": 160, "minimum": 148, "colluders": 2},
    },
    "participant": {
        **LEAST_PLAN,
        "local": {"expected_records": 50, "clip_norm": 0.123456},
        "privacy": {"noise": "participant", "epsilon": 4},
        "cohort": {"size": 100, "minimum": 80},
        "secure_aggregation": {"bits": 24},
    },
}
REFUSED_PLANS: dict[str, Json] = {
    "version": {**LEAST_PLAN, "version": 2},
    "unknown table": {**LEAST_PLAN, "more": {}},
    "unknown key": {**LEAST_PLAN, "run": {"name": "x", "rounds": 1, "more": 1}},
    "a key is missing": {**LEAST_PLAN, "run": {"name": "x"}},
    "text for a number": {**LEAST_PLAN, "run": {"name": "x", "rounds": "1"}},
    "decimal for an integer": {**LEAST_PLAN, "run": {"name": "x", "rounds": 1.0}},
    "three sites, two colluders, no noise": {
        **LEAST_PLAN,
        "privacy": {"noise": "none"},
        "cohort": {"size": 3, "colluders": 2},
    },
    "two sites without noise": {**LEAST_PLAN, "privacy": {"noise": "none"}, "cohort": {"size": 2}},
    "too few survivors": {**LEAST_PLAN, "cohort": {"size": 10, "minimum": 5}},
}


def documents(old: Json) -> Json:
    """Plans, rosters, and what is signed."""
    key = identity_of("roster key")
    members = tuple(identity_of(name).public(name) for name in ("a", "b"))
    roster = Roster.made({"federation": "vectors", "serial": 1, "minimum": 2, "colluders": 0, "members": members})
    return {
        "plan": [
            {"name": name, "given": given, "canonical": plan.canonical().decode(), "hash": plan.hash}
            for name, given in PLANS.items()
            for plan in [make_plan(given)]
        ],
        "refused_plan": [
            {"name": name, "given": given, "error": refusal(lambda given=given: make_plan(given))}  # type: ignore[misc]
            for name, given in REFUSED_PLANS.items()
        ],
        "identity": [
            {
                "ed25519_seed": draw(32).hex(),
                "ml_dsa_65_seed": draw(32).hex(),
                **dict(identity_of(name).keys),
                "fingerprint": identity_of(name).keys.fingerprint,
                "derived": {"label": "accord/1/example", "key": identity_of(name).derive(b"accord/1/example").hex()},
            }
            for name in ("a", "b")
            for draw in [stream(f"identity {name}")]
        ],
        "roster": _roster(roster, key, old.get("roster", {})),
        "signed": [_signed(document, old.get("signed", ())) for document in _vouched()],
        "enrol": _both("enrol", frame("accord/1/enrol", "a", b"request"), identity_of("a"), old.get("enrol", {})),
        "quorum": [
            {"members": n, "colluders": c, "endorsements": quorum(_of_size(n, c))}
            for n, c in ((3, 0), (4, 1), (10, 3), (5, 4))
        ],
    }


def _of_size(members: int, colluders: int) -> Any:
    return mock.Mock(members=range(members), colluders=colluders)


def _both(name: str, message: bytes, identity: Any, old: Json) -> Json:
    """A message and both signatures, which are kept while they verify."""
    signature = bytes.fromhex(old.get("signature", ""))
    keys = identity.keys
    good = ed25519_verifies(keys, message, signature[:64]) and ml_dsa_65_verifies(keys, message, signature[64:])
    both = signature if good else identity.sign_both(message)
    shown = {"message": message.hex()} if len(message) <= 512 else {"message_sha256": sha256(message).hexdigest()}
    return {"name": name, **shown, "signature": both.hex()}


def _roster(roster: Roster, key: Any, old: Json) -> Json:
    both = _both("roster", _message(roster), key, old)
    halves = RosterSignature(ed25519=both["signature"][:128], ml_dsa_65=both["signature"][128:])
    signed = SignedRoster(roster=roster, key=RosterKey.made(dict(key.keys)), signature=halves)
    signed.verify(roster.hash)
    return {"canonical": roster.canonical().decode(), "hash": roster.hash, "key": dict(key.keys), **both}


def _vouched() -> list[Vouched]:
    plan = make_plan(LEAST_PLAN)
    model = SignedModel(
        run="17",
        name="least",
        plan="{}",
        plan_hash=plan.hash,
        digest="ab" * 32,
        rounds=1,
        finished="2026-01-01T00:00:00+00:00",
        metrics={"accuracy": 0.5, "units": 12.0, "none": None},
    )
    return [
        PlanSignature(plan_hash=plan.hash, key=identity_of("a").keys),
        model,
        Endorsement(federation="vectors", roster="cd" * 32, name="a"),
    ]


def _signed(document: Vouched, old: Sequence[Json]) -> Json:
    name = type(document).__name__
    known = next((each for each in old if each["name"] == name), {})
    both = _both(name, document.message(), identity_of("a"), known)
    text = document.model_dump(mode="json", exclude_none=True)
    whole = type(document).from_json(json.dumps({**text, "signature": both["signature"]}))
    whole.check(identity_of("a").keys)
    return {"label": document.LABEL, "fields": text, **both}


# --- sections 4 to 7: keys, masks, shares


def made_terms(roster: Roster, noise: NoiseShares | None = None) -> RunTerms:
    """A run of five sites."""
    return RunTerms(
        run_id="17",
        plan_hash="ab" * 32,
        roster_hash=roster.hash,
        mode="malicious",
        bits=20,
        dimension=5,
        minimum=4,
        colluders=1,
        size=5,
        bound=1.5,
        own_noise=noise is None,
        noise=noise,
    )


def keys(old: Json) -> Json:
    """One pair of sites, from seeds to what they derive for an attempt."""
    roster, terms = roster_of(), made_terms(roster_of())
    made = {name: _site(name, terms, roster, old) for name in ("a", "b")}
    introduction = _introduction(made, terms, old)
    kem = bytes.fromhex(introduction["kem_secret"])
    bundles = tuple(bytes.fromhex(made[name]["bundle"]) for name in ("a", "b"))
    coordinator = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = coordinator.public_key().public_bytes_raw()
    attempt = Attempt(terms, 3, 2, ("a", "b"), bundles, "22" * 32, public)
    shared = replace(terms, noise=_example_shares(), own_noise=False)
    contexts = [
        _context(attempt),
        _context(replace(attempt, choices=(b"\x40", b"\x80"), terms=shared)),
        _context(replace(attempt, model_hash="23" * 32)),
    ]
    private = {name: X25519PrivateKey.from_private_bytes(run_seeds(name)[2]) for name in ("a", "b")}
    pair = pair_keys(attempt, private["a"], Bundle.parse(bundles[1]).public, kem, ("a", "b"))
    up = upload_key(attempt, private["a"], public, "a")
    plain, sealed = bytes(range(41)), [b"\x01" * 60, b""]
    return {
        "terms": {"run_id": "17", "roster_hash": terms.roster_hash, "plan_hash": terms.plan_hash},
        "sites": made,
        "introduction": introduction,
        "context": contexts,
        "pair": {
            "x25519_a": run_seeds("a")[2].hex(),
            "public_b": Bundle.parse(bundles[1]).public.hex(),
            "mask_seed": pair.mask_seed.hex(),
            "seal_up": pair.seal_up.hex(),
            "seal_down": pair.seal_down.hex(),
        },
        "upload": {
            "coordinator": public.hex(),
            "key": up.hex(),
            "payload": plain.hex(),
            "sealed": [item.hex() for item in sealed],
            "next_bundle": bundles[0].hex(),
            "tag": upload_tag(up, memoryview(plain), sealed, bundles[0]).hex(),
        },
        "seal": {
            "data": attempt.shares_data(0, 1).hex(),
            "plain": plain.hex(),
            "sealed": seal(pair.seal_up, plain, attempt.shares_data(0, 1)).hex(),
        },
        "survivors": {
            "indices": [0, 1],
            "message": attempt.survivors_bytes((0, 1)).hex(),
            "signature": identity_of("a").sign(attempt.survivors_bytes((0, 1))).hex(),
        },
        "refused": _refused_keys(made, terms, roster, attempt),
        "thresholds": _threshold_table(),
    }


def _example_shares() -> NoiseShares:
    from vectors.make_transcript import SHARES

    return SHARES


def _site(name: str, terms: RunTerms, roster: Roster, old: Json) -> Json:
    session, kem_seed, private = run_seeds(name)
    identity = identity_of(name)
    public = MLKEM768PrivateKey.from_seed_bytes(kem_seed).public_key().public_bytes_raw()
    credential = Credential(session, public)
    known = old.get("sites", {}).get(name, {}).get("credential", "")[2 * (16 + 1184) :]
    both = _both("", credential.signed_bytes(terms, name), identity, {"signature": known})["signature"]
    data = session + public + bytes.fromhex(both)
    Credential.read(data, terms, roster, name)
    ours = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    head = Head(5, sha256(name.encode()).digest()) if name == "b" else Head()
    made = Bundle(session, 0 if name == "a" else 7, ours, head)
    return {
        "session": session.hex(),
        "kem_seed": kem_seed.hex(),
        "x25519": private.hex(),
        "credential_message": credential.signed_bytes(terms, name).hex(),
        "credential": data.hex(),
        "generation": made.generation,
        "public": ours.hex(),
        "head": head.to_bytes().hex(),
        "bundle_message": made.signed_bytes(terms, name).hex(),
        "bundle": made.issue(terms, name, identity).hex(),
    }


def _introduction(made: dict[str, Json], terms: RunTerms, old: Json) -> Json:
    """b joined later: it encapsulates to a."""
    own, peer = (Party(name, bytes.fromhex(made[name]["session"])) for name in ("b", "a"))
    key = MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(made["a"]["kem_seed"]))
    known = bytes.fromhex(old.get("introduction", {}).get("introduction", ""))
    if not known:
        known, _ = introduce(terms, identity_of("b"), own, peer, key.public_key().public_bytes_raw())
    ciphertext = known[:1088]
    message = _introduction_bytes(terms, own, peer, ciphertext)
    both = _both("", message, identity_of("b"), {"signature": known[1088:].hex()})["signature"]
    return {
        "message": message.hex(),
        "introduction": (ciphertext + bytes.fromhex(both)).hex(),
        "kem_secret": _kem_secret(terms, own, peer, ciphertext, key.decapsulate(ciphertext)).hex(),
    }


def _context(attempt: Attempt) -> Json:
    terms = attempt.terms
    return {
        "terms": {
            "run_id": terms.run_id,
            "roster_hash": terms.roster_hash,
            "plan_hash": terms.plan_hash,
            "mode": terms.mode,
            "bits": terms.bits,
            "bound": decimal_string(terms.bound),
            "dimension": terms.dimension,
            "noise": list(terms.noise.facts) if terms.noise else None,
        },
        "shown": {
            "round": attempt.round,
            "attempt": attempt.attempt,
            "model_hash": attempt.model_hash,
            "coordinator": attempt.coordinator.hex(),
            "choices": [choice.hex() for choice in attempt.choices],
            "cohort": list(attempt.cohort),
            "bundles": [bundle.hex() for bundle in attempt.bundles],
        },
        "context": attempt.context.hex(),
    }


def _refused_keys(made: dict[str, Json], terms: RunTerms, roster: Roster, attempt: Attempt) -> list[Json]:
    member, bundle = roster.member("b"), bytes.fromhex(made["b"]["bundle"])
    credential = bytes.fromhex(made["b"]["credential"])
    low = bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
    forged = Bundle(bytes(16), 0, low).issue(terms, "b", identity_of("b"))
    private = X25519PrivateKey.from_private_bytes(run_seeds("a")[2])
    cases: list[tuple[str, bytes, Callable[[bytes], object]]] = [
        ("bundle one byte short", bundle[:-1], lambda data: Bundle.read(data, terms, member)),
        ("bundle of another generation", _flipped(bundle, 19), lambda data: Bundle.read(data, terms, member)),
        ("bundle of another head", _flipped(bundle, 60), lambda data: Bundle.read(data, terms, member)),
        ("bundle with a point of low order", forged, lambda data: Bundle.read(data, terms, member)),
        ("bundle of another site", bytes.fromhex(made["a"]["bundle"]), lambda data: Bundle.read(data, terms, member)),
        (
            "credential of another session",
            _flipped(credential, 0),
            lambda data: Credential.read(data, terms, roster, "b"),
        ),
        ("credential, ML-DSA-65", _flipped(credential, -1), lambda data: Credential.read(data, terms, roster, "b")),
        ("exchange with zero", bytes(32), lambda data: pair_keys(attempt, private, data, bytes(32), ("a", "b"))),
    ]
    return [
        {"name": name, "sha256": sha256(data).hexdigest(), "error": refusal(lambda: act(data))}  # noqa: B023
        for name, data, act in cases
    ]


def _flipped(data: bytes, at: int) -> bytes:
    out = bytearray(data)
    out[at] ^= 1
    return bytes(out)


def _threshold_table() -> list[Json]:
    table = []
    for n, minimum, colluders, mode, size, own in (
        (2, 2, 0, "malicious", 2, True),
        (2, 2, 0, "malicious", 2, False),
        (3, 3, 1, "malicious", 3, False),
        (3, 3, 2, "malicious", 3, False),
        (3, 3, 2, "malicious", 3, True),
        (4, 4, 2, "semi_honest", 4, False),
        (4, 3, 0, "malicious", 4, True),
        (5, 4, 0, "malicious", 5, False),
        (7, 7, 0, "malicious", 10, False),
        (10, 7, 0, "malicious", 10, False),
        (10, 7, 2, "semi_honest", 10, False),
        (10, 8, 5, "malicious", 10, False),
        (30, 20, 3, "malicious", 30, False),
        (128, 90, 20, "semi_honest", 128, False),
    ):
        given = {"n": n, "minimum": minimum, "colluders": colluders, "mode": mode, "size": size, "own_noise": own}
        try:
            rule = thresholds(n, minimum, colluders, mode, size, own_noise=own)  # type: ignore[arg-type]
        except AccordError as error:
            table.append({**given, "error": type(error).__name__})
        else:
            table.append({**given, "sign": rule.sign, "share": rule.share})
    return table


def masks(_: Json) -> Json:
    """Keystreams, masked words, packing, shares."""
    seeds = [sha256(bytes([index])).digest() for index in range(3)]
    masked, packed = [], []
    for bits in (8, 12, 16, 20, 24, 32, 33, 47, 62):
        words = np.array([0, 1, (1 << bits) - 1, 5, 1 << (bits - 1), 7, 8, 9, 10], dtype=word_type(bits))
        plain = words.tolist()
        packed.append({"bits": bits, "words": plain, "bytes": pack(words, bits).tobytes().hex()})
        add_masks(words, seeds[:2], seeds[2:])
        reduce_words(words, bits)
        masked.append({"bits": bits, "words": plain, "masked": words.tolist()})
    draw = stream("coefficients")
    random = draw(4 * 9 * 3 * 3 * 2)
    shares = shamir.deal(b"".join(seeds), (0, 1, 3, 4), 3, _reader(random))
    rows = [shamir.to_bytes(row) for row in shares]
    plain_bytes = dealt((1, 3), 10, shares[0])
    return {
        "seeds": [seed.hex() for seed in seeds],
        "masked": masked,
        "packed": packed,
        "refused_packing": [
            {"bits": bits, "count": count, "bytes": data, "error": refusal(lambda: _unpack(data, bits, count))}  # noqa: B023
            for bits, count, data in ((16, 2, "000000"), (17, 2, "0000000020"), (20, 1, "000000000000ff00"))
        ],
        "sharing": {
            "holders": [0, 1, 3, 4],
            "threshold": 3,
            "random": random.hex(),
            "shares": [row.hex() for row in rows],
            "rebuilt": shamir.rebuild(shares[1:], (1, 3, 4)).tobytes().hex(),
        },
        "refused_sharing": [
            {"shares": [data.hex() for data in cut], "holders": held, "error": refusal(lambda: _rebuilt(cut, held))}  # noqa: B023
            for cut, held in (
                ([rows[0], rows[1], rows[1]], [0, 1, 3]),
                ([bytes([255, 255, 255, 127]) + rows[0][4:], rows[1], rows[2]], [0, 1, 3]),
            )
        ],
        "dealt": {"partners": [1, 3], "cohort": 10, "shares": rows[0].hex(), "plain": plain_bytes.hex()},
        "opened": [
            {
                "plain": plain_bytes.hex(),
                "survivors": survivors,
                "components": components,
                "removed": removed,
                "shares": opened_part(plain_bytes, 10, survivors, components, removed).hex(),
            }
            for survivors, components, removed in (([0, 1, 3], 0, []), ([0, 1], 0, []), ([0], 0, []), ([0, 3], 1, [0]))
        ],
    }


def _reader(data: bytes) -> Callable[[int], bytes]:
    place = 0

    def read(count: int) -> bytes:
        nonlocal place
        place += count
        return data[place - count : place]

    return read


def _unpack(data: str, bits: int, count: int) -> object:
    from accord_shared.quantize import unpack

    return unpack(bytes.fromhex(data), bits, count)


def _rebuilt(rows: Sequence[bytes], holders: Sequence[int]) -> object:
    return shamir.rebuild(np.stack([shamir.from_bytes(row) for row in rows]), holders)


# --- sections 11 and 13: bounds, scales, noise

SIGMAS = (0.0, 1.0, 1.351, 12.38)
VECTOR = (0.0, 0.25, -0.25, 1e-3, -1e-3, 0.7, -3.0, 3.0, 1e30)


def encoding(_: Json) -> Json:
    """A, s, words."""
    plans = {name: make_plan(given) for name, given in PLANS.items()}
    bounds = [
        {"plan": name, "sigma": decimal_string(sigma), "bound": decimal_string(default_bound(plan, sigma))}
        for name, plan in plans.items()
        if not plan.shared_noise
        for sigma in (SIGMAS if plan.privacy.noise == "site" else SIGMAS[:1])
    ]
    scales = []
    for bits, sites, bound in (
        (24, 10, 0.795),
        (20, 5, 1.5),
        (8, 3, 0.1),
        (33, 100, 27.7),
        (47, 10, 4.02),
        (62, 1000, 1e-5),
    ):
        made = Encoding(bits, sites, bound)
        scales.append(
            {
                "bits": bits,
                "sites": sites,
                "bound": decimal_string(bound),
                "scale": list(made._parts),
                "reach": made.reach,
            }
        )
    words = []
    for bits, sites, bound in ((24, 10, 0.795), (20, 5, 1.5), (12, 3, 0.3), (47, 10, 4.02)):
        vector = np.array(VECTOR, dtype=np.float32)
        encoded = encode(vector, Encoding(bits, sites, bound), SecureGenerator(bytes(range(32))))
        words.append(
            {
                "bits": bits,
                "sites": sites,
                "bound": decimal_string(bound),
                "float32": vector.astype("<f4").tobytes().hex(),
                "generator": bytes(range(32)).hex(),
                "words": encoded.tolist(),
            }
        )
    return {
        "bound": bounds,
        "scale": scales,
        "refused_scale": [
            {"bits": b, "sites": n, "bound": a, "error": refusal(lambda: Encoding(b, n, a))}  # noqa: B023
            for b, n, a in ((7, 1, 1.0), (63, 1, 1.0), (24, 0, 1.0), (24, 3, 0.0), (8, 127, 1.0), (24, 3, 5e-324))
        ],
        "encode": words,
    }


def noise(_: Json) -> Json:
    """Everything of section 13 that follows from a plan, and samples."""
    grids = []
    for name, dimension, sigma in (
        ("cohort", 29_568, 12.38),
        ("cohort", 10**7, 3.0),
        ("counted", 5_002, 0.7),
        ("wide", 29_568, 6.25),
        ("participant", 300, 4.5),
    ):
        plan = make_plan(PLANS[name])
        grids.append(_grid(name, plan, dimension, sigma))
    variances = (Fraction(9), Fraction(13471, 16), Fraction(65536), Fraction(70000), Fraction(10**9 + 1, 16))
    seed = sha256(b"noise").digest()
    centres = [0, 1, 128, 255, 256, -1, -1000, 77777]
    words = np.zeros(len(centres), dtype=np.uint64)
    round_to_integers(np.array(centres, dtype=np.int64), words, SecureGenerator(bytes(range(32))))
    return {
        "sensitivity": [
            {"steps": steps, "dimension": dimension, "delta": decimal_string(sensitivity(steps, dimension))}
            for steps, dimension in ((1, 1), (22, 29_568), (67, 10**6), (100_000, 5), (3, 10**9))
        ],
        "grid": grids,
        "table": [
            {
                "centre": [centre.numerator, centre.denominator],
                "variance": _pair(variance),
                "first": first,
                "last": last,
            }
            | {"count": len(found), "digest": table_digest(found)}
            for centre, variance, first, last in _tables(variances)
            for found in [_thresholds(centre, variance, first, last)]
        ],
        "levels": [
            {"variance": _pair(variance), "levels": [[step, *_pair(part)] for step, part in _levels(variance)]}
            for variance in variances
        ],
        "sample": [
            {
                "variance": _pair(variance),
                "seed": seed.hex(),
                "values": DiscreteGaussian(variance).sample(seed, 40).tolist(),
            }
            for variance in variances
        ],
        "undecided": [
            {
                "variance": _pair(Fraction(9)),
                "seed": one.hex(),
                "values": DiscreteGaussian(Fraction(9)).sample(one, 4).tolist(),
            }
            for one in _undecided()
        ],
        "rounding": {
            "centres": centres,
            "generator": bytes(range(32)).hex(),
            "values": words.view(np.int64).tolist(),
        },
    }


def _sample(variance: Fraction, seed: bytes, count: int) -> list[int]:
    values: list[int] = DiscreteGaussian(variance).sample(seed, count).tolist()
    return values


def _undecided() -> Iterator[bytes]:
    """Seeds whose first value takes further bits: one that is decided either way."""
    table, found, index = _centred_table(Fraction(9)), set[int](), 0
    while len(found) < 2:
        seed = sha256(b"undecided" + index.to_bytes(4, "big")).digest()
        index += 1
        from vectors.second import keystream

        place = int.from_bytes(keystream(seed, 2), "little")
        if table.outcomes[place] == -(1 << 15) and place not in found:
            found.add(place)
            yield seed


def _tables(variances: Sequence[Fraction]) -> Iterator[tuple[Fraction, Fraction, int, int]]:
    for variance in variances[:3]:
        reach = _reach(variance)
        yield Fraction(0), variance, -reach, reach
    for fraction in (1, 128, 255):
        yield Fraction(fraction, 256), Fraction(9), -_reach(Fraction(9)), _reach(Fraction(9)) + 1


def table_digest(thresholds: Sequence[int]) -> str:
    """Of thresholds as 19 bytes each, big-endian (one may be 2^144)."""
    return sha256(b"".join(value.to_bytes(19, "big") for value in thresholds)).hexdigest()


def _pair(value: Fraction) -> list[int]:
    return [value.numerator, value.denominator]


def _grid(name: str, plan: Plan, dimension: int, sigma: float) -> Json:
    shares = NoiseShares.of(plan, dimension, sigma)
    return {
        "plan": name,
        "dimension": dimension,
        "sigma": decimal_string(sigma),
        "colluders": shares.colluders,
        "bound": decimal_string(shared_bound(plan)),
        "clip": decimal_string(nearest(clip_in_updates(plan))),
        "variance": _pair(shares.variance),
        "reach": shares.reach,
        "tail": shares.tail,
        "facts": list(shares.facts),
        "removed": {
            str(u): list(shares.removed(u))
            for u in (shares.minimum, shares.minimum + 1, shares.sites - 1, shares.sites)
        },
    }


# --- section 15: ledgers


def ledger(_: Json) -> Json:
    """An entry and a receipt."""
    nonce, previous = bytes(range(16)), bytes(32)
    entries = []
    for seq, kind, body in ((1, "opened", '{"ledger":"00"}'), (2, "release", "ä")):
        digest = _hash(previous, seq, 1_700_000_000, nonce, kind, body)
        entries.append(
            {
                "previous": previous.hex(),
                "seq": seq,
                "time": 1_700_000_000,
                "nonce": nonce.hex(),
                "kind": kind,
                "body": body,
            }
            | {"hash": digest.hex()}
        )
        previous = digest
    statement = Statement("0123456789abcdef" * 2, Head(2, previous), Account())
    with mock.patch.object(secrets, "token_bytes", lambda count: bytes(range(count))):
        receipt = make_receipt("a", statement, identity_of("a"))
    spoilt = receipt.to_json().replace(receipt.sealed, "a b")
    wrong = Receipt.from_json(receipt.to_json().replace('"seq":2', '"seq":3'))
    return {
        "entries": entries,
        "receipt": json.loads(receipt.to_json()),
        "ed25519_seed": stream("identity a")(32).hex(),
        "key": identity_of("a").derive(_KEY).hex(),
        "account": receipt.open(identity_of("a")).model_dump_json(),
        "refused": [
            {"name": "another number", "seq": 3, "error": refusal(lambda: wrong.verify(identity_of("a").keys))},
            {"name": "another site", "error": refusal(lambda: receipt.verify(identity_of("b").keys))},
            {
                "name": "not base64",
                "error": refusal(lambda: Receipt.from_json(spoilt)),
            },
        ],
    }


# --- section 12: messages


def messages(_: Json) -> Json:
    """One of each kind, and contents that are refused."""
    content = wire.encode(kinds.Opened("17", 1, 2, (b"\x01" * 36, b"")))
    return {
        "inline": wire.INLINE,
        "messages": [
            {
                "fields": fields_of(message),
                "content": content_of(wire.encode(message)),
                "bytes": wire.payload_bytes(message),
            }
            for message in _examples()
        ],
        "refused": [
            {"change": change, "error": refusal(lambda: wire.decode(changed(content, change)))}  # noqa: B023
            for change in CHANGES
        ],
    }


def _examples() -> Iterator[kinds.Message]:
    """Every kind with a value in every field; a long vector at the end."""
    samples: dict[str, Any] = {
        "int": 7,
        "str": "text",
        "bytes": b"\x00\xff",
        "tuple[int, ...]": (0, 3),
        "tuple[str, ...]": ("a", "b"),
        "tuple[bytes, ...]": (b"", b"\x01"),
        "Vector": np.array([0.0, -1.5], dtype=np.float32),
        "Octets": np.array([1, 2, 255], dtype=np.uint8),
    }
    for kind in wire._KINDS.values():
        yield kind(**{field.name: samples[str(field.type)] for field in fields(kind)})
    yield kinds.TrainReply("17", 1, 1, np.zeros((4 << 20) // 4 + 1, dtype=np.float32))


CHANGES: list[Json] = [
    {"message": "Nothing"},
    {"message": None},
    {"more": 1},
    {"round": None},
    {"round": "1"},
    {"round": -1},
    {"round": 2**53 + 1},
    {"round": True},
    {"run_id": "x" * 129},
    {"shares": "text"},
    {"shares": [1]},
    {"record": "other"},
]


def changed(content: RecordDict, change: Json) -> RecordDict:
    """The content with one field set, or (None) taken away, or with a further record."""
    scalars = dict(content.config_records["accord.fields"])
    ((key, value),) = change.items()
    if key == "record":
        return RecordDict({"accord.fields": ConfigRecord(scalars), value: ConfigRecord({})})
    scalars.pop(key, None)
    if value is not None:
        scalars[key] = value
    return RecordDict({"accord.fields": ConfigRecord(scalars)})


def fields_of(message: kinds.Message) -> Json:
    """Fields as JSON: bytes in hexadecimal under `hex`, vectors as their little-endian bytes."""
    return {"message": type(message).__name__} | {f.name: _shown(getattr(message, f.name)) for f in fields(message)}


def content_of(content: RecordDict) -> Json:
    """Flower's records as JSON."""
    table: Json = {}
    for name, record in content.items():
        table[name] = {key: _shown(value) for key, value in record.items()}  # type: ignore[attr-defined]
    return table


def _shown(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _shown(value.astype(value.dtype.newbyteorder("<")).tobytes())
    if isinstance(value, bytes):
        return {"hex": value.hex()} if len(value) < 256 else {"sha256": sha256(value).hexdigest(), "length": len(value)}
    if isinstance(value, Array):
        return {"dtype": value.dtype, "shape": list(value.shape), "stype": value.stype, "data": _shown(value.data)}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return value


TABLES: dict[str, Callable[[Json], Json]] = {
    "numbers": numbers,
    "documents": documents,
    "keys": keys,
    "masks": masks,
    "encoding": encoding,
    "noise": noise,
    "ledger": ledger,
    "messages": messages,
}


def load(name: str) -> Json:
    """A file of vectors as it is; empty if there is none."""
    path = FOLDER / f"{name}.json"
    table: Json = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return table


def made(name: str) -> Json:
    """A table from the product, with what the library draws taken from the file."""
    table: Json = json.loads(json.dumps(TABLES[name](load(name))))
    return table


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name in TABLES:
        text = json.dumps(made(name), indent=1, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
