"""Published answers, through the functions that the protocol uses (sources: tests/vectors/known_answers.json)."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from accord_shared.errors import ProtocolError
from accord_shared.frames import frame
from accord_shared.identity import Identity
from accord_shared.secagg import keys as module
from accord_shared.secagg.keys import Attempt, Bundle, RunTerms, pair_keys, seal, unseal
from accord_shared.secagg.masking import add_masks

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "known_answers.json").read_text())
LOW_ORDER = ["00" * 32, "01" + "00" * 31, "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"]
"""Points of order 1, 2 or 4, and 8 (RFC 7748, section 6.1; Bernstein's list)."""


def of(text: str) -> bytes:
    return bytes.fromhex(text)


def keystream(seed: bytes, count: int) -> bytes:
    """What one seed adds to zeros."""
    vector = np.zeros(count, dtype=np.uint8)
    add_masks(vector, [seed], [])
    return vector.tobytes()


def attempt() -> Attempt:
    terms = RunTerms(
        run_id="1",
        plan_hash="00" * 32,
        roster_hash="11" * 32,
        mode="malicious",
        bits=24,
        dimension=5,
        minimum=2,
        colluders=0,
        size=3,
        bound=1.5,
        own_noise=True,
    )
    return Attempt(terms, 1, 1, ("a", "b"), (b"x", b"y"), "22" * 32, b"\x09" + bytes(31))


def test_every_listed_point_has_low_order_and_no_bundle_may_hold_one() -> None:
    identity, terms = Identity.generate(), attempt().terms
    private = X25519PrivateKey.generate()
    for point in (*module._LOW_ORDER, *map(of, LOW_ORDER)):
        with pytest.raises(ValueError, match="shared key"):
            private.exchange(X25519PublicKey.from_public_bytes(point))
        signed = Bundle(bytes(16), 1, point).issue(terms, "a", identity)
        with pytest.raises(ProtocolError, match="low order"):
            Bundle.read(signed, terms, identity.public("a"))
    good = Bundle(bytes(16), 1, private.public_key().public_bytes_raw())
    assert Bundle.read(good.issue(terms, "a", identity), terms, identity.public("a")) == good


@pytest.mark.parametrize("vector", VECTORS["x25519"], ids=["first", "second"])
def test_x25519_of_rfc_7748_5_2(vector: dict[str, str]) -> None:
    private = X25519PrivateKey.from_private_bytes(of(vector["input_scalar"]))
    assert private.exchange(X25519PublicKey.from_public_bytes(of(vector["input_u"]))) == of(vector["output_u"])


def test_x25519_of_rfc_7748_6_1() -> None:
    vector = {name: of(text) for name, text in VECTORS["x25519_exchange"].items()}
    for one, other in (("alice", "bob"), ("bob", "alice")):
        private = X25519PrivateKey.from_private_bytes(vector[f"{one}_private"])
        assert private.public_key().public_bytes_raw() == vector[f"{one}_public"]
        assert private.exchange(X25519PublicKey.from_public_bytes(vector[f"{other}_public"])) == vector["shared"]


def test_pair_keys_are_hkdf_of_the_published_secret() -> None:
    """Both ends of RFC 7748's exchange, by HMAC alone (RFC 5869): PROTOCOL.md, section 7."""
    vector = {name: of(text) for name, text in VECTORS["x25519_exchange"].items()}
    shown, kem, pair = attempt(), bytes(range(32)), ("a", "b")
    okm = by_hmac(vector["shared"] + kem, shown.context, frame("accord/1/pair", *pair), 96)
    for one, other in (("alice", "bob"), ("bob", "alice")):
        private = X25519PrivateKey.from_private_bytes(vector[f"{one}_private"])
        found = pair_keys(shown, private, vector[f"{other}_public"], kem, pair)
        assert found.mask_seed + found.seal_up + found.seal_down == okm


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point: str) -> None:
    private = X25519PrivateKey.from_private_bytes(of(VECTORS["x25519_exchange"]["alice_private"]))
    with pytest.raises(ProtocolError, match="low order"):
        pair_keys(attempt(), private, of(point), bytes(32), ("a", "b"))


def by_hmac(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2, written a second time."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    block, out, count = b"", b"", 0
    while len(out) < length:
        count += 1
        block = hmac.digest(extracted, block + info + bytes([count]), "sha256")
        out += block
    return out[:length]


@pytest.mark.parametrize("vector", VECTORS["hkdf_sha256"], ids=["A.1", "A.2", "A.3"])
def test_hkdf_of_rfc_5869(vector: dict[str, str]) -> None:
    given = of(vector["ikm"]), of(vector["salt"]), of(vector["info"]), int(vector["l"])
    assert module._hkdf(*given) == of(vector["okm"]) == by_hmac(*given)


@pytest.mark.parametrize("vector", VECTORS["aes_256_zero_block"], ids=lambda vector: vector["first_block"][:8])
def test_a_keystream_begins_with_nists_block_of_zero(vector: dict[str, str]) -> None:
    assert keystream(of(vector["key"]), 16) == of(vector["first_block"])


def test_counter_mode_of_sp_800_38a() -> None:
    vector = {name: of(text) for name, text in VECTORS["aes_256_ctr"].items()}
    encryptor = Cipher(algorithms.AES256(vector["key"]), modes.CTR(vector["counter"])).encryptor()
    assert encryptor.update(vector["plaintext"]) == vector["ciphertext"]


def test_a_keystream_is_aes_of_the_counters() -> None:
    """Big-endian, from zero, over a carry and over the chunks in which it is made."""
    key, blocks = of(VECTORS["aes_256_ctr"]["key"]), (1 << 17) // 16 + 3
    single = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305
    counters = b"".join(count.to_bytes(16, "big") for count in range(blocks))
    assert keystream(key, 16 * blocks - 5) == single.update(counters)[:-5]


def test_keystream_words_are_little_endian() -> None:
    key = of(VECTORS["aes_256_ctr"]["key"])
    stream = keystream(key, 24)
    for width in (1, 2, 4, 8):
        words = np.zeros(24 // width, dtype=f"<u{width}")
        add_masks(words, [], [key])
        expected = [-int.from_bytes(stream[i : i + width], "little") % 256**width for i in range(0, 24, width)]
        assert words.tolist() == expected


@pytest.mark.parametrize("vector", VECTORS["aes_256_gcm"], ids=["13", "14"])
def test_sealing_is_gcm_with_nonce_zero(vector: dict[str, str]) -> None:
    key, plaintext, sealed = (of(vector[name]) for name in ("key", "plaintext", "sealed"))
    assert seal(key, plaintext, b"") == sealed
    assert unseal(key, sealed, b"") == plaintext
    assert unseal(key, sealed, b"x") is None
    assert unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"") is None


@pytest.mark.parametrize("vector", VECTORS["ml_kem_768"], ids=["first", "second"])
def test_ml_kem_768_of_fips_203(vector: dict[str, str]) -> None:
    """A seed is d followed by z, as `Member` draws it; a wrong ciphertext gives another secret, not an error."""
    key = MLKEM768PrivateKey.from_seed_bytes(of(vector["d"]) + of(vector["z"]))
    public = key.public_key().public_bytes_raw()
    assert hashlib.sha256(public).hexdigest() == vector["public_sha256"]
    assert key.decapsulate(of(vector["ciphertext"])) == of(vector["secret"])
    assert key.decapsulate(of(vector["ct_n"])) == of(vector["ss_n"])
