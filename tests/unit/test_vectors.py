"""Every vector of `tests/vectors/steps` comes from the product, byte by byte; and from a second implementation.

`second` follows PROTOCOL.md alone and shares no code with the product: what both compute is what the page says.
"""

from __future__ import annotations

import ast
import json
import zlib
from decimal import Decimal
from fractions import Fraction
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_shared.dp.accounting import noise_multiplier
from accord_shared.plan import make_plan
from vectors import make_vectors as vectors
from vectors import second
from vectors.make_vectors import PLANS, TABLES, load, part_of

Json = dict[str, Any]
FILES: dict[str, Json] = {name: load(name) for name in TABLES}
of = bytes.fromhex


def each(file: str, kind: str) -> pytest.MarkDecorator:
    """One test for every vector of a kind."""
    table = FILES[file][kind]
    return pytest.mark.parametrize("vector", table, ids=[str(place) for place in range(len(table))])


# --- from the product


@pytest.mark.parametrize("name", list(TABLES))
def test_the_product_makes_the_frozen_vectors(name: str) -> None:
    """What the library draws is read from the file and verified by the maker; the rest is made anew."""
    found = vectors.made(name)
    assert found == FILES[name], "if the protocol was meant to change: python -m vectors.make_vectors in tests"


def test_the_files_are_small_and_described() -> None:
    paths = list(vectors.FOLDER.glob("*.json"))
    assert {path.stem for path in paths} == set(TABLES)
    assert sum(path.stat().st_size for path in paths) < 300_000
    about = vectors.FOLDER.with_name("README.md").read_text()
    assert all(f"`{path.name}`" in about for path in paths)


def test_the_second_implementation_shares_no_code() -> None:
    tree = ast.parse(Path(second.__file__).read_text())
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in named if name.startswith(("accord", "vectors", "numpy", "."))]


# --- section 2


@each("numbers", "decimal")
def test_decimals(vector: Json) -> None:
    assert second.decimal_text(float(vector["double"])) == vector["text"]


@each("numbers", "rounded_up")
def test_roundings(vector: Json) -> None:
    found = second.rounded_up(Decimal(vector["value"]), vector["digits"])
    assert second.decimal_text(found) == vector["text"]


@each("numbers", "canonical")
def test_canonical_json(vector: Json) -> None:
    assert second.canonical(vector["value"]).encode() == of(vector["bytes"])


@each("numbers", "frame")
def test_frames(vector: Json) -> None:
    label, *parts = vector["parts"]
    found = second.frame(label, *map(part_of, parts))
    assert found == of(vector["bytes"])
    assert second.sha256(found).hex() == vector["sha256"]


# --- sections 3 and 16


@each("documents", "plan")
def test_plans(vector: Json) -> None:
    found = second.plan_canonical(vector["given"])
    assert found == vector["canonical"]
    assert second.sha256(found.encode()).hex() == vector["hash"]
    assert second.plan_canonical(json.loads(make_plan(vector["given"]).to_json())) == found


PLAN_FILE = json.loads(vectors.FOLDER.with_name("plan.json").read_text())


@pytest.mark.parametrize("vector", PLAN_FILE["plans"], ids=lambda vector: vector["name"])
def test_plans_with_every_key(vector: Json) -> None:
    assert second.plan_canonical(vector["plan"]) == vector["canonical"]


def test_the_page_s_table_of_keys_is_the_plan_s() -> None:
    from accord_shared.plan import Plan

    for name, keys in second.PLAN.items():
        table = Plan.model_fields[name].annotation
        assert list(table.model_fields) == list(keys)  # type: ignore[union-attr]
    assert list(Plan.model_fields) == ["version", *second.PLAN]


@each("documents", "identity")
def test_fingerprints_and_derived_keys(vector: Json) -> None:
    assert second.fingerprint(of(vector["ed25519"]), of(vector["ml_dsa_65"])).hex() == vector["fingerprint"]
    derived = vector["derived"]
    assert second.derived_key(of(vector["ed25519_seed"]), derived["label"].encode()).hex() == derived["key"]


def signed(vector: Json, message: bytes, keys: Json) -> None:
    """The message is the vector's, and both signatures verify."""
    if "message" in vector:
        assert message == of(vector["message"])
    else:
        assert sha256(message).hexdigest() == vector["message_sha256"]
    both = of(vector["signature"])
    assert second.both_verify(of(keys["ed25519"]), of(keys["ml_dsa_65"]), message, both)
    assert not second.both_verify(of(keys["ed25519"]), of(keys["ml_dsa_65"]), message + b"\x00", both)


def test_the_roster() -> None:
    vector = FILES["documents"]["roster"]
    table = json.loads(vector["canonical"])
    assert second.canonical(table) == vector["canonical"]
    assert second.sha256(vector["canonical"].encode()).hex() == vector["hash"]
    signed(vector, second.frame("accord/1/roster", vector["canonical"].encode()), vector["key"])


@each("documents", "signed")
def test_signed_documents(vector: Json) -> None:
    message = second.document_bytes(vector["label"], vector["fields"])
    signed(vector, message, FILES["documents"]["identity"][0])


def test_enrolment() -> None:
    message = second.frame("accord/1/enrol", "a", b"request")
    signed(FILES["documents"]["enrol"], message, FILES["documents"]["identity"][0])


@each("documents", "quorum")
def test_quorums(vector: Json) -> None:
    n, c = vector["members"], vector["colluders"]
    assert min(n, c + (n - c) // 2 + 1) == vector["endorsements"]


# --- sections 4 to 7

KEYS = FILES["keys"]


@each("keys", "thresholds")
def test_thresholds(vector: Json) -> None:
    given = {key: value for key, value in vector.items() if key not in ("sign", "share", "error")}
    if "error" in vector:
        with pytest.raises(second.Refused):
            second.thresholds(**given)
    else:
        assert second.thresholds(**given) == (vector["sign"], vector["share"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_credentials_and_bundles(name: str) -> None:
    site, terms = KEYS["sites"][name], KEYS["terms"]
    seed = FILES["documents"]["identity"]["ab".index(name)]
    session, data = of(site["session"]), of(site["credential"])
    message = second.credential_bytes(terms, name, session, data[16:1200])
    assert data[:16] == session
    assert message == of(site["credential_message"])
    assert second.both_verify(of(seed["ed25519"]), of(seed["ml_dsa_65"]), message, data[1200:])
    parts = (terms, name, session, site["generation"], of(site["public"]), of(site["head"]))
    assert second.bundle_bytes(*parts) == of(site["bundle_message"])
    assert second.bundle(*parts, of(seed["ed25519_seed"])) == of(site["bundle"])


def test_the_introduction() -> None:
    vector, terms = KEYS["introduction"], KEYS["terms"]
    parties = ["b", of(KEYS["sites"]["b"]["session"]), "a", of(KEYS["sites"]["a"]["session"])]
    data = of(vector["introduction"])
    message = second.introduction_bytes(terms, parties, data[:1088])
    assert message == of(vector["message"])
    seed = FILES["documents"]["identity"][1]
    assert second.both_verify(of(seed["ed25519"]), of(seed["ml_dsa_65"]), message, data[1088:])
    found = second.kem_secret(terms["run_id"], parties, data[:1088], of(KEYS["sites"]["a"]["kem_seed"]))
    assert found == of(vector["kem_secret"])


@each("keys", "context")
def test_contexts(vector: Json) -> None:
    assert second.context(vector["terms"], vector["shown"]) == of(vector["context"])


def test_pairs_uploads_and_seals() -> None:
    ctx, kem, pair = of(KEYS["context"][0]["context"]), of(KEYS["introduction"]["kem_secret"]), KEYS["pair"]
    private = of(pair["x25519_a"])
    found = second.pair_keys(private, of(pair["public_b"]), kem, ctx, "a", "b")
    assert [part.hex() for part in found] == [pair["mask_seed"], pair["seal_up"], pair["seal_down"]]
    theirs = of(KEYS["sites"]["b"]["x25519"])
    assert second.pair_keys(theirs, of(KEYS["sites"]["a"]["public"]), kem, ctx, "a", "b") == found
    with pytest.raises(second.Refused):
        second.pair_keys(private, bytes(32), kem, ctx, "a", "b")
    up = KEYS["upload"]
    key = second.upload_key(private, of(up["coordinator"]), ctx, "a")
    assert key == of(up["key"])
    tag = second.upload_tag(key, of(up["payload"]), [of(item) for item in up["sealed"]], of(up["next_bundle"]))
    assert tag == of(up["tag"])
    sealed = KEYS["seal"]
    assert second.shares_data(ctx, 0, 1) == of(sealed["data"])
    assert second.seal(found[1], of(sealed["plain"]), of(sealed["data"])) == of(sealed["sealed"])
    with pytest.raises(second.Refused):
        second.unseal(found[2], of(sealed["sealed"]), of(sealed["data"]))
    survivors = KEYS["survivors"]
    assert second.survivors_bytes(ctx, survivors["indices"]) == of(survivors["message"])


MASKS = FILES["masks"]


@each("masks", "masked")
def test_masks(vector: Json) -> None:
    seeds = [of(seed) for seed in MASKS["seeds"]]
    assert second.masked(vector["words"], vector["bits"], seeds[:2], seeds[2:]) == vector["masked"]


@each("masks", "packed")
def test_packing(vector: Json) -> None:
    data = second.pack(vector["words"], vector["bits"])
    assert data == of(vector["bytes"])
    assert second.unpack(data, vector["bits"], len(vector["words"])) == vector["words"]


@each("masks", "refused_packing")
def test_refused_packing(vector: Json) -> None:
    with pytest.raises(second.Refused):
        second.unpack(of(vector["bytes"]), vector["bits"], vector["count"])


def test_sharing() -> None:
    vector = MASKS["sharing"]
    seeds = [of(seed) for seed in MASKS["seeds"]]
    shares = second.deal(seeds, vector["holders"], vector["threshold"], of(vector["random"]))
    assert [data.hex() for data in shares] == vector["shares"]
    assert b"".join(second.rebuild(shares[1:], vector["holders"][1:])) == of(vector["rebuilt"]) == b"".join(seeds)
    dealt = MASKS["dealt"]
    assert second.dealt(dealt["partners"], dealt["cohort"], of(dealt["shares"])) == of(dealt["plain"])


@each("masks", "refused_sharing")
def test_refused_sharing(vector: Json) -> None:
    with pytest.raises(second.Refused):
        second.rebuild([of(data) for data in vector["shares"]], vector["holders"])


@each("masks", "opened")
def test_openings(vector: Json) -> None:
    plain, removed = of(vector["plain"]), vector["removed"]
    assert second.opened(plain, 10, vector["survivors"], vector["components"], removed) == of(vector["shares"])


# --- sections 11 and 13


@each("encoding", "bound")
def test_bounds(vector: Json) -> None:
    found = second.site_bound(PLANS[vector["plan"]], float(vector["sigma"]))
    assert second.decimal_text(found) == vector["bound"]


@each("encoding", "scale")
def test_scales(vector: Json) -> None:
    given = vector["bits"], vector["sites"], float(vector["bound"])
    assert list(second.scale_of(*given)) == vector["scale"]
    assert second.reach_of(*given) == vector["reach"]


@each("encoding", "refused_scale")
def test_refused_scales(vector: Json) -> None:
    with pytest.raises(second.Refused):
        second.scale_of(vector["bits"], vector["sites"], vector["bound"])


@each("encoding", "encode")
def test_encodings(vector: Json) -> None:
    values = np.frombuffer(of(vector["float32"]), dtype="<f4").tolist()
    coins = second.coins_of(of(vector["generator"]), len(values))
    given = vector["bits"], vector["sites"], float(vector["bound"])
    assert second.encode(values, *given, coins) == vector["words"]


@pytest.mark.parametrize("name", ["least", "named"])
def test_what_enters_the_context_is_the_second_s(name: str) -> None:
    """From the σ that this implementation finds: four digits, so that another search finds it too."""
    plan = make_plan(PLANS[name])
    sigma = noise_multiplier(plan)
    assert len(Decimal(repr(sigma)).as_tuple().digits) <= 4
    assert second.site_bound(PLANS[name], sigma) == vectors.default_bound(plan, sigma)


@each("noise", "sensitivity")
def test_sensitivities(vector: Json) -> None:
    assert second.decimal_text(second.sensitivity(vector["steps"], vector["dimension"])) == vector["delta"]


@each("noise", "grid")
def test_grids(vector: Json) -> None:
    plan, sigma = PLANS[vector["plan"]], float(vector["sigma"])
    shares, bits = second.grid_of(plan, vector["dimension"], sigma, vector["colluders"])
    assert second.decimal_text(second.shared_bound(plan)) == vector["bound"]
    assert second.decimal_text(second.clip_unit(plan)) == vector["clip"]
    assert shares.variance == Fraction(*vector["variance"])
    assert (shares.reach, shares.tail) == (vector["reach"], vector["tail"])
    assert shares.facts(bits) == vector["facts"]
    assert {u: shares.removed(int(u)) for u in vector["removed"]} == vector["removed"]


@each("noise", "table")
def test_tables(vector: Json) -> None:
    """With 30 digits more and the weights one by one: the thresholds are the same to the last of their 144 bits."""
    given = Fraction(*vector["centre"]), Fraction(*vector["variance"]), vector["first"], vector["last"]
    found = second.table(*given)
    assert all(low <= high for low, high in pairwise(found))
    assert second.table_digest(found) == vector["digest"]
    assert second.table_reach(given[1]) == -vector["first"]


@each("noise", "levels")
def test_levels(vector: Json) -> None:
    found = second.levels(Fraction(*vector["variance"]))
    assert [[step, part.numerator, part.denominator] for step, part in found] == vector["levels"]


@pytest.mark.parametrize("kind", ["sample", "undecided"])
def test_samples(kind: str) -> None:
    for vector in FILES["noise"][kind]:
        variance, seed = Fraction(*vector["variance"]), of(vector["seed"])
        assert second.noise(variance, seed, len(vector["values"])) == vector["values"]


def test_rounding() -> None:
    vector = FILES["noise"]["rounding"]
    assert second.rounded(vector["centres"], of(vector["generator"])) == vector["values"]


# --- section 15


@each("ledger", "entries")
def test_ledger_entries(vector: Json) -> None:
    parts = (of(vector["previous"]), vector["seq"], vector["time"], of(vector["nonce"]), vector["kind"], vector["body"])
    assert second.ledger_entry(*parts) == of(vector["hash"])


def test_receipts() -> None:
    table = FILES["ledger"]
    receipt, seed = table["receipt"], of(table["ed25519_seed"])
    public = of(FILES["documents"]["identity"][0]["ed25519"])
    key = second.Ed25519PublicKey.from_public_bytes(public)
    key.verify(of(receipt["signature"]), second.receipt_bytes(receipt))
    padded = second.open_receipt(receipt, seed)
    assert len(padded) % 1024 == 0
    assert zlib.decompressobj().decompress(padded).decode() == table["account"]


# --- section 12


def test_every_kind_of_message_has_a_vector() -> None:
    from accord_shared import wire

    assert {vector["fields"]["message"] for vector in FILES["messages"]["messages"]} == set(wire._KINDS)


@each("messages", "messages")
def test_messages_are_records(vector: Json) -> None:
    """One record of the fields and, only where the vectors are long, one of the vectors."""
    content, shown = vector["content"], vector["fields"]
    assert list(content) in (["accord.fields"], ["accord.fields", "accord.vectors"])
    arrays = content.get("accord.vectors", {})
    assert {**content["accord.fields"], **{name: array["data"] for name, array in arrays.items()}} == shown
    assert all(array["data"]["length"] > 4 << 20 for array in arrays.values())
